// The threads of one engine: a step is one parallel region, entered together and left together.
//
// Threads spin briefly, then sleep in the kernel; a waker makes a system call only if somebody sleeps. Workers
// block all signals, so that handlers run on the application's own threads. A pool is used by one thread at a
// time; several pools may live in one process. In a forked child the workers do not exist: there `run` uses the
// calling thread alone, which gives the same bits, and destruction joins nobody.
//
// Between two regions the first worker may carry out a task beside whatever the caller does: `start` and `finish`.
//
// Where others want the cores, a step is as slow as the thread that the system runs last, at each barrier anew:
// hundreds of times as slow for a small model. So a pool that spent much of a region asleep at barriers does the
// next ones on half as many threads, down to the caller's, and tries with more of them after a while.
#pragma once

#include <atomic>
#include <new>
#include <type_traits>

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
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

LLMC_INLINE int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// A word that threads wait on. Word and sleepers have cache lines of their own.
class Signal {
 public:
  uint32_t value() const { return word_.load(std::memory_order_acquire); }
  // Sets the word, by one thread at a time, and wakes whoever sleeps.
  void set(uint32_t value) {
    word_.store(value, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
  }
  // Whether the word differs from `seen` within `spins` pauses.
  bool spin(uint32_t seen, int spins) const {
    for (int i = 0; i < spins; ++i) {
      if (word_.load(std::memory_order_acquire) != seen) return true;
      spin_pause();
    }
    return false;
  }
  // Returns once the word differs from `seen`, asleep until then.
  void sleep_while(uint32_t seen) {
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
  // How many threads are to meet; while nobody waits.
  void resize(int threads) { threads_ = threads; }
  void wait() {
    const int threads = threads_;  // read before arriving: the next region's may be another number
    if (threads == 1) return;
    const uint32_t seen = passed_.value();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      passed_.set(seen + 1);
    } else if (!passed_.spin(seen, spins_)) {
      const int64_t since = monotonic_ns();
      passed_.sleep_while(seen);
      slept_ns_.fetch_add(monotonic_ns() - since, std::memory_order_relaxed);
    }
  }
  // Nanoseconds that threads slept here since the last call, theirs added up.
  int64_t take_slept_ns() { return slept_ns_.exchange(0, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  Signal passed_;
  std::atomic<int64_t> slept_ns_{0};
  int threads_;
  const int spins_;
};

class Pool {
 public:
  // `threads` counts the calling thread. `spins`: pauses before an idle worker sleeps (0: at once; a pause is
  // 10 to 50 ns). `retreat_ns`: how long fewer threads are used at first where others want the cores (0: all are
  // always used). Check `ok()`: without it the system refused threads, and `run` uses the caller alone.
  explicit Pool(int threads, int spins = 4000, int64_t retreat_ns = 10000000)
      : threads_(threads < 1 ? 1 : threads), spins_(spins), first_retreat_ns_(retreat_ns) {
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

  // Calls body(tid, nt, barrier) on nt threads, at most `threads()`, tid 0 being the caller's, and returns when
  // all have returned. `body` must not throw, and must pass each barrier on all threads or on none.
  template <class Body>
  void run(Body&& body) {
    if (threads() == 1 || getpid() != owner_) {
      Barrier alone(1);
      body(0, 1, alone);
      return;
    }
    const int64_t began = monotonic_ns();
    if (began >= retreat_until_) width_ = threads_;
    if (width_ == 1) {
      Barrier alone(1);
      body(0, 1, alone);
      return;
    }
    using Plain = typename std::remove_reference<Body>::type;
    call_ = [](void* argument, int tid, int nt, Barrier& barrier) {
      (*static_cast<Plain*>(argument))(tid, nt, barrier);
    };
    argument_ = const_cast<void*>(static_cast<const void*>(&body));
    barrier_.resize(width_);
    begin(width_);
    call_(argument_, 0, width_, barrier_);
    barrier_.wait();
    adapt(began, monotonic_ns());
  }

  // Has the first worker call task(argument) while the caller goes on, one task at a time: one that was started
  // before is over when this returns. Where there is no worker, or others want the cores, `finish` carries it out.
  void start(void (*task)(void*), void* argument) {
    finish(false);
    task_ = task;
    task_argument_ = argument;
    tasks_before_ = tasks_done_.value();
    has_task_ = true;
    is_taken_.store(false, std::memory_order_release);
    if (threads() > 1 && width_ > 1 && getpid() == owner_) begin(kTask);
  }
  // Returns when no task is under way any more: whether the last one was carried out since it was started. One
  // that nobody has begun is carried out here if it `is_wanted`, and else never will be.
  bool finish(bool is_wanted) {
    if (!has_task_) return false;
    has_task_ = false;
    if (!is_taken_.exchange(true, std::memory_order_acq_rel)) {
      if (is_wanted) task_(task_argument_);
      return is_wanted;
    }
    if (getpid() != owner_) return false;  // it was the parent's worker that took it
    if (!tasks_done_.spin(tasks_before_, kTaskSpins)) tasks_done_.sleep_while(tasks_before_);
    return true;
  }

 private:
  static constexpr int kWidthBits = 10;
  static constexpr int kTask = 1;  // as a width, which no region has that is begun for workers
  static constexpr int kTaskSpins = 20000;
  static constexpr int64_t kLongestRetreatNs = 640000000;

  struct Worker {
    Pool* pool;
    int tid;
    pthread_t thread;
  };
  static void* enter(void* worker) {
    static_cast<Worker*>(worker)->pool->serve(static_cast<Worker*>(worker)->tid);
    return nullptr;
  }
  // Begins a region of `width` threads. Number and width are one word: a thread that wakes late, when regions
  // without it have passed, must not take the width of one for that of another.
  void begin(int width) { begin_.set(++regions_ << kWidthBits | uint32_t(width)); }
  void serve(int tid) {
    for (uint32_t seen = 0;;) {
      if (!begin_.spin(seen, spins_)) begin_.sleep_while(seen);
      seen = begin_.value();
      if (stopping_.load(std::memory_order_acquire)) return;
      const int width = int(seen & ((1u << kWidthBits) - 1));
      if (width == kTask && tid == 1) take_task();
      if (width == kTask || tid >= width) continue;
      call_(argument_, tid, width, barrier_);
      barrier_.wait();
    }
  }
  // A worker that wakes late may meet the task after the one that it was woken for, or one that was dropped.
  void take_task() {
    if (is_taken_.exchange(true, std::memory_order_acq_rel)) return;
    task_(task_argument_);
    tasks_done_.set(tasks_done_.value() + 1);
  }
  // Chooses how many threads the next regions have: half as many where a quarter of what those of the last one
  // could do was slept away. Sleeping a little is what unequal shares of the work do; a retreat that did not
  // help is followed by one twice as long.
  void adapt(int64_t began, int64_t ended) {
    const bool waited = barrier_.take_slept_ns() * 4 > (ended - began) * width_;
    if (first_retreat_ns_ == 0) return;
    if (waited) {
      width_ /= 2;
      retreat_until_ = ended + retreat_ns_;
      retreat_ns_ = retreat_ns_ * 2 < kLongestRetreatNs ? retreat_ns_ * 2 : kLongestRetreatNs;
    } else if (width_ == threads_) {
      retreat_ns_ = first_retreat_ns_;
    }
  }
  void stop() {
    if (getpid() != owner_ || started_ == 0) return;
    stopping_.store(true, std::memory_order_release);
    begin(0);
    for (; started_ > 0; --started_) pthread_join(workers_[started_ - 1].thread, nullptr);
  }

  const int threads_, spins_;
  const int64_t first_retreat_ns_;
  const pid_t owner_ = getpid();
  int width_ = threads_;
  uint32_t regions_ = 0;
  int64_t retreat_ns_ = first_retreat_ns_, retreat_until_ = 0;
  bool ok_ = false;
  int started_ = 0;
  Worker* workers_ = nullptr;
  void (*call_)(void*, int, int, Barrier&) = nullptr;
  void* argument_ = nullptr;
  std::atomic<bool> stopping_{false};
  void (*task_)(void*) = nullptr;
  void* task_argument_ = nullptr;
  uint32_t tasks_before_ = 0;
  bool has_task_ = false;
  std::atomic<bool> is_taken_{true};
  Signal tasks_done_;
  Signal begin_;
  Barrier barrier_{threads_};
};

LLMC_END
