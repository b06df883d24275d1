// Kernels that add up partial sums to float64 states, in a fixed order, and turn states into losses.
#pragma once

#include "device.h"

namespace fastclip {
namespace cuda {

// One shift is enough for a line whose sum lies between these two. In a sum of at least kLeast, terms that were flushed
// to zero are below fp32's resolution of the sum. If the sum exceeds kLargest, the coefficient, 1 / sum, is close to
// the floats that are flushed to zero.
constexpr double kLeast = 0x1p-78, kLargest = 0x1p125;

// The rows or columns of a chunk, and the memory of their states. A line's sums over several chunks add up in its
// state, since the stream runs one chunk after another.
struct PartLines {
  Partials partials;
  int64_t count = 0, first = 0;             // lines of the chunk; index of the first in the block
  bool begins = true, ends = true;          // true in a line's first chunk, in its last
  double *shift = nullptr, *sum = nullptr;  // of all lines of the block; shift may be null
};

// True for lines of the block that have pairs; for the others a sum of zero is right.
struct Occupied {
  const bool* lines = nullptr;         // or null: every line with a pair besides its own positive
  int64_t others = 0, own_offset = 0;  // the own positive of line l is line l + own_offset of the other side
  __device__ __forceinline__ bool operator()(int64_t l) const {
    if (lines) return lines[l];
    const int64_t own = l + own_offset >= 0 && l + own_offset < others ? 1 : 0;
    return others > own;
  }
};

// Returns a line's sum over this chunk and the earlier ones, and stores it in the state.
__device__ __forceinline__ double add_up(const PartLines& lines, int64_t l) {
  const float* const partial = lines.partials.data + l * lines.partials.line;
  double sum = 0;
  for (int64_t q = 0; q < lines.partials.parts; q++) sum += partial[q * lines.partials.part];
  if (!lines.begins) sum += lines.sum[lines.first + l];
  lines.sum[lines.first + l] = sum;
  return sum;
}

// Adds up the lines' sums and sets their shifts. For a kind with a shift, sets the flag if the sum of an occupied line
// is outside kLeast .. kLargest.
static __global__ void __launch_bounds__(kThreads)
    sums_kernel(PartLines rows, PartLines columns, Occupied rows_occupied, Occupied columns_occupied,
                const float* shift, int32_t* flag) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.count + columns.count) return;
  const bool is_row = index < rows.count;
  const PartLines lines = is_row ? rows : columns;
  const int64_t l = is_row ? index : index - rows.count, out = lines.first + l;
  const double sum = add_up(lines, l);
  if (lines.shift) lines.shift[out] = shift ? *shift : 0.;
  if (shift == nullptr || !lines.ends) return;
  const bool is_occupied = is_row ? rows_occupied(out) : columns_occupied(out);
  if (is_occupied && !(sum >= kLeast && sum <= kLargest)) *flag = 1;
}

// Adds up other numbers of lines: the columns' sums of weights, or how many pairs lie above levels.
static __global__ void __launch_bounds__(kThreads) numbers_kernel(PartLines lines) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < lines.count) add_up(lines, index);
}

// The shifts and coefficients of lines, and the fp32 copies of them that the second sweep reads.
struct StateLines {
  const double *shift = nullptr, *coefficient = nullptr;
  int64_t count = 0;
  float *shift_out = nullptr, *coefficient_out = nullptr;  // shift_out is null if lines have neither shifts nor levels
};

// common: sets `differ` if a shift differs from this one; null: the flag stays as it is.
static __global__ void __launch_bounds__(kThreads)
    operands_kernel(StateLines rows, StateLines columns, const double* common, int32_t* differ) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.count + columns.count) return;
  const StateLines lines = index < rows.count ? rows : columns;
  const int64_t l = index < rows.count ? index : index - rows.count;
  lines.coefficient_out[l] = float(lines.coefficient[l]);
  if (lines.shift_out == nullptr) return;
  lines.shift_out[l] = float(lines.shift[l]);
  if (common && lines.shift[l] != *common) *differ = 1;  // a benign race: all threads write 1
}

// Adds the sums of w and of w * t, (2, parts), to the totals of earlier chunks. Launched with two thread blocks.
static __global__ void __launch_bounds__(kThreads)
    totals_kernel(const float* partials, int64_t parts, bool begins, double* totals) {
  double sum = 0;
  for (int64_t q = threadIdx.x; q < parts; q += kThreads) sum += partials[blockIdx.x * parts + q];
  __shared__ double shared[kWarps];
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = begins ? 0. : totals[blockIdx.x];
  for (int q = 0; q < kWarps; q++) sum += shared[q];
  totals[blockIdx.x] = sum;
}

template <class Kind>
__global__ void __launch_bounds__(kThreads) finish_kernel(Finishing lines) {
  const int64_t l = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (l >= lines.count) return;
  const double bias = Kind::kHasShift ? 0. : value_of(lines.bias, 0);
  const double s = value_of(lines.scale, 1) * lines.positive[l % lines.period] + bias;
  const CUDA::FinishedLine line = Kind::finish(lines.shift[l], lines.sum[l], s);
  lines.losses[l] = line.loss;
  lines.coefficients[l] = line.coefficient;
  lines.weights[l] = line.positive_weight;
}

}  // namespace cuda
}  // namespace fastclip
