// The integer product of one tile (32 weight rows) with a few rows of activations, at this level.
// Sums inside a unit are exact int32; units are then added in ascending order,
//   acc = fma(float(sum), weight_scale * activation_scale, acc),
// so that every form below, and any number of rows, gives the same bits.
#pragma once

#include "quantize.hpp"

LLMC_BEGIN

// Most rows that one call of `tile_dot` takes.
template <class S>
constexpr int kDotRows = (LLMC_AVX512 ? 8 : 4) / S::Limbs;

// Which cache a pass asks weights into, `ahead` bytes along their stream: the first where each tile is read once, the
// second where several passes read it, the later of which ask for the next tile.
enum class Ask { kFirst, kSecond };
constexpr int kPrefetchBytes = 1024;

// Where the limbs, sums and scales of M rows start.
template <class S, int M>
struct RowPointers {
  const int8_t* codes[M * S::Limbs];
  const int32_t* sums[M * S::Limbs];
  const float* scales[M];
};

// Rows first ... first + M - 1 of `x`, or of x[index[...]] where `index` is given.
template <class S, int M>
LLMC_INLINE RowPointers<S, M> row_pointers(const QuantRows& x, const int32_t* index, int64_t first) {
  RowPointers<S, M> out;
  const int8_t* codes = x.codes + first * S::Limbs * x.code_stride;
  const int32_t* sums = x.sums + first * S::Limbs * x.unit_stride;
  const float* scales = x.scales + first * x.unit_stride;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    if (index) {
      const int64_t row = index[first + m];
      codes = x.codes + row * S::Limbs * x.code_stride;
      sums = x.sums + row * S::Limbs * x.unit_stride;
      scales = x.scales + row * x.unit_stride;
    }
    for (int limb = 0; limb < S::Limbs; ++limb, codes += x.code_stride, sums += x.unit_stride) {
      out.codes[m * S::Limbs + limb] = codes;
      out.sums[m * S::Limbs + limb] = sums;
    }
    out.scales[m] = scales;
    scales += x.unit_stride;
  }
  return out;
}

LLMC_END

#if LLMC_AVX512
#include "dot_avx512.hpp"
#elif LLMC_AVX2
#include "dot_avx2.hpp"
#else
#include "dot_generic.hpp"
#endif
