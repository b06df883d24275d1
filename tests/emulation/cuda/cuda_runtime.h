// CUDA on the CPU: the part of its language and runtime that the engine uses. Any C++20 compiler turns the engine's
// source into a program that runs its kernels, thread by thread, under any debugger or sanitizer.
//
//   g++ -std=c++20 -O1 -g -I tests/emulation/cuda -I csrc -x c++ csrc/cuda/engine.cu -x c++ driver.cpp
//
//   default              fibers.h: deterministic and quick, and strict about barriers
//   -DEMULATION_THREADS  threads.h: a host thread for each thread of a block
//   -DEMULATION_POISON   poison.h: shared memory is NaN before every block
//
// Blocks run one after another, and a launch returns when the last has finished; streams are ignored. Device memory is
// host memory. Impossible launches return CUDA's error; wrong barriers and shuffles stop the program. Sanitizers detect
// more mistakes: -fsanitize=address overruns of global memory and of each shared array, -fsanitize=undefined misaligned
// vector accesses, -fsanitize=thread races within a block. Not detected: limits on registers and shared memory,
// __launch_bounds__, dynamic shared memory (not supported), races between blocks (but see EMULATION_REVERSED in
// fibers.h), memory ordering between blocks, and memory that an asynchronous launch would read or write too late.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#include "device_functions.h"
#include "vector_types.h"

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {

inline cudaError_t last_error = cudaSuccess, next_launch = cudaSuccess;

// For tests: the next launch does nothing and returns this.
inline void fail_next_launch(cudaError_t error) { next_launch = error; }

inline cudaError_t noted(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

inline cudaError_t verdict(const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (next_launch != cudaSuccess) return std::exchange(next_launch, cudaSuccess);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > kMostThreads || block.x > 1024 || block.y > 1024 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  return config.dynamicSmemBytes > 0 || config.numAttrs > 0 ? cudaErrorNotSupported : cudaSuccess;
}

}  // namespace emulation

// Like CUDA's, it converts arguments to the kernel's parameters, and every thread has its own copy of these.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const cudaError_t error = emulation::verdict(*config)) return emulation::noted(error);
  using Closure = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Closure closure(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  emulation::scheduler.run(
      config->gridDim, config->blockDim,
      [](const void* opaque) {
        const Closure& closure = *static_cast<const Closure*>(opaque);
        std::apply(closure.first, closure.second);
      },
      &closure);
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return emulation::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// The emulated device claims compute capability 9.0 and two multiprocessors.
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return emulation::noted(cudaErrorInvalidValue);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 2;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
  }
  return emulation::noted(cudaErrorInvalidValue);
}
