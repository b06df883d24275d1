// Two more types of options, for blocks with targets: a guide, whose products are compared with the thresholds, or a
// teacher, whose weights are added to those of the pairs.
#pragma once

#include "bound.h"
#include "pairs.h"

namespace fastclip {
namespace cuda {

struct Guided : All {
  static constexpr bool kIsGuided = true;
  TargetProducts targets;       // for kernels that read products from memory
  Features target_x, target_y;  // for the sweep with running maxima, which computes them: the towers, whole
  int64_t target_width = 0;
};

struct Taught : All {
  static constexpr bool kIsTaught = true;
  TargetProducts targets;
  Scalar scale;
  PairWeights teacher;  // shifts and coefficients of lines only
};

// A teacher's weight of a pair. Each line has a shift of its own, of at least the largest of its logits.
__device__ __forceinline__ float taught_weight(float t, const Affine<float>& k, const LineWeight& row,
                                               const LineWeight& column) {
  return CUDA::Softmax::activation(t, k, row.shift) * row.coefficient +
         CUDA::Softmax::activation(t, k, column.shift) * column.coefficient;
}

}  // namespace cuda
}  // namespace fastclip
