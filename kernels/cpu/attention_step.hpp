// Attention of a whole step on all threads: which thread does which tile, and when long contexts are shared.
#pragma once

#include "attention.hpp"

LLMC_BEGIN

constexpr int64_t kSplitTokens = 8;  // sequences with more rows in the step are never split

// Calls f(tile, cost) for every tile of the batch, in one order on all threads.
template <class F>
LLMC_INLINE void for_tiles(const AttentionShape& a, const AttentionBatch& b, const F& f) {
  const int64_t tokens = tile_tokens(a), heads = tile_heads(a);
  for (int64_t s = 0; s < b.sequences; ++s)
    for (int64_t row = b.query_starts[s]; row < b.query_starts[s + 1]; row += tokens) {
      const int64_t left = b.query_starts[s + 1] - row, count = left < tokens ? left : tokens;
      const int64_t keys = b.positions[row + count - 1] + 1 - oldest_visible(a, b.positions[row]);
      for (int64_t g = 0; g < a.kv_heads; ++g)
        for (int64_t h = 0; h < group_heads(a); h += heads) {
          const int64_t some = group_heads(a) - h < heads ? group_heads(a) - h : heads;
          f(Tile{s, row, count, g, h, some}, (keys + kKeyBlock) * (4 + count * some));
        }
    }
}

// Shared scratch for `threads` threads and contexts of at most `max_context` keys.
inline size_t attention_parts(const AttentionShape& a, int threads, int64_t max_context) {
  return static_cast<size_t>(4 * threads + a.kv_heads * (group_heads(a) / tile_heads(a) + 1)) *
         static_cast<size_t>(max_context / kSplitKeys + 2);
}
inline size_t attention_part_bytes(const AttentionShape& a) {
  return static_cast<size_t>(kTileQueries) * (static_cast<size_t>(padded_values(a)) + 32) * 4;
}
inline size_t attention_step_bytes(const AttentionShape& a, int threads, int64_t max_context) {
  return static_cast<size_t>(threads) * round_up<size_t>(attention_scratch_bytes(a), 64) +
         attention_parts(a, threads, max_context) * attention_part_bytes(a);
}

struct StepPlan {
  int64_t tiles, cost;
  bool split;  // parts of tiles go to different threads, and are merged after a barrier
};

// Too few tiles for the threads and a long context: then parts are shared. Decides nothing about bits.
inline StepPlan attention_plan(const AttentionShape& a, const AttentionBatch& b, int nt) {
  StepPlan plan{0, 0, nt > 1};
  int64_t longest = 0;
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t rows = b.query_starts[s + 1] - b.query_starts[s];
    if (rows > kSplitTokens) plan.split = false;
  }
  for_tiles(a, b, [&](const Tile& tile, int64_t cost) {
    ++plan.tiles;
    plan.cost += cost;
    const int64_t newest = b.positions[tile.first_row + tile.tokens - 1];
    longest = newest + 1 - oldest_visible(a, b.positions[tile.first_row]) > longest ? newest + 1 : longest;
  });
  plan.split = plan.split && plan.tiles < 4 * nt && longest > kSplitKeys;
  return plan;
}

// The memory of part `index`: sums, then m and the denominator's lanes of each row.
LLMC_INLINE float* part_memory(const AttentionShape& a, void* scratch, int nt, int64_t index) {
  char* parts = static_cast<char*>(scratch) + static_cast<size_t>(nt) * round_up<size_t>(attention_scratch_bytes(a), 64);
  return reinterpret_cast<float*>(parts + static_cast<size_t>(index) * attention_part_bytes(a));
}

template <class F>
LLMC_INLINE void for_parts(const AttentionShape& a, const AttentionBatch& b, const Tile& tile, const F& f) {
  const int64_t newest = b.positions[tile.first_row + tile.tokens - 1];
  const int64_t oldest = oldest_visible(a, b.positions[tile.first_row]);
  for (int64_t begin = oldest / kSplitKeys * kSplitKeys; begin <= newest; begin += kSplitKeys) f(begin);
}

// Parts of this thread, kept for `attention_merge`.
template <class T>
inline void attention_split(const AttentionShape& a, const AttentionBatch& b, int tid, int nt, void* scratch) {
  void* own = static_cast<char*>(scratch) + static_cast<size_t>(tid) * round_up<size_t>(attention_scratch_bytes(a), 64);
  const TileScratch s = tile_scratch(a, own);
  const int64_t values = padded_values(a);
  int64_t index = 0, total = 0;
  for_tiles(a, b, [&](const Tile& tile, int64_t) { for_parts(a, b, tile, [&](int64_t) { ++total; }); });
  for_tiles(a, b, [&](const Tile& tile, int64_t) {
    for_parts(a, b, tile, [&](int64_t begin) {
      const int64_t mine = index++;
      if (mine * nt / total != tid) return;
      TileState state;
      QueryLimbs limbs[kTileQueries];
      load_queries<T>(a, b, tile, s, limbs, &state);
      attend_part<T>(a, b, tile, s, limbs, begin, begin + kSplitKeys, &state);
      float* part = part_memory(a, scratch, nt, mine);
      std::memcpy(part, s.acc, static_cast<size_t>(tile.rows() * values) * 4);
      for (int r = 0; r < tile.rows(); ++r) {
        float* row = part + kTileQueries * values + r * 32;
        std::memcpy(row, state.l[r], 64);
        row[16] = state.m[r];
      }
    });
  });
}

// First half of a step's attention, by every thread. `scratch`: attention_step_bytes, 64-byte aligned. A barrier
// must follow, then attention_merge with the same arguments, then (as after any kernel) another barrier.
template <class T>
inline void attention(int tid, int nt, const AttentionShape& a, const AttentionBatch& b, void* scratch) {
  const StepPlan plan = attention_plan(a, b, nt);
  if (plan.split) return attention_split<T>(a, b, tid, nt, scratch);
  void* own = static_cast<char*>(scratch) + static_cast<size_t>(tid) * round_up<size_t>(attention_scratch_bytes(a), 64);
  int64_t before = 0;
  for_tiles(a, b, [&](const Tile& tile, int64_t cost) {
    if ((2 * before + cost) * nt / (2 * plan.cost) == tid) attend_tile<T>(a, b, tile, own);
    before += cost;
  });
}

// Second half: merges what was split; nothing otherwise.
inline void attention_merge(int tid, int nt, const AttentionShape& a, const AttentionBatch& b, void* scratch) {
  const StepPlan plan = attention_plan(a, b, nt);
  if (!plan.split) return;
  void* own = static_cast<char*>(scratch) + static_cast<size_t>(tid) * round_up<size_t>(attention_scratch_bytes(a), 64);
  const TileScratch s = tile_scratch(a, own);
  const int64_t values = padded_values(a);
  int64_t number = 0, index = 0;
  for_tiles(a, b, [&](const Tile& tile, int64_t) {
    const bool mine = number++ * nt / plan.tiles == tid;
    Merged merged;
    if (mine) begin_merge(a, tile, &merged, s.merged);
    for_parts(a, b, tile, [&](int64_t) {
      const float* part = part_memory(a, scratch, nt, index++);
      for (int r = 0; mine && r < tile.rows(); ++r) {
        const float* row = part + kTileQueries * values + r * 32;
        merge_row(row[16], row, part + r * values, values, &merged.m[r], merged.l[r], s.merged + r * values);
      }
    });
    for (int r = 0; mine && r < tile.rows(); ++r)
      put_row(a, merged.l[r], s.merged + r * values, output_row(a, b, tile, r));
  });
}

LLMC_END
