// Plain arguments, without torch: Side, which both C++ engines use, and Problem, the CPU engine's (the CUDA engine's is
// cuda::Block).
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

// A kind of statistic, as its index in the list of kinds (epilogues.h).
enum class Kind : int {};
enum class Dtype { kDouble, kFloat, kBFloat16, kHalf };

// T, the type of a tile's arithmetic, is double for double features and float for all others. Pointers to T are void
// pointers here, and their comments say T. The CUDA engine takes float for T, except in Lines, where it takes double.

// Statistics of one side's lines over one set of pairs, and the coefficients of these pairs' weights.
struct Lines {
  double* shift = nullptr;             // sweep: (rows) out, in log2 units
  double* sum = nullptr;               // sweep: (rows) out, sums of fold over the pairs
  const void* shifts = nullptr;        // weigh: T (rows)
  const void* coefficients = nullptr;  // weigh: T (rows)
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

  Lines negatives, positives;  // positives by id

  void* accumulator = nullptr;  // weigh: T (rows, D) work space of the column side; the gradient itself if dtypes agree
  void* gradient = nullptr;     // weigh: (rows, D) out of gradient_dtype, or null if not wanted
  Dtype gradient_dtype = Dtype::kFloat;
};

// The CPU engine's arguments: a block, and whether to sweep it (fold), to weigh it, or both. Strips are rows of x.
struct Problem {
  Side x, y;
  int64_t width = 0;  // D
  Dtype dtype = Dtype::kFloat;
  Kind kind{};
  bool same_id_positive = false;  // pairs of equal ids are positives; else they are excluded
  double scale = 1, bias = 0;
  int64_t offset = 0;
  bool fold = false;   // sweep: make the states
  bool weigh = false;  // weigh: make gradients and totals

  double shift = 0;             // sweep: the shift of all rows and columns, integral
  bool running_maxima = false;  // sweep: each row and column has its own shift instead
  double* positive = nullptr;   // t of the own positives: sweep writes it, weigh reads it
  bool positive_of_y = false;   // positive and positive_weight are indexed by the columns, not by the rows

  const double* positive_weight = nullptr;  // weigh: dL/ds of the own positives
  bool one_shift = true;                    // weigh: all shifts are equal, so row and column share one exponential
  double gain = 1;            // weigh: the upstream gradient; multiplies both gradients, but not the totals
  bool project = false;       // weigh: gradients with respect to the features before normalisation
  double totals[2] = {0, 0};  // weigh: sums of w and of w * t, out

  void* kept = nullptr;     // T, products of the first rows, without the factors
  int64_t kept_rows = 0;    // strips that lie wholly in these rows are kept
  bool kept_ready = false;  // true: the engine reads `kept`; false: it writes `kept`

  // True if every pair except own positives is a negative of both its lines, and no line has a bias.
  bool is_plain() const { return !x.ids && !x.threshold && !x.key_bias && !y.key_bias; }

  int64_t cache_bytes = 1 << 20;  // size of a core's own cache (L2)
  bool brgemm = false;            // products use oneDNN's batch-reduce GEMM, else BLAS
  bool half_products = false;     // products take bf16 operands as they are; else these are widened to fp32
};

// The CPU engine, compiled once per instruction set.
#define FASTCLIP_DECLARE(capability)                                    \
  namespace capability {                                                \
  int run(Problem& problem); /* the number of threads that took part */ \
  double largest_norm(const Side& side, const Problem& problem);        \
  }
FASTCLIP_DECLARE(DEFAULT)
FASTCLIP_DECLARE(AVX2)
FASTCLIP_DECLARE(AVX512)
#undef FASTCLIP_DECLARE

}  // namespace fastclip
