// Table look-ups: rows of packed or row-major tables, and rows of activations.
#pragma once

#include "layout.hpp"
#include "share.hpp"

LLMC_BEGIN

// out[rows, width] = table rows ids[rows], from a table of packed codes (the tied head's own weights), as
// (code - zero) * scale. Shared by row.
template <class S>
LLMC_KERNEL void embed_codes(int tid, int nt, const int64_t* ids, int64_t rows, const uint8_t* table, int64_t width,
                             float* out, int64_t ld_out) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    for (int64_t k = 0; k < width; ++k) out[m * ld_out + k] = packed_value<S>(table, width, ids[m], k);
}

// The same from a floating-point table in 32-row tiles.
template <class T>
LLMC_KERNEL void embed_tiles(int tid, int nt, const int64_t* ids, int64_t rows, const T* table, int64_t width,
                             float* out, int64_t ld_out) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    for (int64_t k = 0; k < width; ++k) out[m * ld_out + k] = packed_value<T>(table, width, ids[m], k);
}

// Rows ids[rows] of a row-major table, as float32: embeddings, learned positions, gathered activations.
template <class T>
LLMC_KERNEL void gather_rows(int tid, int nt, const int64_t* ids, int64_t rows, const T* table, int64_t ld_table,
                             int64_t width, float* out, int64_t ld_out) {
  const Range mine = share(tid, nt, rows);
  for (int64_t m = mine.begin; m < mine.end; ++m)
    for (int64_t k = 0; k < width; ++k) out[m * ld_out + k] = to_float(table[ids[m] * ld_table + k]);
}

LLMC_END
