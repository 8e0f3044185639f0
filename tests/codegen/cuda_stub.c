// A driver library without a GPU: loads what the real one would load, knows its kernels' parameters from their
// files, writes each launch as a line to the file that LLMC_CUDA_STUB_LOG names, records launches and calls of the
// host as graphs, and gives launches that are carried out to a function that llmc_stub_execute sets.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { OK = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, UNKNOWN_PTX = 222, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };

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

static int driver_version = 12080;
void llmc_stub_driver(int version) { driver_version = version; }

Result cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
Result cuDriverGetVersion(int *version) { return *version = driver_version, OK; }
Result cuDeviceGet(int *device, int index) { return *device = index, OK; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 97 ? 232448 : 1;
  return OK;
}
Result cuGetErrorString(Result code, const char **text) {
  *text = code == UNKNOWN_PTX ? "the provided PTX was compiled with an unsupported toolchain." : code == INVALID_IMAGE ? "device kernel image is invalid" : code == NOT_FOUND ? "named symbol not found" : code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "error";
  return OK;
}
// The newest PTX that a driver compiles, 87 for 8.7: CUDA 12.5 and 12.6 have the same.
static int newest_ptx(void) {
  int major = driver_version / 1000, minor = driver_version % 1000 / 10;
  return 10 * (major - 4) + minor - (major == 12 && minor > 5);
}
static int is_machine_code(const char *image) { return !memcmp(image, "\177ELF", 4); }
Result cuModuleLoadData(void **module, const void *image) {
  if (!is_machine_code(image)) {
    const char *version = strstr(image, "\n.version ");
    int major, minor;
    if (!version || sscanf(version, " .version %d.%d", &major, &minor) != 2) return INVALID_IMAGE;
    if (10 * major + minor > newest_ptx()) return UNKNOWN_PTX;
    fprintf(record(), "compile\n");
  }
  *module = (void *)image;
  return OK;
}

// `.entry NAME(` and a `.param .u64 ...` for each parameter.
static Result find_in_ptx(struct Function **function, const char *text, const char *name) {
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".entry %s(", name);
  const char *from = strstr(text, wanted);
  if (!from) return NOT_FOUND;
  const char *end = strchr(from + strlen(wanted), ')');
  *function = calloc(1, sizeof **function);
  snprintf((*function)->name, sizeof (*function)->name, "%s", name);
  int offset = 0;
  while ((from = strstr(from, ".param .")) && from < end) {
    from += strlen(".param .");
    int size = atoi(from + 1) / 8, index = (*function)->count++;
    offset = (offset + size - 1) / size * size;
    (*function)->size[index] = size;
    (*function)->offset[index] = offset;
    offset += size;
  }
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
  if (!is_machine_code(module)) return find_in_ptx(function, module, name);
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

typedef void (*Execute)(struct Function *function, const unsigned *grid, const uint64_t *values, int count);
typedef void (*HostCall)(void *data);
struct Launch {
  struct Function *function;  // none: a call of the host
  HostCall call;
  void *data;
  unsigned grid[3];
  uint64_t values[64];
};
struct Graph {
  int count, room;
  struct Launch *launches;
};

static Execute execute;
static struct Graph *recording;
static int fails_after = -1;

void llmc_stub_execute(Execute with) { execute = with; }
void llmc_stub_fail_after(int launches) { fails_after = launches; }

static Result carry_out(const struct Launch *launch) {
  if (launch->call) return launch->call(launch->data), OK;
  if (fails_after >= 0 && fails_after-- == 0) return ILLEGAL_ADDRESS;
  if (execute) execute(launch->function, launch->grid, launch->values, launch->function->count);
  return OK;
}

static Result enqueue(const struct Launch *launch) {
  if (!recording) return carry_out(launch);
  if (recording->count == recording->room) {
    recording->room = 2 * recording->room + 64;
    recording->launches = realloc(recording->launches, recording->room * sizeof *launch);
  }
  recording->launches[recording->count++] = *launch;
  return OK;
}

Result cuStreamBeginCapture_v2(void *stream, int mode) {
  (void)stream;
  if (recording || mode != 2) return INVALID_VALUE;
  recording = calloc(1, sizeof *recording);
  return OK;
}
Result cuStreamEndCapture(void *stream, struct Graph **graph) {
  (void)stream;
  if (!recording) return INVALID_VALUE;
  *graph = recording;
  recording = NULL;
  return OK;
}
Result cuGraphInstantiateWithFlags(struct Graph **instance, struct Graph *graph, unsigned long long flags) {
  if (flags) return INVALID_VALUE;
  *instance = malloc(sizeof **instance);
  **instance = *graph;
  return OK;
}
Result cuGraphDestroy(struct Graph *graph) { return free(graph), OK; }
Result cuGraphExecDestroy(struct Graph *graph) { return free(graph->launches), free(graph), OK; }
Result cuGraphLaunch(struct Graph *graph, void *stream) {
  if (recording) return INVALID_VALUE;
  fprintf(record(), "replay %d %p\n", graph->count, stream);
  for (int i = 0; i < graph->count; ++i) {
    Result result = carry_out(graph->launches + i);
    if (result) return result;
  }
  return OK;
}

Result cuLaunchKernelEx(const struct Config *config, struct Function *function, void **values, void **extra) {
  (void)extra;
  // 6: it may begin before the launch ahead of it has ended.
  for (unsigned i = 0; i < config->num_attributes; ++i) {
    const int *attribute = (const int *)((const char *)config->attributes + 72 * i);
    if (attribute[0] != 6 || attribute[2] != 1) return INVALID_VALUE;
    fprintf(record(), "early %s\n", function->name);
  }
  fprintf(record(), "launch %s %u,%u,%u %u %u %p", function->name, config->grid[0], config->grid[1],
          config->grid[2], config->block[0], config->shared, config->stream);
  for (int i = 0; i < function->count; ++i) {
    if (function->size[i] == 8)
      fprintf(record(), " %llu", (unsigned long long)*(uint64_t *)values[i]);
    else
      fprintf(record(), " %d", *(int32_t *)values[i]);
  }
  fputc('\n', record());
  struct Launch launch = {.function = function};
  memcpy(launch.grid, config->grid, sizeof launch.grid);
  for (int i = 0; i < function->count; ++i)
    launch.values[i] = function->size[i] == 8 ? *(uint64_t *)values[i] : *(uint32_t *)values[i];
  return enqueue(&launch);
}

Result cuLaunchHostFunc(void *stream, HostCall call, void *data) {
  (void)stream;
  struct Launch launch = {.call = call, .data = data};
  return enqueue(&launch);
}
