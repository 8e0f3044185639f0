// The obvious form of every canonical operator, for any shape and every level: what tuned kernels are checked
// against, and what runs where there is none. Float32 throughout, each sum in one ascending order.
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

// n[T, D] = norm(x (+ residual)); the sum goes to `total` when there is a residual.
// `centre`: layer norm, otherwise rms norm.
LLMC_KERNEL void norm(int tid, int nt, float* out, float* total, const float* x, const float* residual,
                      const float* weight, const float* bias, int64_t T, int64_t D, float eps, float offset,
                      bool centre) {
  LLMC_SHARE(t, T) {
    const float* in = x + t * D;
    if (residual) {
      for (int64_t d = 0; d < D; ++d) total[t * D + d] = x[t * D + d] + residual[t * D + d];
      in = total + t * D;
    }
    const float mean = centre ? mean_line(in, D) : 0.0f;
    float sum = 0;
    for (int64_t d = 0; d < D; ++d) sum += (in[d] - mean) * (in[d] - mean);
    const float scale = 1.0f / std::sqrt(sum / (float)D + eps);
    for (int64_t d = 0; d < D; ++d) {
      float value = (in[d] - mean) * scale;
      if (weight) value *= weight[d] + offset;
      out[t * D + d] = bias ? value + bias[d] : value;
    }
  }
}

enum class RopeStyle { half, interleaved, interleaved_to_half };

// x[T, H, D] with strides; rotates 2R elements of each head, the first ones or the last.
LLMC_KERNEL void rope(int tid, int nt, float* out, const float* x, int64_t stride_t, int64_t stride_h,
                      const int64_t* positions, const float* inv_freq, int64_t T, int64_t H, int64_t D,
                      int64_t R, float scale, RopeStyle style, bool tail) {
  LLMC_SHARE(r, T * H) {
    const int64_t t = r / H, h = r % H;
    const float* in = x + t * stride_t + h * stride_h;
    float* to = out + r * D;
    const int64_t first = tail ? D - 2 * R : 0;
    for (int64_t d = 0; d < D; ++d) to[d] = in[d];
    for (int64_t i = 0; i < R; ++i) {
      const float angle = (float)positions[t] * inv_freq[i];
      const float c = std::cos(angle) * scale, s = std::sin(angle) * scale;
      const bool halves = style == RopeStyle::half;
      const float a = in[first + (halves ? i : 2 * i)], b = in[first + (halves ? i + R : 2 * i + 1)];
      const bool pairs = style == RopeStyle::interleaved;
      to[first + (pairs ? 2 * i : i)] = a * c - b * s;
      to[first + (pairs ? 2 * i + 1 : i + R)] = b * c + a * s;
    }
  }
}

LLMC_INLINE void store(float value, float* to) { *to = value; }
LLMC_INLINE void store(float value, bf16* to) { *to = to_bf16(value); }

// cache[P, N, G, D] at slots[T]; x[T, G, D] with strides.
template <class C>
LLMC_KERNEL void kv_write(int tid, int nt, C* cache, const float* x, int64_t stride_t, int64_t stride_h,
                          const int64_t* slots, int64_t T, int64_t G, int64_t D) {
  LLMC_SHARE(r, T * G) {
    const int64_t t = r / G, g = r % G;
    if (slots[t] < 0) continue;
    for (int64_t d = 0; d < D; ++d)
      store(x[t * stride_t + g * stride_h + d], cache + (slots[t] * G + g) * D + d);
  }
}

struct AttentionShape {
  int64_t H, G, D, V, page_tokens, window, chunk;
  float scale, softcap;
};

// One query over its keys in absolute blocks of 64: the recurrence that every attention kernel shares.
template <class C>
inline void attend_row(float* out, const float* q, const C* k_cache, const C* v_cache, const int64_t* table,
                       int64_t position, int64_t head, const float* sinks, const AttentionShape& a) {
  constexpr int64_t kBlock = 64;
  const int64_t g = head / (a.H / a.G);
  int64_t first = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
  if (a.chunk) first = std::max(first, position / a.chunk * a.chunk);
  float top = sinks ? sinks[head] : -INFINITY, total = sinks ? 1.0f : 0.0f;
  for (int64_t v = 0; v < a.V; ++v) out[v] = 0;
  for (int64_t block = first / kBlock * kBlock; block <= position; block += kBlock) {
    float score[kBlock];
    float block_top = -INFINITY;
    const int64_t begin = std::max(first, block), end = std::min(position + 1, block + kBlock);
    for (int64_t j = begin; j < end; ++j) {
      const int64_t slot = table[j / a.page_tokens] * a.page_tokens + j % a.page_tokens;
      const C* key = k_cache + (slot * a.G + g) * a.D;
      float dot = 0;
      for (int64_t d = 0; d < a.D; ++d) dot += q[d] * a.scale * load(key[d]);
      score[j - block] = a.softcap ? std::tanh(dot / a.softcap) * a.softcap : dot;
      block_top = std::max(block_top, score[j - block]);
    }
    const float new_top = std::max(top, block_top);
    const float fade = top == -INFINITY ? 0.0f : std::exp(top - new_top);
    total *= fade;
    for (int64_t v = 0; v < a.V; ++v) out[v] *= fade;
    for (int64_t j = begin; j < end; ++j) {
      const float weight = std::exp(score[j - block] - new_top);
      const int64_t slot = table[j / a.page_tokens] * a.page_tokens + j % a.page_tokens;
      const C* value = v_cache + (slot * a.G + g) * a.V;
      total += weight;
      for (int64_t v = 0; v < a.V; ++v) out[v] += weight * load(value[v]);
    }
    top = new_top;
  }
  for (int64_t v = 0; v < a.V; ++v) out[v] /= total;
}

// out[T, H, V]; sequence i owns rows query_starts[i] ... query_starts[i + 1] - 1 and block_table[i, :].
template <class C>
LLMC_KERNEL void paged_attention(int tid, int nt, float* out, const float* q, int64_t stride_t, int64_t stride_h,
                                 const C* k_cache, const C* v_cache, const int64_t* block_table,
                                 int64_t table_stride, const int64_t* query_starts, const int64_t* positions,
                                 const float* sinks, int64_t S, int64_t T, AttentionShape a) {
  LLMC_SHARE(r, T * a.H) {
    const int64_t t = r / a.H, h = r % a.H;
    const int64_t s = std::upper_bound(query_starts, query_starts + S + 1, t) - query_starts - 1;
    if (s >= S) {
      for (int64_t v = 0; v < a.V; ++v) out[r * a.V + v] = 0;
      continue;
    }
    attend_row(out + r * a.V, q + t * stride_t + h * stride_h, k_cache, v_cache,
               block_table + s * table_stride, positions[t], h, sinks, a);
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
