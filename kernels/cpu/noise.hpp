// Philox4x32-10 and Gumbel noise, operation for operation as runtime/philox.py and runtime/noise.py have it.
// float64, round to nearest even, nothing fused.
#pragma once

#include <cmath>

#include "isa.hpp"

LLMC_BEGIN

// Gradual underflow for the life of the object, as numpy has it.
class IeeeArithmetic {
 public:
#if LLMC_X86
  IeeeArithmetic() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ & ~0xe040u); }
  ~IeeeArithmetic() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ & ~(uint64_t{7} << 22)));
  }
  ~IeeeArithmetic() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  IeeeArithmetic() {}
#endif
};

// The random bits of vocabulary indexes 4 * block ... 4 * block + 3 at `position` of a sequence with `seed`.
// (Salmon et al. 2011)
LLMC_INLINE void block_bits(uint64_t seed, uint32_t position, uint32_t block, uint32_t* c) {
  c[0] = block, c[1] = position, c[2] = c[3] = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c[0], product1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
    c[0] = next0, c[1] = static_cast<uint32_t>(product1);
    c[2] = next2, c[3] = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}
LLMC_INLINE uint32_t token_bits(uint64_t seed, uint32_t position, uint32_t id) {
  uint32_t c[4];
  block_bits(seed, position, id / 4, c);
  return c[id % 4];
}

constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33, kLog2EDouble = 0x1.71547652b82fep+0;
constexpr double kMaxNoise = 22.9, kMinNoise = -3.2;

LLMC_INLINE double double_of(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

// Natural logarithm of a positive normal number.
LLMC_INLINE double noise_log(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023;
  double mantissa = double_of((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (mantissa > 0x1.6a09e667f3bcdp+0) mantissa = mantissa * 0.5, ++exponent;
  const double power = static_cast<double>(exponent), s = (mantissa - 1.0) / (mantissa + 1.0), t = s * s;
  double series = 1.0 / 21.0;
  for (int k = 9; k >= 0; --k) series = series * t + 1.0 / (2 * k + 1);
  return power * kLn2High + ((s + s) * series + power * kLn2Low);
}

// e^value for value <= 0; 0 below -700.
LLMC_INLINE double noise_exp(double value) {
  if (value < -700.0) return 0.0;
  constexpr double kFactorials[] = {6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                    720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0};
  const double power = std::nearbyint(value * kLog2EDouble);
  const double r = (value - power * kLn2High) - power * kLn2Low;
  double series = 1.0 / kFactorials[0];
  for (int i = 1; i < 14; ++i) series = series * r + 1.0 / kFactorials[i];
  return series * double_of(static_cast<uint64_t>(static_cast<int64_t>(power) + 1023) << 52);
}

// noise_exp of eight values, lane by lane the same operations: adding 1.5 * 2^52 rounds to a whole number.
typedef double D8 __attribute__((vector_size(64)));
typedef int64_t L8 __attribute__((vector_size(64)));
LLMC_INLINE void noise_exp8(const double* values, double* out) {
  constexpr double kFactorials[] = {6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0,
                                    720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0};
  constexpr double kWhole = 0x1.8p+52;
  const D8 nothing = {}, lowest = nothing - 700.0;
  D8 value;
  std::memcpy(&value, values, 64);
  const L8 gone = value < lowest;
  value = gone ? lowest : value;
  const D8 shifted = value * kLog2EDouble + kWhole;
  const D8 power = shifted - kWhole;
  const D8 r = (value - power * kLn2High) - power * kLn2Low;
  D8 series = nothing + 1.0 / kFactorials[0];
#pragma GCC unroll 16
  for (int i = 1; i < 14; ++i) series = series * r + 1.0 / kFactorials[i];
  L8 bits;
  std::memcpy(&bits, &shifted, 64);
  int64_t whole;
  std::memcpy(&whole, &kWhole, 8);
  bits = (bits - whole + 1023) << 52;
  D8 scale;
  std::memcpy(&scale, &bits, 64);
  series = gone ? nothing : series * scale;
  std::memcpy(out, &series, 64);
}

// Standard Gumbel noise of one vocabulary index, and of 32 random bits.
LLMC_INLINE double gumbel_of(uint32_t bits) {
  const double uniform = (static_cast<double>(bits) + 0.5) * 0x1p-32;
  return -noise_log(-noise_log(uniform));
}
LLMC_INLINE double gumbel(uint64_t seed, uint32_t position, uint32_t id) {
  return gumbel_of(token_bits(seed, position, id));
}

LLMC_END
