// `tile_dot` with AVX-512 VNNI, straight from the packed stream. Included by dot.hpp.
#pragma once

LLMC_BEGIN

// acc += four unsigned codes times four signed activations, in each dword. Inline assembly, because GCC 12
// does not fold a broadcast into the instruction and spills what it hoists instead.
LLMC_INLINE void dot4(__m512i& acc, __m512i codes, const int8_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(acc)
      : "v"(codes), "m"(*reinterpret_cast<const int32_t __attribute__((may_alias, aligned(1)))*>(four)));
}

LLMC_INLINE __m512i scale_zero(const uint8_t* zeros, int32_t total) {
  const __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
  return _mm512_mullo_epi32(z, _mm512_set1_epi32(-total));
}

template <Ask A>
LLMC_INLINE void ask_weights(const uint8_t* address) {
  if (A == Ask::kFirst) prefetch(address);
  else prefetch_l2(address);
}

// sum[J][R] += codes * limbs over one unit, for halves j ... j + J - 1.
template <class S, Ask A, int R, int J>
LLMC_INLINE void unit_sums(const uint8_t* codes, const int8_t* const* limbs, int64_t offset, int j, int64_t ahead,
                           __m512i (&sum)[J][R]) {
  const __m512i mask = _mm512_set1_epi8(15);
  constexpr int kSpan = S::Bits == 4 ? 8 : 4;
#pragma GCC unroll 4
  for (int k = 0; k < S::Unit; k += kSpan) {
    const uint8_t* vectors = codes + k / kSpan * 128;
    if (j == 0) {
      ask_weights<A>(vectors + ahead);
      ask_weights<A>(vectors + ahead + 64);
    }
#pragma GCC unroll 2
    for (int h = 0; h < J; ++h) {
      const __m512i v = _mm512_loadu_si512(vectors + (j + h) * 64);
      const __m512i low = S::Bits == 4 ? _mm512_and_si512(v, mask) : v;
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        dot4(sum[h][r], low, limbs[r] + offset + k);
        if (S::Bits == 4) dot4(sum[h][r], high, limbs[r] + offset + k + 4);
      }
    }
  }
}

template <class S, Ask A, int M>
LLMC_INLINE void tile_dot(const uint8_t* tile, const RowPointers<S, M>& rows, int64_t groups, int64_t ahead,
                          float* out) {
  constexpr int R = M * S::Limbs, J = R <= 4 ? 2 : 1;
  __m512 acc[2][M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[0][m] = acc[1][m] = _mm512_setzero_ps();
  const uint8_t* record = tile;
  for (int64_t group = 0; group < groups; ++group, record += S::kRecord) {
    ask_weights<A>(record + ahead);
#pragma GCC unroll 4
    for (int u = 0; u < S::kUnits; ++u) {
      const int64_t unit = group * S::kUnits + u;
#pragma GCC unroll 2
      for (int j = 0; j < 2; j += J) {
        __m512i sum[J][R];
#pragma GCC unroll 2
        for (int h = 0; h < J; ++h)
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            sum[h][r] = S::Zeros ? scale_zero(record + 64 + (j + h) * 16, rows.sums[r][unit])
                                 : _mm512_set1_epi32(-S::kOffset * rows.sums[r][unit]);
        unit_sums<S, A, R, J>(record + S::kHeader + u * S::kUnitBytes, rows.codes, unit * S::Unit, j, ahead, sum);
#pragma GCC unroll 2
        for (int h = 0; h < J; ++h) {
          const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(record + (j + h) * 32));
          const __m512 scale = _mm512_cvtph_ps(half);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            __m512i whole = sum[h][m * S::Limbs];
            if (S::Limbs == 2)
              whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), sum[h][m * S::Limbs + S::Limbs - 1]);
            const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scales[m][unit]));
            acc[j + h][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), factor, acc[j + h][m]);
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    _mm512_storeu_ps(out + m * kTileRows, acc[0][m]);
    _mm512_storeu_ps(out + m * kTileRows + 16, acc[1][m]);
  }
}

LLMC_END
