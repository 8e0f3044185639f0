// The tile registers that `linear_amx.hpp` needs, as one object: AMX instructions, or (LLMC_AMX_EMULATED) the same
// in standard C++, by which machines without AMX check the code around them.
#pragma once

#include "isa.hpp"

LLMC_BEGIN

// LDTILECFG's operand. Rows and bytes a row of each tile register; unused registers have none.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

#ifndef LLMC_AMX_EMULATED

// Configured for the life of the object, on this thread. Inline assembly, because GCC 12 takes _tile_loadconfig to
// read eight bytes of its operand and drops the stores to the rest.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T> LLMC_INLINE void clear() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
  template <int T> LLMC_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T> LLMC_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  // Sums += signed bytes of A times unsigned bytes of B.
  template <int Sums, int A, int B> LLMC_INLINE void dot() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(A), "i"(B));
  }
};

#else

class Tiles {
 public:
  explicit Tiles(const TileConfig& config) : config_(config) { std::memset(memory_, 0, sizeof memory_); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T> void clear() { std::memset(memory_[T], 0, sizeof memory_[T]); }
  template <int T> void load(const void* from, int64_t stride) {
    clear<T>();
    for (int r = 0; r < config_.rows[T]; ++r)
      std::memcpy(memory_[T] + r * 64, static_cast<const char*>(from) + r * stride, config_.row_bytes[T]);
  }
  template <int T> void store(void* to, int64_t stride) {
    for (int r = 0; r < config_.rows[T]; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, memory_[T] + r * 64, config_.row_bytes[T]);
  }
  template <int Sums, int A, int B> void dot() {
    for (int m = 0; m < config_.rows[Sums]; ++m)
      for (int n = 0; n < config_.row_bytes[Sums] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, memory_[Sums] + m * 64 + n * 4, 4);
        for (int k = 0; k < config_.row_bytes[A]; ++k)
          sum += static_cast<int8_t>(memory_[A][m * 64 + k]) * memory_[B][k / 4 * 64 + n * 4 + k % 4];
        std::memcpy(memory_[Sums] + m * 64 + n * 4, &sum, 4);
      }
  }

 private:
  TileConfig config_;
  uint8_t memory_[8][1024];
};

#endif

LLMC_END
