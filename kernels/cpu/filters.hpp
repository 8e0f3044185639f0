// Which logits a filter keeps, as one threshold on the value: min_p, top_k and top_p of runtime/sampling.py.
// Values are scaled, with their maximum at 0. Each filter is exact, and takes few passes over the values.
#pragma once

#include "math.hpp"
#include "noise.hpp"
#include "select.hpp"

LLMC_BEGIN

constexpr float kAnything = -3.402823466e+38f;  // keeps all but -inf
constexpr float kNoWeight = -28.0f;             // e^x * 2^40 is below 1 here

// The next float below: `v >= x` is `v > below(x)`.
LLMC_INLINE float below(float x) { return std::nextafter(x, -INFINITY); }

// The lowest value whose weight reaches min_p: weights grow with values, so one search decides for all.
LLMC_INLINE float min_p_threshold(double min_p) {
  uint32_t passes = 0, fails = bits_of(705.0f);  // magnitudes of negative values, as bits
  while (fails - passes > 1) {
    const uint32_t middle = passes + (fails - passes) / 2;
    (noise_exp(-static_cast<double>(float_of(middle))) >= min_p ? passes : fails) = middle;
  }
  return -float_of(passes);
}

// Copies the values > bound to `out`; gives their number.
LLMC_INLINE int64_t gather_above(const float* x, int64_t n, float bound, float* out) {
  int64_t count = 0, i = 0;
  const F16 low = set1(bound);
  for (; i + 16 <= n; i += 16) {
    if (!any(less(low, load(x + i)))) continue;
    for (int64_t j = i; j < i + 16; ++j) {
      out[count] = x[j];
      count += x[j] > bound;
    }
  }
  for (; i < n; ++i)
    if (x[i] > bound) out[count++] = x[i];
  return count;
}

// A value that at least `count` of x[n] reach, or -inf where none was found: the count-th largest of the
// maxima of strips, each lane of 32 vectors being one. `maxima` holds n / 32 values.
LLMC_INLINE float reached_by(const float* x, int64_t n, int64_t count, float* maxima) {
  int64_t strips = 0;
  for (int64_t i = 0; i + 512 <= n; i += 512, strips += 16) {
    F16 top = load(x + i);
    for (int64_t j = i + 16; j < i + 512; j += 16) top = max(top, load(x + j));
    store(maxima + strips, top);
  }
  if (strips < count) return -INFINITY;
  std::nth_element(maxima, maxima + count - 1, maxima + strips, [](float a, float b) { return a > b; });
  return maxima[count - 1];
}

// The lowest value that top_k leaves of those >= least; `least` where that is all. `values` holds n.
LLMC_INLINE float top_k_threshold(const float* x, int64_t n, float least, int64_t top_k, float* values) {
  const float reached = top_k < n ? reached_by(x, n, top_k, values) : -INFINITY;
  const int64_t kept = gather_above(x, n, below(std::max(least, reached)), values);
  if (kept <= top_k && reached <= least) return least;
  std::nth_element(values, values + top_k - 1, values + kept, [](float a, float b) { return a > b; });
  return values[top_k - 1];
}

// Weights of values <= 0 in whole units of 2^-40 of the top token's.
LLMC_INLINE void weights_of(const float* values, int64_t count, int64_t* out) {
  double wide[8] = {}, weight[8];
  for (int64_t j = 0; j < count; ++j) wide[j] = values[j];
  noise_exp8(wide, weight);
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<int64_t>(weight[j] * 0x1p40);
}

// The lowest value that top_p leaves of values[n] (which it reorders): the mass of all greater ones is below
// top_p of the total. Masses are summed in buckets of equal width, and values sorted in one bucket alone;
// values without weight are behind all mass and never stay.
LLMC_INLINE float top_p_threshold(float* values, int64_t n, double top_p) {
  constexpr int kBuckets = 512;
  constexpr float kPerUnit = kBuckets / 28.0f;
  const auto bucket_of = [](float v) { return std::min(static_cast<int>(-v * kPerUnit), kBuckets - 1); };
  int64_t mass[kBuckets] = {}, total = 0;
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t count = n - i < 8 ? n - i : 8;
    int64_t weight[8];
    weights_of(values + i, count, weight);
    for (int64_t j = 0; j < count; ++j) mass[bucket_of(values[i + j])] += weight[j], total += weight[j];
  }
  const int64_t limit = static_cast<int64_t>(top_p * static_cast<double>(total));
  int64_t before = 0;
  int bucket = 0;
  for (int64_t sum = 0, b = 0; b < kBuckets && (b == 0 || sum < limit); sum += mass[b++])
    if (mass[b]) bucket = static_cast<int>(b), before = sum;
  const int64_t held =
      std::partition(values, values + n, [&](float v) { return bucket_of(v) == bucket; }) - values;
  std::sort(values, values + held, [](float a, float b) { return a > b; });
  float threshold = values[0];
  for (int64_t i = 0; i < held && (i == 0 || before < limit);) {
    threshold = values[i];
    int64_t weight;
    weights_of(values + i, 1, &weight);
    for (; i < held && values[i] == threshold; ++i) before += weight;
  }
  return threshold;
}

LLMC_END
