// The plain arguments that both C++ engines use, without torch: pointers, sizes, dtypes. cpu/problem.h and
// cuda/engine.h have the rest.
//
// Letters: x (M, D) and y (N, D) are the features, i is a row, j is a column. The product t_ij is <x_i, y_j> times
// factor_x_i and factor_y_j (a factor is 1 / norm, or 1). The logit s_ij is scale * t_ij + bias + key_bias of column j
// (of row i, if the CPU engine has exchanged x and y). The own positive of row i is column i + offset, if that column
// lies in the block.
#pragma once

#include <cstdint>

namespace fastclip {

// The factor of a row whose norm was clamped at 1e-12 is at least this, since float rounds 1e12.
constexpr double kClampedFactor = 0.9999e12;

// A kind of statistic, as its index in the list of kinds (kinds.h).
enum class KindIndex : int {};
enum class Dtype { kDouble, kFloat, kBFloat16, kHalf };

// T, the type of a tile's arithmetic, is double for double features and float for all others. Pointers to T are void
// pointers here, and their comments say T. The CUDA engine takes float for T, except in Lines, where it takes double.

// Statistics of one side's lines over one set of pairs, and the coefficients of these pairs' weights.
struct Lines {
  double* shift = nullptr;             // sweep: (rows) out, in log2 units; with levels, how many pairs lie above
  double* sum = nullptr;               // sweep: (rows) out, sums of fold over the pairs
  double* moment = nullptr;            // sweep: (rows) out, sums of e' * t; of a teacher only
  const void* shifts = nullptr;        // weigh: T (rows); with levels these, for the sweep, too
  const void* coefficients = nullptr;  // weigh: T (rows)
};

// Features as operands of products.
struct Features {
  const void* data = nullptr;    // (rows, D) of dtype, unit stride along D
  int64_t stride = 0;            // between rows, in elements
  const void* factor = nullptr;  // T (rows): 1 / norm, or null for features taken as they are
};

// One tower: its features, the pairs that count for its lines, and its outputs.
struct Side {
  const void* features = nullptr;  // (rows, D) of dtype, unit stride along D
  int64_t rows = 0;
  int64_t stride = 0;            // between rows, in elements
  const void* factor = nullptr;  // T (rows): 1 / norm, or null for features taken as they are

  const int32_t* ids = nullptr;      // (rows), on both sides or none: pairs of equal ids are not negatives
  const void* threshold = nullptr;   // T (rows), on both sides or none: the line's negatives have t <= threshold
  const double* key_bias = nullptr;  // (rows), on one side at most: added to the logits of a line
  double* key_bias_sum = nullptr;    // weigh: (rows) out, sums of the weights; null if not wanted

  Features target;                      // of a guide or a teacher; width D'
  Lines negatives, positives, teacher;  // positives by id

  void* accumulator = nullptr;  // weigh: T (rows, D) work space of the column side; the gradient itself if dtypes agree
  void* gradient = nullptr;     // weigh: (rows, D) out of gradient_dtype, or null if not wanted
  Dtype gradient_dtype = Dtype::kFloat;
};

inline Features features_of(const Side& side) { return {side.features, side.stride, side.factor}; }

}  // namespace fastclip
