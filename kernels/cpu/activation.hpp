// Activations of feed-forward blocks, alone and gated.
#pragma once

#include "math.hpp"
#include "share.hpp"

LLMC_BEGIN

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kSigmoid, kIdentity };

template <Activation A>
LLMC_INLINE F16 activate(F16 x) {
  if constexpr (A == Activation::kSilu) return x / (set1(1.0f) + exp(negate(x)));
  if constexpr (A == Activation::kGelu)
    return (set1(0.5f) * x) * (set1(1.0f) + erf(x * set1(0.70710678118654752f)));
  if constexpr (A == Activation::kGeluTanh) {
    const F16 inner = fma(x * x, set1(0.044715f) * x, x);
    return (set1(0.5f) * x) * (set1(1.0f) + tanh(inner * set1(0.79788456080286536f)));
  }
  // `less` is false for NaN, so that NaN stays.
  const F16 positive = select(less(x, zero()), zero(), x);
  if constexpr (A == Activation::kRelu) return positive;
  if constexpr (A == Activation::kRelu2) return positive * positive;
  if constexpr (A == Activation::kSigmoid) return sigmoid(x);
  return x;
}

// act(gate) * up.
template <Activation A>
struct Gated {
  F16 operator()(F16 gate, F16 up) const { return activate<A>(gate) * up; }
};

// (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit`, |up| at most `limit`.
struct ClampedSwiglu {
  float alpha, limit;
  F16 operator()(F16 gate, F16 up) const {
    const F16 g = min(set1(limit), gate), u = max(set1(-limit), min(set1(limit), up));
    return (u + set1(1.0f)) * (g * sigmoid(g * set1(alpha)));
  }
};

// out[i] = combine(gate[i], up[i]) for n values. `out` may be `gate` or `up`.
template <class Combine>
LLMC_INLINE void gate_values(const Combine& combine, const float* gate, const float* up, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, combine(load(gate + i), load(up + i)));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_first(out + i, combine(load_first(gate + i, left), load_first(up + i, left)), left);
  }
}

// out[rows, width] (stride ld_out) from separate gate and up rows, shared among threads by row.
template <class Combine>
LLMC_KERNEL void gated_rows(int tid, int nt, const Combine& combine, const float* gate, int64_t ld_gate,
                            const float* up, int64_t ld_up, float* out, int64_t ld_out, int64_t rows,
                            int64_t width) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    gate_values(combine, gate + m * ld_gate, up + m * ld_up, out + m * ld_out, width);
}

// The same where gate and up were interleaved by tiles: columns 64 i ... 64 i + 31 of `both` are gate
// columns 32 i ..., the next 32 are up. Shared by the tile pairs of a product of 2 * width columns with
// grain 2, so that each thread reads what it wrote itself: no barrier is needed in between.
template <class Combine>
LLMC_KERNEL void gated_tiles(int tid, int nt, const Combine& combine, const float* both, int64_t ld_both,
                             float* out, int64_t ld_out, int64_t rows, int64_t width) {
  const Range mine = share(tid, nt, 2 * ((width + kTileRows - 1) / kTileRows), 2);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t pair = mine.begin / 2; pair < mine.end / 2; ++pair) {
      const int64_t column = pair * kTileRows, left = width - column;
      const float* gate = both + m * ld_both + 2 * column;
      gate_values(combine, gate, gate + kTileRows, out + m * ld_out + column, left < kTileRows ? left : kTileRows);
    }
}

// The same where gate and up columns alternate: `both` has 2 * width columns, even ones are gate.
template <class Combine>
LLMC_KERNEL void gated_pairs(int tid, int nt, const Combine& combine, const float* both, int64_t ld_both, float* out,
                             int64_t ld_out, int64_t rows, int64_t width) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    for (int64_t i = 0; i < width; i += 16) {
      const int count = static_cast<int>(width - i < 16 ? width - i : 16);
      float gate[16] = {}, up[16] = {};
      for (int j = 0; j < count; ++j) {
        gate[j] = both[m * ld_both + 2 * (i + j)];
        up[j] = both[m * ld_both + 2 * (i + j) + 1];
      }
      store_first(out + m * ld_out + i, combine(load(gate), load(up)), count);
    }
}

// out[i] = act(x[i]) for rows of `width`, shared by row. `out` may be `x`.
template <Activation A>
LLMC_KERNEL void activate_rows(int tid, int nt, const float* x, int64_t ld_x, float* out, int64_t ld_out,
                               int64_t rows, int64_t width) {
  const auto alone = [](F16 value, F16) { return activate<A>(value); };
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    gate_values(alone, x + m * ld_x, x + m * ld_x, out + m * ld_out, width);
}

// cap * tanh(x / cap) in place, shared by row.
LLMC_KERNEL inline void softcap_rows(int tid, int nt, float* x, int64_t ld, int64_t rows, int64_t width, float cap) {
  const auto alone = [cap](F16 value, F16) { return tanh(value / set1(cap)) * set1(cap); };
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) gate_values(alone, x + m * ld, x + m * ld, x + m * ld, width);
}

LLMC_END
