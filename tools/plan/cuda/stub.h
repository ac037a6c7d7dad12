// A no-op CUDA, for a machine without a GPU: device memory is address space, kernels are counted and not run.
// These files define the functions that need more than a line; no_op_cuda.py's tables have the rest.
#pragma once
#define __CUDA_INTERNAL_SKIP_CPP_HEADERS__
#include <cstddef>
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string>

// Marks a function of CUDA; no_op_cuda.py looks for it.
#define ANSWER(type) extern "C" __attribute__((visibility("default"))) type

// The simulated card, from the environment; see device.cpp.
struct Card {
  std::string name;
  int major, minor, multiprocessors, devices;
  size_t memory;
};
const Card& card();
int current_device();

// A kernel, product, collective, fill or copy.
extern "C" void rehearsal_launched();
// A new address, used as a stream, an event, a module or the like.
extern "C" void* rehearsal_handle();

// Copies small blocks only: they can hold numbers that the host reads. The rest of device memory is never touched.
constexpr size_t SMALL = 1 << 16;
void copy_small(void* to, const void* from, size_t bytes);
