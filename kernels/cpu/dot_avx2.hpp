// `tile_dot` with AVX2. Included by dot.hpp.
//
// vpmaddubsw saturates at int16: two products of a 4-bit code and a limb are at most 2 * 15 * 128 = 3840, so
// eight results may be added in int16 before they are widened. 8-bit codes would overflow at once and are
// taken as two planes of four bits, code = 16 high + low.
#pragma once

LLMC_BEGIN

LLMC_INLINE __m256i broadcast4(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// sum[r] += codes * limb over one unit, for the eight tile rows of quarter `q` and R limbs.
template <class S, int R>
LLMC_INLINE void unit_sums(const uint8_t* codes, const int8_t* const* limbs, int64_t offset, int q, __m256i* sum) {
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  constexpr int kSpan = S::Bits == 4 ? 8 : 4;
  constexpr int kBlock = 32;  // activations summed in int16
  for (int block = 0; block < S::Unit; block += kBlock) {
    __m256i low_sum[R], high_sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) low_sum[r] = high_sum[r] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int k = block; k < block + kBlock; k += kSpan) {
      const uint8_t* vector = codes + k / kSpan * 128 + q * 32;
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(vector));
      const __m256i low = _mm256_and_si256(v, mask), high = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int8_t* a = limbs[r] + offset + k;
        const __m256i first = broadcast4(a), second = S::Bits == 4 ? broadcast4(a + 4) : first;
        low_sum[r] = _mm256_add_epi16(low_sum[r], _mm256_maddubs_epi16(low, first));
        if (S::Bits == 4) low_sum[r] = _mm256_add_epi16(low_sum[r], _mm256_maddubs_epi16(high, second));
        else high_sum[r] = _mm256_add_epi16(high_sum[r], _mm256_maddubs_epi16(high, second));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(low_sum[r], ones));
      if (S::Bits == 8) sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(high_sum[r], sixteen));
    }
  }
}

template <class S, Ask, int M>
LLMC_INLINE void tile_dot(const uint8_t* tile, const RowPointers<S, M>& rows, int64_t groups, int64_t ahead,
                          float* out) {
  constexpr int R = M * S::Limbs;
  for (int i = 0; i < M * kTileRows; i += 16) store(out + i, zero());
  for (int64_t unit = 0; unit < groups * S::kUnits; ++unit) {
    const uint8_t* record = tile + unit / S::kUnits * S::kRecord;
    const uint8_t* codes = record + S::kHeader + unit % S::kUnits * S::kUnitBytes;
    for (size_t line = 0; line < S::kUnitBytes; line += 64) prefetch(codes + ahead + line);
    for (int q = 0; q < 4; ++q) {
      __m256i sum[R];
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(record + q * 16));
      const __m256 scale = _mm256_cvtph_ps(half);
      __m256i zeros = _mm256_set1_epi32(S::kOffset);
      if (S::Zeros) zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(record + 64 + q * 8)));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i total = _mm256_set1_epi32(-rows.sums[r][unit]);
        sum[r] = _mm256_mullo_epi32(zeros, total);
      }
      unit_sums<S, R>(codes, rows.codes, unit * S::Unit, q, sum);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __m256i whole = sum[m * S::Limbs];
        if (S::Limbs == 2) whole = _mm256_add_epi32(_mm256_slli_epi32(whole, 8), sum[m * S::Limbs + S::Limbs - 1]);
        const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(rows.scales[m][unit]));
        float* acc = out + m * kTileRows + q * 8;
        _mm256_storeu_ps(acc, _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), factor, _mm256_loadu_ps(acc)));
      }
    }
  }
}

LLMC_END
