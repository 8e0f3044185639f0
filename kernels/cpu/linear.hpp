// Matrix products with packed integer weights: any number of rows, and each row's bits its own.
//
// Batches reread a tile (K * 32 codes, in the second-level cache) for every eight limbs of activations: with
// the sums and the results of eight limbs in registers this reaches 70-90 % of the integer peak, more than
// widening a block of codes for larger register tiles did.
#pragma once

#include "dot.hpp"

LLMC_BEGIN

// What becomes of a product p: y = p + bias, or y = (p + bias) + y.
enum class Into { kStore, kAdd };

template <Into I>
LLMC_INLINE void put_tile(const float* acc, const float* bias, float* y, int64_t columns) {
  for (int64_t i = 0; i < kTileRows && i < columns; i += 16) {
    const int count = static_cast<int>(columns - i < 16 ? columns - i : 16);
    F16 value = load(acc + i);
    if (bias) value = value + load_first(bias + i, count);
    if (I == Into::kAdd) value = value + load_first(y + i, count);
    if (count == 16) store(y + i, value);
    else store_first(y + i, value, count);
  }
}

// Rows of one pass over a tile: as equal as can be, because a pass of one row costs half of one of eight.
LLMC_INLINE int64_t row_chunk(int64_t rows, int64_t most) {
  const int64_t passes = (rows + most - 1) / most;
  return (rows + passes - 1) / passes;
}

// One product: y[rows, ldy] (+)= x[rows] @ weight[out_features, in_features].T + bias.
// `index`, where not null, holds for each row the row of `x` to take. `bias` may be null.
struct Product {
  const uint8_t* weight;
  QuantRows x;
  const int32_t* index;
  int64_t rows;
  const float* bias;
  float* y;
  int64_t ldy, in_features, out_features;
};

template <class S, int M, Into I>
LLMC_KERNEL void dot_tiles(const Product& p, int64_t first, int64_t tile_begin, int64_t tile_end) {
  const RowPointers<S, M> rows = row_pointers<S, M>(p.x, p.index, first);
  const size_t bytes = S::tile_bytes(p.in_features);
  alignas(64) float acc[M * kTileRows];
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    tile_dot<S, M>(p.weight + tile * bytes, rows, S::groups(p.in_features), acc);
    const int64_t column = tile * kTileRows;
    for (int m = 0; m < M; ++m)
      put_tile<I>(acc + m * kTileRows, p.bias ? p.bias + column : nullptr, p.y + (first + m) * p.ldy + column,
                  p.out_features - column);
  }
}

// Calls dot_tiles for `count` rows, at most kDotRows<S>.
template <class S, Into I, int M = kDotRows<S>>
LLMC_INLINE void dot_rows(const Product& p, int64_t first, int64_t count, int64_t tile_begin, int64_t tile_end) {
  if (count == M) return dot_tiles<S, M, I>(p, first, tile_begin, tile_end);
  if constexpr (M > 1) dot_rows<S, I, M - 1>(p, first, count, tile_begin, tile_end);
}

// The tiles [tile_begin, tile_end) of a product, by one thread.
template <class S, Into I>
inline void linear_tiles(const Product& p, int64_t tile_begin, int64_t tile_end) {
  if (p.rows <= kDotRows<S>) return dot_rows<S, I>(p, 0, p.rows, tile_begin, tile_end);
  const int64_t chunk = row_chunk(p.rows, kDotRows<S>);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile)
    for (int64_t first = 0; first < p.rows; first += chunk) {
      const int64_t left = p.rows - first;
      dot_rows<S, I>(p, first, left < chunk ? left : chunk, tile, tile + 1);
    }
}

// The product, shared among threads by whole multiples of `grain` tiles.
template <class S, Into I = Into::kStore>
inline void quantized_linear(int tid, int nt, const Product& p, int64_t grain = 1) {
  const Range mine = share(tid, nt, tiles_of(p.out_features), grain);
  if (p.rows > 0 && mine.begin < mine.end) linear_tiles<S, I>(p, mine.begin, mine.end);
}

LLMC_END
