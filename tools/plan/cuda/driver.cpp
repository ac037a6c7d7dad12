// The driver, which Triton and CUTLASS call next to the runtime, and NVRTC, whose programs are empty.
#include "stub.h"
#include <cstring>
#include <dlfcn.h>

static CUresult nothing(...) { return CUDA_SUCCESS; }
static void* function_called(const char* name) {
  void* address = dlsym(RTLD_DEFAULT, name);
  return address ? address : (void*)nothing;
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

ANSWER(CUresult) cuDeviceGetCount(int* number) { *number = card().devices; return CUDA_SUCCESS; }
ANSWER(CUresult) cuDeviceGet(CUdevice* device, int number) { *device = number; return CUDA_SUCCESS; }
ANSWER(CUresult) cuDeviceGetName(char* name, int size, CUdevice) {
  strncpy(name, card().name.c_str(), size);
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (cudaDeviceAttr)attribute, device);
}

ANSWER(CUresult) cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0, *active = 1;
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuCtxGetDevice(CUdevice* device) { *device = current_device(); return CUDA_SUCCESS; }
ANSWER(CUresult) cuCtxGetLimit(size_t* value, CUlimit) { *value = 0; return CUDA_SUCCESS; }

ANSWER(CUresult) cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) { return CUDA_ERROR_NOT_FOUND; }
ANSWER(CUresult) cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  bool threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, registers = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS;
  *value = threads ? 1024 : registers ? 64 : 0;
  return CUDA_SUCCESS;
}

ANSWER(int) nvrtcGetLoweredName(void*, const char* name, const char** lowered) { *lowered = name; return 0; }
ANSWER(int) nvrtcGetCUBINSize(void*, size_t* bytes) { *bytes = 16; return 0; }
ANSWER(int) nvrtcGetPTXSize(void*, size_t* bytes) { *bytes = 16; return 0; }
ANSWER(int) nvrtcGetProgramLogSize(void*, size_t* bytes) { *bytes = 1; return 0; }
ANSWER(int) nvrtcGetCUBIN(void*, char* code) { memset(code, 0, 16); return 0; }
ANSWER(int) nvrtcGetPTX(void*, char* code) { memset(code, 0, 16); return 0; }
ANSWER(int) nvrtcGetProgramLog(void*, char* text) { *text = 0; return 0; }
