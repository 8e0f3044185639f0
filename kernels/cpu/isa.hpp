// Which instruction set this translation unit is compiled for. Knows compilers, no arithmetic.
//
// The level is decided by the compiler's flags alone (see kernels/levels.py): avx512vnni where all of its
// parts are enabled, amx where int8 tiles are as well, avx2 where AVX2, FMA and F16C are, generic otherwise.
// LLMC_GENERIC forces generic; LLMC_AMX_EMULATED makes amx of avx512vnni, its tiles in standard C++.
// Compile with -ffp-contract=off: results are bit-identical between levels only if the compiler fuses
// nothing that is not written as a fused operation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(LLMC_GENERIC) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define LLMC_AVX512 1
#define LLMC_AVX2 0
#if (defined(__AMX_TILE__) && defined(__AMX_INT8__)) || defined(LLMC_AMX_EMULATED)
#define LLMC_LEVEL amx
#define LLMC_AMX 1
#else
#define LLMC_LEVEL avx512vnni
#define LLMC_AMX 0
#endif
#elif !defined(LLMC_GENERIC) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LLMC_LEVEL avx2
#define LLMC_AMX 0
#define LLMC_AVX512 0
#define LLMC_AVX2 1
#else
#define LLMC_LEVEL generic
#define LLMC_AMX 0
#define LLMC_AVX512 0
#define LLMC_AVX2 0
#endif

#if defined(__x86_64__) || defined(__i386__)
#define LLMC_X86 1
#include <immintrin.h>
#else
#define LLMC_X86 0
#endif

#ifdef __FAST_MATH__
#error "these kernels promise bits: compile without -ffast-math"
#endif

#define LLMC_INLINE inline __attribute__((always_inline))
// GCC 12 has deleted calls to functions whose stores it took for dead (interprocedural mod/ref analysis of
// narrowing conversions): every kernel that is called and writes through pointers is opaque to it.
#if defined(__GNUC__) && !defined(__clang__)
#define LLMC_KERNEL __attribute__((noipa))
#else
#define LLMC_KERNEL __attribute__((noinline))
#endif
#define LLMC_RESTRICT __restrict__

// Kernels live in llmc::<level>, so that units of several levels can be linked into one program.
#define LLMC_BEGIN namespace llmc { inline namespace LLMC_LEVEL {
#define LLMC_END } }

LLMC_BEGIN

constexpr int kLanes = 16;        // lanes of every vector, at every level
constexpr int kTileRows = 32;     // weight rows of one packed tile
constexpr size_t kAlign = 64;     // alignment of arrays and of scratch parts, in bytes
constexpr size_t kWeightSlack = 8192;  // readable bytes that must follow each packed weight array

LLMC_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
LLMC_INLINE void prefetch_l2(const void* address) { __builtin_prefetch(address, 0, 2); }

template <class T>
constexpr T round_up(T value, T multiple) { return (value + multiple - 1) / multiple * multiple; }

// Flushes subnormals for the life of the object. Every thread that runs kernels holds one: the cost of
// subnormal operands is then bounded, and all threads agree to the bit.
class FlushDenormals {
 public:
  FlushDenormals() {
#if LLMC_X86
    saved_ = _mm_getcsr();
    _mm_setcsr((saved_ | 0x8040u) & ~0x6000u);  // FTZ, DAZ, round to nearest even
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"((saved_ | (uint64_t{1} << 24)) & ~(uint64_t{3} << 22)));
#endif
  }
  ~FlushDenormals() {
#if LLMC_X86
    _mm_setcsr(saved_);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" : : "r"(saved_));
#endif
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if LLMC_X86
  unsigned saved_ = 0;
#else
  uint64_t saved_ = 0;
#endif
};

LLMC_END
