// One row of logits to one token, decision for decision as runtime/sampling.py, the oracle, has it.
#pragma once

#include "noise.hpp"
#include "select.hpp"

LLMC_BEGIN

// All that one sample depends on. Pointers may be null where their count is 0.
struct SampleRow {
  float temperature, repetition_penalty, presence_penalty, frequency_penalty;
  double min_p, top_p;
  uint64_t seed;
  int64_t top_k, min_tokens;
  const int64_t* tokens;  // the sequence so far: the prompt, then what was generated
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

// Masks, biases and penalties, in this order, in float32.
LLMC_INLINE void shape_logits(const float* logits, int64_t vocab, const SampleRow& row, const SampleScratch& s) {
  std::memcpy(s.shaped, logits, static_cast<size_t>(vocab) * 4);
  if (row.mask)
    for (int64_t i = 0; i < vocab; ++i)
      if (!(row.mask[i / 32] >> (i % 32) & 1)) s.shaped[i] = -INFINITY;
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

// The lowest scaled logit that top_k leaves, of `n` values (which it reorders).
LLMC_INLINE float top_k_threshold(float* values, int64_t n, int64_t top_k) {
  std::nth_element(values, values + top_k - 1, values + n, [](float a, float b) { return a > b; });
  return values[top_k - 1];
}

// The lowest scaled logit that top_p leaves. Weights are whole units of 2^-40 of the top token's; values
// without one (below -28) are behind all mass and never stay.
LLMC_INLINE float top_p_threshold(float* values, int64_t n, double top_p) {
  const float* end = std::partition(values, values + n, [](float v) { return v > -28.0f; });
  const int64_t heavy = end - values;
  std::sort(values, values + heavy, [](float a, float b) { return a > b; });
  const auto weight = [](float v) { return static_cast<int64_t>(std::floor(noise_exp(v) * 0x1p40)); };
  int64_t total = 0, before = 0;
  for (int64_t i = 0; i < heavy; ++i) total += weight(values[i]);
  const int64_t limit = static_cast<int64_t>(top_p * static_cast<double>(total));
  float threshold = values[0];
  for (int64_t i = 0; i < heavy && (i == 0 || before < limit);) {
    threshold = values[i];
    for (; i < heavy && values[i] == threshold; ++i) before += weight(values[i]);
  }
  return threshold;
}

// The lowest value that stays in s.shaped, which is scaled, with its maximum at 0.
LLMC_INLINE float keep_from(int64_t vocab, const SampleRow& row, const SampleScratch& s) {
  float least = -3.402823466e+38f;
  const auto gather = [&] {
    int64_t n = 0;
    for (int64_t i = 0; i < vocab; ++i)
      if (s.shaped[i] >= least) s.values[n++] = s.shaped[i];
    return n;
  };
  if (row.min_p > 0.0) {
    float lowest = 0.0f;  // exp is monotone: the lowest value that passes decides for all
    const double hopeless = noise_log(row.min_p) - 1e-6;
    for (int64_t i = 0; i < vocab; ++i)
      if (s.shaped[i] < lowest && s.shaped[i] > hopeless && noise_exp(s.shaped[i]) >= row.min_p) lowest = s.shaped[i];
    least = lowest;
  }
  if (row.top_k > 0) {
    const int64_t n = gather();
    if (row.top_k < n) least = std::max(least, top_k_threshold(s.values, n, row.top_k));
  }
  if (row.top_p < 1.0) least = std::max(least, top_p_threshold(s.values, gather(), row.top_p));
  return least;
}

// The next token, or -1 where none may be chosen: NaN or +inf among the logits, or nothing left by masks.
LLMC_KERNEL inline int64_t sample_token(const float* logits, int64_t vocab, const SampleRow& row,
                                        const SampleScratch& s) {
  const IeeeArithmetic ieee;
  if (!best_of(logits, 0, vocab).finite) return -1;
  shape_logits(logits, vocab, row, s);
  const Best best = best_of(s.shaped, 0, vocab);
  if (best.value == -INFINITY) return -1;
  if (row.temperature == 0.0f) return best.index;
  for (int64_t i = 0; i < vocab; ++i) s.shaped[i] = (s.shaped[i] - best.value) / row.temperature;
  const float least = std::max(keep_from(vocab, row, s), static_cast<float>(kMinNoise - kMaxNoise));
  const uint32_t position = static_cast<uint32_t>(row.num_tokens);
  int64_t token = -1;
  double top = 0.0;
  for (int64_t i = 0; i < vocab; ++i) {
    if (!(s.shaped[i] >= least)) continue;
    const double score = static_cast<double>(s.shaped[i]) + gumbel(row.seed, position, static_cast<uint32_t>(i));
    if (token < 0 || score > top) token = i, top = score;
  }
  return token;
}

// Natural logprob of `token` under the model's own distribution, its rank, and the `count` best alternatives'.
// Within rounding of the oracle's: its sum is numpy's.
LLMC_KERNEL inline void token_logprob(const float* logits, int64_t vocab, int64_t token, int64_t count,
                                      double* logprob, int64_t* rank, int32_t* top, double* top_logprobs) {
  const IeeeArithmetic ieee;
  const double peak = best_of(logits, 0, vocab).value;
  double total = 0.0;
  int64_t ahead = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    total += noise_exp(static_cast<double>(logits[i]) - peak);
    ahead += logits[i] > logits[token] || (logits[i] == logits[token] && i < token);
  }
  const double normaliser = peak + noise_log(total);
  *logprob = static_cast<double>(logits[token]) - normaliser;
  *rank = ahead;
  const int64_t found = top_ids(logits, vocab, count, top);
  for (int64_t i = 0; i < found; ++i) top_logprobs[i] = static_cast<double>(logits[top[i]]) - normaliser;
}

LLMC_END
