// How threads of one parallel region share work: contiguous static ranges, a function of the counts alone.
#pragma once

#include "isa.hpp"

LLMC_BEGIN

struct Range { int64_t begin, end; };

// The part of `total` items that thread `tid` of `nt` does, in whole multiples of `grain` items.
LLMC_INLINE Range share(int tid, int nt, int64_t total, int64_t grain = 1) {
  const int64_t grains = (total + grain - 1) / grain;
  const int64_t begin = grains * tid / nt * grain, end = grains * (tid + 1) / nt * grain;
  return {begin < total ? begin : total, end < total ? end : total};
}

LLMC_END
