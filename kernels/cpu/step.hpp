// The frame of a generated step: its inputs, the barrier between calls, and the exported C ABI.
//
// One process may hold many engines: all state is in the engine's own block, nothing is global.
#pragma once

#include "isa.hpp"
#include "pool.hpp"

LLMC_BEGIN

// What one step reads and writes. Sizes as in the program: T tokens, L rows of logits, S sequences, Q = S + 1,
// NT threads. Every field takes eight bytes: callers pass the struct as an array of int64.
template <int kGroups, int kCaches, int kWeights>
struct Step {
  int64_t T, L, S, Q, NT;
  const int64_t *input_ids, *positions, *out_rows, *query_starts;
  const int64_t* block_table[kGroups];
  const int64_t* slots[kGroups];
  int64_t B[kGroups];  // width of each block table
  int64_t P[kGroups];  // physical pages of each group
  void* k_cache[kCaches];
  void* v_cache[kCaches];
  const void* weights[kWeights > 0 ? kWeights : 1];
  char* arena;
  char* scratch;  // of attention kernels: `llmc_scratch_bytes` bytes
  float* logits;
};

LLMC_END

// The C ABI of a generated unit. `open` starts an engine's threads; `step` runs one step on them and returns
// 0, or -1 when `count` is not the number of fields that this unit expects.
#define LLMC_EXPORT_STEP(StepType, step_body, scratch_bytes, version)                                \
  extern "C" __attribute__((visibility("default"))) int32_t llmc_abi_version() { return version; }   \
  extern "C" __attribute__((visibility("default"))) int64_t llmc_scratch_bytes(int32_t threads) {    \
    return scratch_bytes(threads);                                                                   \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) void* llmc_open(int32_t threads) {               \
    return new llmc::Pool(threads);                                                                  \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) void llmc_close(void* engine) {                  \
    delete (llmc::Pool*)engine;                                                                      \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) int32_t llmc_step(void* engine,                  \
                                                                      const int64_t* fields,         \
                                                                      int64_t count) {               \
    if (count * 8 != (int64_t)sizeof(StepType)) return -1;                                           \
    const StepType& step = *(const StepType*)fields;                                                 \
    ((llmc::Pool*)engine)->run([&](int tid, int nt, llmc::Barrier& barrier) {                        \
      llmc::FlushDenormals flush;                                                                    \
      step_body(step, tid, nt, barrier);                                                                \
    });                                                                                              \
    return 0;                                                                                        \
  }
