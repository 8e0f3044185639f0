// Batches of integer products on tile registers: the same exact int32 sums as `tile_dot`, hence the same bits.
//
// A step takes two tiles of activations (16 rows in two limbs, or 32 rows in one) times two tiles of codes (one
// tile of 32 weight rows): four tiles of sums. Codes of a unit are widened once for a whole panel of rows; the sums
// of a step are scaled into the panel's results while the next step multiplies.
#pragma once

#include "dot.hpp"
#include "tiles_amx.hpp"

LLMC_BEGIN

constexpr int kAmxRows = 9;      // fewer rows are faster by VNNI
constexpr int kPanelRows = 128;  // of results in the first-level cache, 16 KB

template <class S>
constexpr int kStepRows = 32 / S::Limbs;

// Registers: sums 0-3 (activation tile, half), activations 4-5, codes 6-7.
template <class S>
inline TileConfig step_config(int rows) {
  constexpr int kBytes = S::Unit < 64 ? S::Unit : 64;
  TileConfig config;
  for (int a = 0; a < 2; ++a) {
    const int left = S::Limbs == 2 ? rows : rows - 16 * a;
    const int some = left < 1 ? 1 : left < 16 ? left : 16;  // a register without rows must not be named
    config.set(4 + a, some, kBytes);
    config.set(2 * a, some, 64);
    config.set(2 * a + 1, some, 64);
  }
  config.set(6, kBytes / 4, 64);
  config.set(7, kBytes / 4, 64);
  return config;
}

// Codes of one unit as rows of code tiles: [half][k / 4][16 weight rows][4].
template <class S>
LLMC_INLINE void widen_unit(const uint8_t* codes, uint8_t* out) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int k = 0; k < S::Unit; k += 8)
    for (int j = 0; j < 2; ++j) {
      uint8_t* rows = out + (j * (S::Unit / 4) + k / 4) * 64;
      if (S::Bits == 4) {
        const __m512i v = _mm512_loadu_si512(codes + (k / 8 * 2 + j) * 64);
        _mm512_store_si512(rows, _mm512_and_si512(v, mask));
        _mm512_store_si512(rows + 64, _mm512_and_si512(_mm512_srli_epi16(v, 4), mask));
      } else {
        _mm512_store_si512(rows, _mm512_loadu_si512(codes + (k / 4 * 2 + j) * 64));
        _mm512_store_si512(rows + 64, _mm512_loadu_si512(codes + (k / 4 * 2 + 2 + j) * 64));
      }
    }
}

// One step's sums [activation tile][half][16][16] of one unit.
template <class S>
LLMC_INLINE void multiply(Tiles& tiles, const QuantRows& x, int64_t row, int64_t unit, int rows, const uint8_t* codes,
                          int32_t (*sums)[256]) {
  const bool both = S::Limbs == 2 || rows > 16;
  const int64_t stride = S::Limbs * x.code_stride;
  const int8_t* first = x.codes + row * stride + unit * S::Unit;
  const int8_t* second = first + (S::Limbs == 2 ? x.code_stride : 16 * stride);
  tiles.clear<0>();
  tiles.clear<1>();
  tiles.clear<2>();
  tiles.clear<3>();
  for (int k = 0; k < S::Unit; k += 64) {
    tiles.load<6>(codes + k / 4 * 64, 64);
    tiles.load<7>(codes + (S::Unit / 4 + k / 4) * 64, 64);
    tiles.load<4>(first + k, stride);
    tiles.dot<0, 4, 6>();
    tiles.dot<1, 4, 7>();
    if (both) {
      tiles.load<5>(second + k, stride);
      tiles.dot<2, 5, 6>();
      tiles.dot<3, 5, 7>();
    }
  }
  tiles.store<0>(sums[0], 64);
  tiles.store<1>(sums[1], 64);
  if (both) {
    tiles.store<2>(sums[2], 64);
    tiles.store<3>(sums[3], 64);
  }
}

// results[rows][32] += scaled sums of one unit, less the codes' zero points: as in dot_avx512.hpp.
template <class S>
LLMC_INLINE void scale_sums(const int32_t (*sums)[256], const QuantRows& x, int64_t row, int64_t unit, int rows,
                            const uint8_t* record, float* results) {
  for (int j = 0; j < 2; ++j) {
    const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(record + j * 32)));
    for (int m = 0; m < rows; ++m) {
      const int32_t* totals = x.sums + (row + m) * S::Limbs * x.unit_stride + unit;
      __m512i whole = _mm512_load_si512(S::Limbs == 2 ? sums[j] + m * 16 : sums[m / 16 * 2 + j] + m % 16 * 16);
      int32_t total = totals[0];
      if (S::Limbs == 2) {
        whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), _mm512_load_si512(sums[2 + j] + m * 16));
        total = total * 256 + totals[x.unit_stride];
      }
      const __m512i offset = S::Zeros ? scale_zero(record + 64 + j * 16, total) : _mm512_set1_epi32(-S::kOffset * total);
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[(row + m) * x.unit_stride + unit]));
      float* to = results + m * kTileRows + j * 16;
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(whole, offset));
      _mm512_store_ps(to, _mm512_fmadd_ps(sum, factor, _mm512_load_ps(to)));
    }
  }
}

// results[rows][32] of `rows` activations from `first` on with one tile of weights. Every step but the last has
// whole tiles; `tiles` is configured for that last one where there is but one.
template <class S>
LLMC_KERNEL void panel_dot(Tiles& tiles, const uint8_t* tile, const QuantRows& x, int64_t first, int rows,
                           int64_t groups, float* results) {
  constexpr int kRows = kStepRows<S>;
  alignas(64) uint8_t codes[8 * S::Unit * 4];
  alignas(64) int32_t sums[2][4][256];
  std::memset(results, 0, static_cast<size_t>(rows) * kTileRows * 4);
  for (int64_t unit = 0; unit < groups * S::kUnits; ++unit) {
    const uint8_t* record = tile + unit / S::kUnits * S::kRecord;
    widen_unit<S>(record + S::kHeader + unit % S::kUnits * S::kUnitBytes, codes);
    for (size_t line = 0; line < S::kUnitBytes; line += 64) prefetch(record + kPrefetchBytes + line);
    int turn = 0;
    for (int row = 0; row < rows; row += kRows, turn ^= 1) {
      const int count = rows - row < kRows ? rows - row : kRows;
      multiply<S>(tiles, x, first + row, unit, count, codes, sums[turn]);
      if (row > 0)
        scale_sums<S>(sums[turn ^ 1], x, first + row - kRows, unit, kRows, record, results + (row - kRows) * kTileRows);
    }
    const int last = (rows - 1) / kRows * kRows;
    scale_sums<S>(sums[turn ^ 1], x, first + last, unit, rows - last, record, results + last * kTileRows);
  }
}

LLMC_END
