// A C interface to elementwise and row kernels, for tests: threads run one after another.
#include "activation.hpp"
#include "embedding.hpp"
#include "moe.hpp"
#include "norm.hpp"
#include "quantize.hpp"
#include "rope.hpp"

using namespace llmc;
#define EXPORT extern "C" __attribute__((visibility("default"))) void

template <class F>
static void threads(int nt, F f) {
  FlushDenormals flush;
  for (int tid = 0; tid < nt; ++tid) f(tid);
}

EXPORT run_function(int which, const float* x, float* out, int64_t n) {
  FlushDenormals flush;
  F16 (*const functions[])(F16) = {
      [](F16 v) { return llmc::exp2(v); }, [](F16 v) { return llmc::exp(v); }, [](F16 v) { return llmc::tanh(v); },
      [](F16 v) { return llmc::erf(v); },  [](F16 v) { return sigmoid(v); },
  };
  for (int64_t i = 0; i < n; i += 16) store(out + i, functions[which](load(x + i)));
}

EXPORT run_fma(const float* a, const float* b, const float* c, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(out + i, fma(load(a + i), load(b + i), load(c + i)));
}

EXPORT run_convert(const float* x, bf16* out, const f16* half, float* from_half, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    store(out + i, load(x + i));
    store(from_half + i, load(half + i));
  }
}

EXPORT run_norm(int nt, int layer, const float* x, const float* residual, float* total, float* out, int64_t rows,
                int64_t width, const float* weight, const float* bias, float eps, float offset) {
  const NormWeights w{weight, bias, eps, offset};
  threads(nt, [&](int tid) {
    if (residual && layer) add_norm_rows<Norm::kLayer>(tid, nt, x, residual, total, out, width, rows, width, w);
    else if (residual) add_norm_rows<Norm::kRms>(tid, nt, x, residual, total, out, width, rows, width, w);
    else if (layer) norm_rows<Norm::kLayer>(tid, nt, x, width, out, width, rows, width, w);
    else norm_rows<Norm::kRms>(tid, nt, x, width, out, width, rows, width, w);
  });
}

template <Activation A>
static void activation(int nt, int form, const float* gate, const float* up, float* out, int64_t rows, int64_t width) {
  threads(nt, [&](int tid) {
    if (form == 0) gated_rows(tid, nt, Gated<A>{}, gate, width, up, width, out, width, rows, width);
    if (form == 1) gated_tiles(tid, nt, Gated<A>{}, gate, round_up<int64_t>(width, 32) * 2, out, width, rows, width);
    if (form == 2) activate_rows<A>(tid, nt, gate, width, out, width, rows, width);
  });
}
EXPORT run_activation(int nt, int which, int form, const float* gate, const float* up, float* out, int64_t rows,
                      int64_t width) {
  void (*const all[])(int, int, const float*, const float*, float*, int64_t, int64_t) = {
      activation<Activation::kSilu>,  activation<Activation::kGelu>,    activation<Activation::kGeluTanh>,
      activation<Activation::kRelu>,  activation<Activation::kRelu2>,   activation<Activation::kSigmoid>,
      activation<Activation::kIdentity>,
  };
  all[which](nt, form, gate, up, out, rows, width);
}
EXPORT run_clamped(const float* gate, const float* up, float* out, int64_t n, float alpha, float limit) {
  gated_rows(0, 1, ClampedSwiglu{alpha, limit}, gate, n, up, n, out, n, 1, n);
}
EXPORT run_softcap(float* x, int64_t rows, int64_t width, float cap) { softcap_rows(0, 1, x, width, rows, width, cap); }

EXPORT run_rope(int nt, int style, float* x, const int64_t* positions, const float* inv_freq, float* table, float scale,
                int64_t rows, int64_t heads, int64_t head_dim, int64_t pairs, int tail) {
  threads(nt, [&](int tid) { rope_table(tid, nt, positions, rows, inv_freq, pairs, scale, table); });
  threads(nt, [&](int tid) {
    const int64_t ld = heads * head_dim;
    if (style == 0) rope_rows<Rope::kHalf>(tid, nt, x, ld, table, rows, heads, head_dim, pairs, tail);
    if (style == 1) rope_rows<Rope::kInterleaved>(tid, nt, x, ld, table, rows, heads, head_dim, pairs, tail);
    if (style == 2) rope_rows<Rope::kInterleavedToHalf>(tid, nt, x, ld, table, rows, heads, head_dim, pairs, tail);
  });
}

EXPORT run_embedding(int kind, const int64_t* ids, int64_t rows, const void* table, int64_t width, float* out) {
  if (kind == 0) embed_codes<Scheme<4, 32, 32, 1, true>>(0, 1, ids, rows, (const uint8_t*)table, width, out, width);
  if (kind == 1) embed_codes<Scheme<8, 128, 128, 1, false>>(0, 1, ids, rows, (const uint8_t*)table, width, out, width);
  if (kind == 2) embed_tiles<float>(0, 1, ids, rows, (const float*)table, width, out, width);
  if (kind == 3) embed_tiles<bf16>(0, 1, ids, rows, (const bf16*)table, width, out, width);
  if (kind == 4) gather_rows<f16>(0, 1, ids, rows, (const f16*)table, width, width, out, width);
}

// A whole mixture: gate_up [E, 2F, D] and down [E, D, F], both int4_g32, rows of gate and up interleaved by tile.
EXPORT run_moe(int nt, const float* x, const int64_t* ids, const float* weights, const uint8_t* gate_up,
               const uint8_t* down, const float* gate_up_bias, const float* down_bias, float* out, int64_t tokens,
               int64_t choices, int64_t experts, int64_t width, int64_t hidden, char* scratch) {
  using S = Scheme<4, 32, 32, 2, false>;
  const int64_t slots = tokens * choices;
  const ExpertGroups groups = expert_groups(scratch, experts, tokens, choices);
  char* next = scratch + round_up<size_t>(expert_group_bytes(experts, tokens, choices), 64);
  const QuantRows qx = quant_rows<S>(next, tokens, width);
  next += round_up<size_t>(quant_rows_bytes<S>(tokens, width), 64);
  const QuantRows qh = quant_rows<S>(next, slots, hidden);
  next += round_up<size_t>(quant_rows_bytes<S>(slots, hidden), 64);
  float* both = (float*)next;
  float* act = both + slots * 2 * hidden;
  float* y = act + slots * hidden;
  threads(nt, [&](int tid) {
    group_experts(tid, ids, tokens, choices, groups);
    quantize_rows<S, 32>(tid, nt, x, width, tokens, width, qx);
  });
  const Product first{gate_up, qx, nullptr, 0, gate_up_bias, both, 2 * hidden, width, 2 * hidden};
  threads(nt, [&](int tid) { expert_linear<S>(tid, nt, groups, first, true, 2); });
  threads(nt, [&](int tid) {
    const Range mine = share(tid, nt, slots);
    gated_tiles(0, 1, Gated<Activation::kSilu>{}, both + mine.begin * 2 * hidden, 2 * hidden, act + mine.begin * hidden,
                hidden, mine.end - mine.begin, hidden);
    quantize_rows<S, 32>(tid, nt, act, hidden, slots, hidden, qh);
  });
  const Product second{down, qh, nullptr, 0, down_bias, y, width, hidden, width};
  threads(nt, [&](int tid) { expert_linear<S>(tid, nt, groups, second, false); });
  threads(nt, [&](int tid) { combine_experts(tid, nt, groups, weights, tokens, choices, y, width, out, width, width); });
}
