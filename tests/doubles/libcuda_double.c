/* A double of libcuda: "device" memory is host memory, events are the host's clock. There is no GPU in it, and its name
   says so. Signatures and numbers as in cuda.h. SM and MEMORY are given when it is compiled. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef SM
#define SM 75
#endif
#ifndef MEMORY
#define MEMORY (1ull << 30)
#endif
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2 };

static size_t used = 0;

int cuInit(unsigned flags) { return flags == 0 ? OK : INVALID; }
int cuDriverGetVersion(int *version) { *version = 12060; return OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal == 0 ? OK : INVALID; }
int cuDeviceGetName(char *name, int size, int device) {
  (void)device;
  strncpy(name, "double of a GPU", (size_t)size);
  return OK;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  if (attribute != 75 && attribute != 76) return INVALID;
  *value = attribute == 75 ? SM / 10 : SM % 10;
  return OK;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = MEMORY; return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &used; return OK; }
int cuCtxSetCurrent(void *context) { return context == &used ? OK : INVALID; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { *left = MEMORY - used; *total = MEMORY; return OK; }
int cuMemAlloc_v2(uint64_t *address, size_t size) {
  if (used + size > MEMORY) return OUT_OF_MEMORY;
  size_t *block = malloc(size + 16);
  block[0] = size;
  used += size;
  *address = (uint64_t)(uintptr_t)(block + 2);
  return OK;
}
int cuMemFree_v2(uint64_t address) {
  size_t *block = (size_t *)(uintptr_t)address - 2;
  used -= block[0];
  free(block);
  return OK;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
  (void)stream;
  memcpy((void *)(uintptr_t)to, from, size);
  return OK;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
  (void)stream;
  memcpy(to, (void *)(uintptr_t)from, size);
  return OK;
}
int cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = malloc(1); return OK; }
int cuStreamSynchronize(void *stream) { return stream ? OK : INVALID; }
int cuEventCreate(void **event, unsigned flags) { (void)flags; *event = calloc(1, sizeof(struct timespec)); return OK; }
int cuEventRecord(void *event, void *stream) { (void)stream; clock_gettime(CLOCK_MONOTONIC, event); return OK; }
int cuEventSynchronize(void *event) { return event ? OK : INVALID; }
int cuEventElapsedTime(float *ms, void *first, void *second) {
  struct timespec *a = first, *b = second;
  *ms = (float)((b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6);
  return OK;
}
int cuGetErrorName(int code, const char **name) {
  *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_INVALID_VALUE";
  return OK;
}
