// A C interface to matrix products, for tests: one entry for each scheme of the list, threads one by one.
#include "float_linear.hpp"

using namespace llmc;

namespace {

struct Call {
  const uint8_t* weight;
  const float* x;
  int64_t ldx;
  const int32_t* index;
  int64_t x_rows, rows;
  const float* bias;
  float* y;
  int64_t ldy, in_features, out_features;
  int32_t threads, add;
  uint8_t* scratch;
};

template <class S, int Group>
void integer(const Call& c) {
  FlushDenormals flush;
  const QuantRows quantized = quant_rows<S>(c.scratch, c.x_rows, c.in_features);
  const Product p{c.weight, quantized, c.index, c.rows, c.bias, c.y, c.ldy, c.in_features, c.out_features};
  for (int tid = 0; tid < c.threads; ++tid)
    quantize_rows<S, Group>(tid, c.threads, c.x, c.ldx, c.x_rows, c.in_features, quantized);
  for (int tid = 0; tid < c.threads; ++tid) {
    if (c.add) quantized_linear<S, Into::kAdd>(tid, c.threads, p);
    else quantized_linear<S>(tid, c.threads, p, 2);
  }
}

template <class T>
void floating(const Call& c) {
  FlushDenormals flush;
  const FloatProduct p{c.weight, c.x, c.ldx, c.index, c.rows, c.bias, c.y, c.ldy, c.in_features, c.out_features};
  for (int tid = 0; tid < c.threads; ++tid) {
    if (c.add) float_linear<T, Into::kAdd>(tid, c.threads, p);
    else float_linear<T>(tid, c.threads, p);
  }
}

template <class S>
int64_t scratch(int64_t rows, int64_t in_features) { return quant_rows_bytes<S>(rows, in_features); }

struct Entry {
  void (*run)(const Call&);
  int64_t (*scratch)(int64_t, int64_t);
};

#define SCHEME(bits, group, unit, limbs, zeros, activations)           \
  {integer<Scheme<bits, group, unit, limbs, zeros>, activations>, \
   scratch<Scheme<bits, group, unit, limbs, zeros>>}

const Entry kEntries[] = {LLMC_TEST_SCHEMES};

}  // namespace

extern "C" {
__attribute__((visibility("default"))) int64_t scratch_bytes(int entry, int64_t rows, int64_t in_features) {
  return kEntries[entry].scratch(rows, in_features);
}
__attribute__((visibility("default"))) void run_integer(int entry, const Call* call) { kEntries[entry].run(*call); }
__attribute__((visibility("default"))) void run_float(int bits, const Call* call) {
  bits == 32 ? floating<float>(*call) : bits == 16 ? floating<bf16>(*call) : floating<f16>(*call);
}
}
