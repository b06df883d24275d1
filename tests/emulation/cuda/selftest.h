// Helpers of the self-test's right and wrong kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>

constexpr int kThreads = 256;

template <class... Parameters, class... Arguments>
cudaError_t launch(unsigned blocks, unsigned threads, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Memory of exactly this size, so that a sanitizer detects overruns.
template <class T>
std::unique_ptr<T[]> device_memory(size_t count, T value = {}) {
  std::unique_ptr<T[]> memory(new T[count]);
  std::fill_n(memory.get(), count, value);
  return memory;
}

// Functions by name, each of which launches a kernel with one mistake.
std::map<std::string, std::function<void()>> mistakes();
