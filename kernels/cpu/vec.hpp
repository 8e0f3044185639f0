// Vectors of sixteen lanes, the unit of every elementwise and reducing kernel: because the number of lanes
// is the same at every level, so is each reduction's order, and with it each bit.
#pragma once

#include "isa.hpp"

#if LLMC_AVX512
#include "vec_avx512.hpp"
#elif LLMC_AVX2
#include "vec_avx2.hpp"
#else
#include "vec_generic.hpp"
#endif

LLMC_BEGIN

LLMC_INLINE F16 zero() { return set1(0.0f); }
LLMC_INLINE F16 negate(F16 a) {
  const I16 bits = as_int(a), sign = set1(INT32_MIN);
  return as_float(bits + sign);  // adding the top bit flips it
}
LLMC_INLINE F16 abs(F16 a) { return as_float(as_int(a) & set1(INT32_MAX)); }
// `magnitude` with the sign of `sign`; `magnitude` must not be negative.
LLMC_INLINE F16 with_sign(F16 magnitude, F16 sign) {
  return as_float(as_int(magnitude) | (as_int(sign) & set1(INT32_MIN)));
}

// Nearest integer, ties to even, for |a| < 2^22: as a float, and as an int.
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23
LLMC_INLINE F16 round_even(F16 a) { return (a + set1(kRoundMagic)) - set1(kRoundMagic); }
LLMC_INLINE I16 round_int(F16 a) {
  return as_int(a + set1(kRoundMagic)) - set1(wrap_bits(kRoundMagic));
}

// Sixteen bfloat16, rounded to nearest even.
LLMC_INLINE I16 bf16_bits(F16 a) {
  const I16 bits = as_int(a);
  const I16 rounded = shift_right<16>(bits + set1(0x7fff) + (shift_right<16>(bits) & set1(1)));
  return select(is_nan(a), shift_right<16>(bits) | set1(0x40), rounded);
}
LLMC_INLINE void store(bf16* p, F16 a) { store_low16(p, bf16_bits(a)); }

LLMC_INLINE F16 load_first(const bf16* p, int count) {
  if (count >= 16) return load(p);
  bf16 whole[16] = {};
  for (int i = 0; i < count; ++i) whole[i] = p[i];
  return load(whole);
}
LLMC_INLINE F16 load_first(const f16* p, int count) {
  if (count >= 16) return load(p);
  f16 whole[16] = {};
  for (int i = 0; i < count; ++i) whole[i] = p[i];
  return load(whole);
}
LLMC_INLINE void store_first(bf16* p, F16 a, int count) {
  bf16 whole[16];
  store(whole, a);
  for (int i = 0; i < (count < 16 ? count : 16); ++i) p[i] = whole[i];
}

LLMC_INLINE I16 lane_numbers() {
  constexpr int32_t kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kNumbers);
}
// Sixteen dwords of any bytes, and one dword of four bytes in every lane.
LLMC_INLINE I16 load_dwords(const void* p) {
  int32_t words[16];
  std::memcpy(words, p, 64);
  return load(words);
}
LLMC_INLINE I16 repeat_dword(const void* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return set1(word);
}

LLMC_END
