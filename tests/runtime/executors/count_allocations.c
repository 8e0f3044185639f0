// Counts calls of the allocator, by any thread, while a step runs. Preloaded before libc.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <errno.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

static atomic_long calls;

void* malloc(size_t size) { atomic_fetch_add(&calls, 1); return __libc_malloc(size); }
void* calloc(size_t count, size_t size) { atomic_fetch_add(&calls, 1); return __libc_calloc(count, size); }
void* realloc(void* old, size_t size) { atomic_fetch_add(&calls, 1); return __libc_realloc(old, size); }
void* memalign(size_t alignment, size_t size) { atomic_fetch_add(&calls, 1); return __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = memalign(alignment, size);
  return *out ? 0 : ENOMEM;
}

long watch_step(int32_t (*step)(void*, const int64_t*, int64_t), void* engine, const int64_t* fields, int64_t count) {
  const long before = atomic_load(&calls);
  const int32_t fault = step(engine, fields, count);
  return fault ? -fault : atomic_load(&calls) - before;
}
