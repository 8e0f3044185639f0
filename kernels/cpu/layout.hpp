// Packed weights: tiles of 32 rows, each one ascending stream of 64-byte vectors of 16 rows.
// kernels/packing.py writes these layouts; its docstrings and this file are the definition.
//
// Integer codes (W4T32, W8T32), G = group:
//   tile t -> group g -> [32 x f16 scale][32 x u8 zero, if Zeros][codes], (K / G) groups
//   4 bits, codes of k8 = 0 .. G/8 - 1, half j = 0, 1: 64 bytes; dword r is row 16 j + r, its byte b holds
//     code 8 k8 + b in the low nibble and code 8 k8 + 4 + b in the high one
//   8 bits, codes of k4 = 0 .. G/4 - 1, half j: 64 bytes; byte b of dword r is code 4 k4 + b of row 16 j + r
//   codes are unsigned; a symmetric scheme has 8 (4 bits) or 128 (8 bits) added
// Floating point: tile t -> k -> half j -> 16 rows of f32 (64 B); f16: k -> 32 rows (64 B);
//   bf16: pairs k2 -> half j -> 16 dwords (64 B), the even k in the low half
#pragma once

#include "number.hpp"

LLMC_BEGIN

// A weight of integer codes and the activations it is multiplied with.
//   Bits 4 or 8; Group 32, 64 or 128: codes that share a scale in the packed stream;
//   Unit: activations that share a scale and are summed in integers, divides Group;
//   Limbs: int8 digits of an activation, 1 (8 bits) or 2 (16 bits); Zeros: zero points are stored.
template <int Bits_, int Group_, int Unit_, int Limbs_, bool Zeros_>
struct Scheme {
  static constexpr int Bits = Bits_, Group = Group_, Unit = Unit_, Limbs = Limbs_;
  static constexpr bool Zeros = Zeros_;
  static constexpr int kOffset = Bits == 4 ? 8 : 128;
  static constexpr int kUnits = Group / Unit;  // units of one group
  static constexpr size_t kHeader = 64 + (Zeros ? 32 : 0);
  static constexpr size_t kRecord = kHeader + size_t{4} * Bits * Group;
  static constexpr size_t kUnitBytes = size_t{4} * Bits * Unit;
  static_assert(Bits == 4 || Bits == 8, "codes are of 4 or 8 bits");
  static_assert(Group == 32 || Group == 64 || Group == 128, "groups are of 32, 64 or 128 codes");
  static_assert(Unit >= 32 && Group % Unit == 0, "a unit divides its group");
  static_assert(Limbs == 1 || Limbs == 2, "activations have one or two limbs");

  static constexpr int64_t groups(int64_t in_features) { return (in_features + Group - 1) / Group; }
  static constexpr int64_t units(int64_t in_features) { return groups(in_features) * kUnits; }
  static constexpr int64_t padded(int64_t in_features) { return groups(in_features) * Group; }
  static constexpr size_t tile_bytes(int64_t in_features) {
    return static_cast<size_t>(groups(in_features)) * kRecord;
  }
};

constexpr int64_t tiles_of(int64_t out_features) { return (out_features + kTileRows - 1) / kTileRows; }

// Bytes of one tile of a floating-point weight; bf16 holds pairs, so an odd K is padded.
template <class T>
constexpr size_t float_tile_bytes(int64_t in_features) {
  return static_cast<size_t>(sizeof(T) == 2 ? round_up<int64_t>(in_features, 2) : in_features) * kTileRows *
         sizeof(T);
}

// Value (row, k) of packed codes: (code - zero) * scale, as the portable packing has it.
template <class S>
LLMC_INLINE float packed_value(const uint8_t* weight, int64_t in_features, int64_t row, int64_t k) {
  const uint8_t* record = weight + static_cast<size_t>(row / kTileRows) * S::tile_bytes(in_features) +
                          static_cast<size_t>(k / S::Group) * S::kRecord;
  const int64_t lane = row % 16, half = row % kTileRows / 16, column = k % S::Group;
  f16 scale;
  std::memcpy(&scale, record + row % kTileRows * 2, 2);
  const int zero = S::Zeros ? record[64 + row % kTileRows] : S::kOffset;
  const uint8_t* codes = record + S::kHeader;
  int code;
  if (S::Bits == 4) {
    const uint8_t byte = codes[(column / 8 * 2 + half) * 64 + lane * 4 + column % 4];
    code = column % 8 < 4 ? byte & 15 : byte >> 4;
  } else {
    code = codes[(column / 4 * 2 + half) * 64 + lane * 4 + column % 4];
  }
  return static_cast<float>(code - zero) * to_float(scale);
}

template <class T>
LLMC_INLINE float packed_value(const T* weight, int64_t in_features, int64_t row, int64_t k) {
  const T* tile = weight + static_cast<size_t>(row / kTileRows) * (float_tile_bytes<T>(in_features) / sizeof(T));
  const int64_t inside = row % kTileRows;
  return to_float(tile[k * kTileRows + inside]);
}
template <>
LLMC_INLINE float packed_value<bf16>(const bf16* weight, int64_t in_features, int64_t row, int64_t k) {
  const bf16* tile = weight + static_cast<size_t>(row / kTileRows) * (float_tile_bytes<bf16>(in_features) / 2);
  const int64_t lane = row % 16, half = row % kTileRows / 16;
  return to_float(tile[(k / 2 * 2 + half) * 32 + lane * 2 + k % 2]);
}

LLMC_END
