// Scalar number formats: bfloat16, float16, and a fused multiply-add that is exact on every machine.
#pragma once

#include "isa.hpp"

LLMC_BEGIN

// Storage types. Distinct from uint16_t so that overloads cannot be confused.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

LLMC_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
LLMC_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// round(a * b + c), rounded once. Without hardware: the product of two floats is exact in double, its sum
// with c is rounded to odd (TwoSum of Knuth finds the error), and rounding that to float is then correct
// (Boldo & Melquiond 2008). Vectorises, unlike a call to libm.
LLMC_INLINE float fma1(float a, float b, float c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  const double sum = product + addend;
  const double virtual_addend = sum - product;
  const double error = (product - (sum - virtual_addend)) + (addend - virtual_addend);
  uint64_t bits;
  std::memcpy(&bits, &sum, 8);
  // Odd already, exact, or not finite (the error of infinity is NaN): nothing to correct.
  const bool adjust = (bits & 1) == 0 && (error > 0.0 || error < 0.0);
  const bool away = (error > 0.0) == (sum > 0.0);
  bits += adjust ? (away ? uint64_t{1} : ~uint64_t{0}) : uint64_t{0};
  double odd;
  std::memcpy(&odd, &bits, 8);
  return static_cast<float>(odd);
#endif
}

LLMC_INLINE int32_t wrap_bits(float value) { return static_cast<int32_t>(bits_of(value)); }

LLMC_INLINE float to_float(float value) { return value; }
LLMC_INLINE float to_float(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
LLMC_INLINE float to_float(f16 value) {
#if defined(__F16C__) && !defined(LLMC_GENERIC)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity, or NaN, which becomes quiet as in hardware
    return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u));
  }
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  return float_of(sign | bits_of(small));
#endif
}

// Round to nearest even; NaN stays NaN (quiet).
LLMC_INLINE bf16 to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return bf16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

LLMC_INLINE void from_float(float value, float* out) { *out = value; }
LLMC_INLINE void from_float(float value, bf16* out) { *out = to_bf16(value); }

LLMC_END
