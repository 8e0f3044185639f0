// Many rows at once with AVX-512 VNNI: two tiles of codes are widened to bytes in a block that stays in the
// first-level cache, and six limbs of activations meet their four vectors in 24 registers of sums.
#pragma once

#include "dot.hpp"

LLMC_BEGIN

constexpr int kPanelLimbs = 6;    // limbs (rows times limbs of a row) of one register block
constexpr int kPanelDepth = 256;  // activations a block of widened codes covers
constexpr int kPanelRows = 192;   // rows whose sums are kept in the second-level cache

// Bytes of one unit of one tile, as [k4][half][16 rows][4 codes].
template <class S>
LLMC_INLINE void widen_group(const uint8_t* codes, uint8_t* out) {
  const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int k8 = 0; k8 < S::Group / 8; ++k8, codes += 128, out += 256) {
    const __m512i first = _mm512_loadu_si512(codes), second = _mm512_loadu_si512(codes + 64);
    _mm512_store_si512(out, _mm512_and_si512(first, mask));
    _mm512_store_si512(out + 64, _mm512_and_si512(second, mask));
    _mm512_store_si512(out + 128, _mm512_and_si512(_mm512_srli_epi16(first, 4), mask));
    _mm512_store_si512(out + 192, _mm512_and_si512(_mm512_srli_epi16(second, 4), mask));
  }
}

// acc[m][T * 32] += rows * T tiles, over one unit. `codes[t]`: bytes of tile t, `records[t]`: its header.
template <class S, int M, int T>
LLMC_INLINE void panel_unit(const uint8_t* const* codes, const uint8_t* const* records,
                            const RowPointers<S, M>& rows, int64_t unit, float* acc) {
  constexpr int R = M * S::Limbs;
  __m512i sum[T * 2][R];
#pragma GCC unroll 4
  for (int v = 0; v < T * 2; ++v)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      sum[v][r] = S::Zeros ? scale_zero(records[v / 2] + 64 + v % 2 * 16, rows.sums[r][unit])
                           : _mm512_set1_epi32(-S::kOffset * rows.sums[r][unit]);
#pragma GCC unroll 1
  for (int k4 = 0; k4 < S::Unit / 4; ++k4) {
    __m512i weight[T * 2];
#pragma GCC unroll 4
    for (int v = 0; v < T * 2; ++v) weight[v] = _mm512_loadu_si512(codes[v / 2] + k4 * 128 + v % 2 * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, rows.codes[r] + unit * S::Unit + k4 * 4, 4);
      const __m512i activation = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < T * 2; ++v)
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[v][r]) : "v"(weight[v]), "v"(activation));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < T * 2; ++v) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(records[v / 2] + v % 2 * 32));
    const __m512 scale = _mm512_cvtph_ps(half);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m512i whole = sum[v][m * S::Limbs];
      if (S::Limbs == 2)
        whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), sum[v][m * S::Limbs + S::Limbs - 1]);
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scales[m][unit]));
      float* to = acc + m * T * kTileRows + v * 16;
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, _mm512_load_ps(to)));
    }
  }
}

template <class S, int M, int T>
LLMC_INLINE void panel_block(const uint8_t* const* codes, const uint8_t* const* records, int64_t first_group,
                             int64_t groups, const QuantRows& x, const int32_t* index, int64_t row, float* acc) {
  const RowPointers<S, M> rows = row_pointers<S, M>(x, index, row);
  const uint8_t *at[T], *header[T];
  for (int64_t group = 0; group < groups; ++group) {
    for (int u = 0; u < S::kUnits; ++u) {
      for (int t = 0; t < T; ++t) {
        at[t] = codes[t] + group * (S::Bits == 4 ? S::Group * kTileRows : S::kRecord) + u * S::Unit * kTileRows;
        header[t] = records[t] + group * S::kRecord;
      }
      panel_unit<S, M, T>(at, header, rows, (first_group + group) * S::kUnits + u, acc);
    }
  }
}

// acc[rows][T * 32] = rows first ... of x times T neighbouring tiles. At most kPanelRows rows.
template <class S, int T>
LLMC_KERNEL void panel(const uint8_t* tile, size_t tile_bytes, int64_t groups, const QuantRows& x,
                       const int32_t* index, int64_t first, int64_t rows, float* acc) {
  constexpr int kRows = kPanelLimbs / S::Limbs;
  constexpr int64_t kGroups = kPanelDepth / S::Group;
  alignas(64) uint8_t wide[T][S::Bits == 4 ? kPanelDepth * kTileRows : 64];
  std::memset(acc, 0, static_cast<size_t>(rows) * T * kTileRows * 4);
  for (int64_t g = 0; g < groups; g += kGroups) {
    const int64_t count = groups - g < kGroups ? groups - g : kGroups;
    const uint8_t *records[T], *codes[T];
    for (int t = 0; t < T; ++t) {
      records[t] = tile + t * tile_bytes + g * S::kRecord;
      codes[t] = S::Bits == 4 ? wide[t] : records[t] + S::kHeader;
      for (int64_t i = 0; S::Bits == 4 && i < count; ++i)
        widen_group<S>(records[t] + i * S::kRecord + S::kHeader, wide[t] + i * S::Group * kTileRows);
    }
    int64_t m = 0;
    for (; m + kRows <= rows; m += kRows)
      panel_block<S, kRows, T>(codes, records, g, count, x, index, first + m, acc + m * T * kTileRows);
    constexpr int kHalf = kRows / 2;  // rows that are left go in threes, then one by one
    for (; kHalf > 1 && m + kHalf <= rows; m += kHalf)
      panel_block<S, kHalf, T>(codes, records, g, count, x, index, first + m, acc + m * T * kTileRows);
    for (; m < rows; ++m)
      panel_block<S, 1, T>(codes, records, g, count, x, index, first + m, acc + m * T * kTileRows);
  }
}

LLMC_END
