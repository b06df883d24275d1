// Partial sums to float64 states, in a fixed order, whoever finishes first; states to losses.
#pragma once

#include "device_cuda.h"

namespace fastclip {
namespace cuda {

// The least R + P of a line that one reference can serve: what such a line lost lies below fp32's resolution of it.
// Of one above 2^125 the coefficient, 1 / (R + P), comes close to where floats are flushed to zero.
constexpr double kLeast = 0x1p-78, kLargest = 0x1p125;

// Rows or columns of a part, and where their states lie. A line's sums in several parts add up in its state: the
// stream runs one part after another.
struct PartLines {
  Partials partials;
  int64_t count = 0, first = 0;                 // of the part's lines; the first one's place in the block
  bool begins = true, ends = true;              // whether this is a line's first part, its last
  double *reference = nullptr, *sum = nullptr;  // of the block's lines
};

// The positives of a block: of row i it is column i + offset, if there is one.
struct PositivesOf {
  const double* t = nullptr;
  int64_t rows = 0, columns = 0, offset = 0;
};

// Where there is one reference, the flag is raised if it was too coarse for a line: one whose R + P is so small may
// have lost terms that count.
static __global__ void __launch_bounds__(kThreads) sums_kernel(PartLines rows, PartLines columns, PositivesOf positives,
                                                               Scalar scale, const float* reference, int32_t* flag) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.count + columns.count) return;
  const bool is_row = index < rows.count;
  const PartLines lines = is_row ? rows : columns;
  const int64_t l = is_row ? index : index - rows.count, out = lines.first + l;
  const float* const partial = lines.partials.data + l * lines.partials.line;
  double sum = 0;
  for (int64_t q = 0; q < lines.partials.parts; q++) sum += partial[q * lines.partials.part];
  if (!lines.begins) sum += lines.sum[out];
  lines.sum[out] = sum;
  const double m = reference ? *reference : 0.;
  lines.reference[out] = m;
  if (reference == nullptr || !lines.ends) return;
  const int64_t i = is_row ? out : out - positives.offset, j = i + positives.offset;
  double total = sum;
  if (i >= 0 && i < positives.rows && j >= 0 && j < positives.columns) {
    const double exponent = value_of(scale, 1) * kLog2E * positives.t[i] - m;
    // An estimate is enough, and beyond these limits none is needed. A NaN stays one.
    total += exponent < -200 ? 0.f : exp2f(exponent > 120 ? 120.f : float(exponent));
  }
  if (!(total >= kLeast && sum <= kLargest)) *flag = 1;
}

// The second sweep's operands of a line: fp32, and whether references differ.
struct StateLines {
  const double *reference = nullptr, *coefficient = nullptr;
  int64_t count = 0;
  float *reference_out = nullptr, *coefficient_out = nullptr;
};

static __global__ void __launch_bounds__(kThreads)
    operands_kernel(StateLines rows, StateLines columns, bool has_references, int32_t* differ) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.count + columns.count) return;
  const StateLines lines = index < rows.count ? rows : columns;
  const int64_t l = index < rows.count ? index : index - rows.count;
  lines.coefficient_out[l] = float(lines.coefficient[l]);
  if (!has_references) return;
  lines.reference_out[l] = float(lines.reference[l]);
  if (lines.reference[l] != rows.reference[0]) *differ = 1;  // whoever writes writes the same
}

// Adds the sums of w and of w * t, (2, parts), to the totals of earlier parts. Two blocks.
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

template <class Loss>
__global__ void __launch_bounds__(kThreads) finish_kernel(Lines lines) {
  const int64_t l = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (l >= lines.count) return;
  const double bias = Loss::kUsesBias ? value_of(lines.bias, 0) : 0.;
  const double s = value_of(lines.scale, 1) * lines.positive[l % lines.period] + bias;
  const CUDA::Line line = Loss::finish(lines.reference[l], lines.sum[l], s);
  lines.losses[l] = line.loss;
  lines.coefficients[l] = line.coefficient;
  lines.weights[l] = line.positive_weight;
}

}  // namespace cuda
}  // namespace fastclip
