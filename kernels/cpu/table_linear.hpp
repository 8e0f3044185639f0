// Products with codes whose values are looked up: tables of 16 values, 8-bit floats, and integers with scales of
// any dtype. Activations stay float32. kernels/tables.py writes the layout; K is cut in groups of any size:
//   tile of 32 rows t -> group g -> [32 x f32 scale][32 x u8 zero, if Zeros][codes of the group]
//   a byte a code: k -> 32 rows; a nibble: pairs of k -> 32 rows, the even k in the low nibble
// One chain a (row, column): inside a group sum = fma(value, x, sum) over ascending k, then
// acc = fma(sum, scale, acc) over ascending groups, for any number of rows.
#pragma once

#include "moe.hpp"

LLMC_BEGIN

enum class CodeKind { kInt, kNf4, kFp4, kFp8 };

// Values of a table's codes: QLoRA appendix E; OCP Microscaling Formats 1.0, section 5.3.3.
constexpr float kNf4Values[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                  -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                  0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
                                  0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                                  0.7229568362236023f, 1.0f};
constexpr float kFp4Values[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f,
                                  -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; the largest magnitude of bits is NaN.
LLMC_INLINE F16 e4m3_values(I16 code) {
  const I16 bits = code & set1(0x7f), exponent = shift_right<3>(bits);
  const F16 normal = as_float(shift_left<20>(bits) + set1(120 << 23));
  const F16 small = to_float(bits) * set1(0x1p-9f);
  F16 size = select(less(exponent, set1(1)), small, normal);
  size = select(less(set1(0x7e), bits), set1(float_of(0x7fc00000u)), size);
  return as_float(as_int(size) | shift_left<24>(code & set1(0x80)));
}

// `Offset` is taken from integers; zero points too, where there are any. `Whole`: a byte a code.
template <CodeKind Kind_, bool Whole_, bool Zeros_, int Offset_>
struct TableCodes {
  static constexpr CodeKind Kind = Kind_;
  static constexpr bool Whole = Whole_, Zeros = Zeros_;
  static constexpr int64_t kHeader = kTileRows * (Zeros ? 5 : 4);

  static F16 values(I16 code) {
    if constexpr (Kind == CodeKind::kNf4) return look_up(kNf4Values, code);
    if constexpr (Kind == CodeKind::kFp4) return look_up(kFp4Values, code);
    if constexpr (Kind == CodeKind::kFp8) return e4m3_values(code);
    return to_float(code - set1(Offset_));
  }
  static constexpr int64_t code_bytes(int64_t count) { return kTileRows * (Whole ? count : (count + 1) / 2); }
  static constexpr int64_t tile_bytes(int64_t in_features, int64_t group) {
    const int64_t whole = in_features / group, rest = in_features % group;
    return whole * (kHeader + code_bytes(group)) + (rest ? kHeader + code_bytes(rest) : 0);
  }
};

// As FloatProduct, with `group` codes a scale.
struct TableProduct {
  const uint8_t* weight;
  const float* x;
  int64_t ldx;
  const int32_t* index;
  int64_t rows;
  const float* bias;
  float* y;
  int64_t ldy, in_features, out_features, group;
};

// One code of each of a tile's rows, less its zero point, times M activations.
template <class C, int M>
LLMC_INLINE void add_code(I16 low, I16 high, const F16 (&zeros)[2], const float* const (&x)[M], int64_t k,
                          F16 (&sum)[M][2]) {
  F16 first = C::values(low), second = C::values(high);
  if (C::Zeros) first = first - zeros[0], second = second - zeros[1];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const F16 value = set1(x[m][k]);
    sum[m][0] = fma(first, value, sum[m][0]);
    sum[m][1] = fma(second, value, sum[m][1]);
  }
}

template <class C, int M>
LLMC_KERNEL void table_tile(const TableProduct& p, int64_t first, int64_t tile) {
  const uint8_t* at = p.weight + tile * C::tile_bytes(p.in_features, p.group);
  const float* x[M];
  for (int m = 0; m < M; ++m) x[m] = p.x + (p.index ? p.index[first + m] : first + m) * p.ldx;
  F16 acc[M][2];
  // Sums stay in registers only where every index into them is a constant: each loop over m is unrolled.
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = zero();
  for (int64_t start = 0; start < p.in_features; start += p.group) {
    const int64_t stop = start + p.group < p.in_features ? start + p.group : p.in_features;
    float scales[kTileRows];
    std::memcpy(scales, at, sizeof scales);
    F16 zeros[2] = {zero(), zero()}, sum[M][2];
    if (C::Zeros) zeros[0] = to_float(load(at + 4 * kTileRows)), zeros[1] = to_float(load(at + 4 * kTileRows + 16));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = zero();
    const uint8_t* codes = at + C::kHeader;
    for (int64_t k = start; k < stop; codes += kTileRows) {
      prefetch(codes + 1024);
      const I16 low = load(codes), high = load(codes + 16);
      if (C::Whole) {
        add_code<C, M>(low, high, zeros, x, k++, sum);
        continue;
      }
      add_code<C, M>(low & set1(15), high & set1(15), zeros, x, k++, sum);
      if (k < stop) add_code<C, M>(shift_right<4>(low), shift_right<4>(high), zeros, x, k++, sum);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      acc[m][0] = fma(sum[m][0], load(scales), acc[m][0]);
      acc[m][1] = fma(sum[m][1], load(scales + 16), acc[m][1]);
    }
    at += C::kHeader + C::code_bytes(stop - start);
  }
  const int64_t column = tile * kTileRows;
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float out[kTileRows];
    store(out, acc[m][0]);
    store(out + 16, acc[m][1]);
    put_tile<Into::kStore>(out, p.bias ? p.bias + column : nullptr, p.y + (first + m) * p.ldy + column,
                           p.out_features - column);
  }
}

constexpr int kTableRows = LLMC_AVX512 ? 6 : 2;  // rows whose sums fit registers

template <class C, int M = kTableRows>
LLMC_INLINE void table_rows(const TableProduct& p, int64_t first, int64_t count, int64_t tile) {
  if (count == M) return table_tile<C, M>(p, first, tile);
  if constexpr (M > 1) table_rows<C, M - 1>(p, first, count, tile);
}

template <class C>
inline void table_tiles(const TableProduct& p, int64_t begin, int64_t end) {
  const int64_t chunk = p.rows > 0 ? row_chunk(p.rows, kTableRows) : 1;
  for (int64_t tile = begin; tile < end; ++tile)
    for (int64_t first = 0; first < p.rows; first += chunk)
      table_rows<C>(p, first, p.rows - first < chunk ? p.rows - first : chunk, tile);
}

// The product, shared among threads by tiles.
template <class C>
inline void table_linear(int tid, int nt, const TableProduct& p) {
  const Range mine = share(tid, nt, tiles_of(p.out_features));
  table_tiles<C>(p, mine.begin, mine.end);
}

// The same for the slots of experts, as `expert_float_linear` (moe.hpp).
template <class C>
inline void expert_table_linear(int tid, int nt, const ExpertGroups& groups, const TableProduct& p, bool by_token) {
  const int64_t tiles = tiles_of(p.out_features), bytes = tiles * C::tile_bytes(p.in_features, p.group);
  for_expert_tiles(tid, nt, groups, tiles, 1, [&](int64_t e, int64_t first, int64_t slots, int64_t begin, int64_t end) {
    TableProduct one = p;
    one.weight = p.weight + e * bytes;
    one.bias = p.bias ? p.bias + e * p.out_features : nullptr;
    one.rows = slots;
    one.y = p.y + first * p.ldy;
    if (by_token) one.index = groups.token + first;
    else one.x = p.x + first * p.ldx;
    table_tiles<C>(one, begin, end);
  });
}

// Value (row, k), for random access.
template <class C>
LLMC_INLINE float table_value(const uint8_t* weight, int64_t in_features, int64_t group, int64_t row, int64_t k) {
  const uint8_t* record = weight + row / kTileRows * C::tile_bytes(in_features, group) +
                          k / group * (C::kHeader + C::code_bytes(group));
  const int64_t lane = row % kTileRows, column = k % group;
  const uint8_t byte = record[C::kHeader + (C::Whole ? column : column / 2) * kTileRows + lane];
  float scale, value[16];
  std::memcpy(&scale, record + lane * 4, 4);
  store(value, C::values(set1(static_cast<int32_t>(C::Whole ? byte : (column % 2 ? byte >> 4 : byte & 15)))));
  return (value[0] - (C::Zeros ? static_cast<float>(record[4 * kTileRows + lane]) : 0.0f)) * scale;
}

LLMC_END
