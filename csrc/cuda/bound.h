// The shift m that all lines share in the first sweep of a kind with a shift, in log2 units, computed on the device.
//
// If m is the same for all lines, a pair's row and column need one exponential only, exp2(logit - m). m is chosen so
// that the exponential of the largest possible logit is 2^above: `above` is large enough that the sum of the smallest
// row does not underflow fp32, and small enough that a sum over 2^27 columns does not overflow.
#pragma once

#include "device.h"

namespace fastclip {
namespace cuda {

struct Features {
  const void* data = nullptr;
  int64_t rows = 0, stride = 0;
  const float* factor = nullptr;
};

// The most thread blocks that share the rows of one tower.
constexpr int64_t kMostNormBlocks = 512;
inline int64_t norm_blocks(const Features& f) {
  const int64_t blocks = cdiv(f.rows, kWarps);
  return f.factor ? 0 : blocks < kMostNormBlocks ? blocks : kMostNormBlocks;
}

// Writes the largest squared norm of each thread block's rows, those of x first. A norm that overflows is infinite;
// then shift_kernel sets the flag, since one shift is not enough.
template <class T>
__global__ void __launch_bounds__(kThreads)
    longest_kernel(Features x, Features y, int64_t blocks_x, int64_t width, float* squares) {
  const bool is_x = int64_t(blockIdx.x) < blocks_x;
  const Features f = is_x ? x : y;
  const int64_t block = blockIdx.x - (is_x ? 0 : blocks_x), blocks = is_x ? blocks_x : gridDim.x - blocks_x;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float largest = 0;
  for (int64_t row = block * kWarps + warp; row < f.rows; row += blocks * kWarps) {
    const T* const features = static_cast<const T*>(f.data) + row * f.stride;
    float square = 0;
    for (int64_t d = lane; d < width; d += kWarp) square += widen(features[d]) * widen(features[d]);
    largest = fmaxf(largest, warp_sum(square));
  }
  __shared__ float shared[kWarps];
  if (lane == 0) shared[warp] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int q = 1; q < kWarps; q++) largest = fmaxf(largest, shared[q]);
    squares[blockIdx.x] = largest;
  }
}

// The largest of `count` numbers and `least`, returned to every thread of the thread block.
__device__ inline float largest_of(const float* numbers, int64_t count, float least) {
  __shared__ float shared[kWarps];
  float largest = least;
  for (int64_t q = threadIdx.x; q < count; q += kThreads) largest = fmaxf(largest, numbers[q]);
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int q = 0; q < kWarps; q++) largest = fmaxf(largest, shared[q]);
  __syncthreads();  // the next call overwrites `shared`
  return largest;
}

// The largest norm; 1 if there are no squares, since factors then make every norm 1.
__device__ inline float largest_norm(const float* squares, int64_t count) {
  const float largest = largest_of(squares, count, 0.f);
  return count > 0 ? sqrtf(largest) : 1.f;
}

// Computes the shift from a bound of |t| if one is given, else from norms, and from the largest biases of columns, in
// log2 units, if there are any. Sets or clears the flag that asks for running maxima. Launched with one thread block.
static __global__ void __launch_bounds__(kThreads)
    shift_kernel(Scalar bound, const float* squares, int64_t count_x, int64_t count_y, const float* biases,
                 int64_t count_biases, Scalar scale, float* shift, int32_t* flag) {
  const double longest_x = largest_norm(squares, count_x), longest_y = largest_norm(squares + count_x, count_y);
  const float bias = largest_of(biases, count_biases, -INFINITY);
  if (threadIdx.x != 0) return;
  const double largest = value_of(bound, longest_x * longest_y);
  // The margin covers the rounding of norms and products.
  const double top = fabs(value_of(scale, 1)) * largest * (kLog2E * (1 + 1e-5));
  // Every row has a pair in the column of the largest bias, whose logit is at least -top plus that bias.
  const double above = fmin(fmax(2 * top - 120, 0.), 100.);
  // m is integral, so that exponentials relative to m and to any other integral shift differ by a power of two. Beyond
  // 2^24 it is rounded, but there one shift is not enough anyway.
  const float m = float(ceil(top - above) + (bias > -INFINITY ? double(bias) : 0.));
  *shift = m;
  // A shift that is not finite is wrong even for a line without pairs.
  *flag = fabsf(m) < INFINITY ? 0 : 1;
}

}  // namespace cuda
}  // namespace fastclip
