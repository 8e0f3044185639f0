// Causal attention of ragged queries over paged keys and values: prefill, decode and verification alike.
//
// One recurrence for every row, a function of its own query and keys alone (numbers are log2 units):
//   * keys are taken in blocks at absolute multiples of 64; a row skips blocks in which it sees nothing;
//   * the row's reference m starts at -inf and moves to the block's maximum b only when b > m + 8; then the
//     sums fade by 2^(m - b); weights are 2^(score - m), one exp2, and enter the denominator in 16 lanes;
//   * keys are split at absolute multiples of kSplitKeys; each part is its own recurrence, and parts are
//     merged in ascending order, after the sink where there is one.
// So neither the batch, the chunking of a prompt, the threads nor who computes a part can change a bit.
// (Milakov & Gimelshein 2018 for the recurrence; Dao et al. 2022 for blocks; the lazy rescale as in FA4.)
#pragma once

#include "attention_blocks.hpp"

LLMC_BEGIN

constexpr int64_t kSplitKeys = 1024;
constexpr int kTileQueries = 32;  // rows (tokens times heads of a group) of one tile, at most
constexpr float kRescale = 8.0f;
constexpr float kLog2E = 1.44269504088896341f;

struct AttentionShape {
  int64_t heads, kv_heads, k_width, v_width, page_tokens;
  float scale, softcap;    // softcap 0: none
  int64_t window, chunk;   // 0: none
  const float* sinks;      // [heads], or null
};

// One step's batch. Sequence s owns rows query_starts[s] ... query_starts[s + 1] - 1 of q, at consecutive
// positions; its page i is block_table[s * table_width + i].
struct AttentionBatch {
  const float* q;  // [T, ldq], heads in order
  int64_t ldq;
  const char *k_cache, *v_cache;
  const int64_t *block_table, *query_starts, *positions;
  int64_t table_width, sequences;
  float* out;      // [T, ld_out], heads in order
  int64_t ld_out;
};

// State of a tile's rows. Rows are token-major: row = token * heads_per_group + head.
struct TileState {
  float m[kTileQueries];
  alignas(64) float l[kTileQueries][16];
  int64_t position[kTileQueries];
};

LLMC_INLINE int64_t oldest_visible(const AttentionShape& a, int64_t position) {
  int64_t oldest = a.window && position >= a.window ? position - a.window + 1 : 0;
  if (a.chunk && position / a.chunk * a.chunk > oldest) oldest = position / a.chunk * a.chunk;
  return oldest;
}

LLMC_INLINE int64_t padded_values(const AttentionShape& a) { return round_up<int64_t>(a.v_width, 16); }
LLMC_INLINE int64_t group_heads(const AttentionShape& a) { return a.heads / a.kv_heads; }
// Heads of a group that one tile takes, and tokens.
LLMC_INLINE int64_t tile_heads(const AttentionShape& a) {
  return group_heads(a) < kTileQueries ? group_heads(a) : kTileQueries;
}
LLMC_INLINE int64_t tile_tokens(const AttentionShape& a) { return kTileQueries / tile_heads(a); }

// Per-thread scratch of one tile: queries, limbs, scores, weights, sums and merged sums.
struct TileScratch {
  float *q, *scores, *acc, *merged;
  int8_t* limbs;
  WeightLimbs* weights;
};
inline size_t attention_scratch_bytes(const AttentionShape& a) {
  const size_t width = static_cast<size_t>(cache_width(a.k_width)), values = static_cast<size_t>(padded_values(a));
  return kTileQueries * (width * 4 + kKeyBlock * 4 + values * 8 + round_up<size_t>(width * 2, 64) + sizeof(WeightLimbs)) + 64;
}
inline TileScratch tile_scratch(const AttentionShape& a, void* memory) {
  const int64_t width = cache_width(a.k_width), values = padded_values(a);
  TileScratch s;
  s.weights = static_cast<WeightLimbs*>(memory);
  s.acc = reinterpret_cast<float*>(s.weights + kTileQueries);
  s.merged = s.acc + kTileQueries * values;
  s.scores = s.merged + kTileQueries * values;
  s.q = s.scores + kTileQueries * kKeyBlock;
  s.limbs = reinterpret_cast<int8_t*>(s.q + kTileQueries * width);
  return s;
}

// Keys of a block that a row sees, as offsets in the block.
struct Visible { int low, high; };

LLMC_INLINE F16 hide(F16 value, int chunk, Visible seen, F16 hidden) {
  const I16 key = lane_numbers() + set1(chunk * kChunk);
  return select(less(key, set1(seen.low)), hidden, select(less(set1(seen.high), key), hidden, value));
}

// Moves a row's reference to `top` where it lies far above: what was summed before fades.
LLMC_INLINE void move_reference(float top, float* m, float* l, float* acc, int64_t values) {
  if (top <= *m + kRescale) return;
  const F16 fade = *m == -INFINITY ? zero() : exp2(set1(*m) - set1(top));
  for (int64_t i = 0; i < values; i += 16) store(acc + i, load(acc + i) * fade);
  store(l, load(l) * fade);
  *m = top;
}

LLMC_INLINE F16 capped(const AttentionShape& a, F16 score) {
  return a.softcap != 0.0f ? tanh(score) * set1(a.softcap * kLog2E) : score;
}

// Weights of R rows over a block that they see whole, in place of their scores. All rows of one stage before the
// next: each stage of a row waits for the one before.
template <int R>
LLMC_KERNEL void weigh_whole(const AttentionShape& a, float* m, float (*l)[16], float* scores, float* acc,
                             int64_t values) {
  F16 top[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    top[r] = set1(-INFINITY);
#pragma GCC unroll 4
    for (int c = 0; c < kBlockChunks; ++c) {
      float* at = scores + r * kKeyBlock + c * kChunk;
      const F16 score = capped(a, load(at));
      if (a.softcap != 0.0f) store(at, score);
      top[r] = max(top[r], score);
    }
  }
  float tops[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) tops[r] = max_lanes(top[r]);
  for (int r = 0; r < R; ++r) move_reference(tops[r], m + r, l[r], acc + r * values, values);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const F16 reference = set1(m[r]);
    F16 weight[kBlockChunks];
#pragma GCC unroll 4
    for (int c = 0; c < kBlockChunks; ++c) {
      float* at = scores + r * kKeyBlock + c * kChunk;
      weight[c] = exp2_small(load(at) - reference);
      store(at, weight[c]);
    }
    store(l[r], load(l[r]) + ((weight[0] + weight[1]) + (weight[2] + weight[3])));
  }
}

// The same for one row, some keys of the block's chunks hidden.
LLMC_KERNEL inline void weigh_masked(const AttentionShape& a, const KeyBlock& block, Visible seen, float* m, float* l,
                                     float* scores, float* acc, int64_t values) {
  const F16 nothing = set1(-INFINITY);
  F16 score[kBlockChunks], top = nothing;
  for (int c = 0; c < kBlockChunks; ++c) {
    score[c] = nothing;
    if (c < block.first || c >= block.last) continue;
    score[c] = hide(capped(a, load(scores + c * kChunk)), c, seen, nothing);
    top = max(top, score[c]);
  }
  move_reference(max_lanes(top), m, l, acc, values);
  const F16 reference = set1(*m);
  F16 weight[kBlockChunks];
  for (int c = 0; c < kBlockChunks; ++c) {
    // A hidden key weighs nothing even where the reference is -inf or NaN.
    weight[c] = hide(exp2_small(score[c] - reference), c, seen, zero());
    store(scores + c * kChunk, weight[c]);
  }
  store(l, load(l) + ((weight[0] + weight[1]) + (weight[2] + weight[3])));
}

// Calls `f` with a compile-time count for rows in groups of at most eight: f(first, std::integral_constant).
template <int N> struct Count { static constexpr int value = N; };
template <class F, int N = 8>
LLMC_INLINE void with_count(int count, int first, const F& f) {
  if (count == N) return f(first, Count<N>{});
  if constexpr (N > 1) with_count<F, N - 1>(count, first, f);
}
constexpr int kRowGroup = LLMC_AVX512 ? 8 : LLMC_AVX2 ? 4 : 2;
template <class F>
LLMC_INLINE void by_rows(int rows, const F& f) {
  for (int first = 0; first < rows; first += kRowGroup)
    with_count<F, kRowGroup>(rows - first < kRowGroup ? rows - first : kRowGroup, first, f);
}

// Weights of all rows of a tile over the block at `base`; false where no row sees any of its keys.
LLMC_INLINE bool weigh_rows(const AttentionShape& a, const KeyBlock& block, int64_t base, int rows, TileState* state,
                            float* scores, float* acc, int64_t values) {
  // Positions ascend along a tile: the first row is the one that sees least at the end, the last at the start.
  if (state->position[0] >= base + kKeyBlock - 1 && oldest_visible(a, state->position[rows - 1]) <= base) {
    by_rows(rows, [&](int first, auto count) {
      weigh_whole<decltype(count)::value>(a, state->m + first, state->l + first, scores + first * kKeyBlock,
                                          acc + first * values, values);
    });
    return true;
  }
  bool any_row = false;
  for (int r = 0; r < rows; ++r) {
    float* own = scores + r * kKeyBlock;
    const int64_t position = state->position[r], oldest = oldest_visible(a, position);
    if (position < base || oldest >= base + kKeyBlock) {
      for (int c = 0; c < kBlockChunks; ++c) store(own + c * kChunk, zero());
      continue;
    }
    const Visible seen{static_cast<int>(oldest > base ? oldest - base : 0),
                       static_cast<int>(position - base < kKeyBlock ? position - base : kKeyBlock - 1)};
    if (seen.low == 0 && seen.high == kKeyBlock - 1)
      weigh_whole<1>(a, &state->m[r], &state->l[r], own, acc + r * values, values);
    else
      weigh_masked(a, block, seen, &state->m[r], state->l[r], own, acc + r * values, values);
    any_row = true;
  }
  return any_row;
}

template <class T>
LLMC_INLINE void block_scores(const TileScratch& s, const QueryLimbs* limbs, int rows, int64_t width,
                              const KeyBlock& block) {
  by_rows(rows, [&](int first, auto count) {
    constexpr int R = decltype(count)::value;
    if constexpr (sizeof(T) == 1) score_rows_int8<R>(limbs + first, width, block, s.scores + first * kKeyBlock);
    else score_rows<T, R>(s.q + first * width, width, width, block, s.scores + first * kKeyBlock);
  });
}
template <class T>
LLMC_INLINE void block_values(const TileScratch& s, int rows, int64_t width, int64_t ld, const KeyBlock& block) {
  by_rows(rows, [&](int first, auto count) {
    constexpr int R = decltype(count)::value;
    if constexpr (sizeof(T) == 1) weight_limbs<R>(s.scores + first * kKeyBlock, block, s.weights + first);
    if constexpr (sizeof(T) == 1) add_values_int8<R>(s.weights + first, block, width, s.acc + first * ld, ld);
    else add_values<T, R>(s.scores + first * kKeyBlock, block, width, s.acc + first * ld, ld);
  });
}

// Pointers to the chunks of the block at `base` that keys oldest ... newest touch, into `block`: to clear one, or to
// copy it as a value, takes as long as a row's scores.
template <class T>
LLMC_INLINE void key_block(const AttentionShape& a, const AttentionBatch& b, const int64_t* pages, int64_t group,
                           int64_t base, int64_t oldest, int64_t newest, KeyBlock& block) {
  const CacheShape<T> shape{a.kv_heads, a.page_tokens, a.k_width, a.v_width};
  block.key_begin = static_cast<int>(oldest > base ? oldest - base : 0);
  block.key_end = static_cast<int>(newest - base < kKeyBlock ? newest - base + 1 : kKeyBlock);
  block.first = block.key_begin / kChunk;
  block.last = (block.key_end + kChunk - 1) / kChunk;
  int64_t page = (base + block.first * kChunk) / a.page_tokens;  // one division: they take as long as a row
  int64_t offset = base + block.first * kChunk - page * a.page_tokens;
  for (int c = block.first; c < block.last; ++c, offset += kChunk) {
    if (offset == a.page_tokens) ++page, offset = 0;
    const int64_t index = pages[page] * a.kv_heads + group;
    const char *k = b.k_cache + index * shape.k_block(), *v = b.v_cache + index * shape.v_block();
    block.k[c] = k + shape.k_chunk(offset);
    block.v[c] = v + shape.v_chunk(offset);
    if (sizeof(T) == 1) {
      block.k_scales[c] = reinterpret_cast<const float*>(k + shape.k_scales()) + offset;
      block.v_scales[c] = reinterpret_cast<const float*>(v + shape.v_scales()) + offset;
    }
  }
}

// A tile: tokens first_row ... of one sequence, some heads of one group.
struct Tile {
  int64_t sequence, first_row, tokens, group, first_head, heads;
  int rows() const { return static_cast<int>(tokens * heads); }
};

// The recurrence over keys [begin, end) of one tile, into s.acc and `state`.
template <class T>
LLMC_KERNEL void attend_part(const AttentionShape& a, const AttentionBatch& b, const Tile& tile, const TileScratch& s,
                             const QueryLimbs* limbs, int64_t begin, int64_t end, TileState* state) {
  const int rows = tile.rows();
  const int64_t values = padded_values(a), width = cache_width(a.k_width);
  const int64_t *pages = b.block_table + tile.sequence * b.table_width;
  std::memset(s.acc, 0, static_cast<size_t>(rows * values) * 4);
  for (int r = 0; r < rows; ++r) {
    state->m[r] = -INFINITY;
    store(state->l[r], zero());
  }
  const int64_t newest = b.positions[tile.first_row + tile.tokens - 1];
  const int64_t oldest = oldest_visible(a, b.positions[tile.first_row]);
  const int64_t first = oldest > begin ? oldest / kKeyBlock * kKeyBlock : begin;
  if (first >= end || first > newest) return;
  KeyBlock blocks[2];
  int which = 0;
  key_block<T>(a, b, pages, tile.group, first, oldest, newest, blocks[0]);
  for (int64_t base = first; base < end && base <= newest; base += kKeyBlock) {
    KeyBlock &block = blocks[which], &next = blocks[which ^= 1];
    const int64_t after = base + kKeyBlock <= newest ? base + kKeyBlock : base;
    key_block<T>(a, b, pages, tile.group, after, oldest, newest, next);
    for (int c = block.first; c < block.last; ++c) {
      block.next_k[c] = c < next.last && c >= next.first ? next.k[c] : block.k[c];
      block.next_v[c] = c < next.last && c >= next.first ? next.v[c] : block.v[c];
      if (sizeof(T) == 1 && c < next.last && c >= next.first) {
        prefetch_l2(next.k_scales[c]);
        prefetch_l2(next.v_scales[c]);
      }
    }
    block_scores<T>(s, limbs, rows, width, block);
    if (weigh_rows(a, block, base, rows, state, s.scores, s.acc, values)) block_values<T>(s, rows, cache_width(a.v_width), values, block);
  }
}

// The scaled queries of a tile, in float32 or limbs.
template <class T>
LLMC_KERNEL void load_queries(const AttentionShape& a, const AttentionBatch& b, const Tile& tile,
                              const TileScratch& s, QueryLimbs* limbs, TileState* state) {
  const int64_t width = cache_width(a.k_width);
  const float factor = a.softcap != 0.0f ? a.scale / a.softcap : a.scale * kLog2E;
  for (int64_t t = 0; t < tile.tokens; ++t)
    for (int64_t h = 0; h < tile.heads; ++h) {
      const int64_t row = t * tile.heads + h, head = tile.group * group_heads(a) + tile.first_head + h;
      const float* q = b.q + (tile.first_row + t) * b.ldq + head * a.k_width;
      float* to = s.q + row * width;
      int64_t i = 0;
      for (; i + 16 <= a.k_width; i += 16) store(to + i, load(q + i) * set1(factor));
      for (; i < width; ++i) to[i] = i < a.k_width ? q[i] * factor : 0.0f;
      state->position[row] = b.positions[tile.first_row + t];
      if (sizeof(T) == 1) limbs[row] = query_limbs(to, width, s.limbs + row * round_up<int64_t>(width * 2, 64));
    }
}

// What has been merged of a row: reference, denominator lanes, sums.
struct Merged {
  float m[kTileQueries];
  alignas(64) float l[kTileQueries][16];
};
LLMC_INLINE void begin_merge(const AttentionShape& a, const Tile& tile, Merged* merged, float* sums) {
  std::memset(sums, 0, static_cast<size_t>(tile.rows() * padded_values(a)) * 4);
  for (int r = 0; r < tile.rows(); ++r) {
    const int64_t head = tile.group * group_heads(a) + tile.first_head + r % tile.heads;
    store(merged->l[r], zero());
    merged->m[r] = a.sinks ? a.sinks[head] * kLog2E : -INFINITY;
    if (a.sinks) merged->l[r][0] = 1.0f;
  }
}
// Adds one part of a row.
LLMC_INLINE void merge_row(float m, const float* l, const float* acc, int64_t values, float* merged_m,
                           float* merged_l, float* sums) {
  if (m == -INFINITY && sum_lanes(load(l)) == 0.0f) return;  // saw nothing; NaN scores do not end here
  const float top = !(m <= *merged_m) ? m : *merged_m;
  const F16 old_part = *merged_m == -INFINITY ? zero() : exp2(set1(*merged_m) - set1(top));
  const F16 new_part = exp2(set1(m) - set1(top));
  store(merged_l, fma(load(l), new_part, load(merged_l) * old_part));
  for (int64_t i = 0; i < values; i += 16) store(sums + i, fma(load(acc + i), new_part, load(sums + i) * old_part));
  *merged_m = top;
}
LLMC_INLINE void put_row(const AttentionShape& a, const float* l, const float* sums, float* out) {
  const float total = sum_lanes(load(l));
  const F16 inverse = set1(total == 0.0f ? 0.0f : 1.0f / total);
  for (int64_t i = 0; i < a.v_width; i += 16) {
    const int count = static_cast<int>(a.v_width - i < 16 ? a.v_width - i : 16);
    store_first(out + i, fma(load(sums + i), inverse, zero()), count);  // adding zero makes -0 into 0
  }
}

// Where the output row of a tile's row r begins.
LLMC_INLINE float* output_row(const AttentionShape& a, const AttentionBatch& b, const Tile& tile, int r) {
  const int64_t head = tile.group * group_heads(a) + tile.first_head + r % tile.heads;
  return b.out + (tile.first_row + r / tile.heads) * b.ld_out + head * a.v_width;
}

// A whole tile: all parts in order, merged, written.
template <class T>
LLMC_KERNEL void attend_tile(const AttentionShape& a, const AttentionBatch& b, const Tile& tile, void* scratch) {
  const TileScratch s = tile_scratch(a, scratch);
  TileState state;
  QueryLimbs limbs[kTileQueries];
  Merged merged;
  load_queries<T>(a, b, tile, s, limbs, &state);
  begin_merge(a, tile, &merged, s.merged);
  const int64_t values = padded_values(a), newest = b.positions[tile.first_row + tile.tokens - 1];
  const int64_t oldest = oldest_visible(a, b.positions[tile.first_row]);
  for (int64_t begin = oldest / kSplitKeys * kSplitKeys; begin <= newest; begin += kSplitKeys) {
    attend_part<T>(a, b, tile, s, limbs, begin, begin + kSplitKeys, &state);
    for (int r = 0; r < tile.rows(); ++r)
      merge_row(state.m[r], state.l[r], s.acc + r * values, values, &merged.m[r], merged.l[r], s.merged + r * values);
  }
  for (int r = 0; r < tile.rows(); ++r)
    put_row(a, merged.l[r], s.merged + r * values, output_row(a, b, tile, r));
}

LLMC_END
