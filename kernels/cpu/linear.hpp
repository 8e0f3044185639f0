// Matrix products with packed integer weights: any number of rows, and each row's bits its own.
//
// Batches reread a tile (K * 32 codes) for every eight limbs of activations, whose sums and results fill the
// registers, and take rows in blocks whose limbs stay in the second-level cache while all tiles pass by.
#pragma once

#include "dot.hpp"
#if LLMC_AMX
#include "linear_amx.hpp"
#endif

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

// Asks for the two lines that will be written: stores retire in order, and a batch would wait for each of them.
LLMC_INLINE void prefetch_tile_row(const float* y) {
  __builtin_prefetch(y, 1, 3);
  __builtin_prefetch(y + 16, 1, 3);
}

// Rows of one pass over a tile: as equal as can be, because a pass of one row costs half of one of eight.
LLMC_INLINE int64_t row_chunk(int64_t rows, int64_t most) {
  const int64_t passes = (rows + most - 1) / most;
  return (rows + passes - 1) / passes;
}

// Rows of one block: whole passes of `chunk` rows whose activations, of `row_bytes` each, take at most half of a
// common second-level cache, and few enough that each row's page of results has a translation at hand.
LLMC_INLINE int64_t row_block(int64_t chunk, int64_t row_bytes) {
  constexpr int64_t kCacheBytes = int64_t{512} << 10, kMostRows = 64;
  const int64_t rows = kCacheBytes / row_bytes < kMostRows ? kCacheBytes / row_bytes : kMostRows;
  return rows < chunk ? chunk : rows / chunk * chunk;
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

// Rows [first, last), a multiple of M of them, with each of some tiles. Passes of M rows stay in here: what a call
// costs is a tenth of a pass over a narrow matrix. The first pass asks for weights `ahead` bytes on, others `later`.
template <class S, int M, Into I, Ask A>
LLMC_KERNEL void dot_tiles(const Product& p, int64_t first, int64_t last, int64_t tile_begin, int64_t tile_end,
                           int64_t ahead, int64_t later) {
  const size_t bytes = S::tile_bytes(p.in_features);
  alignas(64) float acc[M * kTileRows];
  RowPointers<S, M> rows = row_pointers<S, M>(p.x, p.index, first);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t column = tile * kTileRows;
    const float* bias = p.bias ? p.bias + column : nullptr;
    for (int64_t row = first; row < last; row += M) {
      if (last - first > M) rows = row_pointers<S, M>(p.x, p.index, row);
      float* y = p.y + row * p.ldy + column;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) prefetch_tile_row(y + m * p.ldy);
      tile_dot<S, A>(p.weight + tile * bytes, rows, S::groups(p.in_features), row == first ? ahead : later, acc);
      for (int m = 0; m < M; ++m) put_tile<I>(acc + m * kTileRows, bias, y + m * p.ldy, p.out_features - column);
    }
  }
}

// Rows [first, last), at most kDotRows<S>, in one pass.
template <class S, Into I, Ask A, int M = kDotRows<S>>
LLMC_INLINE void dot_rows(const Product& p, int64_t first, int64_t last, int64_t tile_begin, int64_t tile_end,
                          int64_t ahead) {
  if (last - first == M) return dot_tiles<S, M, I, A>(p, first, last, tile_begin, tile_end, ahead, ahead);
  if constexpr (M > 1) dot_rows<S, I, A, M - 1>(p, first, last, tile_begin, tile_end, ahead);
}

// Rows [first, last) in passes of `chunk` rows, more than half of kDotRows<S>, and one of the rest, tile by tile.
template <class S, Into I, int M = kDotRows<S>>
LLMC_INLINE void dot_block(const Product& p, int64_t first, int64_t last, int64_t chunk, int64_t tile_begin,
                           int64_t tile_end) {
  if (chunk == M) {
    const int64_t whole = first + (last - first) / M * M, bytes = static_cast<int64_t>(S::tile_bytes(p.in_features));
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t later = tile + 1 < tile_end ? bytes : kPrefetchBytes;
      if (whole > first) dot_tiles<S, M, I, Ask::kSecond>(p, first, whole, tile, tile + 1, kPrefetchBytes, later);
      const int64_t ahead = whole > first ? later : kPrefetchBytes;
      if (whole < last) dot_rows<S, I, Ask::kSecond>(p, whole, last, tile, tile + 1, ahead);
    }
    return;
  }
  if constexpr (2 * (M - 1) > kDotRows<S>) dot_block<S, I, M - 1>(p, first, last, chunk, tile_begin, tile_end);
}

#if LLMC_AMX
// Rows [first, first + rows) of one tile: whole steps, or fewer rows than one step has.
template <class S, Into I>
LLMC_KERNEL void panel_tile(const Product& p, int64_t first, int rows, int64_t tile) {
  alignas(64) float results[kPanelRows * kTileRows];
  const TileConfig config = step_config<S>(rows);
  Tiles tiles(config);
  const int64_t column = tile * kTileRows;
  float* y = p.y + first * p.ldy + column;
  for (int m = 0; m < rows; ++m) prefetch_tile_row(y + m * p.ldy);
  panel_dot<S>(tiles, p.weight + tile * S::tile_bytes(p.in_features), p.x, first, rows, S::groups(p.in_features), results);
  for (int m = 0; m < rows; ++m)
    put_tile<I>(results + m * kTileRows, p.bias ? p.bias + column : nullptr, y + m * p.ldy, p.out_features - column);
}

// All rows, in blocks as below. Rows are consecutive: tiles are loaded with a stride.
template <class S, Into I>
inline void amx_tiles(const Product& p, int64_t tile_begin, int64_t tile_end) {
  const int64_t block = round_up<int64_t>((int64_t{1} << 20) / (S::Limbs * p.x.code_stride) + 1, kPanelRows);
  for (int64_t begin = 0; begin < p.rows; begin += block) {
    const int64_t end = begin + block < p.rows ? begin + block : p.rows;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile)
      for (int64_t first = begin; first < end;) {
        const int64_t left = end - first < kPanelRows ? end - first : kPanelRows;
        const int64_t rows = left < kStepRows<S> ? left : left / kStepRows<S> * kStepRows<S>;
        panel_tile<S, I>(p, first, static_cast<int>(rows), tile);
        first += rows;
      }
  }
}
#endif

// The tiles [tile_begin, tile_end) of a product, by one thread.
template <class S, Into I>
inline void linear_tiles(const Product& p, int64_t tile_begin, int64_t tile_end) {
#if LLMC_AMX
  if (p.rows >= kAmxRows && !p.index) return amx_tiles<S, I>(p, tile_begin, tile_end);
#endif
  if (p.rows <= kDotRows<S>) return dot_rows<S, I, Ask::kFirst>(p, 0, p.rows, tile_begin, tile_end, kPrefetchBytes);
  const int64_t chunk = row_chunk(p.rows, kDotRows<S>), block = row_block(chunk, S::Limbs * p.x.code_stride);
  for (int64_t begin = 0; begin < p.rows; begin += block)
    dot_block<S, I>(p, begin, begin + block < p.rows ? begin + block : p.rows, chunk, tile_begin, tile_end);
}

// The product, shared among threads by whole multiples of `grain` tiles.
template <class S, Into I = Into::kStore>
inline void quantized_linear(int tid, int nt, const Product& p, int64_t grain = 1) {
  const Range mine = share(tid, nt, tiles_of(p.out_features), grain);
  if (p.rows > 0 && mine.begin < mine.end) linear_tiles<S, I>(p, mine.begin, mine.end);
}

LLMC_END
