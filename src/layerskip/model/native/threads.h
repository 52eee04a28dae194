// Division of work among threads, their barrier, and memory that they share.
#pragma once

#include <atomic>
#include <chrono>
#include <climits>
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
// case another process needs the core. Longer waits are timed. When they take a third of the time, some thread
// has no core, and a quarter of the threads should leave the pass: see team_size.py.
class Team {
 public:
  // The threads of the next layer; all threads of a barrier see the same number after it.
  int remaining(int size) const {
    const int most = most_.load(std::memory_order_relaxed);
    return size < most ? size : most;
  }

  void wait(int size) {
    if (size == 1) return;
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      judge(size);
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    int64_t since = 0;
    for (uint32_t spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins == SPINS) since = nanoseconds();
      if (spins >= SPINS) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("isb" ::: "memory");  // about as long; `yield` does not pause on most ARMs
#endif
    }
    if (since) waited_.fetch_add((nanoseconds() - since) / (size - 1), std::memory_order_relaxed);
  }

  // Adds the times of the pass to the totals; one thread alone is not counted.
  void report(int size) const {
    const int64_t last = remaining(size) > 1 ? nanoseconds() - begin_ : 0;
    layerskip_pass_times[0].fetch_add(elapsed_ + last, std::memory_order_relaxed);
    layerskip_pass_times[1].fetch_add(waited_.load(std::memory_order_relaxed), std::memory_order_relaxed);
  }

 private:
  static constexpr uint32_t SPINS = 2000;
  static constexpr int64_t WINDOW = 50000000;  // as in team_size.py

  void judge(int size) {
    const int64_t waited = waited_.load(std::memory_order_relaxed) - judged_;
    if (3 * waited <= WINDOW) return;
    const int64_t now = nanoseconds();
    if (3 * waited <= now - begin_) return;
    most_.store(size - (size + 3) / 4, std::memory_order_relaxed);
    judged_ += waited;
    elapsed_ += now - begin_;
    begin_ = now;
  }

  alignas(128) std::atomic<int> arrived_{0};  // 128: a cache line of Apple's CPUs
  alignas(128) std::atomic<uint32_t> round_{0};
  alignas(128) std::atomic<int64_t> waited_{0};
  std::atomic<int> most_{INT_MAX};
  // Since the start of the pass or the last threads that left, and before
  int64_t begin_ = nanoseconds(), elapsed_ = 0, judged_ = 0;
};

// Calls work(team, thread, threads) on each thread.
template <class Work>
void in_parallel(int threads, Work work) {
  Team team;
  int size = 1;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    if (thread == 0) size = all;
    work(team, thread, all);
    const int rest = team.remaining(all);
    if (thread < rest) team.wait(rest);
  }
  team.report(size);
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
