// Copies of features that a product cannot take as they are. float32 features are rounded to tf32, since tensor cores
// would truncate them. fp16 features are multiplied by their factors, since fp16 weights times the factors would leave
// fp16's range.
#pragma once

#include "bound.h"

namespace fastclip {
namespace cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) copy_kernel(Features from, int64_t width, bool to_tf32, T* to) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= from.rows) return;
  const T* const features = static_cast<const T*>(from.data) + row * from.stride;
  const float factor = from.factor ? from.factor[row] : 1.f;
  for (int64_t d = threadIdx.x % kWarp; d < width; d += kWarp) {
    const float v = widen(features[d]) * factor;
    to[row * width + d] = narrow<T>(to_tf32 ? rounded_to_tf32(v) : v);
  }
}

}  // namespace cuda
}  // namespace fastclip
