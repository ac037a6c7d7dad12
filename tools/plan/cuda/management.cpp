// NVML, a separate library (libnvidia-ml.so.1): PyTorch asks it whether GPUs of several nodes share memory. They do not.
#define ANSWER(name) extern "C" __attribute__((visibility("default"))) int name

ANSWER(nvmlInit_v2)() { return 0; }
ANSWER(nvmlSystemGetCudaDriverVersion_v2)(int* version) {
  *version = 13020;
  return 0;
}
ANSWER(nvmlDeviceGetHandleByPciBusId_v2)(const char*, void** device) {
  static char it;
  *device = &it;
  return 0;
}
ANSWER(nvmlDeviceGetGpuFabricInfoV)(void*, void*) { return 0; }  // the caller's zeros say: not supported
ANSWER(nvmlDeviceGetComputeRunningProcesses)(void*, unsigned* number, void*) {
  *number = 0;
  return 0;
}
ANSWER(nvmlDeviceGetNvLinkRemoteDeviceType)(void*, unsigned, void*) { return 3; }  // not supported
ANSWER(nvmlDeviceGetNvLinkRemotePciInfo_v2)(void*, unsigned, void*) { return 3; }
