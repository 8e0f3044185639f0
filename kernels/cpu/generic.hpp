// Helpers of generated loops: work sharing, and scans, sorts and norms of one line. Plain C++ at every level;
// each line is computed in one ascending order, so results depend on nothing but the line.
#pragma once

#include <algorithm>
#include <cmath>

#include "isa.hpp"

// Rows first ... last - 1 of `total` for this thread: a static split by index.
#define LLMC_SHARE(r, total)                                                         \
  for (int64_t r = (int64_t)(total) * tid / nt, r##_end = (int64_t)(total) * (tid + 1) / nt; r < r##_end; ++r)

LLMC_BEGIN

template <class A, class B>
LLMC_INLINE A max2(A a, B b) { return a > (A)b || a != a ? a : (A)b; }
template <class A, class B>
LLMC_INLINE A min2(A a, B b) { return a < (A)b || a != a ? a : (A)b; }

// Remainder with the sign of the divisor, as Python has it.
LLMC_INLINE int64_t floor_mod(int64_t a, int64_t b) { const int64_t m = a % b; return m != 0 && (m < 0) != (b < 0) ? m + b : m; }
LLMC_INLINE float floor_mod(float a, float b) { const float m = std::fmod(a, b); return m != 0 && (m < 0) != (b < 0) ? m + b : m; }

template <class O, class I>
inline void cumsum_line(O* out, int64_t out_stride, const I* in, int64_t in_stride, int64_t n) {
  O sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    sum += (O)in[j * in_stride];
    out[j * out_stride] = sum;
  }
}

inline void softmax_line(float* out, int64_t out_stride, const float* in, int64_t in_stride, int64_t n) {
  float top = -INFINITY;
  for (int64_t j = 0; j < n; ++j) top = std::max(top, in[j * in_stride]);
  float total = 0;
  for (int64_t j = 0; j < n; ++j) {
    const float weight = top == -INFINITY ? 0 : std::exp(in[j * in_stride] - top);
    out[j * out_stride] = weight;
    total += weight;
  }
  for (int64_t j = 0; j < n; ++j) out[j * out_stride] /= total;
}

// The k first of n values in order, with their indexes; equal values by ascending index. `t` holds n indexes.
inline void order_line(float* values, int64_t* indexes, const float* in, int64_t* t, int64_t n, int64_t k,
                       bool descending) {
  for (int64_t j = 0; j < n; ++j) t[j] = j;
  std::partial_sort(t, t + k, t + n, [&](int64_t a, int64_t b) {
    if (in[a] != in[b]) return descending ? in[a] > in[b] : in[a] < in[b];
    return a < b;
  });
  for (int64_t j = 0; j < k; ++j) {
    indexes[j] = t[j];
    values[j] = in[t[j]];
  }
}

inline float mean_line(const float* in, int64_t n) {
  float sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += in[j];
  return sum / (float)n;
}

inline float variance_line(const float* in, int64_t n, int64_t correction) {
  const float mean = mean_line(in, n);
  float sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += (in[j] - mean) * (in[j] - mean);
  return sum / (float)(n - correction);
}

inline void layer_norm_line(float* out, const float* in, const float* weight, const float* bias, int64_t n,
                            float eps) {
  const float mean = mean_line(in, n);
  const float scale = 1.0f / std::sqrt(variance_line(in, n, 0) + eps);
  for (int64_t j = 0; j < n; ++j) {
    const float value = (in[j] - mean) * scale * (weight ? weight[j] : 1.0f);
    out[j] = value + (bias ? bias[j] : 0.0f);
  }
}

inline void rms_norm_line(float* out, const float* in, const float* weight, const float*, int64_t n, float eps) {
  float sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += in[j] * in[j];
  const float scale = 1.0f / std::sqrt(sum / (float)n + eps);
  for (int64_t j = 0; j < n; ++j) out[j] = in[j] * scale * (weight ? weight[j] : 1.0f);
}

LLMC_END
