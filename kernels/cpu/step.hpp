// The frame of a generated step: its inputs, the barrier between calls, and the exported C ABI.
//
// One process may hold many engines: all state is in the engine's own block, nothing is global.
#pragma once

#include "isa.hpp"
#include "pool.hpp"
#include "sample_step.hpp"

LLMC_BEGIN

// Drafts for the step after one that verifies drafts of a single sequence: drawn by another unit, the draft
// model's, as a task of the pool, while the caller goes on. Callers pass it as an array of int64.
constexpr int64_t kMostAhead = 64;
struct DraftAhead {
  // The other unit's `llmc_draw`, one of its engines, and the fields of its step.
  int32_t (*draw)(void* engine, const int64_t* fields, int64_t count, const int64_t* ids, int64_t num_ids, int64_t start);
  void* engine;
  const int64_t* fields;
  int64_t num_fields;
  int64_t num_computed;  // tokens of the sequence that it has computed, drafts that are verified now included
  // Results: what `draw` returned, and what it read, `num_ids` tokens from position `start` on, the last one the
  // last sample of the step.
  int64_t fault, start, num_ids;
  int64_t ids[kMostAhead];
};

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
  SampleJob* jobs;
  int64_t num_jobs;
  char* sample_scratch;  // `llmc_sample_scratch_bytes` bytes, zeroed once
  // More than one round: each sequence's job draws a token, which is its only one in the next round.
  int64_t rounds;
  int64_t* drawn;         // [rounds, S] tokens, -1 from a sequence's first row of logits that is not finite on
  int64_t* round_memory;  // [3 S + Q + kGroups S]
  DraftAhead* ahead;      // or null
};

// What a unit was generated for.
struct StepLimits {
  int64_t tokens, logit_rows, vocab, context, threads;
};
// What queries of one cache group can see: all before them, or a window or chunk of tokens (0: none).
struct GroupLimits {
  int64_t page_tokens, window, chunk;
};

// Why a step cannot run. runtime/executors/cpu_library.py gives these words.
enum StepFault : int32_t {
  kFits = 0, kFieldCount, kSizes, kQueryStarts, kTokenIds, kPositions, kLogitRows, kBlockTable, kSlots, kJobs,
  kRounds, kAhead,
};

// Whether the ids, positions and rows of a step are ones that its kernels may follow.
template <class StepType>
LLMC_KERNEL StepFault check_rows(const StepType& s, const StepLimits& most) {
  const bool counts = s.T >= 0 && s.L >= 0 && s.S >= 0 && s.Q == s.S + 1 && s.num_jobs >= 0;
  if (!counts || s.T > most.tokens || s.L > most.logit_rows || s.S > most.tokens) return kSizes;
  if (s.query_starts[0] != 0 || s.query_starts[s.S] != s.T) return kQueryStarts;
  for (int64_t i = 0; i < s.S; ++i)
    if (s.query_starts[i + 1] <= s.query_starts[i]) return kQueryStarts;
  for (int64_t t = 0; t < s.T; ++t)
    if (s.input_ids[t] < 0 || s.input_ids[t] >= most.vocab) return kTokenIds;
  for (int64_t i = 0; i < s.S; ++i)
    for (int64_t t = s.query_starts[i]; t < s.query_starts[i + 1]; ++t) {
      if (s.positions[t] < 0 || s.positions[t] >= most.context) return kPositions;
      if (t > s.query_starts[i] && s.positions[t] != s.positions[t - 1] + 1) return kPositions;
    }
  for (int64_t i = 0; i < s.L; ++i)
    if (s.out_rows[i] < 0 || s.out_rows[i] >= s.T) return kLogitRows;
  for (int64_t i = 0; i < s.num_jobs; ++i)
    if (!job_fits(s.jobs[i], s.L, most.vocab)) return kJobs;
  return kFits;
}

// Whether every sequence can go on by itself: one job each, of its last token, and positions for all rounds.
template <class StepType>
LLMC_KERNEL StepFault check_rounds(const StepType& s, const StepLimits& most) {
  if (s.rounds == 1) return kFits;
  if (s.rounds < 1 || s.rounds > most.context || s.L != s.S || s.num_jobs != s.S) return kRounds;
  if (!s.drawn || !s.round_memory) return kRounds;
  for (int64_t i = 0; i < s.S; ++i) {
    const SampleJob& job = s.jobs[i];
    const int64_t last = s.query_starts[i + 1] - 1;
    if (s.out_rows[i] != last || s.positions[last] + s.rounds > most.context) return kRounds;
    if (job.known >= 0 || job.logits_row != i || job.row.mask) return kRounds;
  }
  return kFits;
}

// Whether drafts can be drawn behind the step: one sequence, with a sample behind its last known token and behind
// each draft, of which the draft model has computed all that came before.
template <class StepType>
LLMC_KERNEL StepFault check_ahead(const StepType& s) {
  if (!s.ahead) return kFits;
  if (s.S != 1 || s.rounds != 1 || s.num_jobs < 1 || s.num_jobs > s.T || s.T >= kMostAhead) return kAhead;
  if (s.ahead->num_computed < s.positions[0] || !s.ahead->draw) return kAhead;
  for (int64_t i = 0; i < s.num_jobs; ++i)
    if (s.jobs[i].known >= 0 || s.out_rows[s.jobs[i].logits_row] != s.T - s.num_jobs + i) return kAhead;
  return kFits;
}

// The same of the pages of one group: every page that a query sees, and every slot written.
template <class StepType>
LLMC_KERNEL StepFault check_pages(const StepType& s, int group, const GroupLimits& limits) {
  const int64_t page = limits.page_tokens, width = s.B[group], pages = s.P[group];
  if (width < 0 || pages < 0) return kSizes;
  for (int64_t i = 0; i < s.S; ++i) {
    const int64_t first = s.positions[s.query_starts[i]];
    const int64_t last = s.positions[s.query_starts[i + 1] - 1] + s.rounds - 1;
    int64_t oldest = 0;
    if (limits.window) oldest = first - limits.window + 1 > 0 ? first - limits.window + 1 : 0;
    if (limits.chunk) oldest = first / limits.chunk * limits.chunk;
    if (last / page >= width) return kBlockTable;
    for (int64_t j = oldest / page; j <= last / page; ++j) {
      const int64_t entry = s.block_table[group][i * width + j];
      if (entry < 0 || entry >= pages) return kBlockTable;
    }
  }
  for (int64_t t = 0; t < s.T; ++t)
    if (s.slots[group][t] < -1 || s.slots[group][t] >= pages * page) return kSlots;
  return kFits;
}

template <class StepType, int kGroups>
LLMC_INLINE StepFault check_step(const StepType& s, const StepLimits& most, const GroupLimits (&groups)[kGroups]) {
  StepFault fault = check_rows(s, most);
  if (fault == kFits) fault = check_rounds(s, most);
  if (fault == kFits) fault = check_ahead(s);
  for (int group = 0; group < kGroups && fault == kFits; ++group) fault = check_pages(s, group, groups[group]);
  return fault;
}

// Keeps what the jobs of a round drew, and makes it the input of the next. A sequence that failed goes on with
// token 0, in pages of its own, and draws nothing more.
template <class StepType, int kGroups>
LLMC_KERNEL void next_round(StepType& s, int64_t round, const GroupLimits (&groups)[kGroups]) {
  int64_t *ids = s.round_memory, *positions = ids + s.S, *rows = positions + s.S, *starts = rows + s.S;
  int64_t* slots = starts + s.Q;
  for (int64_t i = 0; i < s.S; ++i) {
    SampleJob& job = s.jobs[i];
    const bool goes_on = job.finite && (round == 0 || s.drawn[(round - 1) * s.S + i] >= 0);
    s.drawn[round * s.S + i] = goes_on ? job.token : -1;
    if (round + 1 == s.rounds) continue;
    ids[i] = goes_on ? job.token : 0;
    if (job.row.tokens) job.row.tokens[job.row.num_tokens] = ids[i];
    ++job.row.num_tokens;
    const int64_t position = s.positions[s.query_starts[i + 1] - 1] + 1;
    for (int group = 0; group < kGroups; ++group) {
      const int64_t page = groups[group].page_tokens;
      const int64_t entry = s.block_table[group][i * s.B[group] + position / page];
      slots[group * s.S + i] = entry * page + position % page;
    }
    positions[i] = position;
    rows[i] = i;
  }
  if (round + 1 == s.rounds) return;
  for (int64_t i = 0; i <= s.S; ++i) starts[i] = i;
  for (int group = 0; group < kGroups; ++group) s.slots[group] = slots + group * s.S;
  s.input_ids = ids, s.positions = positions, s.out_rows = rows, s.query_starts = starts;
  s.T = s.S;
}

// What the draft model has to read behind a step: the tokens that it has not computed, up to the last sample, the
// first one that is no accepted draft. False where that one could not be drawn.
template <class StepType>
LLMC_KERNEL bool look_ahead(const StepType& s) {
  DraftAhead& ahead = *s.ahead;
  const int64_t first = s.T - s.num_jobs;  // the last token that is no draft
  int64_t accepted = 0;
  while (accepted + 1 < s.num_jobs && s.jobs[accepted].finite &&
         s.jobs[accepted].token == s.input_ids[first + accepted + 1])
    ++accepted;
  if (!s.jobs[accepted].finite) return false;
  const int64_t last = s.positions[first + accepted] + 1;
  ahead.start = std::min(ahead.num_computed, last);
  ahead.num_ids = last + 1 - ahead.start;
  for (int64_t i = 0; i + 1 < ahead.num_ids; ++i) ahead.ids[i] = s.input_ids[ahead.start + i - s.positions[0]];
  ahead.ids[ahead.num_ids - 1] = s.jobs[accepted].token;
  return true;
}

inline void draw_ahead(void* argument) {
  DraftAhead& ahead = *(DraftAhead*)argument;
  ahead.fault = ahead.draw(ahead.engine, ahead.fields, ahead.num_fields, ahead.ids, ahead.num_ids, ahead.start);
}

// Memory for the tokens of a step that another unit's step gives.
template <int kGroups>
struct GivenTokens {
  int64_t positions[kMostAhead], slots[kGroups][kMostAhead], out_row, query_starts[2];
};

// Makes `num_ids` tokens from position `start` on the input of a step of one sequence with one job, which draws
// behind the last of them.
template <class StepType, int kGroups>
LLMC_KERNEL StepFault give_tokens(StepType& s, GivenTokens<kGroups>& given, const int64_t* ids, int64_t num_ids,
                                  int64_t start, const StepLimits& most, const GroupLimits (&groups)[kGroups]) {
  if (num_ids < 1 || num_ids > kMostAhead || start < 0 || start + num_ids > most.context) return kSizes;
  if (s.num_jobs != 1 || !s.jobs || !s.drawn) return kJobs;
  for (int64_t i = 0; i < num_ids; ++i) {
    const int64_t position = given.positions[i] = start + i;
    for (int group = 0; group < kGroups; ++group) {
      const int64_t page = groups[group].page_tokens;
      if (position / page >= s.B[group] || s.block_table[group][position / page] < 0) return kBlockTable;
      given.slots[group][i] = s.block_table[group][position / page] * page + position % page;
    }
  }
  given.out_row = given.query_starts[1] = num_ids;
  --given.out_row;
  given.query_starts[0] = 0;
  s.T = num_ids, s.L = 1, s.S = 1, s.Q = 2;
  s.input_ids = ids, s.positions = given.positions, s.out_rows = &given.out_row, s.query_starts = given.query_starts;
  for (int group = 0; group < kGroups; ++group) s.slots[group] = given.slots[group];
  SampleRow& row = s.jobs[0].row;
  if (row.tokens) std::copy(ids, ids + num_ids, row.tokens + start);
  row.num_tokens = start + num_ids;
  return kFits;
}

// Runs a step on an engine's threads, round after round, if it fits; then has drafts drawn behind it.
template <class StepType, int kGroups, class Body>
LLMC_INLINE int32_t carry_out(Pool& pool, StepType& step, const StepLimits& most, const GroupLimits (&groups)[kGroups],
                              Body&& body) {
  if (step.NT != pool.threads()) return kSizes;
  const StepFault fault = check_step(step, most, groups);
  if (fault != kFits || step.T == 0) return fault;
  for (int64_t round = 0; round < step.rounds; ++round) {
    pool.run([&](int tid, int nt, Barrier& barrier) {
      FlushDenormals flush;
      body(step, tid, nt, barrier);
      run_jobs(tid, nt, step.jobs, step.num_jobs, step.logits, most.vocab, step.sample_scratch);
    });
    if (step.rounds > 1) next_round(step, round, groups);
  }
  if (step.ahead && look_ahead(step)) pool.start(&draw_ahead, step.ahead);
  return kFits;
}

LLMC_END

// The C ABI of a generated unit. `open` starts an engine's threads (null: the system refused memory or threads);
// `step` runs one step on them, round after round, and returns 0, or the `StepFault` for which it did nothing.
// `draw` is a step of one sequence with one job whose tokens are `ids`, at positions from `start` on, in place of
// those that the fields tell of; the tokens drawn, one a round, go to `drawn`, and room for all of them and for
// `ids` is behind the tokens of the job. `finish` returns when no drafts are drawn ahead any more, 1 where they
// were drawn since the last step; those that were not begun are drawn if they are `wanted`.
#define LLMC_EXPORT_STEP(StepType, step_body, scratch_bytes, limits, groups, version)                \
  extern "C" __attribute__((visibility("default"))) int32_t llmc_abi_version() { return version; }   \
  extern "C" __attribute__((visibility("default"))) int64_t llmc_scratch_bytes(int32_t threads) {    \
    return scratch_bytes(threads);                                                                   \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) int64_t llmc_sample_scratch_bytes(               \
      int32_t threads) {                                                                             \
    return threads * (int64_t)llmc::sample_scratch_bytes(limits.vocab);                              \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) void* llmc_open(int32_t threads) {               \
    if (threads < 1 || threads > limits.threads) return nullptr;                                     \
    llmc::Pool* pool = new (std::nothrow) llmc::Pool(threads);                                       \
    if (pool && pool->ok()) return pool;                                                             \
    delete pool;                                                                                     \
    return nullptr;                                                                                  \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) void llmc_close(void* engine) {                  \
    delete (llmc::Pool*)engine;                                                                      \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) int32_t llmc_step(void* engine,                  \
                                                                      const int64_t* fields,         \
                                                                      int64_t count) {               \
    if (count * 8 != (int64_t)sizeof(StepType)) return llmc::kFieldCount;                            \
    StepType step = *(const StepType*)fields;                                                        \
    return llmc::carry_out(*(llmc::Pool*)engine, step, limits, groups, step_body);                   \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) int32_t llmc_draw(                               \
      void* engine, const int64_t* fields, int64_t count, const int64_t* ids, int64_t num_ids,       \
      int64_t start) {                                                                               \
    if (count * 8 != (int64_t)sizeof(StepType)) return llmc::kFieldCount;                            \
    StepType step = *(const StepType*)fields;                                                        \
    llmc::GivenTokens<sizeof(groups) / sizeof(groups[0])> given;                                     \
    int32_t fault = llmc::give_tokens(step, given, ids, num_ids, start, limits, groups);             \
    if (fault == llmc::kFits)                                                                        \
      fault = llmc::carry_out(*(llmc::Pool*)engine, step, limits, groups, step_body);                \
    if (fault == llmc::kFits && step.rounds == 1)                                                    \
      step.drawn[0] = step.jobs[0].finite ? step.jobs[0].token : -1;                                 \
    return fault;                                                                                    \
  }                                                                                                  \
  extern "C" __attribute__((visibility("default"))) int32_t llmc_finish(void* engine,                \
                                                                        int32_t wanted) {            \
    return ((llmc::Pool*)engine)->finish(wanted != 0);                                               \
  }
