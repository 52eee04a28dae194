// Division of work among threads, their barrier, and memory that they share.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <sched.h>

namespace {

struct Share {
  int64_t first, last;
};
inline Share share(int64_t n, int thread, int threads) {
  return {n * thread / threads, n * (thread + 1) / threads};
}

// The steps of a layer are shorter than a sleep and a wake-up, so the barrier spins; but not for long, in
// case another process needs the core.
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
    for (uint32_t spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 2000) sched_yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("isb" ::: "memory");  // about as long; `yield` does not pause on most ARMs
#endif
    }
  }

 private:
  alignas(128) std::atomic<int> arrived_{0};  // 128: a cache line of Apple's CPUs
  alignas(128) std::atomic<uint32_t> round_{0};
};

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
