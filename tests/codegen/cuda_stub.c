// A driver library without a GPU: loads what the real one would load, knows its kernels' parameters from their
// files, and writes each launch as a line to the file that LLMC_CUDA_STUB_LOG names.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { OK = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };

struct Function {
  char name[256];
  int count, size[64], offset[64];
};
struct Section {
  uint32_t name, type;
  uint64_t flags, address, offset, size;
  uint32_t link, info;
  uint64_t align, entry;
};
struct Config {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned num_attributes;
};

static FILE *record(void) {
  static FILE *file;
  if (!file) {
    file = fopen(getenv("LLMC_CUDA_STUB_LOG"), "a");
    setvbuf(file, NULL, _IOLBF, 0);
  }
  return file;
}

Result cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
Result cuDeviceGet(int *device, int index) { return *device = index, OK; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 97 ? 232448 : 1;
  return OK;
}
Result cuGetErrorString(Result code, const char **text) {
  *text = code == INVALID_IMAGE ? "device kernel image is invalid" : code == NOT_FOUND ? "named symbol not found" : "error";
  return OK;
}
Result cuModuleLoadData(void **module, const void *image) {
  if (memcmp(image, "\177ELF", 4)) return INVALID_IMAGE;
  *module = (void *)image;
  return OK;
}

static void read_parameters(struct Function *function, const uint8_t *from, const uint8_t *end) {
  while (from + 4 <= end) {
    uint8_t form = from[0], kind = from[1];
    uint16_t size = *(const uint16_t *)(from + 2);
    from += 4;
    if (form != 4) continue;
    if (kind == 0x17) {
      int ordinal = *(const uint16_t *)(from + 4);
      function->offset[ordinal] = *(const uint16_t *)(from + 6);
      function->size[ordinal] = *(const uint32_t *)(from + 8) >> 18;
      if (ordinal >= function->count) function->count = ordinal + 1;
    }
    from += size;
  }
}

Result cuModuleGetFunction(struct Function **function, void *module, const char *name) {
  const uint8_t *file = module;
  const struct Section *sections = (const void *)(file + *(const uint64_t *)(file + 40));
  const char *names = (const char *)file + sections[*(const uint16_t *)(file + 62)].offset;
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < *(const uint16_t *)(file + 60); ++i) {
    if (strcmp(names + sections[i].name, wanted)) continue;
    *function = calloc(1, sizeof **function);
    snprintf((*function)->name, sizeof (*function)->name, "%s", name);
    read_parameters(*function, file + sections[i].offset, file + sections[i].offset + sections[i].size);
    return OK;
  }
  return NOT_FOUND;
}

Result cuFuncGetParamInfo(struct Function *function, size_t index, size_t *offset, size_t *size) {
  if ((int)index >= function->count) return INVALID_VALUE;
  *offset = function->offset[index];
  *size = function->size[index];
  return OK;
}
Result cuFuncSetAttribute(struct Function *function, int attribute, int value) {
  fprintf(record(), "attribute %s %d=%d\n", function->name, attribute, value);
  return OK;
}

Result cuLaunchKernelEx(const struct Config *config, struct Function *function, void **values, void **extra) {
  (void)extra;
  fprintf(record(), "launch %s %u,%u,%u %u %u %p", function->name, config->grid[0], config->grid[1],
          config->grid[2], config->block[0], config->shared, config->stream);
  for (int i = 0; i < function->count; ++i) {
    if (function->size[i] == 8)
      fprintf(record(), " %llu", (unsigned long long)*(uint64_t *)values[i]);
    else
      fprintf(record(), " %d", *(int32_t *)values[i]);
  }
  fputc('\n', record());
  return OK;
}
