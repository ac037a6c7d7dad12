// The driver, which Triton and CUTLASS call beside the runtime, and NVRTC, whose programs are empty.
#include "stub.h"
#include <cstring>
#include <dlfcn.h>

static CUresult nothing(...) { return CUDA_SUCCESS; }
static void* function_called(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  return found ? found : (void*)nothing;
}

ANSWER(cudaError_t) cudaGetDriverEntryPointByVersion(
    const char* name, void** address, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *address = function_called(name);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaGetDriverEntryPoint(
    const char* name, void** address, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPointByVersion(name, address, 0, 0, result);
}
ANSWER(CUresult) cuGetProcAddress_v2(const char* name, void** address, int, cuuint64_t, CUdriverProcAddressQueryResult*) {
  *address = function_called(name);
  return CUDA_SUCCESS;
}

ANSWER(CUresult) cuInit(unsigned) { return CUDA_SUCCESS; }
ANSWER(CUresult) cuDriverGetVersion(int* version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
ANSWER(CUresult) cuGetErrorString(CUresult, const char** text) { *text = "an error in a rehearsal"; return CUDA_SUCCESS; }
ANSWER(CUresult) cuDeviceGetCount(int* number) { *number = card().devices; return CUDA_SUCCESS; }
ANSWER(CUresult) cuDeviceGet(CUdevice* device, int number) { *device = number; return CUDA_SUCCESS; }
ANSWER(CUresult) cuDeviceGetName(char* name, int size, CUdevice) {
  strncpy(name, card().name.c_str(), size);
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);
}

static char context;  // there is one
ANSWER(CUresult) cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice) { *found = (CUcontext)&context; return CUDA_SUCCESS; }
ANSWER(CUresult) cuCtxGetCurrent(CUcontext* found) { *found = (CUcontext)&context; return CUDA_SUCCESS; }
ANSWER(CUresult) cuCtxGetDevice(CUdevice* device) { *device = current_device(); return CUDA_SUCCESS; }
ANSWER(CUresult) cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuCtxGetLimit(size_t* value, CUlimit) { *value = 0; return CUDA_SUCCESS; }

ANSWER(CUresult) cuModuleLoad(CUmodule* module, const char*) { *module = (CUmodule)new_handle(); return CUDA_SUCCESS; }
ANSWER(CUresult) cuModuleLoadData(CUmodule* module, const void*) { return cuModuleLoad(module, nullptr); }
ANSWER(CUresult) cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return cuModuleLoad(module, nullptr);
}
ANSWER(CUresult) cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) { return CUDA_ERROR_NOT_FOUND; }
ANSWER(CUresult) cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  bool threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, registers = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS;
  *value = threads ? 1024 : registers ? 64 : 0;
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuLaunchKernel(
    CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**) {
  count("launch", (const char*)function);
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuLaunchKernelEx(const CUlaunchConfig*, CUfunction function, void**, void**) {
  count("launch", (const char*)function);
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuOccupancyMaxActiveBlocksPerMultiprocessor(int* number, CUfunction, int, size_t) {
  *number = 2;
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuOccupancyMaxActiveClusters(int* number, CUfunction, const CUlaunchConfig*) {
  *number = 66;
  return CUDA_SUCCESS;
}

ANSWER(int) nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
  *program = new_handle();
  return 0;
}
ANSWER(int) nvrtcGetLoweredName(void*, const char* name, const char** lowered) { *lowered = name; return 0; }
ANSWER(int) nvrtcGetCUBINSize(void*, size_t* bytes) { *bytes = 16; return 0; }
ANSWER(int) nvrtcGetPTXSize(void*, size_t* bytes) { *bytes = 16; return 0; }
ANSWER(int) nvrtcGetProgramLogSize(void*, size_t* bytes) { *bytes = 1; return 0; }
ANSWER(int) nvrtcGetCUBIN(void*, char* code) { memset(code, 0, 16); return 0; }
ANSWER(int) nvrtcGetPTX(void*, char* code) { memset(code, 0, 16); return 0; }
ANSWER(int) nvrtcGetProgramLog(void*, char* text) { *text = 0; return 0; }
