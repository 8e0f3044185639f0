// The paged key and value cache of one layer: how a page lies in memory, and how tokens are written to it.
//
// K and V are arrays of blocks, block (page, head) at (page * kv_heads + head) * block bytes. A page has N
// tokens, a multiple of 16; tokens lie in chunks of 16, one after the other. With D and V rounded up to
// multiples of 4 (the padding is zero):
//   float32   K chunk [D][16 tokens]               V chunk [16][V]
//   bfloat16  K chunk [D / 2][16][2]               V chunk [8 pairs of tokens][V][2]
//   int8      K chunk [D / 4][16][4], code + 128   V chunk [4 quadruples][V][4], signed
//             each block ends with float32 scales [N]: value = code * scale
#pragma once

#include <cmath>

#include "share.hpp"
#include "vec.hpp"

LLMC_BEGIN

constexpr int kChunk = 16;  // tokens of one cache chunk

LLMC_INLINE int64_t cache_width(int64_t width) { return round_up<int64_t>(width, 4); }

// Bytes of one token's values, and of one (page, head) block, in a cache of T: float, bf16 or int8_t.
template <class T>
LLMC_INLINE int64_t cache_block_bytes(int64_t page_tokens, int64_t width) {
  return page_tokens * (cache_width(width) * static_cast<int64_t>(sizeof(T)) + (sizeof(T) == 1 ? 4 : 0));
}

template <class T>
struct CacheShape {
  int64_t kv_heads, page_tokens, k_width, v_width;
  int64_t k_block() const { return cache_block_bytes<T>(page_tokens, k_width); }
  int64_t v_block() const { return cache_block_bytes<T>(page_tokens, v_width); }
  // The chunk with offset `token` of a page, and the scales of its tokens.
  int64_t k_chunk(int64_t token) const { return token / kChunk * kChunk * cache_width(k_width) * sizeof(T); }
  int64_t v_chunk(int64_t token) const { return token / kChunk * kChunk * cache_width(v_width) * sizeof(T); }
  int64_t k_scales() const { return page_tokens * cache_width(k_width); }
  int64_t v_scales() const { return page_tokens * cache_width(v_width); }
};

LLMC_INLINE void put_k(float* chunk, int token, int64_t i, float value) { chunk[i * kChunk + token] = value; }
LLMC_INLINE void put_k(bf16* chunk, int token, int64_t i, float value) {
  chunk[(i / 2 * kChunk + token) * 2 + i % 2] = to_bf16(value);
}
LLMC_INLINE void put_v(float* chunk, int token, int64_t i, int64_t width, float value) {
  chunk[token * width + i] = value;
}
LLMC_INLINE void put_v(bf16* chunk, int token, int64_t i, int64_t width, float value) {
  chunk[(token / 2 * width + i) * 2 + token % 2] = to_bf16(value);
}

template <class T>
LLMC_INLINE void write_k(char* block, int64_t offset, const float* values, const CacheShape<T>& shape) {
  T* chunk = reinterpret_cast<T*>(block + shape.k_chunk(offset));
  const int token = static_cast<int>(offset % kChunk);
  const int64_t padded = cache_width(shape.k_width);
  for (int64_t i = 0; i < padded; ++i) put_k(chunk, token, i, i < shape.k_width ? values[i] : 0.0f);
}
template <class T>
LLMC_INLINE void write_v(char* block, int64_t offset, const float* values, const CacheShape<T>& shape) {
  T* chunk = reinterpret_cast<T*>(block + shape.v_chunk(offset));
  const int token = static_cast<int>(offset % kChunk);
  const int64_t padded = cache_width(shape.v_width);
  for (int64_t i = 0; i < padded; ++i) put_v(chunk, token, i, padded, i < shape.v_width ? values[i] : 0.0f);
}

// bfloat16 is rounded sixteen values at a time.
template <>
LLMC_INLINE void write_k<bf16>(char* block, int64_t offset, const float* values, const CacheShape<bf16>& shape) {
  bf16* chunk = reinterpret_cast<bf16*>(block + shape.k_chunk(offset));
  const int token = static_cast<int>(offset % kChunk);
  const int64_t padded = cache_width(shape.k_width);
  int64_t i = 0;
  for (bf16 some[16]; i + 16 <= shape.k_width; i += 16) {
    store(some, load(values + i));
    for (int j = 0; j < 16; j += 2) std::memcpy(chunk + ((i + j) / 2 * kChunk + token) * 2, some + j, 4);
  }
  for (; i < padded; ++i) put_k(chunk, token, i, i < shape.k_width ? values[i] : 0.0f);
}
template <>
LLMC_INLINE void write_v<bf16>(char* block, int64_t offset, const float* values, const CacheShape<bf16>& shape) {
  bf16* chunk = reinterpret_cast<bf16*>(block + shape.v_chunk(offset));
  const int token = static_cast<int>(offset % kChunk);
  const int64_t padded = cache_width(shape.v_width);
  int64_t i = 0;
  for (bf16 some[16]; i + 16 <= shape.v_width; i += 16) {
    store(some, load(values + i));
    for (int j = 0; j < 16; ++j) chunk[(token / 2 * padded + i + j) * 2 + token % 2] = some[j];
  }
  for (; i < padded; ++i) put_v(chunk, token, i, padded, i < shape.v_width ? values[i] : 0.0f);
}

// The int8 scale of a row: largest magnitude / 127; NaN where the row is not finite. `factor` is its inverse.
LLMC_INLINE float row_scale(const float* values, int64_t width, float* factor) {
  uint32_t top = 0;
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t bits = bits_of(values[i]) & 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  const float peak = float_of(top);
  const bool finite = top < 0x7f800000u, tiny = peak < 1e-30f;
  *factor = finite && !tiny ? 127.0f / peak : 0.0f;
  return finite ? (tiny ? 0.0f : peak / 127.0f) : float_of(0x7fc00000u);
}
LLMC_INLINE int code_of(float value, float factor) {
  const float scaled = factor == 0.0f ? 0.0f : value * factor;
  return wrap_bits(scaled + kRoundMagic) - wrap_bits(kRoundMagic);
}
template <>
LLMC_INLINE void write_k<int8_t>(char* block, int64_t offset, const float* values, const CacheShape<int8_t>& shape) {
  float factor;
  const float scale = row_scale(values, shape.k_width, &factor);
  uint8_t* chunk = reinterpret_cast<uint8_t*>(block + shape.k_chunk(offset));
  const int64_t token = offset % kChunk, padded = cache_width(shape.k_width);
  for (int64_t i = 0; i < padded; ++i)
    chunk[(i / 4 * kChunk + token) * 4 + i % 4] =
        static_cast<uint8_t>(128 + (i < shape.k_width ? code_of(values[i], factor) : 0));
  std::memcpy(block + shape.k_scales() + offset * 4, &scale, 4);
}
template <>
LLMC_INLINE void write_v<int8_t>(char* block, int64_t offset, const float* values, const CacheShape<int8_t>& shape) {
  float factor;
  const float scale = row_scale(values, shape.v_width, &factor);
  int8_t* chunk = reinterpret_cast<int8_t*>(block + shape.v_chunk(offset));
  const int64_t token = offset % kChunk, padded = cache_width(shape.v_width);
  for (int64_t i = 0; i < padded; ++i)
    chunk[(token / 4 * padded + i) * 4 + token % 4] =
        static_cast<int8_t>(i < shape.v_width ? code_of(values[i], factor) : 0);
  std::memcpy(block + shape.v_scales() + offset * 4, &scale, 4);
}

// Writes k[rows, ld_k] and v[rows, ld_v], heads in order, at slots[rows] (page * page_tokens + offset;
// negative: skip). Either of k and v may be null. Shared by row.
template <class T>
LLMC_KERNEL void kv_write(int tid, int nt, const float* k, int64_t ld_k, const float* v, int64_t ld_v,
                          char* k_cache, char* v_cache, const int64_t* slots, int64_t rows,
                          const CacheShape<T>& shape) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) {
    if (slots[m] < 0) continue;
    const int64_t page = slots[m] / shape.page_tokens, offset = slots[m] % shape.page_tokens;
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      const int64_t block = page * shape.kv_heads + g;
      if (k) write_k<T>(k_cache + block * shape.k_block(), offset, k + m * ld_k + g * shape.k_width, shape);
      if (v) write_v<T>(v_cache + block * shape.v_block(), offset, v + m * ld_v + g * shape.v_width, shape);
    }
  }
}

LLMC_END
