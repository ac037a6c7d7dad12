// Memory: address space that is reserved and hardly ever touched, up to the card's size.
#include "stub.h"
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sys/mman.h>

static std::mutex mutex;
static std::map<char*, size_t> blocks;  // by their address
static size_t used = 0;
constexpr size_t PAGE = 2 << 20;

static bool is_on_device(const void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  auto after = blocks.upper_bound((char*)address);
  if (after == blocks.begin()) return false;
  auto [begin, size] = *--after;
  return (char*)address < begin + size;
}

void copy_small(void* to, const void* from, size_t bytes) {
  if (to != from && bytes <= SMALL) memmove(to, from, bytes);
}

static void* reserve(size_t size) {
  void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return nullptr;
  blocks[(char*)address] = size;
  return address;
}
static size_t give_back(void* address) {
  auto found = blocks.find((char*)address);
  if (found == blocks.end()) return 0;
  size_t size = found->second;
  munmap(address, size);
  blocks.erase(found);
  return size;
}

ANSWER(cudaError_t) cudaMalloc(void** address, size_t bytes) {
  size_t size = (bytes + PAGE - 1) / PAGE * PAGE;
  std::lock_guard<std::mutex> lock(mutex);
  if (used + size > card().memory || !(*address = reserve(size))) return cudaErrorMemoryAllocation;
  used += size;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaFree(void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  used -= give_back(address);
  return cudaSuccess;
}

// Expandable segments: addresses are reserved at once, and memory is mapped there piece by piece; a handle is its size.
ANSWER(CUresult) cuMemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *bytes = PAGE;
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr, unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  *address = (CUdeviceptr)reserve(size);
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
ANSWER(CUresult) cuMemAddressFree(CUdeviceptr address, size_t) {
  std::lock_guard<std::mutex> lock(mutex);
  give_back((void*)address);
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*, unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  if (used + size > card().memory) return CUDA_ERROR_OUT_OF_MEMORY;
  used += *handle = size;
  return CUDA_SUCCESS;
}
ANSWER(CUresult) cuMemRelease(CUmemGenericAllocationHandle handle) {
  std::lock_guard<std::mutex> lock(mutex);
  used -= handle;
  return CUDA_SUCCESS;
}
ANSWER(cudaError_t) cudaMemGetInfo(size_t* left, size_t* total) {
  *total = card().memory, *left = card().memory - used;
  return cudaSuccess;
}

// Pinned memory is ordinary memory of the host.
ANSWER(cudaError_t) cudaMallocHost(void** address, size_t bytes) { *address = calloc(1, bytes + 1); return cudaSuccess; }
ANSWER(cudaError_t) cudaHostAlloc(void** address, size_t bytes, unsigned) { return cudaMallocHost(address, bytes); }
ANSWER(cudaError_t) cudaFreeHost(void* address) { free(address); return cudaSuccess; }

ANSWER(cudaError_t) cudaMemset(void* address, int value, size_t bytes) {
  rehearsal_launched();
  if (bytes <= SMALL) memset(address, value, bytes);
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(address, value, bytes);
}

ANSWER(cudaError_t) cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  rehearsal_launched();
  if (kind == cudaMemcpyDeviceToDevice) copy_small(to, from, bytes);
  else memmove(to, from, bytes);
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

ANSWER(cudaError_t) cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  memset(found, 0, sizeof *found);
  bool here = is_on_device(address);
  found->device = current_device();
  found->type = here ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  (here ? found->devicePointer : found->hostPointer) = (void*)address;
  return cudaSuccess;
}
ANSWER(cudaError_t) cudaGetSymbolAddress(void** address, const void*) {
  static void* const somewhere = calloc(1, 1 << 20);
  *address = somewhere;
  return cudaSuccess;
}
ANSWER(CUresult) cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)value = address;
  else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int*)value = current_device();
  else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(int*)value = CU_MEMORYTYPE_DEVICE;
  return CUDA_SUCCESS;
}
