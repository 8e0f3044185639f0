// A C interface to the choice of tokens and to the pool, for tests.
#include "pool.hpp"
#include "sampling.hpp"

using namespace llmc;
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t run_sample(const float* logits, int64_t vocab, const SampleRow* row, void* scratch) {
  FlushDenormals flush;  // as in a step: the sampler leaves it by itself
  return sample_token(logits, vocab, *row, sample_scratch(scratch, vocab));
}
EXPORT int64_t scratch_bytes(int64_t vocab) { return sample_scratch_bytes(vocab); }
EXPORT void run_noise(uint64_t seed, uint32_t position, const uint32_t* ids, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = gumbel(seed, position, ids[i]);
}
EXPORT void run_logprob(const float* logits, int64_t vocab, int64_t token, int64_t count, double* logprob, int64_t* rank,
                        int32_t* top, double* top_logprobs) {
  token_logprob(logits, vocab, token, count, logprob, rank, top, top_logprobs);
}
EXPORT void run_best(int nt, const float* logits, int64_t rows, int64_t vocab, Best* partial, Best* best) {
  for (int tid = 0; tid < nt; ++tid) partial_best(tid, nt, logits, vocab, rows, vocab, partial);
  for (int tid = 0; tid < nt; ++tid) combine_best(tid, nt, partial, rows, best);
}

EXPORT void* pool_open(int threads, int spins) { return new Pool(threads, spins, 0); }
EXPORT void* pool_open_wary(int threads, int64_t retreat_ns) { return new Pool(threads, 4000, retreat_ns); }
// A region whose last thread is away for `away_us`: how many threads it had.
EXPORT int pool_width(void* pool, int away_us) {
  int width = 0;
  static_cast<Pool*>(pool)->run([&](int tid, int nt, Barrier& barrier) {
    if (tid == 0) width = nt;
    if (nt > 1 && tid == nt - 1 && away_us) usleep(away_us);
    barrier.wait();
  });
  return width;
}
// Regions in every third of which the last thread is away: how often one was not seen behind a barrier.
EXPORT int64_t pool_missed(void* pool, int regions) {
  int entered[64] = {};
  int64_t missed = 0;
  for (int r = 1; r <= regions; ++r)
    static_cast<Pool*>(pool)->run([&](int tid, int nt, Barrier& barrier) {
      if (r % 3 == 0 && nt > 1 && tid == nt - 1) usleep(1500);
      entered[tid] = r;
      barrier.wait();
      if (tid == 0)
        for (int t = 0; t < nt; ++t) missed += entered[t] != r;
    });
  return missed;
}
// Runs `regions` regions of `rounds` rounds: in each round every thread adds what its neighbour wrote in the
// round before. Returns the sum of all cells; any missed barrier changes it.
EXPORT int64_t pool_work(void* pool, int64_t regions, int64_t rounds) {
  static constexpr int kMost = 64;
  struct alignas(64) Cell { int64_t value[2]; } cells[kMost] = {};
  int threads = 1;
  for (int64_t r = 0; r < regions; ++r)
    static_cast<Pool*>(pool)->run([&](int tid, int nt, Barrier& barrier) {
      if (tid == 0) threads = nt;
      cells[tid].value[0] += 1;
      barrier.wait();
      for (int64_t i = 0; i < rounds; ++i) {
        const int64_t from = cells[(tid + 1) % nt].value[i % 2];
        cells[tid].value[(i + 1) % 2] = (from * 3 + tid) % 1000003;
        barrier.wait();
      }
      if (rounds % 2) cells[tid].value[0] = cells[tid].value[1];
    });
  int64_t total = 0;
  for (int t = 0; t < threads; ++t) total += cells[t].value[0];
  return total;
}
// Tasks between regions, each taken in another way: how often one ran that was said not to, or not the once that
// it was said to, or was asked for and did not. `begun` counts those that a worker had begun when it was asked.
struct Counted {
  int64_t runs = 0;
  int away_us = 0;
  pthread_t by = pthread_self();
};
EXPORT int64_t pool_tasks(void* pool, int count, int64_t* begun) {
  Pool& on = *static_cast<Pool*>(pool);
  auto task = [](void* argument) {
    Counted& one = *static_cast<Counted*>(argument);
    if (one.away_us) usleep(one.away_us);
    ++one.runs;
    one.by = pthread_self();
  };
  int64_t wrong = 0;
  for (int i = 0; i < count; ++i) {
    Counted first, second;
    first.away_us = i % 5 == 0 ? 300 : 0;
    on.start(task, &first);
    if (i % 7 == 1) {  // one that is started over another
      on.start(task, &second);
      wrong += first.runs > 1;
    }
    Counted& last = i % 7 == 1 ? second : first;
    if (i % 3 == 0) usleep(50);
    if (i % 4 == 2) wrong += pool_work(pool, 1, 3) < 0;
    const bool is_wanted = i % 2 == 0;
    const bool was_run = on.finish(is_wanted);
    wrong += last.runs != was_run;
    wrong += is_wanted && !was_run;
    wrong += on.finish(true);
    *begun += last.runs && !pthread_equal(last.by, pthread_self());
  }
  return wrong;
}
// Leaves a task under way that takes a while.
EXPORT void pool_leave_task(void* pool, int64_t* runs) {
  static_cast<Pool*>(pool)->start(
      [](void* argument) {
        usleep(20000);
        ++*static_cast<int64_t*>(argument);
      },
      runs);
}
EXPORT int pool_finish(void* pool, int is_wanted) { return static_cast<Pool*>(pool)->finish(is_wanted); }
EXPORT void pool_close(void* pool) { delete static_cast<Pool*>(pool); }
EXPORT int pool_threads(void* pool) { return static_cast<Pool*>(pool)->threads(); }
