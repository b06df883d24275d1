// The one shift of a softmax sweep, in log2 units, made on the device.
//
// exp2(logit - m) serves the row and the column of a pair alike if m is one number for all of them. m puts the largest
// logit that is possible at 2^above: high enough for the smallest row to stay within fp32, low enough for a sum over
// 2^27 columns not to overflow.
#pragma once

#include "device.h"

namespace fastclip {
namespace cuda {

struct Features {
  const void* data = nullptr;
  int64_t rows = 0, stride = 0;
  const float* factor = nullptr;
};

// Blocks that share the rows of one tower.
constexpr int64_t kMostNormBlocks = 512;
inline int64_t norm_blocks(const Features& f) {
  const int64_t blocks = cdiv(f.rows, kWarps);
  return f.factor ? 0 : blocks < kMostNormBlocks ? blocks : kMostNormBlocks;
}

// The largest squared norm of each block's rows, blocks of x first. Infinite where it overflows: then no one shift
// is enough, and the states say so.
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

// The largest of `count` numbers and `least`, on all threads of the block.
__device__ inline float largest_of(const float* numbers, int64_t count, float least) {
  __shared__ float shared[kWarps];
  float largest = least;
  for (int64_t q = threadIdx.x; q < count; q += kThreads) largest = fmaxf(largest, numbers[q]);
  largest = warp_max(largest);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int q = 0; q < kWarps; q++) largest = fmaxf(largest, shared[q]);
  __syncthreads();  // the next call writes there
  return largest;
}

// 1 where there are no squares: factors made the norms 1.
__device__ inline float largest_norm(const float* squares, int64_t count) {
  const float largest = largest_of(squares, count, 0.f);
  return count > 0 ? sqrtf(largest) : 1.f;
}

// From |t| <= bound where that is given, else from norms; and from the largest biases of columns, in log2 units, where
// these have any. Sets the flag that asks for running maxima, or clears it. One block.
static __global__ void __launch_bounds__(kThreads)
    shift_kernel(Scalar bound, const float* squares, int64_t count_x, int64_t count_y, const float* biases,
                 int64_t count_biases, Scalar scale, float* shift, int32_t* flag) {
  const double longest_x = largest_norm(squares, count_x), longest_y = largest_norm(squares + count_x, count_y);
  const float bias = largest_of(biases, count_biases, -INFINITY);
  if (threadIdx.x != 0) return;
  const double largest = value_of(bound, longest_x * longest_y);
  // The margin covers the rounding of norms and products.
  const double top = fabs(value_of(scale, 1)) * largest * (kLog2E * (1 + 1e-5));
  // The column of the largest bias keeps every row's sum above -top, relative to that bias.
  const double above = fmin(fmax(2 * top - 120, 0.), 100.);
  // Integral, so that powers of two relate it to any other shift. Beyond 2^24 it rounds: there no one shift is
  // enough.
  const float m = float(ceil(top - above) + (bias > -INFINITY ? double(bias) : 0.));
  *shift = m;
  // One that is no number serves nobody, not even a line without pairs.
  *flag = fabsf(m) < INFINITY ? 0 : 1;
}

}  // namespace cuda
}  // namespace fastclip
