// Turns products of weights and features into gradients: adds the positive's term, applies the factor, the
// normalisation's Jacobian, gain and scale. Also adds the positives' terms to totals and to the columns' sums of
// weights.
//
//   g_i = product_i * shrink / factor_i + p_i * partner^_i
//   dx_i = gain * scale * factor_i * (g_i - x^_i <x^_i, g_i>)
//
// product_i is row i of the product of weights and features, p_i the weight of the own positive, and partner_i the
// other tower's row of that positive; x^ and partner^ are features times their factors. If the weights do not carry the
// factors (spread is false), product_i is not divided by factor_i. Without projection, dx_i = gain * scale * g_i. Each
// warp completes one row, and the cost is O((M + N) D).
#pragma once

#include "bound.h"

namespace fastclip {
namespace cuda {

// Rows first .. first + rows of one tower. The partner of row i is row i + offset of the other tower.
struct Completion {
  const float* product = nullptr;  // (rows, width); may be the gradient: a thread reads an element before it writes it
  Features mine, partner;          // the whole towers
  int64_t rows = 0, first = 0, width = 0, offset = 0;
  const double* weight = nullptr;  // of the positives, indexed by rows of x
  bool by_partner = false;         // mine is y, and the weight is at the partner's index
  Scalar gain, scale;
  float shrink = 1;    // the inverse of PairWeights::enlarged
  bool spread = true;  // the weights that made the product carried both factors
  bool project = false, clamped_is_zero = false;
  void* gradient = nullptr;  // (rows, width)
  Dtype gradient_dtype = Dtype::kFloat;
};

// Loads kAtOnce neighbours of a row: 4 if rows are aligned, else 1.
template <int kAtOnce, class T>
__device__ __forceinline__ void load_some(const T* from, float (&to)[kAtOnce]) {
  if constexpr (kAtOnce == 4)
    load_four(from, to);
  else
    to[0] = widen(*from);
}

template <int kAtOnce, class T>
__device__ __forceinline__ void store_some(void* row, int64_t d, const float (&from)[kAtOnce]) {
  T* const to = static_cast<T*>(row) + d;
  if constexpr (kAtOnce == 4)
    store_four(to, from);
  else
    *to = narrow<T>(from[0]);
}

template <class T, int kAtOnce>
__device__ __forceinline__ void complete_row(const Completion& c, int64_t row, int lane) {
  const int64_t i = c.first + row, j = i + c.offset;
  const bool has_partner = j >= 0 && j < c.partner.rows;
  const T* const x = static_cast<const T*>(c.mine.data) + i * c.mine.stride;
  const T* const partner = static_cast<const T*>(c.partner.data) + (has_partner ? j : 0) * c.partner.stride;
  const float* const product = c.product + row * c.width;
  float p = has_partner ? float(c.weight[c.by_partner ? j : i]) : 0.f;
  if (has_partner && c.partner.factor) p *= c.partner.factor[j];
  const float factor = c.mine.factor ? c.mine.factor[i] : 1.f;
  const float divisor = c.spread ? c.shrink / factor : c.shrink;
  const float gain = float(value_of(c.gain, 1) * value_of(c.scale, 1));
  // A norm below 1e-12 was clamped: the features were divided by a constant.
  const bool clamped = factor >= float(kClampedFactor);
  const auto gradient_at = [&](int64_t d, float (&g)[kAtOnce]) {
    float y[kAtOnce] = {};
    load_some<kAtOnce>(product + d, g);
    if (has_partner) load_some<kAtOnce>(partner + d, y);
#pragma unroll
    for (int q = 0; q < kAtOnce; q++) g[q] = has_partner ? g[q] * divisor + p * y[q] : g[q] * divisor;
  };
  float along = 0;
  if (c.project) {
    for (int64_t d = lane * kAtOnce; d < c.width; d += kWarp * kAtOnce) {
      float g[kAtOnce], unit[kAtOnce];
      gradient_at(d, g);
      load_some<kAtOnce>(x + d, unit);
#pragma unroll
      for (int q = 0; q < kAtOnce; q++) along += unit[q] * factor * g[q];
    }
    along = clamped ? 0.f : warp_sum(along);
  }
  const float multiplier = c.project ? gain * factor : gain;
  char* const gradient = static_cast<char*>(c.gradient) + row * c.width * size_of(c.gradient_dtype);
  for (int64_t d = lane * kAtOnce; d < c.width; d += kWarp * kAtOnce) {
    float g[kAtOnce], unit[kAtOnce] = {};
    gradient_at(d, g);
    if (c.project) load_some<kAtOnce>(x + d, unit);
#pragma unroll
    for (int q = 0; q < kAtOnce; q++) {
      if (c.project) g[q] -= unit[q] * factor * along;
      g[q] *= multiplier;
      // A gradient times 1e12 would overflow fp16, so a zero row gets a zero gradient there instead of an infinite one.
      if (c.clamped_is_zero && clamped) g[q] = 0;
    }
    switch (c.gradient_dtype) {
      case Dtype::kFloat:
        store_some<kAtOnce, float>(gradient, d, g);
        break;
      case Dtype::kBFloat16:
        store_some<kAtOnce, __nv_bfloat16>(gradient, d, g);
        break;
      case Dtype::kHalf:
        store_some<kAtOnce, __half>(gradient, d, g);
        break;
      case Dtype::kDouble:
#pragma unroll
        for (int q = 0; q < kAtOnce; q++) reinterpret_cast<double*>(gradient)[d + q] = g[q];
    }
  }
}

template <class T, int kAtOnce>
__global__ void __launch_bounds__(kThreads) complete_kernel(Completion c) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row < c.rows) complete_row<T, kAtOnce>(c, row, threadIdx.x % kWarp);
}

// gain times the sums of w and of w * t, including those of the positives. Launched with one thread block.
static __global__ void __launch_bounds__(kThreads)
    complete_totals_kernel(const double* totals, const double* weight, const double* positive, Scalar gain,
                           int64_t rows, int64_t columns, int64_t offset, double* out) {
  double w = 0, wt = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    if (i + offset < 0 || i + offset >= columns) continue;
    w += weight[i];
    wt += weight[i] * positive[i];
  }
  __shared__ double shared[2][kWarps];
  w = warp_sum(w), wt = warp_sum(wt);
  if (threadIdx.x % kWarp == 0) shared[0][threadIdx.x / kWarp] = w, shared[1][threadIdx.x / kWarp] = wt;
  __syncthreads();
  if (threadIdx.x >= 2) return;
  double sum = totals[threadIdx.x];
  for (int q = 0; q < kWarps; q++) sum += shared[threadIdx.x][q];
  out[threadIdx.x] = value_of(gain, 1) * sum;
}

// gain times each column's sum of w, including those of the own positives. In place.
static __global__ void __launch_bounds__(kThreads)
    complete_key_bias_kernel(double* sums, const double* weight, Scalar gain, int64_t rows, int64_t columns,
                             int64_t offset) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x, i = j - offset;
  if (j < columns) sums[j] = value_of(gain, 1) * (sums[j] + (i >= 0 && i < rows ? weight[i] : 0.));
}

}  // namespace cuda
}  // namespace fastclip
