// Runs kernels of the generic level over numbers of its own and prints what they give, to the bit: for machines
// that tests can only emulate.
#include <cstdio>
#include <vector>

#include "activation.hpp"
#include "linear.hpp"
#include "norm.hpp"
#include "rope.hpp"
#include "sampling.hpp"
#include "table_linear.hpp"

using namespace llmc;

static uint64_t state = 88172645463325252ull;
static uint32_t next() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<uint32_t>(state >> 16);
}
static float value() { return static_cast<float>(static_cast<int32_t>(next())) * 0x1p-30f; }

static void print(const char* name, const void* data, size_t bytes) {
  uint64_t hash = 1469598103934665603ull;
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 1099511628211ull;
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}

template <class S>
static void product(const char* name, int64_t rows, int64_t width, int64_t columns) {
  std::vector<float> x(rows * width), y(rows * columns);
  for (float& v : x) v = value();
  std::vector<uint8_t> weight(tiles_of(columns) * S::tile_bytes(width) + kWeightSlack);
  for (uint8_t& byte : weight) byte = static_cast<uint8_t>(next());
  for (size_t at = 0; at + S::kRecord <= weight.size(); at += S::kRecord)
    for (int i = 0; i < 32; ++i) weight[at + 2 * i + 1] &= 0x3f;  // scales that are finite
  std::vector<uint8_t> memory(quant_rows_bytes<S>(rows, width) + 64);
  void* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  const QuantRows q = quant_rows<S>(aligned, rows, width);
  quantize_rows<S, S::Unit>(0, 1, x.data(), width, rows, width, q);
  quantized_linear<S>(0, 1, Product{weight.data(), q, nullptr, rows, nullptr, y.data(), columns, width, columns});
  print(name, y.data(), y.size() * 4);
}

int main() {
  FlushDenormals flush;
  product<Scheme<4, 32, 32, 2, false>>("int4", 5, 96, 40);
  product<Scheme<8, 128, 128, 1, true>>("int8", 3, 256, 33);
  std::vector<float> x(4 * 64), y(4 * 64);
  for (float& v : x) v = 3 * value();
  norm_rows<Norm::kRms>(0, 1, x.data(), 64, y.data(), 64, 4, 64, NormWeights{nullptr, nullptr, 1e-5f, 0.0f});
  print("norm", y.data(), y.size() * 4);
  gated_rows(0, 1, Gated<Activation::kGeluTanh>{}, x.data(), 64, y.data(), 64, y.data(), 64, 4, 64);
  print("gate", y.data(), y.size() * 4);
  const int64_t positions[] = {0, 7, 100, 4000};
  std::vector<float> frequencies(32), table(4 * 64);
  for (int i = 0; i < 32; ++i) frequencies[i] = 1.0f / static_cast<float>(1 + 5 * i);
  rope_table(0, 1, positions, 4, frequencies.data(), 32, 1.0f, table.data());
  print("rope", table.data(), table.size() * 4);
  std::vector<float> logits(5000);
  for (float& v : logits) v = 4 * value();
  std::vector<uint8_t> memory(sample_scratch_bytes(5000) + 64);
  SampleRow row{};
  row.temperature = 0.9f, row.repetition_penalty = 1.0f, row.top_p = 0.9, row.top_k = 300, row.seed = 11;
  int64_t tokens[20];
  for (int i = 0; i < 20; ++i) row.num_tokens = i, tokens[i] = sample_token(logits.data(), 5000, row, sample_scratch(memory.data(), 5000));
  print("sample", tokens, sizeof tokens);
}
