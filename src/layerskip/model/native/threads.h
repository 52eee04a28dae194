// Division of work among threads, their barrier, and memory that they share.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <omp.h>
#include <sched.h>

// Nanoseconds that all passes of several threads took, and of these the ones that threads waited for a late thread
// (the mean of all but one): see team_size.py.
extern "C" {
std::atomic<int64_t> layerskip_pass_times[2];
}

namespace {

struct Share {
  int64_t first, last;
};
inline Share share(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
}

inline int64_t nanoseconds() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The steps of a layer are shorter than a sleep and a wake-up, so the barrier spins; but not for long, in
// case another process needs the core. Only waits longer than that are timed.
class Team {
 public:
  void wait(int size) {
    if (size == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    int64_t late = 0;
    for (uint32_t spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins == SPINS) late = nanoseconds();
      if (spins >= SPINS) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("isb" ::: "memory");  // about as long; `yield` does not pause on most ARMs
#endif
    }
    if (late) waited_.fetch_add(nanoseconds() - late, std::memory_order_relaxed);
  }
  int64_t waited() const { return waited_.load(std::memory_order_relaxed); }

 private:
  static constexpr uint32_t SPINS = 2000;
  alignas(128) std::atomic<int> arrived_{0};  // 128: a cache line of Apple's CPUs
  alignas(128) std::atomic<uint32_t> round_{0};
  alignas(128) std::atomic<int64_t> waited_{0};
};

// Calls work(team, thread, threads) on each thread.
template <class Work>
void in_parallel(int threads, Work work) {
  Team team;
  int size = 1;
  const int64_t begin = nanoseconds();
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    if (thread == 0) size = all;
    work(team, thread, all);
    team.wait(all);
  }
  if (size == 1) return;
  layerskip_pass_times[0].fetch_add(nanoseconds() - begin, std::memory_order_relaxed);
  layerskip_pass_times[1].fetch_add(team.waited() / (size - 1), std::memory_order_relaxed);
}

struct Free {
  void operator()(void *p) const { free(p); }
};
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : memory_(aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64)) {
    if (!memory_) throw std::bad_alloc();
  }
  T *get() const { return (T *)memory_.get(); }

 private:
  std::unique_ptr<void, Free> memory_;
};

}  // namespace
