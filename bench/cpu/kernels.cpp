// Times kernels against the limits of the machine: kernels THREADS REPEATS wall|cpu all|limits. Prints one JSON
// object. `cpu` takes processor time of the (then only) thread, for busy machines; `limits` measures these alone.
// In every repeat each measurement runs once, so that a slow moment hits all of them.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <time.h>

#include "attention_step.hpp"
#include "float_linear.hpp"
#include "pool.hpp"

using namespace llmc;

namespace {

bool g_processor_time = false;

double seconds() {
  timespec time;
  if (g_processor_time && clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0)
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Memory in 2 MB pages, never given back: the program ends soon. Written at once, for untouched pages all
// are one page of zeros; the bytes are small numbers as bf16, f32 and int8 alike.
char* large(size_t bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  bytes = round_up(bytes + kWeightSlack, kPage);
  void* raw = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) std::abort();
  char* p = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(raw), static_cast<uintptr_t>(kPage)));
  madvise(p, bytes, MADV_HUGEPAGE);
  std::memset(p, 0x3c, bytes);
  return p;
}

LLMC_KERNEL int32_t read_all(const char* p, size_t bytes) {
  I16 a = set1(int32_t{0}), b = a;
  for (size_t i = 0; i + 128 <= bytes; i += 128) {
    prefetch(p + i + 4096);
    prefetch(p + i + 4160);
    a = a | load_dwords(p + i);
    b = b | load_dwords(p + i + 64);
  }
  return sum_lanes(a | b);
}

// Integer operations a second of one thread, from registers; 0 where the level has no such instruction.
LLMC_KERNEL double integer_operations(int64_t rounds) {
#if LLMC_AVX512
  __m512i x = _mm512_set1_epi8(1);
  __m512i a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
  for (int64_t r = 0; r < rounds; ++r)
    asm volatile(
        "vpdpbusd %12, %12, %0\n vpdpbusd %12, %12, %1\n vpdpbusd %12, %12, %2\n vpdpbusd %12, %12, %3\n"
        "vpdpbusd %12, %12, %4\n vpdpbusd %12, %12, %5\n vpdpbusd %12, %12, %6\n vpdpbusd %12, %12, %7\n"
        "vpdpbusd %12, %12, %8\n vpdpbusd %12, %12, %9\n vpdpbusd %12, %12, %10\n vpdpbusd %12, %12, %11\n"
        : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l)
        : "v"(x));
  return static_cast<double>(rounds) * 12 * 128;
#else
  return static_cast<double>(rounds) * 0;
#endif
}

struct Measurement {
  std::string name, unit;
  std::function<double()> run;  // amount of work of one run, in units
  std::vector<double> rates;
};

struct Bench {
  Pool& pool;
  int repeats;
  std::vector<Measurement> all;

  void add(std::string name, std::string unit, std::function<double()> run) {
    run();  // touches memory, warms caches
    all.push_back({std::move(name), std::move(unit), std::move(run), {}});
  }
  void measure() {
    for (int r = 0; r < repeats; ++r)
      for (Measurement& m : all) {
        const double start = seconds(), work = m.run();
        m.rates.push_back(work / (seconds() - start) / 1e9);
      }
  }
  void print() {
    std::printf("{");
    for (size_t i = 0; i < all.size(); ++i) {
      std::vector<double>& rates = all[i].rates;
      std::sort(rates.begin(), rates.end());
      std::printf("%s\n  \"%s\": {\"unit\": \"%s\", \"p50\": %.2f, \"p10\": %.2f, \"p90\": %.2f, \"n\": %zu}", i ? "," : "",
                  all[i].name.c_str(), all[i].unit.c_str(), rates[rates.size() / 2], rates[rates.size() / 10],
                  rates[rates.size() * 9 / 10], rates.size());
    }
    std::printf("\n}\n");
  }
};

constexpr size_t kArena = size_t{192} << 20;  // weights rotate through this, so that caches cannot flatter
constexpr int64_t kOut = 8192, kIn = 2048;

void scramble(char* p, size_t bytes) {
  for (size_t i = 0; i < bytes / 8; ++i) reinterpret_cast<uint64_t*>(p)[i] = (i + 1) * 0x9e3779b97f4a7c15ull;
}

template <class S>
void integer_products(Bench& bench, const char* name) {
  const size_t bytes = static_cast<size_t>(tiles_of(kOut)) * S::tile_bytes(kIn);
  const int copies = static_cast<int>(kArena / bytes);
  char* weights = large(bytes * copies);
  scramble(weights, bytes * copies);
  for (size_t r = 0; r < bytes * copies / S::kRecord; ++r)
    for (int i = 0; i < 32; ++i) reinterpret_cast<uint16_t*>(weights + r * S::kRecord)[i] = 0x2000;
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 256}) {
    float* x = reinterpret_cast<float*>(large(rows * kIn * 4));
    for (int64_t i = 0; i < rows * kIn; ++i) x[i] = static_cast<float>(i % 101) - 50.0f;
    float* y = reinterpret_cast<float*>(large(rows * kOut * 4));
    const QuantRows q = quant_rows<S>(large(quant_rows_bytes<S>(rows, kIn)), rows, kIn);
    quantize_rows<S, S::Group>(0, 1, x, kIn, rows, kIn, q);
    const bool decode = rows <= 8;
    const int reps = decode ? copies / 4 + 1 : 1;
    bench.add(std::string(name) + (decode ? "_bytes_m" : "_ops_m") + std::to_string(rows), decode ? "GB/s" : "GOP/s",
              [=, &bench, next = 0]() mutable {
      for (int i = 0; i < reps; ++i, ++next) {
        const uint8_t* w = reinterpret_cast<const uint8_t*>(weights) + next % copies * bytes;
        bench.pool.run([&](int tid, int nt, Barrier&) {
          FlushDenormals flush;
          quantized_linear<S>(tid, nt, Product{w, q, nullptr, rows, nullptr, y, kOut, kIn, kOut});
        });
      }
      return static_cast<double>(reps) * (decode ? static_cast<double>(bytes) : 2.0 * kOut * kIn * rows * S::Limbs);
    });
  }
}

template <class T>
void float_products(Bench& bench, const char* name) {
  const size_t bytes = static_cast<size_t>(tiles_of(kOut)) * float_tile_bytes<T>(kIn);
  const int copies = static_cast<int>(kArena / bytes);
  char* weights = large(bytes * copies);
  for (int64_t rows : {1, 4, 64}) {
    float* x = reinterpret_cast<float*>(large(rows * kIn * 4));
    float* y = reinterpret_cast<float*>(large(rows * kOut * 4));
    bench.add(std::string(name) + (rows <= 4 ? "_bytes_m" : "_ops_m") + std::to_string(rows), rows <= 4 ? "GB/s" : "GOP/s",
              [=, &bench, next = 0]() mutable {
      const char* w = weights + next++ % copies * bytes;
      bench.pool.run([&](int tid, int nt, Barrier&) {
        float_linear<T>(tid, nt, FloatProduct{w, x, kIn, nullptr, rows, nullptr, y, kOut, kIn, kOut});
      });
      return rows <= 4 ? static_cast<double>(bytes) : 2.0 * kOut * kIn * rows;
    });
  }
}

template <class T>
void attentions(Bench& bench, const char* name, int64_t context, int64_t rows) {
  const AttentionShape a{32, 8, 64, 64, 32, 0.125f, 0.0f, 0, 0, nullptr};
  const CacheShape<T> cache{8, 32, 64, 64};
  const int64_t pages = (context + 31) / 32, copies = rows > 1 ? 1 : 8;
  const size_t bytes = static_cast<size_t>(8 * pages * copies) * cache.k_block();
  char *k = large(bytes), *v = large(bytes);
  int64_t* table = reinterpret_cast<int64_t*>(large(pages * copies * 8));
  for (int64_t i = 0; i < pages * copies; ++i) table[i] = i * 7919 % (pages * copies);  // pages lie anywhere
  int64_t* positions = reinterpret_cast<int64_t*>(large(rows * 8));
  for (int64_t r = 0; r < rows; ++r) positions[r] = context - rows + r;
  int64_t* starts = reinterpret_cast<int64_t*>(large(16));
  starts[0] = 0;
  starts[1] = rows;
  float* q = reinterpret_cast<float*>(large(rows * 2048 * 4));
  float* out = reinterpret_cast<float*>(large(rows * 2048 * 4));
  char* scratch = large(attention_step_bytes(a, bench.pool.threads(), context));
  const bool decode = rows == 1;
  bench.add(name, decode ? "GB/s" : "GOP/s", [=, &bench, next = int64_t{0}]() mutable {
    const AttentionBatch b{q, 2048, k, v, table + next++ % copies * pages, starts, positions, pages, 1, out, 2048};
    bench.pool.run([&](int tid, int nt, Barrier& barrier) {
      FlushDenormals flush;
      attention<T>(tid, nt, a, b, scratch);
      barrier.wait();
      attention_merge(tid, nt, a, b, scratch);
    });
    const double keys = static_cast<double>(context - rows / 2) * rows;
    return decode ? 2.0 * static_cast<double>(bytes) / copies : 4.0 * keys * 2048;
  });
}

void add_kernels(Bench& bench) {
  integer_products<Scheme<4, 32, 32, 1, false>>(bench, "int4_g32");
  integer_products<Scheme<4, 32, 32, 2, false>>(bench, "int4_g32_accurate");
  integer_products<Scheme<4, 128, 128, 1, false>>(bench, "int4_g128");
  integer_products<Scheme<8, 32, 32, 1, false>>(bench, "int8_g32");
  float_products<bf16>(bench, "bf16");
  attentions<bf16>(bench, "attention_bf16_4k_decode", 4096, 1);
  attentions<int8_t>(bench, "attention_int8_4k_decode", 4096, 1);
  attentions<bf16>(bench, "attention_bf16_512_prefill", 512, 512);
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::atoi(arguments[1]) : 1, repeats = count > 2 ? std::atoi(arguments[2]) : 9;
  g_processor_time = count > 3 && std::string(arguments[3]) == "cpu" && threads == 1;
  const bool all = count < 5 || std::string(arguments[4]) == "all";
  Pool pool(threads, 4000, 0);
  Bench bench{pool, repeats, {}};
  char* arena = large(kArena);
  scramble(arena, kArena);
  bench.add("streaming_read", "GB/s", [&] {
    pool.run([&](int tid, int nt, Barrier&) {
      const Range mine = share(tid, nt, kArena, 4096);
      volatile int32_t sink = read_all(arena + mine.begin, static_cast<size_t>(mine.end - mine.begin));
      (void)sink;
    });
    return static_cast<double>(kArena);
  });
  bench.add("integer_peak", "GOP/s", [&] {
    std::vector<double> work(static_cast<size_t>(threads));
    pool.run([&](int tid, int, Barrier&) { work[static_cast<size_t>(tid)] = integer_operations(2000000); });
    double total = 0;
    for (double one : work) total += one;
    return total;
  });
  if (all) add_kernels(bench);
  bench.measure();
  bench.print();
}
