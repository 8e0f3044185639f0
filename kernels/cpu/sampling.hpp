// One row of logits to one token, decision for decision as runtime/sampling.py, the oracle, has it.
#pragma once

#include "filters.hpp"

LLMC_BEGIN

// All that one sample depends on. Pointers may be null where their count is 0.
struct SampleRow {
  float temperature, repetition_penalty, presence_penalty, frequency_penalty;
  double min_p, top_p;
  uint64_t seed;
  int64_t top_k, min_tokens;
  int64_t* tokens;  // the sequence so far: the prompt, then what was generated; then room for later rounds
  int64_t num_tokens, num_prompt_tokens;
  const int64_t* banned;  // masked while fewer than min_tokens were generated
  int64_t num_banned;
  const int64_t* bias_ids;
  const float* biases;
  int64_t num_biases;
  const uint32_t* mask;  // bit set: allowed; null: all are
};

// Scratch of one thread: logits as shaped, values to sort, how often each token was generated.
struct SampleScratch {
  float *shaped, *values;
  int32_t* counts;  // all zero between calls
};
inline size_t sample_scratch_bytes(int64_t vocab) { return static_cast<size_t>(round_up<int64_t>(vocab, 16)) * 12; }
// Lays scratch out in zeroed `memory`.
inline SampleScratch sample_scratch(void* memory, int64_t vocab) {
  float* p = static_cast<float*>(memory);
  const int64_t n = round_up<int64_t>(vocab, 16);
  return {p, p + n, reinterpret_cast<int32_t*>(p + 2 * n)};
}

// Whether anything below changes a logit.
LLMC_INLINE bool is_shaped(const SampleRow& row) {
  const bool banned = row.num_banned > 0 && row.num_tokens - row.num_prompt_tokens < row.min_tokens;
  const bool penalised = row.repetition_penalty != 1.0f || row.presence_penalty != 0.0f || row.frequency_penalty != 0.0f;
  return row.mask || banned || row.num_biases > 0 || penalised;
}

// Masks, biases and penalties, in this order, in float32.
LLMC_INLINE void shape_logits(const float* logits, int64_t vocab, const SampleRow& row, const SampleScratch& s) {
  std::memcpy(s.shaped, logits, static_cast<size_t>(vocab) * 4);
  for (int64_t word = 0; row.mask && word * 32 < vocab; ++word) {
    if (row.mask[word] == 0xffffffffu) continue;
    const int64_t end = vocab - word * 32 < 32 ? vocab : word * 32 + 32;
    for (int64_t i = word * 32; i < end; ++i)
      if (!(row.mask[word] >> (i % 32) & 1)) s.shaped[i] = -INFINITY;
  }
  const int64_t generated = row.num_tokens - row.num_prompt_tokens;
  if (generated < row.min_tokens)
    for (int64_t i = 0; i < row.num_banned; ++i) s.shaped[row.banned[i]] = -INFINITY;
  for (int64_t i = 0; i < row.num_biases; ++i) s.shaped[row.bias_ids[i]] += row.biases[i];
  if (row.repetition_penalty != 1.0f) {
    for (int64_t i = 0; i < row.num_tokens; ++i) {
      const int64_t id = row.tokens[i];
      if (s.counts[id]) continue;
      s.counts[id] = 1;
      const float value = s.shaped[id];
      s.shaped[id] = value > 0.0f ? value / row.repetition_penalty : value * row.repetition_penalty;
    }
    for (int64_t i = 0; i < row.num_tokens; ++i) s.counts[row.tokens[i]] = 0;
  }
  if (row.frequency_penalty == 0.0f && row.presence_penalty == 0.0f) return;
  const int64_t* made = row.tokens + row.num_prompt_tokens;
  for (int64_t i = 0; i < generated; ++i) ++s.counts[made[i]];
  for (int64_t i = 0; i < generated; ++i) {
    int32_t& count = s.counts[made[i]];
    if (!count) continue;
    s.shaped[made[i]] -= row.frequency_penalty * static_cast<float>(count);
    s.shaped[made[i]] -= row.presence_penalty;
    count = 0;
  }
}

// The lowest value that stays in s.shaped, which is scaled, with its maximum at 0.
LLMC_INLINE float keep_from(int64_t vocab, const SampleRow& row, const SampleScratch& s) {
  float least = row.min_p > 0.0 ? min_p_threshold(row.min_p) : kAnything;
  if (row.top_k > 0) least = top_k_threshold(s.shaped, vocab, least, row.top_k, s.values);
  if (row.top_p < 1.0) {
    const int64_t n = gather_above(s.shaped, vocab, std::max(below(least), kNoWeight), s.values);
    least = std::max(least, top_p_threshold(s.values, n, row.top_p));
  }
  return least;
}

// The best score of scaled[vocab], that is value + noise, among values >= least. `best` is an index of value 0.
//
// A value v beats the score `top` only if its uniform number u has 1 - u < e^(v - top), as -log u >= 1 - u.
// This rules out nearly all tokens from their random bits alone; the margin of 1e-3 covers every rounding.
LLMC_INLINE int64_t best_score(const float* scaled, int64_t vocab, int64_t best, float least, uint64_t seed,
                               uint32_t position) {
  int64_t token = best;
  double top = gumbel(seed, position, static_cast<uint32_t>(best));
  const float lowest = below(least);
  for (int64_t i = 0; i < vocab; i += 16) {
    const int count = static_cast<int>(vocab - i < 16 ? vocab - i : 16);
    const F16 value = load_first(scaled + i, count);
    const float peak = static_cast<float>(top);
    const F16 bound = set1(std::max(lowest, peak - static_cast<float>(kMaxNoise) - 0.01f));
    if (!any(less(bound, value))) continue;
    alignas(64) int32_t bits[16];
    for (int block = 0; block < 4; ++block)
      block_bits(seed, position, static_cast<uint32_t>(i / 4 + block), reinterpret_cast<uint32_t*>(bits) + 4 * block);
    const I16 rest = shift_right<8>(set1(int32_t{-1}) - load(bits));  // (1 - u) * 2^24, rounded down
    if (!any(less(to_float(rest), exp(value - set1(peak)) * set1(1.001f * 16777216.0f)))) continue;
    for (int lane = 0; lane < count; ++lane) {
      const float v = scaled[i + lane];
      if (!(v > lowest) || !(static_cast<double>(v) + kMaxNoise >= top)) continue;
      const double score = static_cast<double>(v) + gumbel_of(static_cast<uint32_t>(bits[lane]));
      if (score > top || (score == top && i + lane < token)) token = i + lane, top = score;
    }
  }
  return token;
}

// out = (x - peak) / temperature
LLMC_INLINE void scale_logits(const float* x, int64_t n, float peak, float temperature, float* out) {
  const F16 top = set1(peak), divisor = set1(temperature);
  for (int64_t i = 0; i < n; i += 16) {
    const int count = static_cast<int>(n - i < 16 ? n - i : 16);
    store_first(out + i, (load_first(x + i, count) - top) / divisor, count);
  }
}

// The next token, or -1 where none may be chosen: NaN or +inf among the logits, or nothing left by masks.
LLMC_KERNEL inline int64_t sample_token(const float* logits, int64_t vocab, const SampleRow& row,
                                        const SampleScratch& s) {
  const IeeeArithmetic ieee;
  Best best = best_of(logits, 0, vocab);
  if (!best.finite) return -1;
  const float* shaped = logits;
  if (is_shaped(row)) {
    shape_logits(logits, vocab, row, s);
    shaped = s.shaped;
    best = best_of(shaped, 0, vocab);
  }
  if (!best.finite || best.value == -INFINITY) return -1;
  if (row.temperature == 0.0f) return best.index;
  scale_logits(shaped, vocab, best.value, row.temperature, s.shaped);
  const float least = std::max(keep_from(vocab, row, s), static_cast<float>(kMinNoise - kMaxNoise));
  return best_score(s.shaped, vocab, best.index, least, row.seed, static_cast<uint32_t>(row.num_tokens));
}

// Natural logprob of `token` under the model's own distribution, its rank, and the `count` best alternatives'.
// Within rounding of the oracle's: its sum is numpy's.
LLMC_KERNEL inline void token_logprob(const float* logits, int64_t vocab, int64_t token, int64_t count,
                                      double* logprob, int64_t* rank, int32_t* top, double* top_logprobs) {
  const IeeeArithmetic ieee;
  const double peak = best_of(logits, 0, vocab).value;
  double lanes[8] = {};
  int64_t ahead = 0;
  for (int64_t i = 0; i < vocab; i += 8) {
    const int64_t count = vocab - i < 8 ? vocab - i : 8;
    double apart[8], weight[8];
    for (int64_t j = 0; j < 8; ++j) apart[j] = j < count ? static_cast<double>(logits[i + j]) - peak : -INFINITY;
    noise_exp8(apart, weight);
    for (int64_t j = 0; j < 8; ++j) lanes[j] += weight[j];
    for (int64_t j = i; j < i + count; ++j)
      ahead += logits[j] > logits[token] || (logits[j] == logits[token] && j < token);
  }
  double total = 0.0;
  for (const double lane : lanes) total += lane;
  const double normaliser = peak + noise_log(total);
  *logprob = static_cast<double>(logits[token]) - normaliser;
  *rank = ahead;
  const int64_t found = top_ids(logits, vocab, count, top);
  for (int64_t i = 0; i < found; ++i) top_logprobs[i] = static_cast<double>(logits[top[i]]) - normaliser;
}

LLMC_END
