// Products, look-ups and experts over weights in any form, for shapes and schemes without a tuned kernel.
// Float32 throughout, each sum in one ascending order.
//
// Every function shares its rows among threads: `tid` of `nt`. Matrices are row-major, activations dense.
#pragma once

#include "generic.hpp"
#include "layout.hpp"
#include "number.hpp"

LLMC_BEGIN
namespace plain {

LLMC_INLINE float load(float value) { return value; }
LLMC_INLINE float load(bf16 value) { return to_float(value); }
LLMC_INLINE float load(f16 value) { return to_float(value); }

// A scheme of codes: `bits` 8 (one code a byte) or fewer (two a byte, even column low, + 2^(bits-1) if symmetric).
struct Codes {
  const uint8_t* codes;
  const f16* scales;
  const uint8_t* zeros;  // null: symmetric
  int64_t row_bytes, groups, group_size;
  int bits;

  float at(int64_t row, int64_t column) const {
    const int64_t group = column / group_size;
    int value;
    if (bits == 8) {
      const uint8_t byte = codes[row * row_bytes + column];
      value = zeros ? (int)byte : (int)(int8_t)byte;
    } else {
      const uint8_t byte = codes[row * row_bytes + column / 2];
      value = (column & 1 ? byte >> 4 : byte & 15) - (zeros ? 0 : 1 << (bits - 1));
    }
    if (zeros) value -= zeros[row * groups + group];
    return (float)value * to_float(scales[row * groups + group]);
  }
};

template <class W>
struct Rows {
  const W* values;
  int64_t width;
  float at(int64_t row, int64_t column) const { return load(values[row * width + column]); }
};

// The packed forms of layout.hpp, for random access.
template <class W>
struct Tiles {
  const W* values;
  int64_t width;
  float at(int64_t row, int64_t column) const { return packed_value(values, width, row, column); }
};
template <class S>
struct CodeTiles {
  const uint8_t* weight;
  int64_t width;
  float at(int64_t row, int64_t column) const { return packed_value<S>(weight, width, row, column); }
};

// out[T, N] = x[T, K] @ weight[N, K].T + bias
template <class M>
LLMC_KERNEL void linear(int tid, int nt, float* out, const float* x, M weight, const float* bias, int64_t T,
                        int64_t N, int64_t K) {
  LLMC_SHARE(n, N) {
    for (int64_t t = 0; t < T; ++t) {
      float sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += x[t * K + k] * weight.at(n, k);
      out[t * N + n] = bias ? sum + bias[n] : sum;
    }
  }
}

template <class M>
LLMC_KERNEL void embedding(int tid, int nt, float* out, const int64_t* ids, M table, int64_t T, int64_t D) {
  LLMC_SHARE(t, T) {
    for (int64_t d = 0; d < D; ++d) out[t * D + d] = table.at(ids[t], d);
  }
}

// Sum over a token's experts of weight * down(act(gate_up(x))), choices ascending. `scratch` holds 3F per thread.
template <class M, class Act>
LLMC_KERNEL void moe(int tid, int nt, float* out, const float* x, const int64_t* ids, const float* weights,
                     M gate_up, M down, const float* up_bias, const float* down_bias, float* scratch, int64_t T,
                     int64_t k, int64_t D, int64_t F, int64_t U, Act act) {
  float* hidden = scratch + (int64_t)tid * (U + F);
  float* gated = hidden + U;
  LLMC_SHARE(t, T) {
    for (int64_t d = 0; d < D; ++d) out[t * D + d] = 0;
    for (int64_t c = 0; c < k; ++c) {
      const int64_t e = ids[t * k + c];
      for (int64_t u = 0; u < U; ++u) {
        float sum = 0;
        for (int64_t d = 0; d < D; ++d) sum += x[t * D + d] * gate_up.at(e * U + u, d);
        hidden[u] = up_bias ? sum + up_bias[e * U + u] : sum;
      }
      act(gated, hidden);
      for (int64_t d = 0; d < D; ++d) {
        float sum = 0;
        for (int64_t f = 0; f < F; ++f) sum += gated[f] * down.at(e * D + d, f);
        if (down_bias) sum += down_bias[e * D + d];
        out[t * D + d] += sum * weights[t * k + c];
      }
    }
  }
}

}  // namespace plain
LLMC_END
