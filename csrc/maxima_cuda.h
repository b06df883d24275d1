// The sweep with running maxima: right at any scale. Launched after the sweep with one reference, always, and returns
// at once unless the flag says that this was too coarse; the host never learns which of them did the work.
//
// A block owns 64 lines and meets all their pairs, so that it needs no partial sums, and makes the products itself, on
// the ordinary cores: what a library makes cannot depend on a flag. Rows and columns each make their own: twice the
// products of a sweep that shares them, on a path that training takes only if features were not normalised or the
// scale is beyond about 110.
#pragma once

#include "bound_cuda.h"

namespace fastclip {
namespace cuda {

constexpr int kLines = 64, kDepth = 16, kSide = 4;  // of a block; of a step along the width; a thread's pairs, squared
constexpr int kAcross = kLines / kSide;             // threads that share a line
static_assert(kAcross * kAcross == kThreads, "a thread holds kSide x kSide pairs");
// A sum relative to its own largest term lies within these, or its logits have outgrown the dtype.
constexpr double kLeastRelative = 0x1p-100;

struct States {
  double *reference = nullptr, *sum = nullptr;
};

// A step of features as fp32, line by line; zeros past the edges.
template <class T>
__device__ __forceinline__ void stage(const Features& f, int64_t first, int64_t depth, int64_t width,
                                      float (&to)[kDepth][kLines + 1]) {
  for (int q = threadIdx.x; q < kDepth * kLines; q += kThreads) {
    const int line = q / kDepth, d = q % kDepth;
    const bool inside = first + line < f.rows && depth + d < width;
    to[d][line] = inside ? widen(static_cast<const T*>(f.data)[(first + line) * f.stride + depth + d]) : 0.f;
  }
}

template <class T, class Loss>
__global__ void __launch_bounds__(kThreads)
    maxima_kernel(Features x, Features y, int64_t width, Scalar scale, Scalar bias, int64_t offset, const int32_t* flag,
                  double* positive, States rows, States columns) {
  if (*flag == 0) return;
  const int64_t blocks_x = cdiv(x.rows, kLines);
  const bool is_row = int64_t(blockIdx.x) < blocks_x;
  const Features mine = is_row ? x : y, others = is_row ? y : x;
  const States states = is_row ? rows : columns;
  const int64_t shift = is_row ? offset : -offset;  // the positive of line l is line l + shift of the others
  const int64_t first = (blockIdx.x - (is_row ? 0 : blocks_x)) * kLines;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const Affine<float> k = affine<Loss>(scale, bias);

  __shared__ float a[kDepth][kLines + 1], b[kDepth][kLines + 1];
  float running[kSide];
  double sum[kSide] = {};
#pragma unroll
  for (int p = 0; p < kSide; p++) running[p] = -INFINITY;
  for (int64_t first_other = 0; first_other < others.rows; first_other += kLines) {
    float t[kSide][kSide] = {};
    for (int64_t depth = 0; depth < width; depth += kDepth) {
      __syncthreads();
      stage<T>(mine, first, depth, width, a);
      stage<T>(others, first_other, depth, width, b);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; d++)
#pragma unroll
        for (int p = 0; p < kSide; p++)
#pragma unroll
          for (int q = 0; q < kSide; q++) t[p][q] += a[d][down * kSide + p] * b[d][across + q * kAcross];
    }
#pragma unroll
    for (int p = 0; p < kSide; p++) {
      const int64_t line = first + down * kSide + p;
      bool live[kSide];
      float top = -INFINITY;
#pragma unroll
      for (int q = 0; q < kSide; q++) {
        const int64_t other = first_other + across + q * kAcross;
        live[q] = line < mine.rows && other < others.rows;
        if (live[q]) {
          if (mine.factor) t[p][q] *= mine.factor[line];
          if (others.factor) t[p][q] *= others.factor[other];
          if (other == line + shift) {
            live[q] = false;
            if (is_row) positive[line] = t[p][q];  // it must tie with its duplicates among these products
          }
        }
        if (live[q]) top = fmaxf(top, t[p][q] * k.scale);
      }
      top = ceilf(warp_max(top, kAcross));
      if (top > running[p]) {
        // Both are integral or infinite: a power of two, or 0 for the first of them.
        sum[p] = running[p] == -INFINITY ? 0. : sum[p] * exp2(double(running[p]) - double(top));
        running[p] = top;
      }
      float part = 0;
#pragma unroll
      for (int q = 0; q < kSide; q++)
        if (live[q]) part += Loss::fold(t[p][q], k, running[p] == -INFINITY ? 0.f : running[p]);
      sum[p] += warp_sum(part, kAcross);
    }
  }
#pragma unroll
  for (int p = 0; p < kSide; p++) {
    const int64_t line = first + down * kSide + p;
    if (across != 0 || line >= mine.rows) continue;
    const bool absent = running[p] == -INFINITY;
    const bool sound = absent || (sum[p] >= kLeastRelative && sum[p] <= 0x1p127);
    states.reference[line] = absent ? 0. : double(running[p]);
    states.sum[line] = sound ? sum[p] : double(NAN);
  }
}

inline int64_t maxima_blocks(const Features& x, const Features& y) {
  return cdiv(x.rows, kLines) + cdiv(y.rows, kLines);
}

}  // namespace cuda
}  // namespace fastclip
