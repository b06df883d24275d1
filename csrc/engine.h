// The plain arguments of both engines: pointers, sizes and which outputs are wanted. No torch here.
//
// Letters: x (M, D) and y (N, D) the features, i a row, j a column, t_ij = <x_i, y_j> * factor_x_i * factor_y_j,
// s_ij = scale * t_ij + bias + key_bias of its lines the logit. The own positive of row i is column i + offset, where
// that lies in the block.
#pragma once

#include <cstdint>

namespace fastclip {

// A kind of statistic: its place in the list of them (epilogues.h).
enum class Kind : int {};
enum class Dtype { kDouble, kFloat, kBFloat16, kHalf };

// T, the type of every statistic, is double for double features and float for all others; pointers to T are void here.

// Statistics of the lines of a side over one set of pairs, and coefficients for their weights.
struct Lines {
  double* shift = nullptr;             // sweep: (rows) out, in log2 units
  double* sum = nullptr;               // sweep: (rows) out, the folded pairs
  const void* shifts = nullptr;        // weigh: T (rows)
  const void* coefficients = nullptr;  // weigh: T (rows)
};

// One tower: its features, which pairs count for its lines, and what is wanted of it.
struct Side {
  const void* features = nullptr;  // (rows, D) of dtype, unit stride along D
  int64_t rows = 0;
  int64_t stride = 0;            // between rows, in elements
  const void* factor = nullptr;  // T (rows): 1 / norm, or null for features taken as they are

  const int32_t* ids = nullptr;      // (rows), of both sides or none: pairs of equal ids are no negatives
  const void* threshold = nullptr;   // T (rows), of both or none: a negative of larger t does not count for this line
  const double* key_bias = nullptr;  // (rows), of one side at most: added to the logits of a line
  double* key_bias_sum = nullptr;    // weigh: (rows) out, sums of the weights; null where they are not wanted

  Lines negatives, positives;  // positives by id

  void* accumulator =
      nullptr;               // weigh: T (rows, D) work space of the column side; equal to gradient where dtypes agree
  void* gradient = nullptr;  // weigh: (rows, D) out of gradient_dtype, or null where it is not wanted
  Dtype gradient_dtype = Dtype::kFloat;
};

struct Problem {
  Side x, y;
  int64_t width = 0;  // D
  Dtype dtype = Dtype::kFloat;
  Kind kind{};
  bool same_id_positive = false;  // pairs of equal ids are positives; else they are left out
  double scale = 1, bias = 0;
  int64_t offset = 0;
  bool fold = false;   // sweep: make the states
  bool weigh = false;  // weigh: make gradients and totals

  double shift = 0;             // sweep: the one shift of all rows and columns, integral
  bool running_maxima = false;  // sweep: a shift for each row and column instead
  double* positive = nullptr;   // t of the own positives: sweep writes it, weigh reads it
  bool positive_of_y = false;   // positive and positive_weight are indexed by the columns, not by the rows

  const double* positive_weight = nullptr;  // weigh: dL/ds of the own positives
  bool one_shift = true;                    // weigh: all shifts equal: one exponential serves row and column
  double gain = 1;            // weigh: the upstream gradient; multiplies both gradients, but not the totals
  bool project = false;       // weigh: gradients with respect to the features before normalisation
  double totals[2] = {0, 0};  // weigh: sums of w and of w * t, out

  void* kept = nullptr;     // T, products of the leading rows, without the factors
  int64_t kept_rows = 0;    // blocks that lie wholly in these rows are kept
  bool kept_ready = false;  // to be read; else to be written

  // Every pair but the own positives is a negative of both of its lines, and no line has a bias.
  bool is_plain() const { return !x.ids && !x.threshold && !x.key_bias && !y.key_bias; }

  int64_t cache_bytes = 1 << 20;  // of a core's own cache (L2)
  bool brgemm = false;            // products by oneDNN's batch-reduce GEMM, else by BLAS
  bool half_products = false;     // bf16 operands as they are, else widened to fp32
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
