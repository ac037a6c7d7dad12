// Kernels are known by the names that their host functions are registered with, counted, and not run. Streams and events
// are always done; to wait for one is an event that is counted.
#include "stub.h"
#include <cstring>
#include <mutex>
#include <unordered_map>

static std::mutex mutex;
static std::unordered_map<const void*, std::string>& kernels() {
  static auto* names = new std::unordered_map<const void*, std::string>;  // outlives those who register at the start
  return *names;
}

ANSWER(void**) __cudaRegisterFatBinary(void*) { static void* handle[4]; return handle; }
ANSWER(void) __cudaRegisterFatBinaryEnd(void**) {}
ANSWER(void) __cudaUnregisterFatBinary(void**) {}
ANSWER(void) __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
ANSWER(void) __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> lock(mutex);
  kernels()[host] = name;
}

// The configuration of <<<...>>> goes by these two.
static thread_local struct { dim3 grid, block; size_t shared; void* stream; } configuration;
ANSWER(unsigned) __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
ANSWER(cudaError_t) __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *(void**)stream = configuration.stream;
  return cudaSuccess;
}
ANSWER(cudaError_t) __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}

static cudaError_t launched(const void* host) {
  std::unique_lock<std::mutex> lock(mutex);
  auto found = kernels().find(host);
  std::string name = found == kernels().end() ? "unknown kernel" : found->second;
  lock.unlock();
  count("launch", name);
  return cudaSuccess;
}
ANSWER(cudaError_t) __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched((const void*)kernel);
}
ANSWER(cudaError_t) cudaLaunchKernel(const void* host, dim3, dim3, void**, size_t, cudaStream_t) { return launched(host); }
ANSWER(cudaError_t) cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* host, void**) { return launched(host); }
ANSWER(cudaError_t) cudaLaunchCooperativeKernel(const void* host, dim3, dim3, void**, size_t, cudaStream_t) {
  return launched(host);
}

ANSWER(cudaError_t) cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->maxDynamicSharedSizeBytes = 49152;
  found->binaryVersion = found->ptxVersion = card().major * 10 + card().minor;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* number, const void*, int, size_t) {
  *number = 2;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* number, const void*, int, size_t, unsigned) {
  *number = 2;
  return cudaSuccess;
}

ANSWER(cudaError_t) cudaGetLastError() { return cudaSuccess; }
ANSWER(cudaError_t) cudaPeekAtLastError() { return cudaSuccess; }
ANSWER(cudaError_t) cudaDeviceSynchronize() { count("wait", "device"); return cudaSuccess; }
ANSWER(cudaError_t) cudaStreamSynchronize(cudaStream_t) { count("wait", "stream"); return cudaSuccess; }
ANSWER(cudaError_t) cudaEventSynchronize(cudaEvent_t) { count("wait", "event"); return cudaSuccess; }
ANSWER(cudaError_t) cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
ANSWER(cudaError_t) cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
ANSWER(cudaError_t) cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { *milliseconds = 1; return cudaSuccess; }
ANSWER(cudaError_t) cudaStreamCreate(cudaStream_t* stream) { *stream = (cudaStream_t)new_handle(); return cudaSuccess; }
ANSWER(cudaError_t) cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
ANSWER(cudaError_t) cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
ANSWER(cudaError_t) cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
ANSWER(cudaError_t) cudaEventCreate(cudaEvent_t* event) { *event = (cudaEvent_t)new_handle(); return cudaSuccess; }
ANSWER(cudaError_t) cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }

// No graph is ever captured.
ANSWER(cudaError_t) cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
    const cudaGraphEdgeData**, size_t*) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
