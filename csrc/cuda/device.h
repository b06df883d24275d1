// Tools of the CUDA engine's kernels: the kinds of statistic compiled for CUDA, conversions of numbers, reductions over
// a warp, and, on the host, the launch of kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "chunk_view.h"

#define FASTCLIP_CAPABILITY CUDA
#define FASTCLIP_CUDA_MATH 1
#include "../kinds.h"

namespace fastclip {
namespace cuda {

using CUDA::Affine;
using CUDA::kLog2E;

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a thread block, in every kernel
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kWholeWarp = 0xffffffffu;

__host__ __device__ __forceinline__ int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- numbers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

__host__ __device__ __forceinline__ int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// Four neighbours in one access; the address must be a multiple of 4 * sizeof(T), at most 16.
template <class T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  T value[4];
};

template <class T>
__device__ __forceinline__ void load_four(const T* from, float (&to)[4]) {
  const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
  for (int q = 0; q < 4; q++) to[q] = widen(four.value[q]);
}

template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&from)[4]) {
  Four<T> four;
#pragma unroll
  for (int q = 0; q < 4; q++) four.value[q] = narrow<T>(from[q]);
  *reinterpret_cast<Four<T>*>(to) = four;
}

__device__ __forceinline__ double value_of(const Scalar& s, double absent) {
  if (s.at == nullptr) return absent;
  switch (s.dtype) {
    case Dtype::kDouble:
      return *static_cast<const double*>(s.at);
    case Dtype::kFloat:
      return *static_cast<const float*>(s.at);
    case Dtype::kBFloat16:
      return widen(*static_cast<const __nv_bfloat16*>(s.at));
    default:
      return widen(*static_cast<const __half*>(s.at));
  }
}

template <class Kind>
__device__ __forceinline__ Affine<float> affine(const Scalar& scale, const Scalar& bias) {
  return {value_of(scale, 1) * kLog2E, Kind::kHasShift ? 0. : value_of(bias, 0) * kLog2E};
}

// Rounds to nearest even; tensor cores would truncate.
__device__ __forceinline__ float rounded_to_tf32(float v) {
  const unsigned bits = __float_as_uint(v);
  // Infinities and NaN are returned unchanged.
  return fabsf(v) < INFINITY ? __uint_as_float((bits + 0xfffu + ((bits >> 13) & 1u)) & ~0x1fffu) : v;
}

template <class T>
__device__ __forceinline__ T warp_sum(T v, int lanes = kWarp) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(kWholeWarp, v, distance);
  return v;
}

__device__ __forceinline__ float warp_max(float v, int lanes = kWarp) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) v = fmaxf(v, __shfl_xor_sync(kWholeWarp, v, distance));
  return v;
}

// ---- host ----------------------------------------------------------------------------------------------------------

inline const void* advance(const void* features, int64_t elements, Dtype dtype) {
  return static_cast<const char*>(features) + elements * size_of(dtype);
}

inline bool is_multiple(const void* address, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes) == 0;
}

// Calls f with a null pointer to the type of the features.
template <class Function>
void for_features(Dtype dtype, Function f) {
  switch (dtype) {
    case Dtype::kFloat:
      return f(static_cast<float*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kHalf:
      return f(static_cast<__half*>(nullptr));
    default:
      throw std::invalid_argument("the CUDA engine takes float32, bfloat16 and float16 features, got float64");
  }
}

// A launch, as its error message describes it: the kernel, and the size of the block of logits.
struct LaunchLabel {
  const char* kernel;
  int64_t rows, columns, width;
  Stream stream;
};

inline void check(cudaError_t error, const LaunchLabel& place) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next call would report again
  throw std::runtime_error(std::string(place.kernel) + " failed on " + std::to_string(place.rows) + " x " +
                           std::to_string(place.columns) + " logits of width " + std::to_string(place.width) + ": " +
                           cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const LaunchLabel& place, void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) {
  if (blocks < 1 || blocks > INT32_MAX) check(cudaErrorInvalidConfiguration, place);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = place.stream;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), place);
}

}  // namespace cuda
}  // namespace fastclip
