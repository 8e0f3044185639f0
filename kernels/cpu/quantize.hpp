// Activations as int8 limbs, one scale per (row, group): the left operand of every integer product.
//
// A group of `Group` activations x with largest magnitude a becomes v = rint(x * (top / a)), scale = a / top,
// with top = 127 (one limb: the code is v) or 32512 = 127 * 256 (two limbs: v = 256 high + low,
// -128 <= low <= 127). Groups below 1e-30 are zero; a group with an infinity or NaN gets the scale NaN, so
// that its row says so.
#pragma once

#include <cmath>

#include "layout.hpp"
#include "share.hpp"
#include "vec.hpp"

LLMC_BEGIN

constexpr float kSmallestActivation = 1e-30f;

// Quantised rows in caller's memory. Limb l of row m: codes + (m * limbs + l) * code_stride bytes; its sum
// over unit u: sums[(m * limbs + l) * unit_stride + u]; the row's scale there: scales[m * unit_stride + u].
struct QuantRows {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  int64_t code_stride, unit_stride;
};

// Strides are whole cache lines and, for codes, no power of two.
template <class S>
constexpr int64_t quant_code_stride(int64_t in_features) { return round_up<int64_t>(S::padded(in_features), 64) + 64; }
template <class S>
constexpr int64_t quant_unit_stride(int64_t in_features) { return round_up<int64_t>(S::units(in_features), 16); }

// Bytes that `quant_rows` needs for `rows` rows.
template <class S>
constexpr size_t quant_rows_bytes(int64_t rows, int64_t in_features) {
  return static_cast<size_t>(rows) * (static_cast<size_t>(S::Limbs) * quant_code_stride<S>(in_features) +
                                      size_t{4} * (S::Limbs + 1) * quant_unit_stride<S>(in_features));
}
// Lays quantised rows out in `memory`, 64-byte aligned.
template <class S>
inline QuantRows quant_rows(void* memory, int64_t rows, int64_t in_features) {
  QuantRows out;
  out.code_stride = quant_code_stride<S>(in_features);
  out.unit_stride = quant_unit_stride<S>(in_features);
  out.codes = static_cast<int8_t*>(memory);
  out.scales = reinterpret_cast<float*>(out.codes + rows * S::Limbs * out.code_stride);
  out.sums = reinterpret_cast<int32_t*>(out.scales + rows * out.unit_stride);
  return out;
}

// The codes of one unit of `Unit` values and their sums.
template <class S>
LLMC_INLINE void quantize_unit(const float* x, int64_t valid, F16 factor, int8_t* high, int8_t* low,
                               int32_t* high_sum, int32_t* low_sum) {
  I16 sum_high = set1(int32_t{0}), sum_low = set1(int32_t{0});
  for (int k = 0; k < S::Unit; k += 16) {
    const int64_t left = valid - k;
    const F16 value = left >= 16 ? load(x + k) : (left > 0 ? load_first(x + k, static_cast<int>(left)) : zero());
    const I16 code = round_int(value * factor);
    if (S::Limbs == 1) {
      store_low8(high + k, code);
      sum_high = sum_high + code;
    } else {
      const I16 top = shift_right_signed<8>(code + set1(int32_t{128}));
      const I16 rest = code - shift_left<8>(top);
      store_low8(high + k, top);
      store_low8(low + k, rest);
      sum_high = sum_high + top;
      sum_low = sum_low + rest;
    }
  }
  *high_sum = sum_lanes(sum_high);
  if (S::Limbs == 2) *low_sum = sum_lanes(sum_low);
}

// Quantises x[in_features] into row `row`. `Group` activations share a scale: a multiple of S::Unit.
template <class S, int Group>
LLMC_KERNEL void quantize_row(const float* x, int64_t in_features, QuantRows out, int64_t row) {
  static_assert(Group % S::Unit == 0, "an activation group is made of whole units");
  constexpr float kTop = S::Limbs == 1 ? 127.0f : 32512.0f;
  int8_t* high = out.codes + row * S::Limbs * out.code_stride;
  int8_t* low = high + (S::Limbs - 1) * out.code_stride;
  float* scales = out.scales + row * out.unit_stride;
  int32_t* high_sums = out.sums + row * S::Limbs * out.unit_stride;
  int32_t* low_sums = high_sums + (S::Limbs - 1) * out.unit_stride;
  const int64_t padded = S::padded(in_features);
  for (int64_t start = 0; start < padded; start += Group) {
    const int64_t stop = start + Group < padded ? start + Group : padded;
    I16 top_bits = set1(int32_t{0});  // magnitudes compare as integers, NaN above all
    for (int64_t k = start; k < stop; k += 16) {
      const int64_t left = in_features - k;
      if (left <= 0) break;
      top_bits = max(top_bits, as_int(abs(left >= 16 ? load(x + k) : load_first(x + k, static_cast<int>(left)))));
    }
    const int32_t bits = max_lanes(top_bits);
    const float top = float_of(static_cast<uint32_t>(bits));
    const bool finite = bits < 0x7f800000, tiny = top < kSmallestActivation;
    const float factor = finite && !tiny ? kTop / top : 0.0f;
    const float scale = finite ? (tiny ? 0.0f : top / kTop) : float_of(0x7fc00000u);
    for (int64_t k = start; k < stop; k += S::Unit) {
      const int64_t unit = k / S::Unit;
      // A factor of 0 times infinity would be NaN: such a group has no values.
      const int64_t valid = finite ? in_features - k : 0;
      quantize_unit<S>(x + k, valid, set1(factor), high + k, low + k, high_sums + unit, low_sums + unit);
      scales[unit] = scale;
    }
  }
}

// Rows of x[rows, ld], shared among threads by row.
template <class S, int Group>
inline void quantize_rows(int tid, int nt, const float* x, int64_t ld, int64_t rows, int64_t in_features,
                          QuantRows out) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) quantize_row<S, Group>(x + m * ld, in_features, out, m);
}

LLMC_END
