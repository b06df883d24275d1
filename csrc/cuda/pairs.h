// The options of a block: ids, thresholds and positives by id, which decide whether a pair is a negative or a positive
// of its lines, and biases of columns.
//
// Kernels that visit pairs are compiled for these types of options. Plain has no options and costs nothing. Ids
// excludes pairs at the cost of a comparison. All has every option; absent options have neutral values. targets.h adds
// two types for blocks with targets.
#pragma once

#include "device.h"

namespace fastclip {
namespace cuda {

using CUDA::LineBias;
using BiasedAffine = Affine<float, float, true>;

// The roles of a pair: a negative of the line that is processed, a negative of its other line, a positive by id of
// both.
struct Counts {
  bool mine, other, positive;
};

// Each type of options has: Line, the numbers it needs of a line, loaded by row() and column(); Bias, the bias of a
// column, loaded by bias(); and counts(), which returns the roles of a pair. t: the product that is compared with
// thresholds. is_pair: the pair lies in the block and is not an own positive.
struct Plain {
  static constexpr bool kHasAll = false, kIsGuided = false, kIsTaught = false;
  struct Line {};
  struct Bias {};
  __device__ __forceinline__ Line row(int64_t) const { return {}; }
  __device__ __forceinline__ Line column(int64_t) const { return {}; }
  template <class Kind>
  __device__ __forceinline__ Bias bias(int64_t, const Affine<float>&) const {
    return {};
  }
  __device__ __forceinline__ Counts counts(Line, Line, float, bool is_pair) const { return {is_pair, is_pair, false}; }
};

struct Ids : Plain {
  const int32_t *x = nullptr, *y = nullptr;
  struct Line {
    int32_t id;
  };
  __device__ __forceinline__ Line row(int64_t i) const { return {x[i]}; }
  __device__ __forceinline__ Line column(int64_t j) const { return {y[j]}; }
  __device__ __forceinline__ Counts counts(Line mine, Line other, float, bool is_pair) const {
    const bool is_negative = is_pair && mine.id != other.id;
    return {is_negative, is_negative, false};
  }
};

struct All {
  static constexpr bool kHasAll = true, kIsGuided = false, kIsTaught = false;
  const int32_t *ids_x = nullptr, *ids_y = nullptr;            // or null
  const float *threshold_x = nullptr, *threshold_y = nullptr;  // or null
  const LineBias<float>* biases = nullptr;                     // of the columns, or null
  bool same_id_positive = false;

  // With positives by id: their shifts and coefficients (c and d are a and b of PairWeights).
  const float *shift_x = nullptr, *shift_y = nullptr, *c = nullptr, *d = nullptr;
  Partials weights;  // the columns' sums of weights, or null

  struct Line {
    int32_t id;
    float threshold;
  };
  using Bias = LineBias<float>;

  // Without ids, rows get 0 and columns 1, which differ.
  __device__ __forceinline__ Line row(int64_t i) const {
    return {ids_x ? ids_x[i] : 0, threshold_x ? threshold_x[i] : INFINITY};
  }
  __device__ __forceinline__ Line column(int64_t j) const {
    return {ids_y ? ids_y[j] : 1, threshold_y ? threshold_y[j] : INFINITY};
  }
  // The bias of a column, which includes the bias of all logits.
  template <class Kind>
  __device__ __forceinline__ Bias bias(int64_t j, const Affine<float>& k) const {
    if (biases) return biases[j];
    Bias b;
    b.whole = Kind::kHasShift ? 0.f : k.bias, b.part = Kind::kHasShift ? 0.f : k.bias_low;
    return b;
  }
  __device__ __forceinline__ Counts counts(Line mine, Line other, float t, bool is_pair) const {
    const bool is_same = mine.id == other.id, is_negative = is_pair && !is_same;
    // A NaN counts, so that it makes its lines NaN.
    return {is_negative && !(t > mine.threshold), is_negative && !(t > other.threshold),
            is_pair && is_same && same_id_positive};
  }
};

// The arguments k and m of fold and activation for one pair.
template <class Kind>
__device__ __forceinline__ const Affine<float>& affine_of(const Affine<float>& k, Plain::Bias, bool) {
  return k;
}
template <class Kind>
__device__ __forceinline__ BiasedAffine affine_of(const Affine<float>& k, const LineBias<float>& bias,
                                                  bool is_positive) {
  const BiasedAffine biased(k.scale, k.scale_low, Kind::kHasShift ? 0.f : bias.whole, bias.part);
  return Kind::kNegatesPositives && is_positive ? biased.negated() : biased;
}
template <class Kind>
__device__ __forceinline__ float shift_of(float m, Plain::Bias) {
  return m;
}
template <class Kind>
__device__ __forceinline__ float shift_of(float m, const LineBias<float>& bias) {
  return Kind::kHasShift ? m - bias.whole : m;
}

// A line's coefficient and shift, from which the weights of its pairs are made.
struct LineWeight {
  float coefficient, shift;
};

// Chooses by value: with a choice between two addresses, the compiler would put both objects into local memory.
__device__ __forceinline__ LineWeight choose(bool first, LineWeight a, LineWeight b) {
  return {first ? a.coefficient : b.coefficient, first ? a.shift : b.shift};
}

// The weight of a pair that may count for one of its lines only. `mine` and `other` are the coefficients and shifts of
// the two lines: for positives by id if the pair is one, else for negatives.
template <class Kind, class K>
__device__ __forceinline__ float weight_by_role(float t, const K& k, const LineBias<float>& bias, const Counts& counts,
                                                const LineWeight& mine, const LineWeight& other, bool two_shifts) {
  const auto activation = [&](const LineWeight& line) {
    return Kind::activation(t, k, shift_of<Kind>(line.shift, bias));
  };
  const bool is_mine = counts.mine || counts.positive, is_other = counts.other || counts.positive;
  const float first = activation(mine);
  float w;
  // Excluded only after the product, since the exponential of an excluded pair may overflow.
  if (two_shifts)
    w = (is_mine ? first * mine.coefficient : 0.f) + (is_other ? activation(other) * other.coefficient : 0.f);
  else
    w = first * ((is_mine ? mine.coefficient : 0.f) + (is_other ? other.coefficient : 0.f));
  w = is_mine || is_other ? w : 0.f;
  return Kind::kNegatesPositives && counts.positive ? -w : w;
}

// Converts key_bias, plus the common bias in kinds that use one, to the columns' biases, and finds the largest finite
// one of each thread block.
template <class Kind>
__global__ void __launch_bounds__(kThreads)
    biases_kernel(const double* key_bias, int64_t columns, Scalar bias, LineBias<float>* biases, float* largest) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float most = -INFINITY;
  if (j < columns) {
    const LineBias<float> of_column(key_bias[j] + (Kind::kHasShift ? 0. : value_of(bias, 0)));
    biases[j] = of_column;
    if (fabsf(of_column.whole) < INFINITY) most = of_column.whole;
  }
  most = warp_max(most);
  __shared__ float shared[kWarps];
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = most;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int q = 1; q < kWarps; q++) most = fmaxf(most, shared[q]);
  largest[blockIdx.x] = most;
}

}  // namespace cuda
}  // namespace fastclip
