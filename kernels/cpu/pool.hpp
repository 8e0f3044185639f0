// The threads of one engine: a step is one parallel region, entered together and left together.
//
// Threads spin briefly, then sleep in the kernel; a waker makes a system call only if somebody sleeps. Workers
// block all signals, so that handlers run on the application's own threads. A pool is used by one thread at a
// time; several pools may live in one process. In a forked child the workers do not exist: there `run` uses the
// calling thread alone, which gives the same bits, and destruction joins nobody.
#pragma once

#include <atomic>
#include <new>
#include <type_traits>

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "isa.hpp"

LLMC_BEGIN

LLMC_INLINE void spin_pause() {
#if LLMC_X86
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A counter that threads wait on. Count and sleepers have cache lines of their own.
class Signal {
 public:
  uint32_t value() const { return word_.load(std::memory_order_acquire); }
  // Moves the counter on and wakes whoever sleeps.
  void advance() {
    word_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
  }
  // Returns once the counter differs from `seen`: after at most `spins` pauses the thread sleeps.
  void wait(uint32_t seen, int spins) {
    for (int i = 0; i < spins; ++i) {
      if (word_.load(std::memory_order_acquire) != seen) return;
      spin_pause();
    }
    while (word_.load(std::memory_order_acquire) == seen) {
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (word_.load(std::memory_order_seq_cst) == seen) sleep(seen);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

 private:
#if defined(__linux__)
  void sleep(uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
  }
  void wake() {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word_), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }
#else
  void sleep(uint32_t) { sched_yield(); }
  void wake() {}
#endif
  alignas(64) std::atomic<uint32_t> word_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
};

// Where all threads of a region meet; what one wrote before it, all see after it.
class Barrier {
 public:
  explicit Barrier(int threads, int spins = 20000) : threads_(threads), spins_(spins) {}
  void wait() {
    if (threads_ == 1) return;
    const uint32_t seen = passed_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      passed_.advance();
    } else {
      passed_.wait(seen, spins_);
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  Signal passed_;
  const int threads_, spins_;
};

class Pool {
 public:
  // `threads` counts the calling thread. `spins`: pauses before an idle worker sleeps (0: at once; a pause is
  // 10 to 50 ns). Check `ok()`: without it the system refused threads, and `run` uses the caller alone.
  explicit Pool(int threads, int spins = 4000) : threads_(threads < 1 ? 1 : threads), spins_(spins) {
    workers_ = threads_ > 1 ? new (std::nothrow) Worker[threads_ - 1] : nullptr;
    ok_ = threads_ == 1 || workers_ != nullptr;
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    while (ok_ && started_ < threads_ - 1) {
      workers_[started_] = Worker{this, started_ + 1, {}};
      ok_ = pthread_create(&workers_[started_].thread, nullptr, &Pool::enter, &workers_[started_]) == 0;
      started_ += ok_;
    }
    pthread_sigmask(SIG_SETMASK, &old, nullptr);
    if (!ok_) stop();
  }
  ~Pool() {
    stop();
    delete[] workers_;
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  bool ok() const { return ok_; }
  int threads() const { return ok_ ? threads_ : 1; }

  // Calls body(tid, nt, barrier) on every thread, tid 0 being the caller's, and returns when all have
  // returned. `body` must not throw, and must pass each barrier on all threads or on none.
  template <class Body>
  void run(Body&& body) {
    if (threads() == 1 || getpid() != owner_) {
      Barrier alone(1);
      body(0, 1, alone);
      return;
    }
    using Plain = typename std::remove_reference<Body>::type;
    call_ = [](void* argument, int tid, int nt, Barrier& barrier) {
      (*static_cast<Plain*>(argument))(tid, nt, barrier);
    };
    argument_ = const_cast<void*>(static_cast<const void*>(&body));
    begin_.advance();
    call_(argument_, 0, threads_, barrier_);
    barrier_.wait();
  }

 private:
  struct Worker {
    Pool* pool;
    int tid;
    pthread_t thread;
  };
  static void* enter(void* worker) {
    static_cast<Worker*>(worker)->pool->serve(static_cast<Worker*>(worker)->tid);
    return nullptr;
  }
  void serve(int tid) {
    for (uint32_t seen = 0;; ++seen) {
      begin_.wait(seen, spins_);
      if (stopping_.load(std::memory_order_acquire)) return;
      call_(argument_, tid, threads_, barrier_);
      barrier_.wait();
    }
  }
  void stop() {
    if (getpid() != owner_ || started_ == 0) return;
    stopping_.store(true, std::memory_order_release);
    begin_.advance();
    for (; started_ > 0; --started_) pthread_join(workers_[started_ - 1].thread, nullptr);
  }

  const int threads_, spins_;
  const pid_t owner_ = getpid();
  bool ok_ = false;
  int started_ = 0;
  Worker* workers_ = nullptr;
  void (*call_)(void*, int, int, Barrier&) = nullptr;
  void* argument_ = nullptr;
  std::atomic<bool> stopping_{false};
  Signal begin_;
  Barrier barrier_{threads_};
};

LLMC_END
