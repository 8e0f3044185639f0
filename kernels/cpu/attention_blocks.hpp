// Scores and weighted sums of one block of 64 keys for a few query rows, for each kind of cache.
//
// float32 and bfloat16 caches: one chain of fused multiply-adds per score over ascending elements, and per
// output over ascending keys. int8 caches: the query, and the block's weights times value scales, are
// 16-bit integers (two limbs), whose products with the codes are summed exactly.
#pragma once

#include "kv_cache.hpp"
#include "math.hpp"

LLMC_BEGIN

constexpr int kKeyBlock = 64;
constexpr int kBlockChunks = kKeyBlock / kChunk;

// What a block of keys is read from: pointers to its chunks, valid for chunks [first, last).
struct KeyBlock {
  const char* k[kBlockChunks];
  const char* v[kBlockChunks];
  const float* k_scales[kBlockChunks];  // int8 only
  const float* v_scales[kBlockChunks];
  const char* next_k[kBlockChunks];  // what to prefetch meanwhile: pages lie anywhere
  const char* next_v[kBlockChunks];
  int first, last;            // chunks to read
  int key_begin, key_end;     // keys that some row of the tile may see, within the block
};


// --- float32 and bfloat16 -------------------------------------------------------------------------------

LLMC_INLINE void key_pair(const float* chunk, int64_t i, F16* even, F16* odd) {
  *even = load(chunk + i * kChunk);
  *odd = load(chunk + (i + 1) * kChunk);
}
LLMC_INLINE void key_pair(const bf16* chunk, int64_t i, F16* even, F16* odd) {
  const I16 both = load_dwords(chunk + i * kChunk);
  *even = as_float(shift_left<16>(both));
  *odd = as_float(both & set1(static_cast<int32_t>(0xffff0000u)));
}
LLMC_INLINE void value_pair(const float* chunk, int pair, int64_t width, int64_t i, F16* even, F16* odd, int count) {
  *even = load_first(chunk + 2 * pair * width + i, count);
  *odd = load_first(chunk + (2 * pair + 1) * width + i, count);
}
LLMC_INLINE void value_pair(const bf16* chunk, int pair, int64_t width, int64_t i, F16* even, F16* odd, int count) {
  const bf16* p = chunk + (pair * width + i) * 2;
  I16 both;
  if (count >= 16) {
    both = load_dwords(p);
  } else {
    int32_t words[16] = {};
    std::memcpy(words, p, static_cast<size_t>(count) * 4);
    both = load(words);
  }
  *even = as_float(shift_left<16>(both));
  *odd = as_float(both & set1(static_cast<int32_t>(0xffff0000u)));
}

// scores[r][chunk * 16 ...] for R rows q[r * ldq] and C chunks from `chunk` on.
template <class T, int R, int C>
LLMC_INLINE void score_chunks(const float* q, int64_t ldq, int64_t width, const KeyBlock& block, int chunk,
                              float* scores) {
  F16 sum[C][R];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[c][r] = zero();
  for (int64_t i = 0; i < width; i += 2) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      F16 even, odd;
      key_pair(reinterpret_cast<const T*>(block.k[chunk + c]), i, &even, &odd);
      prefetch_l2(block.next_k[chunk + c] + i * kChunk * static_cast<int64_t>(sizeof(T)));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[c][r] = fma(even, set1(q[r * ldq + i]), sum[c][r]);
        sum[c][r] = fma(odd, set1(q[r * ldq + i + 1]), sum[c][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(scores + r * kKeyBlock + (chunk + c) * kChunk, sum[c][r]);
}

template <class T, int R>
LLMC_KERNEL void score_rows(const float* q, int64_t ldq, int64_t width, const KeyBlock& block, float* scores) {
  constexpr int C = LLMC_AVX512 && R <= 4 ? 4 : 1;
  int chunk = block.first;
  for (; chunk + C <= block.last; chunk += C) score_chunks<T, R, C>(q, ldq, width, block, chunk, scores);
  for (; chunk < block.last; ++chunk) score_chunks<T, R, 1>(q, ldq, width, block, chunk, scores);
}

// out[r][i ... i + 16 B) += sum over the block's keys of weights[r][key] * value, keys ascending.
template <class T, int R, int B>
LLMC_INLINE void add_columns(const float* weights, const KeyBlock& block, int64_t width, int64_t i, int count,
                             float* out, int64_t ld_out) {
  F16 sum[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) sum[r][b] = load(out + r * ld_out + i + b * 16);
  const auto add_pair = [&](int key, auto both) {
    const T* chunk = reinterpret_cast<const T*>(block.v[key / kChunk]);
    const char* next = block.next_v[key / kChunk] + (key % kChunk * width + i * 2) * static_cast<int64_t>(sizeof(T));
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      F16 even, odd;
      prefetch_l2(next + b * 32 * sizeof(T));
      value_pair(chunk, key % kChunk / 2, width, i + b * 16, &even, &odd, B > 1 ? 16 : count);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[r][b] = fma(even, set1(weights[r * kKeyBlock + key]), sum[r][b]);
        if (both) sum[r][b] = fma(odd, set1(weights[r * kKeyBlock + key + 1]), sum[r][b]);
      }
    }
  };
  int key = block.key_begin & ~1;
  for (; key + 1 < block.key_end; key += 2) add_pair(key, std::true_type{});
  if (key < block.key_end) add_pair(key, std::false_type{});  // nothing lies beside the last key
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) store(out + r * ld_out + i + b * 16, sum[r][b]);
}

// `out` rows have room for whole vectors.
template <class T, int R>
LLMC_KERNEL void add_values(const float* weights, const KeyBlock& block, int64_t width, float* out, int64_t ld_out) {
  constexpr int B = LLMC_AVX512 ? (R <= 4 ? 4 : 2) : 1;
  int64_t i = 0;
  for (; i + 16 * B <= width; i += 16 * B) add_columns<T, R, B>(weights, block, width, i, 16, out, ld_out);
  for (; i < width; i += 16)
    add_columns<T, R, 1>(weights, block, width, i, static_cast<int>(width - i < 16 ? width - i : 16), out, ld_out);
}

// --- int8 ------------------------------------------------------------------------------------------------

// A quantised query row: limbs[2][width], 128 times their sums, the scale of the whole.
struct QueryLimbs {
  const int8_t* high;
  const int8_t* low;
  int32_t high_offset, low_offset;
  float scale;
};

// Limbs of x[width] as in quantize.hpp, the whole row one group. `limbs` has room for 2 * width bytes.
LLMC_INLINE QueryLimbs query_limbs(const float* x, int64_t width, int8_t* limbs) {
  uint32_t top = 0;
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  const float peak = float_of(top);
  const bool finite = top < 0x7f800000u, tiny = peak < 1e-30f;
  const float factor = finite && !tiny ? 32512.0f / peak : 0.0f;
  int32_t high_sum = 0, low_sum = 0;
  for (int64_t i = 0; i < width; ++i) {
    const int code = code_of(x[i], factor), high = (code + 128) >> 8, low = code - high * 256;
    limbs[i] = static_cast<int8_t>(high);
    limbs[width + i] = static_cast<int8_t>(low);
    high_sum += high;
    low_sum += low;
  }
  const float scale = finite ? (tiny ? 0.0f : peak / 32512.0f) : float_of(0x7fc00000u);
  return {limbs, limbs + width, -128 * high_sum, -128 * low_sum, scale};
}

template <int R, int C>
LLMC_INLINE void score_chunks_int8(const QueryLimbs* q, int64_t width, const KeyBlock& block, int chunk,
                                   float* scores) {
  I16 high[C][R], low[C][R];
#pragma GCC unroll 2
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) high[c][r] = set1(q[r].high_offset), low[c][r] = set1(q[r].low_offset);
  for (int64_t i = 0; i < width; i += 4) {
    I16 codes[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      codes[c] = load_dwords(block.k[chunk + c] + i * kChunk);
      prefetch_l2(block.next_k[chunk + c] + i * kChunk);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const I16 top = repeat_dword(q[r].high + i), rest = repeat_dword(q[r].low + i);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        high[c][r] = dot_bytes(high[c][r], codes[c], top);
        low[c][r] = dot_bytes(low[c][r], codes[c], rest);
      }
    }
  }
#pragma GCC unroll 2
  for (int c = 0; c < C; ++c) {
    const F16 scale = load(block.k_scales[chunk + c]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F16 whole = to_float(shift_left<8>(high[c][r]) + low[c][r]);
      store(scores + r * kKeyBlock + (chunk + c) * kChunk, whole * (scale * set1(q[r].scale)));
    }
  }
}

template <int R>
LLMC_KERNEL void score_rows_int8(const QueryLimbs* q, int64_t width, const KeyBlock& block, float* scores) {
  constexpr int C = LLMC_AVX512 && R <= 4 ? 2 : 1;
  int chunk = block.first;
  for (; chunk + C <= block.last; chunk += C) score_chunks_int8<R, C>(q, width, block, chunk, scores);
  for (; chunk < block.last; ++chunk) score_chunks_int8<R, 1>(q, width, block, chunk, scores);
}

// Weights times value scales as 16-bit integers of two unsigned limbs, per row and block. Dword 4 q + c is the keys
// 4 q ... 4 q + 3 of chunk c.
struct WeightLimbs {
  alignas(64) uint8_t high[kKeyBlock], low[kKeyBlock];
  float scale;
};

// Limbs of R rows of weights[R][kKeyBlock]. All rows of one stage before the next, as in `weigh_whole`. Hidden keys
// weigh nothing, whatever lies in their scales.
template <int R>
LLMC_KERNEL void weight_limbs(const float* weights, const KeyBlock& block, WeightLimbs* out) {
  F16 scaled[R][kBlockChunks];
  I16 top[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    top[r] = set1(int32_t{0});
#pragma GCC unroll 4
    for (int c = 0; c < kBlockChunks; ++c) {
      scaled[r][c] = zero();
      if (c < block.first || c >= block.last) continue;
      const F16 weight = load(weights + r * kKeyBlock + c * kChunk);
      scaled[r][c] = select(less(zero(), weight), weight * load(block.v_scales[c]), weight);  // 0 or NaN as it is
      top[r] = max(top[r], as_int(scaled[r][c]));
    }
  }
  float factor[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int32_t bits = max_lanes(top[r]);
    const float peak = float_of(static_cast<uint32_t>(bits));
    const bool finite = bits < 0x7f800000, tiny = peak < 1e-30f;
    factor[r] = finite && !tiny ? 65280.0f / peak : 0.0f;
    out[r].scale = finite ? (tiny ? 0.0f : peak / 65280.0f) : float_of(0x7fc00000u);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    I16 code[kBlockChunks];
#pragma GCC unroll 4
    for (int c = 0; c < kBlockChunks; ++c)  // a factor of 0 means no codes, infinite weights included
      code[c] = factor[r] == 0.0f ? set1(int32_t{0}) : round_int(scaled[r][c] * set1(factor[r]));
    store_two_bytes(out[r].high, out[r].low, code[0], code[1], code[2], code[3]);
  }
}

LLMC_INLINE I16 load_quad(const char* p, int count) {
  if (count >= 16) return load_dwords(p);
  int32_t words[16] = {};
  std::memcpy(words, p, static_cast<size_t>(count) * 4);
  return load(words);
}

// out[r][i ... i + 16 B) += the block's weights times its values.
template <int R, int B>
LLMC_INLINE void add_columns_int8(const WeightLimbs* weights, const KeyBlock& block, int64_t width, int64_t i,
                                  int count, float* out, int64_t ld_out) {
  I16 high[R][B], low[R][B];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) high[r][b] = low[r][b] = set1(int32_t{0});
  for (int chunk = block.first; chunk < block.last; ++chunk)
    for (int quad = 0; quad < 4; ++quad) {
      const int64_t offset = (quad * width + i) * 4;
      I16 codes[B];
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        codes[b] = load_quad(block.v[chunk] + offset + b * 64, B > 1 ? 16 : count);
        prefetch_l2(block.next_v[chunk] + offset + b * 64);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int at = quad * 16 + chunk * 4;
        const I16 top = repeat_dword(weights[r].high + at), rest = repeat_dword(weights[r].low + at);
#pragma GCC unroll 2
        for (int b = 0; b < B; ++b) {
          high[r][b] = dot_bytes(high[r][b], top, codes[b]);
          low[r][b] = dot_bytes(low[r][b], rest, codes[b]);
        }
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < B; ++b) {
      float* to = out + r * ld_out + i + b * 16;
      store(to, fma(to_float(shift_left<8>(high[r][b]) + low[r][b]), set1(weights[r].scale), load(to)));
    }
}

template <int R>
LLMC_KERNEL void add_values_int8(const WeightLimbs* weights, const KeyBlock& block, int64_t width, float* out,
                                 int64_t ld_out) {
  constexpr int B = LLMC_AVX512 && R <= 4 ? 2 : 1;
  int64_t i = 0;
  for (; i + 16 * B <= width; i += 16 * B) add_columns_int8<R, B>(weights, block, width, i, 16, out, ld_out);
  for (; i < width; i += 16)
    add_columns_int8<R, 1>(weights, block, width, i, static_cast<int>(width - i < 16 ? width - i : 16), out, ld_out);
}

LLMC_END
