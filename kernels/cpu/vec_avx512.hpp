// Sixteen lanes as one AVX-512 register. Same names and same bits as vec_avx2.hpp and vec_generic.hpp.
#pragma once

#include "number.hpp"

LLMC_BEGIN

struct I16 { __m512i v; };
struct F16 { __m512 v; };
struct M16 { __mmask16 v; };

LLMC_INLINE __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

LLMC_INLINE F16 set1(float x) { return {_mm512_set1_ps(x)}; }
LLMC_INLINE I16 set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
LLMC_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
LLMC_INLINE I16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LLMC_INLINE F16 load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
LLMC_INLINE F16 load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Sixteen bytes, zero or sign extended.
LLMC_INLINE I16 load(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
LLMC_INLINE I16 load(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The first `count` lanes; the rest is zero and is not read.
LLMC_INLINE F16 load_first(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), p)};
}
LLMC_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
LLMC_INLINE void store(int32_t* p, I16 a) { _mm512_storeu_si512(p, a.v); }
LLMC_INLINE void store_first(float* p, F16 a, int count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
}
// The low byte, or low half, of each lane. The masked forms, because GCC 12 miscompiles the others.
LLMC_INLINE void store_low8(void* p, I16 a) { _mm512_mask_cvtepi32_storeu_epi8(p, 0xffff, a.v); }
LLMC_INLINE void store_low16(void* p, I16 a) { _mm512_mask_cvtepi32_storeu_epi16(p, 0xffff, a.v); }

// The two low bytes of each lane of four vectors, the rest of which is 0: dword 4 l + v has those of lanes 4 l ... 4 l + 3
// of vector v.
LLMC_INLINE void store_two_bytes(void* high, void* low, I16 a, I16 b, I16 c, I16 d) {
  const __m512i x = _mm512_packus_epi32(a.v, b.v), y = _mm512_packus_epi32(c.v, d.v), byte = _mm512_set1_epi16(255);
  _mm512_storeu_si512(high, _mm512_packus_epi16(_mm512_srli_epi16(x, 8), _mm512_srli_epi16(y, 8)));
  _mm512_storeu_si512(low, _mm512_packus_epi16(_mm512_and_si512(x, byte), _mm512_and_si512(y, byte)));
}

LLMC_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
LLMC_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
LLMC_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
LLMC_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
LLMC_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN.
LLMC_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
LLMC_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }

LLMC_INLINE I16 operator+(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
LLMC_INLINE I16 operator-(I16 a, I16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LLMC_INLINE I16 operator*(I16 a, I16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
LLMC_INLINE I16 operator&(I16 a, I16 b) { return {_mm512_and_si512(a.v, b.v)}; }
LLMC_INLINE I16 operator|(I16 a, I16 b) { return {_mm512_or_si512(a.v, b.v)}; }
LLMC_INLINE I16 max(I16 a, I16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int N> LLMC_INLINE I16 shift_left(I16 a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> LLMC_INLINE I16 shift_right(I16 a) { return {_mm512_srli_epi32(a.v, N)}; }
template <int N> LLMC_INLINE I16 shift_right_signed(I16 a) { return {_mm512_srai_epi32(a.v, N)}; }

LLMC_INLINE F16 as_float(I16 a) { return {_mm512_castsi512_ps(a.v)}; }
LLMC_INLINE I16 as_int(F16 a) { return {_mm512_castps_si512(a.v)}; }
LLMC_INLINE F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }

// table[index] for indexes below 16.
LLMC_INLINE F16 look_up(const float (&table)[16], I16 index) {
  return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table))};
}
LLMC_INLINE M16 less(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
LLMC_INLINE M16 is_nan(F16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
LLMC_INLINE M16 less(I16 a, I16 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
LLMC_INLINE bool any(M16 m) { return m.v != 0; }
LLMC_INLINE F16 select(M16 m, F16 yes, F16 no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
LLMC_INLINE I16 select(M16 m, I16 yes, I16 no) { return {_mm512_mask_blend_epi32(m.v, no.v, yes.v)}; }

// sum + the four products of unsigned bytes with signed bytes of each dword, exactly.
// Inline assembly, because GCC 12 copies the sums of the intrinsic about.
LLMC_INLINE I16 dot_bytes(I16 sum, I16 unsigned_bytes, I16 signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(unsigned_bytes.v), "v"(signed_bytes.v));
  return sum;
}

// Reductions fold the upper half onto the lower, as in vec_generic.hpp.
#define LLMC_FOLD_FLOAT(name, op128, op256)                                              \
  LLMC_INLINE float name(F16 x) {                                                       \
    const __m256 eight = op256(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));                              \
    const __m128 four = op128(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
    const __m128 two = op128(four, _mm_movehl_ps(four, four));                          \
    return _mm_cvtss_f32(op128(two, _mm_shuffle_ps(two, two, 1)));                      \
  }
#define LLMC_FOLD_INT(name, op128, op256)                                               \
  LLMC_INLINE int32_t name(I16 x) {                                                     \
    const __m256i eight = op256(_mm512_castsi512_si256(x.v), _mm512_extracti32x8_epi32(x.v, 1));                     \
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
