// A CUDA that does nothing, for a machine without a GPU: device memory is address space, kernels are counted and not run.
// What the libraries of PyTorch ask for and no file here answers is answered with 0 by stubs that build.py writes.
#pragma once
#define __CUDA_INTERNAL_SKIP_CPP_HEADERS__
#include <cstddef>
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string>

// Marks what is answered here; build.py looks for it.
#define ANSWER(type) extern "C" __attribute__((visibility("default"))) type

// The card that is played, from the environment; see device.cpp.
struct Card {
  std::string name;
  int major, minor, multiprocessors, devices;
  size_t memory;
};
const Card& card();
int current_device();

// Adds one to the number of events of a kind, while counting is on: "launch", "copy", "wait", each with a name.
void count(const char* kind, const std::string& name);

// An address that stands for a stream, an event, a module or the like.
void* new_handle();

// Copies what is small enough to hold numbers that the host may read; the rest of device memory is never touched.
constexpr size_t SMALL = 1 << 16;
void copy_small(void* to, const void* from, size_t bytes);
