// The devices: REHEARSAL_CARD names the card, REHEARSAL_CAPABILITY is "9.0" or the like, REHEARSAL_GIB its memory,
// REHEARSAL_MULTIPROCESSORS and REHEARSAL_DEVICES are numbers.
#include "stub.h"
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

const Card& card() {
  static const Card played = [] {
    Card card{getenv("REHEARSAL_CARD")};
    sscanf(getenv("REHEARSAL_CAPABILITY"), "%d.%d", &card.major, &card.minor);
    card.multiprocessors = atoi(getenv("REHEARSAL_MULTIPROCESSORS"));
    card.devices = atoi(getenv("REHEARSAL_DEVICES"));
    card.memory = size_t(atof(getenv("REHEARSAL_GIB")) * (1ull << 30));
    return card;
  }();
  return played;
}

static std::atomic<long> launches = 0;
ANSWER(void) rehearsal_launched() { ++launches; }
ANSWER(long) rehearsal_launches() { return launches; }
ANSWER(void*) rehearsal_handle() { return calloc(1, 64); }

static int shared_of_block() { return card().major >= 9 ? 232448 : 166912; }
static int shared_of_multiprocessor() { return card().major >= 9 ? 233472 : 167936; }

static thread_local int device = 0;
int current_device() { return device; }

ANSWER(cudaError_t) cudaGetDeviceCount(int* number) { *number = card().devices; return cudaSuccess; }
ANSWER(cudaError_t) cudaGetDevice(int* number) { *number = device; return cudaSuccess; }
ANSWER(cudaError_t) cudaSetDevice(int number) {
  if (number < 0 || number >= card().devices) return cudaErrorInvalidDevice;
  device = number;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { *milliseconds = 1; return cudaSuccess; }
ANSWER(cudaError_t) cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaDeviceGetPCIBusId(char* text, int size, int number) {
  snprintf(text, size, "0000:%02x:00.0", number + 1);
  return cudaSuccess;
}

ANSWER(cudaError_t) cudaGetDeviceProperties(cudaDeviceProp* found, int number) {
  memset(found, 0, sizeof *found);
  snprintf(found->name, sizeof found->name, "%s (rehearsal)", card().name.c_str());
  found->totalGlobalMem = card().memory;
  found->major = card().major, found->minor = card().minor;
  found->multiProcessorCount = card().multiprocessors;
  found->maxThreadsPerMultiProcessor = 2048, found->maxThreadsPerBlock = 1024, found->warpSize = 32;
  found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = shared_of_block();
  found->sharedMemPerMultiprocessor = shared_of_multiprocessor();
  found->regsPerBlock = found->regsPerMultiprocessor = 65536, found->l2CacheSize = 40 << 20;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxBlocksPerMultiProcessor = 32, found->unifiedAddressing = 1, found->pciBusID = number + 1;
  found->textureAlignment = 512, found->memoryBusWidth = 5120;
  return cudaSuccess;
}

ANSWER(cudaError_t) cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = card().multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = card().major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = card().minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_of_block(); break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_of_multiprocessor(); break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

ANSWER(cudaError_t) cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->maxDynamicSharedSizeBytes = 49152;
  found->binaryVersion = found->ptxVersion = card().major * 10 + card().minor;
  return cudaSuccess;
}
