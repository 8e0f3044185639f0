// A C interface to the paged cache and attention, for tests: threads run one after another.
#include "attention_step.hpp"

using namespace llmc;

struct Call {
  int64_t heads, kv_heads, k_width, v_width, page_tokens, window, chunk;
  double scale, softcap;
  const float* sinks;
  const float *q, *k, *v;
  char *k_cache, *v_cache;
  const int64_t *block_table, *query_starts, *positions, *slots;
  int64_t table_width, sequences, rows;
  float* out;
  char* scratch;
  int64_t threads, max_context;
};

static AttentionShape shape_of(const Call& c) {
  return {c.heads, c.kv_heads, c.k_width, c.v_width, c.page_tokens, (float)c.scale, (float)c.softcap, c.window, c.chunk, c.sinks};
}

template <class T>
static void run(const Call& c) {
  FlushDenormals flush;
  const int nt = (int)c.threads;
  const CacheShape<T> cache{c.kv_heads, c.page_tokens, c.k_width, c.v_width};
  const AttentionShape a = shape_of(c);
  const AttentionBatch b{c.q, c.heads * c.k_width, c.k_cache, c.v_cache, c.block_table, c.query_starts, c.positions,
                         c.table_width, c.sequences, c.out, c.heads * c.v_width};
  for (int tid = 0; tid < nt; ++tid)
    kv_write<T>(tid, nt, c.k, c.kv_heads * c.k_width, c.v, c.kv_heads * c.v_width, c.k_cache, c.v_cache, c.slots, c.rows, cache);
  for (int tid = 0; tid < nt; ++tid) attention<T>(tid, nt, a, b, c.scratch);
  for (int tid = 0; tid < nt; ++tid) attention_merge(tid, nt, a, b, c.scratch);
}

extern "C" {
__attribute__((visibility("default"))) void run_attention(int bits, const Call* c) {
  bits == 32 ? run<float>(*c) : bits == 16 ? run<bf16>(*c) : run<int8_t>(*c);
}
__attribute__((visibility("default"))) int64_t scratch_bytes(const Call* c) {
  return attention_step_bytes(shape_of(*c), (int)c->threads, c->max_context);
}
__attribute__((visibility("default"))) int64_t block_bytes(int bits, int64_t page_tokens, int64_t width) {
  return bits == 32 ? cache_block_bytes<float>(page_tokens, width)
         : bits == 16 ? cache_block_bytes<bf16>(page_tokens, width) : cache_block_bytes<int8_t>(page_tokens, width);
}
}
