// Sixteen lanes as an array, in standard C++: the form for any machine, and the meaning of the others.
#pragma once

#include "number.hpp"

LLMC_BEGIN

struct I16 { int32_t v[16]; };
struct F16 { float v[16]; };
struct M16 { int32_t v[16]; };  // all bits set, or none

#define LLMC_LANES(expression)                        \
  do {                                                \
    for (int i = 0; i < 16; ++i) out.v[i] = expression; \
    return out;                                       \
  } while (0)

LLMC_INLINE int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
LLMC_INLINE uint32_t raw(int32_t x) { return static_cast<uint32_t>(x); }

LLMC_INLINE F16 set1(float x) { F16 out; LLMC_LANES(x); }
LLMC_INLINE I16 set1(int32_t x) { I16 out; LLMC_LANES(x); }
LLMC_INLINE F16 load(const float* p) { F16 out; LLMC_LANES(p[i]); }
LLMC_INLINE I16 load(const int32_t* p) { I16 out; LLMC_LANES(p[i]); }
LLMC_INLINE F16 load(const bf16* p) { F16 out; LLMC_LANES(to_float(p[i])); }
LLMC_INLINE F16 load(const f16* p) { F16 out; LLMC_LANES(to_float(p[i])); }
LLMC_INLINE I16 load(const uint8_t* p) { I16 out; LLMC_LANES(p[i]); }
LLMC_INLINE I16 load(const int8_t* p) { I16 out; LLMC_LANES(p[i]); }
LLMC_INLINE F16 load_first(const float* p, int count) { F16 out; LLMC_LANES(i < count ? p[i] : 0.0f); }
LLMC_INLINE void store(float* p, F16 a) { std::memcpy(p, a.v, sizeof a.v); }
LLMC_INLINE void store(int32_t* p, I16 a) { std::memcpy(p, a.v, sizeof a.v); }
LLMC_INLINE void store_first(float* p, F16 a, int count) {
  for (int i = 0; i < (count < 16 ? count : 16); ++i) p[i] = a.v[i];
}
LLMC_INLINE void store_low8(void* p, I16 a) {
  for (int i = 0; i < 16; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(a.v[i]);
}
LLMC_INLINE void store_low16(void* p, I16 a) {
  uint16_t half[16];
  for (int i = 0; i < 16; ++i) half[i] = static_cast<uint16_t>(a.v[i]);
  std::memcpy(p, half, sizeof half);
}

LLMC_INLINE void store_two_bytes(void* high, void* low, I16 a, I16 b, I16 c, I16 d) {
  const I16 vectors[4] = {a, b, c, d};
  for (int i = 0; i < 64; ++i) {
    const int32_t lane = vectors[i % 16 / 4].v[i / 16 * 4 + i % 4];
    static_cast<uint8_t*>(high)[i] = static_cast<uint8_t>(lane >> 8);
    static_cast<uint8_t*>(low)[i] = static_cast<uint8_t>(lane);
  }
}

LLMC_INLINE F16 operator+(F16 a, F16 b) { F16 out; LLMC_LANES(a.v[i] + b.v[i]); }
LLMC_INLINE F16 operator-(F16 a, F16 b) { F16 out; LLMC_LANES(a.v[i] - b.v[i]); }
LLMC_INLINE F16 operator*(F16 a, F16 b) { F16 out; LLMC_LANES(a.v[i] * b.v[i]); }
LLMC_INLINE F16 operator/(F16 a, F16 b) { F16 out; LLMC_LANES(a.v[i] / b.v[i]); }
LLMC_INLINE F16 fma(F16 a, F16 b, F16 c) { F16 out; LLMC_LANES(fma1(a.v[i], b.v[i], c.v[i])); }
LLMC_INLINE F16 max(F16 a, F16 b) { F16 out; LLMC_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
LLMC_INLINE F16 min(F16 a, F16 b) { F16 out; LLMC_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }

LLMC_INLINE I16 operator+(I16 a, I16 b) { I16 out; LLMC_LANES(wrap(raw(a.v[i]) + raw(b.v[i]))); }
LLMC_INLINE I16 operator-(I16 a, I16 b) { I16 out; LLMC_LANES(wrap(raw(a.v[i]) - raw(b.v[i]))); }
LLMC_INLINE I16 operator*(I16 a, I16 b) { I16 out; LLMC_LANES(wrap(raw(a.v[i]) * raw(b.v[i]))); }
LLMC_INLINE I16 operator&(I16 a, I16 b) { I16 out; LLMC_LANES(a.v[i] & b.v[i]); }
LLMC_INLINE I16 operator|(I16 a, I16 b) { I16 out; LLMC_LANES(a.v[i] | b.v[i]); }
LLMC_INLINE I16 max(I16 a, I16 b) { I16 out; LLMC_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
template <int N> LLMC_INLINE I16 shift_left(I16 a) { I16 out; LLMC_LANES(wrap(raw(a.v[i]) << N)); }
template <int N> LLMC_INLINE I16 shift_right(I16 a) { I16 out; LLMC_LANES(wrap(raw(a.v[i]) >> N)); }
template <int N> LLMC_INLINE I16 shift_right_signed(I16 a) { I16 out; LLMC_LANES(a.v[i] >> N); }

LLMC_INLINE F16 as_float(I16 a) { F16 out; LLMC_LANES(float_of(raw(a.v[i]))); }
LLMC_INLINE I16 as_int(F16 a) { I16 out; LLMC_LANES(wrap(bits_of(a.v[i]))); }
LLMC_INLINE F16 to_float(I16 a) { F16 out; LLMC_LANES(static_cast<float>(a.v[i])); }

// table[index] for indexes below 16.
LLMC_INLINE F16 look_up(const float (&table)[16], I16 index) { F16 out; LLMC_LANES(table[index.v[i] & 15]); }
LLMC_INLINE M16 less(F16 a, F16 b) { M16 out; LLMC_LANES(-static_cast<int32_t>(a.v[i] < b.v[i])); }
LLMC_INLINE M16 is_nan(F16 a) { M16 out; LLMC_LANES(-static_cast<int32_t>(a.v[i] != a.v[i])); }
LLMC_INLINE M16 less(I16 a, I16 b) { M16 out; LLMC_LANES(-static_cast<int32_t>(a.v[i] < b.v[i])); }
LLMC_INLINE bool any(M16 m) {
  int32_t all = 0;
  for (int i = 0; i < 16; ++i) all |= m.v[i];
  return all != 0;
}
LLMC_INLINE F16 select(M16 m, F16 yes, F16 no) { F16 out; LLMC_LANES(m.v[i] ? yes.v[i] : no.v[i]); }
LLMC_INLINE I16 select(M16 m, I16 yes, I16 no) { I16 out; LLMC_LANES(m.v[i] ? yes.v[i] : no.v[i]); }
#undef LLMC_LANES

LLMC_INLINE I16 dot_bytes(I16 sum, I16 unsigned_bytes, I16 signed_bytes) {
  uint8_t u[64];
  int8_t s[64];
  std::memcpy(u, unsigned_bytes.v, 64);
  std::memcpy(s, signed_bytes.v, 64);
  for (int i = 0; i < 16; ++i)
    for (int b = 0; b < 4; ++b) sum.v[i] += u[4 * i + b] * s[4 * i + b];
  return sum;
}

// Reductions fold the upper half onto the lower: lane i takes i + 8, then i + 4, i + 2, i + 1. Which of several
// NaN or equal values a maximum gives is not defined.
template <class V, class F>
LLMC_INLINE auto fold(V a, const F& combine) -> decltype(a.v[0] + a.v[0]) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = combine(a.v[i], a.v[i + half]);
  return a.v[0];
}
LLMC_INLINE float sum_lanes(F16 a) { return fold(a, [](float x, float y) { return x + y; }); }
LLMC_INLINE int32_t sum_lanes(I16 a) { return fold(a, [](int32_t x, int32_t y) { return wrap(raw(x) + raw(y)); }); }
LLMC_INLINE float max_lanes(F16 a) { return fold(a, [](float x, float y) { return x > y ? x : y; }); }
LLMC_INLINE int32_t max_lanes(I16 a) { return fold(a, [](int32_t x, int32_t y) { return x > y ? x : y; }); }

LLMC_END
