// Look-ups of rows of packed matrices, shared among threads by row.
#pragma once

#include "generic.hpp"
#include "table_linear.hpp"

LLMC_BEGIN
namespace plain {

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

template <class C>
struct TableTiles {
  const uint8_t* weight;
  int64_t width, group;
  float at(int64_t row, int64_t column) const { return table_value<C>(weight, width, group, row, column); }
};

// out[T, D] = table[ids]
template <class M>
LLMC_KERNEL void embedding(int tid, int nt, float* out, const int64_t* ids, M table, int64_t T, int64_t D) {
  LLMC_SHARE(t, T) {
    for (int64_t d = 0; d < D; ++d) out[t * D + d] = table.at(ids[t], d);
  }
}

}  // namespace plain
LLMC_END
