// Wrong kernels with one mistake each. test_cuda_emulation.py lists what must detect each mistake.
#include <cmath>

#include "selftest.h"

namespace {

__global__ void race_kernel(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 40) % kThreads];
}

// Lacks a barrier between the reads of one iteration and the write of the next.
__global__ void late_race_kernel(float* out) {
  __shared__ float shared;
  for (int q = 0; q < 3; q++) {
    if (threadIdx.x == 0) shared = float(q);
    __syncthreads();
    out[threadIdx.x] += shared;
  }
}

__global__ void warp_race_kernel(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  const float v = __shfl_xor_sync(0xffffffffu, shared[threadIdx.x], 1);
  out[threadIdx.x] = v + shared[threadIdx.x ^ 1];
}

__global__ void global_race_kernel(float* out) { out[threadIdx.x / 2] = float(threadIdx.x); }
__global__ void overrun_kernel(float* out, int count) {
  out[threadIdx.x + (threadIdx.x == kThreads - 1)] = float(count);
}
__global__ void shared_overrun_kernel(float* out, int shift) {
  __shared__ float shared[kThreads];
  float* const first = shared;
  first[threadIdx.x + shift] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void misaligned_kernel(float* out) {
  if (threadIdx.x < 32) reinterpret_cast<float4*>(out + 1)[threadIdx.x] = make_float4(1, 2, 3, 4);
}
__global__ void divergent_kernel(float* out) {
  if (threadIdx.x < 100)
    __syncthreads();
  else
    __syncwarp(__ballot_sync(0xffffffffu, 1));
  out[threadIdx.x] = 1;
}
__global__ void two_barriers_kernel(float* out) {
  if (threadIdx.x < 128) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
  }
}
__global__ void late_lane_kernel(float* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
__global__ void foreign_lane_kernel(float* out) {
  out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(0xffffu, 1.f, 20) : 0;
}
__global__ void two_shuffles_kernel(float* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.f, 1);
  else
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 2.f, 1);
}
__global__ void unwritten_kernel(float* out) {
  __shared__ float shared[kThreads];
  if (threadIdx.x > 0) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

template <class... Parameters, class... Arguments>
void run(void (*kernel)(float*, Parameters...), Arguments... arguments) {
  const auto out = device_memory<float>(kThreads);
  launch(2, kThreads, kernel, out.get(), arguments...);
  for (int k = 0; k < kThreads; k++) expect(!std::isnan(out[k]), "an element was read before it was written");
}

}  // namespace

std::map<std::string, std::function<void()>> mistakes() {
  return {
      {"race", [] { run(race_kernel); }},
      {"late race", [] { run(late_race_kernel); }},
      {"warp race", [] { run(warp_race_kernel); }},
      {"global race", [] { run(global_race_kernel); }},
      {"overrun", [] { run(overrun_kernel, kThreads); }},
      {"shared overrun", [] { run(shared_overrun_kernel, 1); }},
      {"misaligned", [] { run(misaligned_kernel); }},
      {"divergent barrier", [] { run(divergent_kernel); }},
      {"two barriers", [] { run(two_barriers_kernel); }},
      {"returned lane", [] { run(late_lane_kernel); }},
      {"foreign lane", [] { run(foreign_lane_kernel); }},
      {"two shuffles", [] { run(two_shuffles_kernel); }},
      {"unwritten", [] { run(unwritten_kernel); }},
  };
}
