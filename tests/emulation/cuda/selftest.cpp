// Tests the emulation itself.
//
//   selftest         right kernels give right results, impossible launches fail
//   selftest times   prints the time of barriers and launches
//   selftest NAME    runs one of mistakes.cpp
#include "selftest.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <chrono>
#include <cmath>
#include <limits>
#include <thread>

namespace {

constexpr int kBlocks = 3;

__global__ void sum_kernel(const float* in, int count, double* out) {
  __shared__ double shared[kThreads];
  double sum = 0;
  for (int q = blockIdx.x * blockDim.x + threadIdx.x; q < count; q += gridDim.x * blockDim.x) sum += in[q];
  shared[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = shared[0];
}

void block_reduction() {
  const int count = 5000;
  const auto in = device_memory<float>(count);
  for (int q = 0; q < count; q++) in[q] = float(q % 7);
  const auto out = device_memory<double>(kBlocks);
  expect(launch(kBlocks, kThreads, sum_kernel, in.get(), count, out.get()) == cudaSuccess, "launch of sum_kernel");
  double expected = 0;
  for (int q = 0; q < count; q++) expected += q % 7;
  expect(out[0] + out[1] + out[2] == expected, "the sum of all blocks");
}

// Launches of different host threads take turns.
void two_host_threads() {
  std::thread other([] {
    for (int q = 0; q < 2; q++) block_reduction();
  });
  for (int q = 0; q < 2; q++) block_reduction();
  other.join();
}

template <class T>
__global__ void shuffle_kernel(T* out) {
  T v = T(threadIdx.x + 1);
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  const T lane = T(threadIdx.x % 32);
  bool right = __shfl_sync(0xffffffffu, lane, 37) == T(5) &&
               __shfl_sync(0xffffffffu, lane, 3, 8) == lane - T(int(lane) % 8) + T(3);
  right &= __shfl_up_sync(0xffffffffu, lane, 1) == (lane > 0 ? lane - T(1) : lane);
  right &= __shfl_down_sync(0xffffffffu, lane, 4, 8) == (int(lane) % 8 < 4 ? lane + T(4) : lane);
  out[threadIdx.x] = right ? v : T(-1);
}

template <class T>
void shuffles() {
  const auto out = device_memory<T>(kThreads);
  launch(1, kThreads, shuffle_kernel<T>, out.get());
  for (int k = 0; k < kThreads; k++) {
    const int first = k / 32 * 32;
    expect(out[k] == T(32 * first + 32 * 33 / 2), "shuffles of thread " + std::to_string(k));
  }
}

__global__ void vote_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  const bool right = __ballot_sync(0xffffffffu, lane < 5) == 31u && __any_sync(0xffffffffu, lane == 9) == 1 &&
                     __all_sync(0xffffffffu, lane < 31) == 0 && __all_sync(0xffffffffu, true) == 1;
  const bool all = __syncthreads_count(threadIdx.x < 70) == 70 && __syncthreads_or(threadIdx.x == 200) == 1 &&
                   __syncthreads_and(threadIdx.x != 200) == 0 && __syncthreads_and(1) == 1 && __syncthreads_or(0) == 0;
  out[threadIdx.x] = right && all;
}

void votes() {
  const auto out = device_memory<int>(kThreads);
  launch(1, kThreads, vote_kernel, out.get());
  for (int k = 0; k < kThreads; k++) expect(out[k] == 1, "votes of thread " + std::to_string(k));
}

// Each warp reads numbers that another wrote, after some threads, and whole warps, have returned.
__global__ void early_return_kernel(int* out, int leave_from) {
  __shared__ int shared[kThreads];
  if (int(threadIdx.x) >= leave_from) return;
  shared[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  __syncwarp();
  out[threadIdx.x] = shared[(threadIdx.x + 32) % leave_from];
}

void early_returns() {
  for (const int leave_from : {1, 31, 33, 200}) {
    const auto out = device_memory<int>(kThreads, -1);
    launch(2, kThreads, early_return_kernel, out.get(), leave_from);
    for (int k = 0; k < kThreads; k++)
      expect(out[k] == (k < leave_from ? (k + 32) % leave_from : -1), "thread " + std::to_string(k));
  }
}

__global__ void warp_kernel(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

#if !defined(EMULATION_THREADS)
// Lanes of a half meet among themselves, the other half as often as it likes.
__global__ void half_warp_kernel(int* out) {
  const bool upper = threadIdx.x >= 16;
  int v = int(threadIdx.x);
  for (int turn = 0; turn < (upper ? 3 : 2); turn++) v += __shfl_xor_sync(upper ? 0xffff0000u : 0xffffu, v, 1);
  out[threadIdx.x] = v + __shfl_sync(0xffffffffu, v, 31);
}
#endif

void parts_of_a_warp() {
  const auto out = device_memory<float>(40);
  launch(1, 40, warp_kernel, out.get());
  for (int k = 0; k < 40; k++) expect(out[k] == float(k ^ 1), "__syncwarp of a warp that is not whole");
#if !defined(EMULATION_THREADS)
  const auto half = device_memory<int>(32);
  launch(1, 32, half_warp_kernel, half.get());
  for (int k = 0; k < 32; k++)  // pairs add up to 4 * (k / 2) + 1; doubled in the next turn, and again
    expect(half[k] == (k < 16 ? 2 : 4) * (4 * (k / 2) + 1) + 4 * 61, "meetings of a part of a warp");
#endif
}

__global__ void grid_kernel(unsigned* out) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread]++;
}

void grids() {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2, 3, 2);
  config.blockDim = dim3(4, 3, 5);
  const auto out = device_memory<unsigned>(12 * 60);
  cudaLaunchKernelEx(&config, grid_kernel, out.get());
  for (int q = 0; q < 12 * 60; q++) expect(out[q] == 1, "every thread of every block once");
}

__global__ void return_kernel(const int* flag) {
  if (*flag == 0) return;
  __syncthreads();
}

void refused_launches() {
  const int flag = 0;
  for (const auto& [grid, block] : {std::pair(dim3(0), dim3(32)),
                                    {dim3(1u << 31), dim3(32)},
                                    {dim3(1, 65536), dim3(32)},
                                    {dim3(1), dim3(1025)},
                                    {dim3(1), dim3(32, 33)},
                                    {dim3(1), dim3(1, 1, 65)},
                                    {dim3(1), dim3(0)}}) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block;
    expect(cudaLaunchKernelEx(&config, return_kernel, &flag) == cudaErrorInvalidConfiguration, "an impossible launch");
    expect(cudaPeekAtLastError() == cudaErrorInvalidConfiguration, "its error stays");
    expect(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess,
           "until it is read");
  }
  emulation::fail_next_launch(cudaErrorLaunchFailure);
  expect(launch(1, 32, return_kernel, &flag) == cudaErrorLaunchFailure, "a launch that was to fail");
  expect(cudaGetLastError() == cudaErrorLaunchFailure, "and its error");
  expect(launch(1, 32, return_kernel, &flag) == cudaSuccess, "the launch after it");
}

void conversions() {
  // Every half there is, and floats between, at, and beside every two neighbours.
  const auto is_same = [](float a, float b) {
    return std::isnan(a) ? std::isnan(b) : __float_as_uint(a) == __float_as_uint(b);
  };
  for (unsigned bits = 0; bits < 1u << 16; bits++) {
    const float half = __half2float({uint16_t(bits)}), bfloat = __bfloat162float({uint16_t(bits)});
    expect(is_same(__half2float(__float2half_rn(half)), half), "a half and back");
    expect(is_same(__bfloat162float(__float2bfloat16_rn(bfloat)), bfloat), "a bfloat16 and back");
    if ((bits & 0x7fffu) < 0x7c00u) {
      const float next =
          (bits & 0x7fffu) == 0x7bffu ? std::copysign(65536.f, half) : __half2float({uint16_t(bits + 1)});
      const float middle = half + (next - half) / 2;
      const unsigned even = bits + (bits & 1);
      expect(__float2half_rn(middle).bits == even, "a tie of halves");
      expect(__float2half_rn(std::nextafter(middle, half)).bits == bits, "below a tie of halves");
      expect(__float2half_rn(std::nextafter(middle, next)).bits == bits + 1, "above a tie of halves");
    }
    if ((bits & 0x7fffu) < 0x7f80u) {
      const float middle = __uint_as_float(bits << 16 | 0x8000u);
      expect(__float2bfloat16_rn(middle).bits == bits + (bits & 1), "a tie of bfloat16");
      expect(__float2bfloat16_rn(__uint_as_float(bits << 16 | 0x7fffu)).bits == bits, "below a tie of bfloat16");
      expect(__float2bfloat16_rn(__uint_as_float(bits << 16 | 0x8001u)).bits == bits + 1, "above a tie of bfloat16");
    }
  }
#if defined(__FLT16_MAX__)
  for (unsigned bits = 0; bits < 1u << 16; bits++)
    expect(is_same(__half2float({uint16_t(bits)}), float(std::bit_cast<_Float16>(uint16_t(bits)))),
           "the compiler's half");
#endif
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  expect(__float2half_rn(nan).bits == 0x7fff && __float2bfloat16_rn(nan).bits == 0x7fff, "NaN");
  expect(__float2half_rn(-infinity).bits == 0xfc00 && __float2bfloat16_rn(infinity).bits == 0x7f80, "infinities");
  expect(__float2half_rn(1e-30f).bits == 0 && __float2half_rn(-1e-30f).bits == 0x8000, "signed zeros");
}

__global__ void many_shuffles_kernel(float* out) {
  float v = float(threadIdx.x);
  for (int q = 0; q < 100; q++) v += __shfl_xor_sync(0xffffffffu, v, 1 << q % 5);
  out[threadIdx.x] = v;
}

double milliseconds(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

void times() {
  const auto out = device_memory<float>(kThreads);
  launch(1, kThreads, many_shuffles_kernel, out.get());
  std::printf("256 threads, 100 shuffles: %.2f ms\n",
              milliseconds([&] { launch(1, kThreads, many_shuffles_kernel, out.get()); }));
#if !defined(EMULATION_THREADS)
  const int flag = 0;
  std::printf("10,000 blocks that return at once: %.1f ms\n",
              milliseconds([&] { launch(10000, kThreads, return_kernel, &flag); }));
#endif
}

}  // namespace

int main(int count, char** arguments) {
  const std::string wanted = count > 1 ? arguments[1] : "";
  if (wanted == "times") {
    times();
  } else if (!wanted.empty()) {
    const auto all = mistakes();
    const auto found = all.find(wanted);
    expect(found != all.end(), "no mistake is called " + wanted);
    found->second();
    std::printf("nothing noticed\n");
  } else {
    block_reduction();
    two_host_threads();
    shuffles<float>(), shuffles<double>(), shuffles<int>(), shuffles<int64_t>(), shuffles<unsigned>();
    votes();
    early_returns();
    parts_of_a_warp();
    grids();
    refused_launches();
    conversions();
    std::printf("passed\n");
  }
}
