// Root-mean-square and layer norms over float32 rows, optionally after adding the residual stream.
// Sums run in sixteen lanes over ascending columns and are folded once. In float32 both styles of the
// operators (cast_then_scale, scale_then_cast) are the same arithmetic: n * (weight + offset).
#pragma once

#include <cmath>

#include "share.hpp"
#include "vec.hpp"

LLMC_BEGIN

enum class Norm { kRms, kLayer };

struct NormWeights {
  const float* weight;  // [width], or null
  const float* bias;    // [width], or null; layer norm only
  float eps, offset;
};

LLMC_INLINE F16 load_columns_of(const float* row, int64_t i, int64_t width) {
  return width - i >= 16 ? load(row + i) : load_first(row + i, static_cast<int>(width - i));
}
LLMC_INLINE void store_columns_of(float* row, int64_t i, int64_t width, F16 value) {
  if (width - i >= 16) store(row + i, value);
  else store_first(row + i, value, static_cast<int>(width - i));
}

// total[i] = x[i] + residual[i], where there is one. `total` may be either of them.
LLMC_INLINE void add_row(const float* x, const float* residual, float* total, int64_t width) {
  for (int64_t i = 0; i < width; i += 16)
    store_columns_of(total, i, width, load_columns_of(x, i, width) + load_columns_of(residual, i, width));
}

// out[width] = norm(x[width]). `out` may be `x`.
template <Norm N>
LLMC_KERNEL void norm_row(const float* x, float* out, int64_t width, const NormWeights& w) {
  float mean = 0.0f;
  if (N == Norm::kLayer) {
    F16 sum = zero();
    for (int64_t i = 0; i < width; i += 16) sum = sum + load_columns_of(x, i, width);
    mean = sum_lanes(sum) / static_cast<float>(width);
  }
  F16 squares = zero();
  int64_t i = 0;
  for (; i + 16 <= width; i += 16) {
    const F16 value = load(x + i) - set1(mean);
    squares = fma(value, value, squares);
  }
  if (i < width) {  // lanes beyond the row stay zero rather than minus the mean
    const int left = static_cast<int>(width - i);
    float rest[16] = {};
    for (int j = 0; j < left; ++j) rest[j] = x[i + j] - mean;
    squares = fma(load(rest), load(rest), squares);
  }
  const float variance = sum_lanes(squares) / static_cast<float>(width);
  const F16 factor = set1(1.0f / std::sqrt(variance + w.eps)), centre = set1(mean), offset = set1(w.offset);
  for (i = 0; i < width; i += 16) {
    F16 value = load_columns_of(x, i, width);
    if (N == Norm::kLayer) value = value - centre;
    value = value * factor;
    if (w.weight) value = value * (load_columns_of(w.weight, i, width) + offset);
    if (w.bias) value = value + load_columns_of(w.bias, i, width);
    store_columns_of(out, i, width, value);
  }
}

// out[rows, width] = norm(x), shared among threads by row. Strides may differ; heads are rows too.
template <Norm N>
inline void norm_rows(int tid, int nt, const float* x, int64_t ld_x, float* out, int64_t ld_out, int64_t rows,
                      int64_t width, const NormWeights& w) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) norm_row<N>(x + m * ld_x, out + m * ld_out, width, w);
}

// total = x + residual, out = norm(total), shared by row. `total` may be `x` or `residual`.
template <Norm N>
inline void add_norm_rows(int tid, int nt, const float* x, const float* residual, float* total, float* out,
                          int64_t ld, int64_t rows, int64_t width, const NormWeights& w) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) {
    add_row(x + m * ld, residual + m * ld, total + m * ld, width);
    norm_row<N>(total + m * ld, out + m * ld, width, w);
  }
}

LLMC_END
