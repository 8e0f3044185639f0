// Mixtures of experts: tokens grouped by expert, products over all chosen experts at once, weighted sums.
//
// A slot is one (token, choice). Slots are sorted by expert, tokens ascending within one; products run over
// (expert, tile) pairs, so that threads share the work of few or many experts alike. Each slot's bits are
// those of a product of its row alone.
#pragma once

#include "float_linear.hpp"

LLMC_BEGIN

struct ExpertGroups {
  int32_t* first;    // [experts + 1]: slots of expert e are first[e] ... first[e + 1] - 1
  int32_t* token;    // [slots]: token of each slot
  int32_t* slot_of;  // [tokens * choices]: slot of each (token, choice)
  int64_t experts, slots;
};

inline size_t expert_group_bytes(int64_t experts, int64_t tokens, int64_t choices) {
  return static_cast<size_t>(experts + 1 + 2 * tokens * choices) * 4;
}
inline ExpertGroups expert_groups(void* memory, int64_t experts, int64_t tokens, int64_t choices) {
  int32_t* p = static_cast<int32_t*>(memory);
  return {p, p + experts + 1, p + experts + 1 + tokens * choices, experts, tokens * choices};
}

// Sorts the slots of expert_ids[tokens, choices]. By thread 0 alone; a barrier must follow.
LLMC_KERNEL inline void group_experts(int tid, const int64_t* expert_ids, int64_t tokens, int64_t choices,
                                      const ExpertGroups& groups) {
  if (tid != 0) return;
  std::memset(groups.first, 0, static_cast<size_t>(groups.experts + 1) * 4);
  for (int64_t i = 0; i < tokens * choices; ++i) ++groups.first[expert_ids[i] + 1];
  for (int64_t e = 0; e < groups.experts; ++e) groups.first[e + 1] += groups.first[e];
  for (int64_t i = 0; i < tokens * choices; ++i) {  // stable: the next free slot of each expert
    const int32_t slot = groups.first[expert_ids[i]]++;
    groups.token[slot] = static_cast<int32_t>(i / choices);
    groups.slot_of[i] = slot;
  }
  for (int64_t e = groups.experts; e > 0; --e) groups.first[e] = groups.first[e - 1];
  groups.first[0] = 0;
}

// Calls f(expert, first slot, slots, tile_begin, tile_end) for this thread's part of all (expert, tile) pairs.
template <class F>
LLMC_INLINE void for_expert_tiles(int tid, int nt, const ExpertGroups& groups, int64_t tiles, int64_t grain, const F& f) {
  int64_t active = 0;
  for (int64_t e = 0; e < groups.experts; ++e) active += groups.first[e + 1] > groups.first[e];
  const int64_t whole = round_up<int64_t>(tiles, grain);
  const Range mine = share(tid, nt, active * whole, grain);
  int64_t start = 0;
  for (int64_t e = 0; e < groups.experts; ++e) {
    const int64_t slots = groups.first[e + 1] - groups.first[e];
    if (slots == 0) continue;
    const int64_t begin = mine.begin > start ? mine.begin - start : 0;
    const int64_t end = mine.end - start < tiles ? mine.end - start : tiles;
    if (begin < end) f(e, static_cast<int64_t>(groups.first[e]), slots, begin, end);
    start += whole;
  }
}

// y[slots, ldy] = x @ weight[expert].T + bias[expert] for every slot. `p.weight` holds the experts' packed
// matrices one after the other, `p.bias` [experts, out_features] or null. `by_token`: x has a row a token
// (the first product of an expert); otherwise a row a slot (the second).
template <class S>
inline void expert_linear(int tid, int nt, const ExpertGroups& groups, const Product& p, bool by_token, int64_t grain = 1) {
  const size_t bytes = static_cast<size_t>(tiles_of(p.out_features)) * S::tile_bytes(p.in_features);
  for_expert_tiles(tid, nt, groups, tiles_of(p.out_features), grain,
                   [&](int64_t e, int64_t first, int64_t slots, int64_t begin, int64_t end) {
    Product one = p;
    one.weight = p.weight + static_cast<size_t>(e) * bytes;
    one.bias = p.bias ? p.bias + e * p.out_features : nullptr;
    one.rows = slots;
    one.y = p.y + first * p.ldy;
    if (by_token) {
      one.index = groups.token + first;
    } else {
      one.x.codes = p.x.codes + first * S::Limbs * p.x.code_stride;
      one.x.sums = p.x.sums + first * S::Limbs * p.x.unit_stride;
      one.x.scales = p.x.scales + first * p.x.unit_stride;
    }
    linear_tiles<S, Into::kStore>(one, begin, end);
  });
}

// The same with floating-point weights.
template <class T>
inline void expert_float_linear(int tid, int nt, const ExpertGroups& groups, const FloatProduct& p, bool by_token,
                                int64_t grain = 1) {
  const size_t bytes = static_cast<size_t>(tiles_of(p.out_features)) * float_tile_bytes<T>(p.in_features);
  for_expert_tiles(tid, nt, groups, tiles_of(p.out_features), grain,
                   [&](int64_t e, int64_t first, int64_t slots, int64_t begin, int64_t end) {
    FloatProduct one = p;
    one.weight = static_cast<const char*>(p.weight) + static_cast<size_t>(e) * bytes;
    one.bias = p.bias ? p.bias + e * p.out_features : nullptr;
    one.rows = slots;
    one.y = p.y + first * p.ldy;
    if (by_token) one.index = groups.token + first;
    else one.x = p.x + first * p.ldx;
    float_linear_tiles<T, Into::kStore>(one, begin, end);
  });
}

// out[tokens, width] = sum over choices, ascending, of weights[token, choice] * y[slot]. Shared by token.
LLMC_KERNEL inline void combine_experts(int tid, int nt, const ExpertGroups& groups, const float* weights,
                                        int64_t tokens, int64_t choices, const float* y, int64_t ldy, float* out,
                                        int64_t ld_out, int64_t width) {
  const Range mine = share(tid, nt, tokens);
  for (int64_t t = mine.begin; t < mine.end; ++t)
    for (int64_t i = 0; i < width; i += 16) {
      const int count = static_cast<int>(width - i < 16 ? width - i : 16);
      F16 sum = zero();
      for (int64_t c = 0; c < choices; ++c) {
        const float* row = y + groups.slot_of[t * choices + c] * ldy + i;
        sum = fma(load_first(row, count), set1(weights[t * choices + c]), sum);
      }
      store_first(out + t * ld_out + i, sum, count);
    }
}

LLMC_END
