// `tile_dot` in standard C++. Included by dot.hpp.
#pragma once

LLMC_BEGIN

// sums[32] of one unit: codes * limb, without the zero points.
template <class S>
LLMC_INLINE void unit_sums(const uint8_t* codes, const int8_t* limb, int32_t* LLMC_RESTRICT sums) {
  for (int i = 0; i < kTileRows; ++i) sums[i] = 0;
  constexpr int kSpan = S::Bits == 4 ? 8 : 4;  // activations that 128 bytes of codes meet
  for (int k = 0; k < S::Unit; k += kSpan, codes += 128) {
    for (int i = 0; i < kTileRows; ++i) {
      const uint8_t* four = codes + i * 4;  // half i / 16, dword i % 16: contiguous
      int32_t sum = sums[i];
      for (int b = 0; b < 4; ++b) {
        if (S::Bits == 4) sum += (four[b] & 15) * limb[k + b] + (four[b] >> 4) * limb[k + 4 + b];
        else sum += four[b] * limb[k + b];
      }
      sums[i] = sum;
    }
  }
}

// out[M][32] = tile * rows, for `groups` groups.
template <class S, Ask, int M>
LLMC_INLINE void tile_dot(const uint8_t* tile, const RowPointers<S, M>& rows, int64_t groups, int64_t,
                          float* out) {
  for (int i = 0; i < M * kTileRows; ++i) out[i] = 0.0f;
  for (int64_t unit = 0; unit < groups * S::kUnits; ++unit) {
    const uint8_t* record = tile + unit / S::kUnits * S::kRecord;
    const uint8_t* codes = record + S::kHeader + unit % S::kUnits * S::kUnitBytes;
    for (int m = 0; m < M; ++m) {
      int32_t sums[kTileRows], low[kTileRows];
      int32_t total = rows.sums[m * S::Limbs][unit];
      unit_sums<S>(codes, rows.codes[m * S::Limbs] + unit * S::Unit, sums);
      if (S::Limbs == 2) {
        unit_sums<S>(codes, rows.codes[m * S::Limbs + S::Limbs - 1] + unit * S::Unit, low);
        for (int i = 0; i < kTileRows; ++i) sums[i] = sums[i] * 256 + low[i];
        total = total * 256 + rows.sums[m * S::Limbs + S::Limbs - 1][unit];
      }
      for (int i = 0; i < kTileRows; ++i) {
        f16 scale;
        std::memcpy(&scale, record + i * 2, 2);
        const int32_t zero = S::Zeros ? record[64 + i] : S::kOffset;
        const float factor = to_float(scale) * rows.scales[m][unit];
        out[m * kTileRows + i] =
            fma1(static_cast<float>(sums[i] - zero * total), factor, out[m * kTileRows + i]);
      }
    }
  }
}

LLMC_END
