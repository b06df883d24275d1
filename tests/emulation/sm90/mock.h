// The record that the mock CUDA runtime keeps of a launch.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

struct TensorMap {
  uint64_t address;
  unsigned type, rank;
  std::vector<uint64_t> sizes, strides;  // strides in bytes, all but the first
  std::vector<uint32_t> box;
  unsigned swizzle, fill;
  bool is_legal;
};

struct Seen {
  std::vector<TensorMap> maps;
  int launches = 0, shared_limit = 0;
  const void* kernel = nullptr;
  dim3 grid, block, cluster = {1, 1, 1};
  size_t shared = 0;
  cudaStream_t stream = nullptr;
  const char* parameters = nullptr;  // valid during the launch only
  cudaError_t fails = cudaSuccess;   // the result of the next launch
  void (*on_launch)() = nullptr;
};
extern Seen seen;

// A mock tensor map holds this mark and its index in `maps`; a real one is opaque.
constexpr uint64_t kMapMark = 0xfa57c11bfa57c11b;
