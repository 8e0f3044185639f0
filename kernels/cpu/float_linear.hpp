// Matrix products with float32, float16 or bfloat16 weights; activations stay float32.
// Each output is one chain of fused multiply-adds over ascending k, at every number of rows.
#pragma once

#include "linear.hpp"

LLMC_BEGIN

// The two vectors (32 rows) of weights of columns k and k + 1; `second` is not read when K ends at k.
LLMC_INLINE void load_columns(const float* tile, int64_t k, F16* first, F16* second, bool both) {
  first[0] = load(tile + k * 32);
  first[1] = load(tile + k * 32 + 16);
  second[0] = second[1] = zero();
  if (both) {
    second[0] = load(tile + k * 32 + 32);
    second[1] = load(tile + k * 32 + 48);
  }
}
LLMC_INLINE void load_columns(const f16* tile, int64_t k, F16* first, F16* second, bool) {
  first[0] = load(tile + k * 32);
  first[1] = load(tile + k * 32 + 16);
  second[0] = load(tile + k * 32 + 32);
  second[1] = load(tile + k * 32 + 48);
}
LLMC_INLINE void load_columns(const bf16* tile, int64_t k, F16* first, F16* second, bool) {
  for (int j = 0; j < 2; ++j) {
    int32_t pairs[16];
    std::memcpy(pairs, tile + k * 32 + j * 32, 64);
    const I16 both = load(pairs);
    first[j] = as_float(shift_left<16>(both));
    second[j] = as_float(both & set1(static_cast<int32_t>(0xffff0000u)));
  }
}

struct FloatProduct {
  const void* weight;
  const float* x;  // [*, ldx]
  int64_t ldx;
  const int32_t* index;
  int64_t rows;
  const float* bias;
  float* y;
  int64_t ldy, in_features, out_features;
};

constexpr int kFloatRows = LLMC_AVX512 ? 8 : 2;  // rows whose sums stay in registers

template <class T, int M, Into I>
LLMC_KERNEL void float_tiles(const FloatProduct& p, int64_t first, int64_t tile_begin, int64_t tile_end) {
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = p.x + (p.index ? p.index[first + m] : first + m) * p.ldx;
  const size_t step = float_tile_bytes<T>(p.in_features) / sizeof(T);
  const int64_t K = p.in_features;
  alignas(64) float out[kTileRows];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const T* weight = static_cast<const T*>(p.weight) + tile * step;
    F16 acc[M][2];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
    // Sums stay in registers only where every index into them is a constant: each loop over m is unrolled.
    const int64_t even = K & ~int64_t{1};
    for (int64_t k = 0; k < even; k += 2) {
      F16 w0[2], w1[2];
      const char* line = reinterpret_cast<const char*>(weight + k * kTileRows);
#pragma GCC unroll 4
      for (size_t i = 0; i < 2 * kTileRows * sizeof(T); i += 64) prefetch(line + 2048 + i);
      load_columns(weight, k, w0, w1, true);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const F16 a0 = set1(x[m][k]), a1 = set1(x[m][k + 1]);
        acc[m][0] = fma(w0[0], a0, acc[m][0]);
        acc[m][1] = fma(w0[1], a0, acc[m][1]);
        acc[m][0] = fma(w1[0], a1, acc[m][0]);
        acc[m][1] = fma(w1[1], a1, acc[m][1]);
      }
    }
    if (even < K) {
      F16 w0[2], w1[2];
      load_columns(weight, even, w0, w1, false);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const F16 a0 = set1(x[m][even]);
        acc[m][0] = fma(w0[0], a0, acc[m][0]);
        acc[m][1] = fma(w0[1], a0, acc[m][1]);
      }
    }
    const int64_t column = tile * kTileRows;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      store(out, acc[m][0]);
      store(out + 16, acc[m][1]);
      put_tile<I>(out, p.bias ? p.bias + column : nullptr, p.y + (first + m) * p.ldy + column,
                  p.out_features - column);
    }
  }
}

template <class T, Into I, int M = kFloatRows>
LLMC_INLINE void float_rows(const FloatProduct& p, int64_t first, int64_t count, int64_t begin, int64_t end) {
  if (count == M) return float_tiles<T, M, I>(p, first, begin, end);
  if constexpr (M > 1) float_rows<T, I, M - 1>(p, first, count, begin, end);
}

// The tiles [tile_begin, tile_end) of a product, by one thread.
template <class T, Into I>
inline void float_linear_tiles(const FloatProduct& p, int64_t tile_begin, int64_t tile_end) {
  if (p.rows <= kFloatRows) return float_rows<T, I>(p, 0, p.rows, tile_begin, tile_end);
  const int64_t chunk = row_chunk(p.rows, kFloatRows), block = row_block(chunk, p.ldx * 4);
  for (int64_t begin = 0; begin < p.rows; begin += block) {
    const int64_t end = begin + block < p.rows ? begin + block : p.rows;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile)
      for (int64_t first = begin; first < end; first += chunk)
        float_rows<T, I>(p, first, first + chunk < end ? chunk : end - first, tile, tile + 1);
  }
}

// The product, shared among threads by whole multiples of `grain` tiles. T: float, f16 or bf16.
template <class T, Into I = Into::kStore>
inline void float_linear(int tid, int nt, const FloatProduct& p, int64_t grain = 1) {
  const Range mine = share(tid, nt, tiles_of(p.out_features), grain);
  if (p.rows > 0 && mine.begin < mine.end) float_linear_tiles<T, I>(p, mine.begin, mine.end);
}

LLMC_END
