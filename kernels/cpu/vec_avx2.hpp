// Sixteen lanes as two AVX2 registers. Same names and same bits as vec_avx512.hpp and vec_generic.hpp.
#pragma once

#include "number.hpp"

LLMC_BEGIN

struct I16 { __m256i a, b; };
struct F16 { __m256 a, b; };
struct M16 { __m256i a, b; };

LLMC_INLINE I16 lane_index() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
LLMC_INLINE M16 first_lanes(int count) {
  const __m256i n = _mm256_set1_epi32(count);
  return {_mm256_cmpgt_epi32(n, lane_index().a), _mm256_cmpgt_epi32(n, lane_index().b)};
}

LLMC_INLINE F16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LLMC_INLINE I16 set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LLMC_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LLMC_INLINE I16 load(const int32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
LLMC_INLINE F16 load(const bf16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  const __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16);
  const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16);
  return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
LLMC_INLINE F16 load(const f16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
LLMC_INLINE I16 load(const uint8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
LLMC_INLINE I16 load(const int8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
LLMC_INLINE F16 load_first(const float* p, int count) {
  const M16 m = first_lanes(count);
  return {_mm256_maskload_ps(p, m.a), _mm256_maskload_ps(p + 8, m.b)};
}
LLMC_INLINE void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
LLMC_INLINE void store(int32_t* p, I16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + 1, x.b);
}
LLMC_INLINE void store_first(float* p, F16 x, int count) {
  const M16 m = first_lanes(count);
  _mm256_maskstore_ps(p, m.a, x.a);
  _mm256_maskstore_ps(p + 8, m.b, x.b);
}
LLMC_INLINE __m256i low16_of(I16 x) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
LLMC_INLINE void store_low16(void* p, I16 x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), low16_of(x));
}
LLMC_INLINE void store_low8(void* p, I16 x) {
  const __m256i bytes = _mm256_and_si256(low16_of(x), _mm256_set1_epi16(0xff));
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm_packus_epi16(low, high));
}

LLMC_INLINE void store_two_bytes_of_half(char* high, char* low, __m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i x = _mm256_packus_epi32(a, b), y = _mm256_packus_epi32(c, d), byte = _mm256_set1_epi16(255);
  const __m256i upper = _mm256_packus_epi16(_mm256_srli_epi16(x, 8), _mm256_srli_epi16(y, 8));
  const __m256i lower = _mm256_packus_epi16(_mm256_and_si256(x, byte), _mm256_and_si256(y, byte));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), upper);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), lower);
}
LLMC_INLINE void store_two_bytes(void* high, void* low, I16 a, I16 b, I16 c, I16 d) {
  char *upper = static_cast<char*>(high), *lower = static_cast<char*>(low);
  store_two_bytes_of_half(upper, lower, a.a, b.a, c.a, d.a);
  store_two_bytes_of_half(upper + 32, lower + 32, a.b, b.b, c.b, d.b);
}

#define LLMC_PAIR(x, y, op) {op((x).a, (y).a), op((x).b, (y).b)}
LLMC_INLINE F16 operator+(F16 x, F16 y) { return LLMC_PAIR(x, y, _mm256_add_ps); }
LLMC_INLINE F16 operator-(F16 x, F16 y) { return LLMC_PAIR(x, y, _mm256_sub_ps); }
LLMC_INLINE F16 operator*(F16 x, F16 y) { return LLMC_PAIR(x, y, _mm256_mul_ps); }
LLMC_INLINE F16 operator/(F16 x, F16 y) { return LLMC_PAIR(x, y, _mm256_div_ps); }
LLMC_INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
LLMC_INLINE F16 max(F16 x, F16 y) { return LLMC_PAIR(x, y, _mm256_max_ps); }
LLMC_INLINE F16 min(F16 x, F16 y) { return LLMC_PAIR(x, y, _mm256_min_ps); }

LLMC_INLINE I16 operator+(I16 x, I16 y) { return LLMC_PAIR(x, y, _mm256_add_epi32); }
LLMC_INLINE I16 operator-(I16 x, I16 y) { return LLMC_PAIR(x, y, _mm256_sub_epi32); }
LLMC_INLINE I16 operator*(I16 x, I16 y) { return LLMC_PAIR(x, y, _mm256_mullo_epi32); }
LLMC_INLINE I16 operator&(I16 x, I16 y) { return LLMC_PAIR(x, y, _mm256_and_si256); }
LLMC_INLINE I16 operator|(I16 x, I16 y) { return LLMC_PAIR(x, y, _mm256_or_si256); }
LLMC_INLINE I16 max(I16 x, I16 y) { return LLMC_PAIR(x, y, _mm256_max_epi32); }
#undef LLMC_PAIR
template <int N> LLMC_INLINE I16 shift_left(I16 x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N> LLMC_INLINE I16 shift_right(I16 x) {
  return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
template <int N> LLMC_INLINE I16 shift_right_signed(I16 x) {
  return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}

LLMC_INLINE F16 as_float(I16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
LLMC_INLINE I16 as_int(F16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
LLMC_INLINE F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

// table[index] for indexes below 16.
LLMC_INLINE __m256 look_up8(__m256 low, __m256 high, __m256i index) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 as the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
}
LLMC_INLINE F16 look_up(const float (&table)[16], I16 index) {
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  return {look_up8(low, high, index.a), look_up8(low, high, index.b)};
}
LLMC_INLINE M16 less(F16 x, F16 y) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
LLMC_INLINE M16 is_nan(F16 x) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q)),
          _mm256_castps_si256(_mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q))};
}
LLMC_INLINE M16 less(I16 x, I16 y) {
  return {_mm256_cmpgt_epi32(y.a, x.a), _mm256_cmpgt_epi32(y.b, x.b)};
}
LLMC_INLINE bool any(M16 m) { return _mm256_movemask_epi8(_mm256_or_si256(m.a, m.b)) != 0; }
LLMC_INLINE F16 select(M16 m, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(m.a)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(m.b))};
}
LLMC_INLINE I16 select(M16 m, I16 yes, I16 no) {
  return {_mm256_blendv_epi8(no.a, yes.a, m.a), _mm256_blendv_epi8(no.b, yes.b, m.b)};
}

// Even and odd bytes go their own ways as int16: vpmaddubsw would saturate.
LLMC_INLINE __m256i dot_bytes(__m256i sum, __m256i u, __m256i s) {
  const __m256i even = _mm256_and_si256(u, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(u, 8);
  const __m256i s_even = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), s_odd = _mm256_srai_epi16(s, 8);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, s_even), _mm256_madd_epi16(odd, s_odd)));
}
LLMC_INLINE I16 dot_bytes(I16 sum, I16 unsigned_bytes, I16 signed_bytes) {
  return {dot_bytes(sum.a, unsigned_bytes.a, signed_bytes.a), dot_bytes(sum.b, unsigned_bytes.b, signed_bytes.b)};
}

// Reductions fold the upper half onto the lower, as in vec_generic.hpp.
#define LLMC_FOLD_FLOAT(name, op128, op256)                                              \
  LLMC_INLINE float name(F16 x) {                                                       \
    const __m256 eight = op256(x.a, x.b);                              \
    const __m128 four = op128(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    const __m128 two = op128(four, _mm_movehl_ps(four, four));                          \
    return _mm_cvtss_f32(op128(two, _mm_shuffle_ps(two, two, 1)));                      \
  }
#define LLMC_FOLD_INT(name, op128, op256)                                               \
  LLMC_INLINE int32_t name(I16 x) {                                                     \
    const __m256i eight = op256(x.a, x.b);                     \
    const __m128i four = op128(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1)); \
    const __m128i two = op128(four, _mm_shuffle_epi32(four, 0x4e));                     \
    return _mm_cvtsi128_si32(op128(two, _mm_shuffle_epi32(two, 0xb1)));                 \
  }
LLMC_FOLD_FLOAT(sum_lanes, _mm_add_ps, _mm256_add_ps)
LLMC_FOLD_FLOAT(max_lanes, _mm_max_ps, _mm256_max_ps)
LLMC_FOLD_INT(sum_lanes, _mm_add_epi32, _mm256_add_epi32)
LLMC_FOLD_INT(max_lanes, _mm_max_epi32, _mm256_max_epi32)
#undef LLMC_FOLD_FLOAT
#undef LLMC_FOLD_INT

LLMC_END
