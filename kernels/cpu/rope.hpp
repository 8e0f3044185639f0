// Rotary position embedding: angles of a step once, then rotations of query and key heads.
#pragma once

#include <cmath>

#include "share.hpp"
#include "vec.hpp"

LLMC_BEGIN

enum class Rope { kHalf, kInterleaved, kInterleavedToHalf };

// sin and cos of a float32 angle of any size below 2^31 * pi / 2, computed in double without fused operations
// and rounded once: Cody-Waite reduction by pi / 2 in three parts, then Taylor polynomials.
LLMC_INLINE void sin_cos(float angle, float* sin_out, float* cos_out) {
  constexpr double kHigh = 1.57079632673412561417e+00, kMid = 6.07710050630396597660e-11;
  constexpr double kLow = 2.02226624879595063154e-21;  // the parts of pi / 2 have 33 bits, the last the rest
  const double x = static_cast<double>(angle);
  const double quarter = std::nearbyint(x * 6.36619772367581382433e-01);
  const double r = ((x - quarter * kHigh) - quarter * kMid) - quarter * kLow, t = r * r;
  double s = 1.0 / 6227020800.0, c = 1.0 / 479001600.0;
  s = s * t - 1.0 / 39916800.0;
  s = s * t + 1.0 / 362880.0;
  s = s * t - 1.0 / 5040.0;
  s = s * t + 1.0 / 120.0;
  s = s * t - 1.0 / 6.0;
  s = (s * t) * r + r;
  c = c * t - 1.0 / 3628800.0;
  c = c * t + 1.0 / 40320.0;
  c = c * t - 1.0 / 720.0;
  c = c * t + 1.0 / 24.0;
  c = c * t - 0.5;
  c = c * t + 1.0;
  const int64_t turn = static_cast<int64_t>(quarter) & 3;
  const double sine = turn & 1 ? c : s, cosine = turn & 1 ? s : c;
  *sin_out = static_cast<float>(turn & 2 ? -sine : sine);
  *cos_out = static_cast<float>(turn == 1 || turn == 2 ? -cosine : cosine);
}

// table[rows][2][pairs]: cos then sin of float(position) * inv_freq, times scale. Shared by row. One table
// serves every layer with the same frequencies.
LLMC_KERNEL inline void rope_table(int tid, int nt, const int64_t* positions, int64_t rows, const float* inv_freq,
                                   int64_t pairs, float scale, float* table) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    for (int64_t i = 0; i < pairs; ++i) {
      float sine, cosine;
      sin_cos(static_cast<float>(positions[m]) * inv_freq[i], &sine, &cosine);
      table[m * 2 * pairs + i] = cosine * scale;
      table[m * 2 * pairs + pairs + i] = sine * scale;
    }
}

// Rotates 2 * pairs values in place; `angles` is one row of the table.
template <Rope R>
LLMC_INLINE void rotate(float* x, const float* angles, int64_t pairs) {
  const float *cosine = angles, *sine = angles + pairs;
  if (R == Rope::kHalf) {
    int64_t i = 0;
    for (; i + 16 <= pairs; i += 16) {
      const F16 a = load(x + i), b = load(x + pairs + i), c = load(cosine + i), s = load(sine + i);
      store(x + i, a * c - b * s);
      store(x + pairs + i, b * c + a * s);
    }
    for (; i < pairs; ++i) {
      const float a = x[i], b = x[pairs + i];
      x[i] = a * cosine[i] - b * sine[i];
      x[pairs + i] = b * cosine[i] + a * sine[i];
    }
    return;
  }
  float first[512], second[512];
  for (int64_t i = 0; i < pairs; ++i) {
    first[i] = x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i];
    second[i] = x[2 * i + 1] * cosine[i] + x[2 * i] * sine[i];
  }
  for (int64_t i = 0; i < pairs; ++i) {
    x[R == Rope::kInterleaved ? 2 * i : i] = first[i];
    x[R == Rope::kInterleaved ? 2 * i + 1 : pairs + i] = second[i];
  }
}

// One token's heads x[heads][head_dim], in place: the first 2 * pairs values of each head, or the last when
// `tail`. At most 512 pairs.
template <Rope R>
LLMC_KERNEL void rope_heads(float* x, const float* angles, int64_t heads, int64_t head_dim, int64_t pairs,
                            bool tail) {
  for (int64_t h = 0; h < heads; ++h) rotate<R>(x + h * head_dim + (tail ? head_dim - 2 * pairs : 0), angles, pairs);
}

// x[rows] (stride ld) of heads, in place, shared by row.
template <Rope R>
inline void rope_rows(int tid, int nt, float* x, int64_t ld, const float* table, int64_t rows, int64_t heads,
                      int64_t head_dim, int64_t pairs, bool tail) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    rope_heads<R>(x + m * ld, table + m * 2 * pairs, heads, head_dim, pairs, tail);
}

LLMC_END
