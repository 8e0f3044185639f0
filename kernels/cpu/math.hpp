// Elementary functions on vectors, with the same bits at every level: polynomials in fused multiply-adds.
// Coefficients are least-squares fits at Chebyshev nodes; the bounds are measured by tests.
#pragma once

#include "vec.hpp"

LLMC_BEGIN

template <int N>
LLMC_INLINE F16 horner(const float (&coefficients)[N], F16 x) {
  F16 sum = set1(coefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) sum = fma(sum, x, set1(coefficients[i]));
  return sum;
}

// 2^(n + f) for |f| <= 1/2 and whole n in [-126, 127]; relative error below 2e-7.
LLMC_INLINE F16 power_of_two(F16 n, F16 f) {
  constexpr float kSeries[] = {1.535336196e-04f, 1.339887385e-03f, 9.618436918e-03f,
                               5.550332367e-02f, 2.402264774e-01f, 6.931471825e-01f};
  const F16 mantissa = fma(horner(kSeries, f), f, set1(1.0f));
  return mantissa * as_float(shift_left<23>(as_int(n + set1(kRoundMagic + 127.0f))));  // NaN stays NaN
}

// 2^x for x <= 127: 0 below -125, NaN for NaN. As `power_of_two`, with fewer operations around it: half of 2^n is made
// of the sum that rounds x, and doubled in the series, which is exact.
LLMC_INLINE F16 exp2_small(F16 x) {
  constexpr float kSeries[] = {2 * 1.535336196e-04f, 2 * 1.339887385e-03f, 2 * 9.618436918e-03f,
                               2 * 5.550332367e-02f, 2 * 2.402264774e-01f, 2 * 6.931471825e-01f};
  const F16 rounded = x + set1(kRoundMagic + 126.0f), f = x - (rounded - set1(kRoundMagic + 126.0f));
  const F16 mantissa = fma(horner(kSeries, f), f, set1(2.0f));
  const F16 power = mantissa * as_float(shift_left<23>(as_int(rounded)));  // of no meaning where it is not taken
  return select(less(x, set1(-125.0f)), zero(), power);
}
// 2^x: 0 below -125, 2^127 above 127, NaN for NaN.
LLMC_INLINE F16 exp2(F16 x) { return exp2_small(min(set1(127.0f), x)); }

// e^x: 0 below -86, e^88 above 88, NaN for NaN; relative error below 3e-7.
LLMC_INLINE F16 exp(F16 x) {
  constexpr float kLog2High = 1.44269502e+00f, kLog2Low = 1.92596303e-08f;  // log2(e) in two parts
  const F16 inside = max(set1(-86.0f), min(set1(88.0f), x));
  const F16 n = round_even(inside * set1(kLog2High));
  const F16 f = fma(inside, set1(kLog2Low), fma(inside, set1(kLog2High), negate(n)));
  return select(less(x, set1(-86.0f)), zero(), power_of_two(n, f));
}

LLMC_INLINE F16 sigmoid(F16 x) { return set1(1.0f) / (set1(1.0f) + exp(negate(x))); }

// Relative error below 3e-7.
LLMC_INLINE F16 tanh(F16 x) {
  constexpr float kSeries[] = {-5.708789919e-03f, 2.064235136e-02f, -5.374066904e-02f, 1.333145350e-01f,
                               -3.333328366e-01f};
  const F16 size = abs(x), square = x * x;
  const F16 near = fma(horner(kSeries, square) * square, x, x);
  const F16 far = set1(1.0f) - set1(2.0f) / (exp(size + size) + set1(1.0f));
  return select(less(size, set1(0.625f)), near, with_sign(far, x));
}

// Absolute error below 2e-7.
LLMC_INLINE F16 erf(F16 x) {
  constexpr float kNear[] = {7.853861462e-05f, -8.010193706e-04f, 5.188327748e-03f, -2.685381286e-02f,
                             1.128358543e-01f, -3.761262596e-01f, 1.128379107e+00f};
  // -log2(1 - erf(x)) for 1 <= x <= 4; beyond 4 erf is 1 to the last bit.
  constexpr float kFar[] = {3.128737808e-05f, -6.367121241e-04f, 6.065892056e-03f, -3.636780381e-02f,
                            1.564148962e-01f, 9.135432243e-01f, 1.629637122e+00f, -2.712797432e-04f};
  const F16 size = min(set1(4.0f), abs(x));
  const F16 near = horner(kNear, x * x) * x;
  const F16 far = set1(1.0f) - exp2(negate(horner(kFar, size)));
  return select(is_nan(x), x, select(less(abs(x), set1(1.0f)), near, with_sign(far, x)));
}

LLMC_END
