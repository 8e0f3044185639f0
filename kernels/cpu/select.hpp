// The best of a row of logits: argmax over all threads, and the k best in order. Equal values rank by index.
#pragma once

#include <algorithm>
#include <cmath>

#include "share.hpp"
#include "vec.hpp"

LLMC_BEGIN

// The first largest value; `finite` is false where a value is NaN or +inf.
struct Best {
  float value;
  int32_t index;
  int32_t finite;
};

constexpr float kLargest = 3.402823466e+38f;

// Best of x[begin, end). Lanes keep their first largest value; the winner of equal lanes is the lowest index.
LLMC_INLINE Best best_of(const float* x, int64_t begin, int64_t end) {
  F16 top = set1(-INFINITY);
  I16 where = set1(static_cast<int32_t>(begin));
  bool finite = true;
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) {
    const F16 value = load(x + i);
    const M16 better = less(top, value);
    top = select(better, value, top);
    where = select(better, set1(static_cast<int32_t>(i)), where);
    finite &= !any(is_nan(value)) && !any(less(set1(kLargest), value));
  }
  float values[16];
  int32_t indexes[16];
  store(values, top);
  store(indexes, where);
  Best best{-INFINITY, static_cast<int32_t>(begin), finite};
  for (int lane = 0; lane < 16; ++lane) {
    const int32_t index = indexes[lane] + (values[lane] == -INFINITY ? 0 : lane);
    if (values[lane] > best.value || (values[lane] == best.value && index < best.index))
      best.value = values[lane], best.index = index;
  }
  for (; i < end; ++i) {
    if (x[i] > best.value) best.value = x[i], best.index = static_cast<int32_t>(i);
    if (!(x[i] <= kLargest)) best.finite = 0;
  }
  return best;
}

// partial[nt][rows]: this thread's part of each row of logits[rows, ld]. A barrier and `combine_best` follow.
LLMC_KERNEL inline void partial_best(int tid, int nt, const float* logits, int64_t ld, int64_t rows, int64_t vocab,
                                     Best* partial) {
  const Range mine = share(tid, nt, vocab, 64);
  for (int64_t m = 0; m < rows; ++m) partial[tid * rows + m] = best_of(logits + m * ld, mine.begin, mine.end);
}

// best[rows] of all threads' parts, shared by row. Parts are in order of their columns.
LLMC_KERNEL inline void combine_best(int tid, int nt, const Best* partial, int64_t rows, Best* best) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m) {
    Best all = partial[m];
    for (int t = 1; t < nt; ++t) {
      const Best& part = partial[t * rows + m];
      if (part.value > all.value) all.value = part.value, all.index = part.index;
      all.finite &= part.finite;
    }
    best[m] = all;
  }
}

// The `count` best of x[n], best first: a heap of the worst so far, as `count` is small. NaN is never chosen.
LLMC_KERNEL inline int64_t top_ids(const float* x, int64_t n, int64_t count, int32_t* ids) {
  const auto before = [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  int64_t held = 0;
  for (int64_t i = 0; i < n && count > 0; ++i) {
    const int32_t id = static_cast<int32_t>(i);
    if (held == count && !(x[i] > x[ids[0]])) continue;
    if (x[i] != x[i]) continue;
    if (held == count) std::pop_heap(ids, ids + held--, before);
    ids[held++] = id;
    std::push_heap(ids, ids + held, before);
  }
  std::sort_heap(ids, ids + held, before);
  return held;
}

LLMC_END
