// The plain arguments of both engines: pointers, sizes and which outputs are wanted. No torch here.
//
// Letters: x (M, D) and y (N, D) the features, i a row, j a column, t_ij = <x_i, y_j> * factor_x_i * factor_y_j,
// s_ij = scale * t_ij + bias the logit. The positive of row i is column i + offset, where that lies in the block.
#pragma once

#include <cstdint>

namespace fastclip {

enum class Loss { kSoftmax, kSigmoid };
enum class Dtype { kDouble, kFloat, kBFloat16, kHalf };

// One tower: its features, and what is wanted of it. T, the type of every statistic, is double for double features and
// float for all others; pointers to T are void here.
struct Side {
  const void* features = nullptr;  // (rows, D) of dtype, unit stride along D
  int64_t rows = 0;
  int64_t stride = 0;            // between rows, in elements
  const void* factor = nullptr;  // T (rows): 1 / norm, or null for features taken as they are

  double* reference = nullptr;  // sweep: (rows) out, in log2 units
  double* sum = nullptr;        // sweep: (rows) out, the folded negatives

  const void* references = nullptr;    // weigh: T (rows)
  const void* coefficients = nullptr;  // weigh: T (rows), a for x and b for y

  void* accumulator =
      nullptr;               // weigh: T (rows, D) work space of the column side; equal to gradient where dtypes agree
  void* gradient = nullptr;  // weigh: (rows, D) out of gradient_dtype, or null where it is not wanted
  Dtype gradient_dtype = Dtype::kFloat;
};

struct Problem {
  Side x, y;
  int64_t width = 0;  // D
  Dtype dtype = Dtype::kFloat;
  Loss loss = Loss::kSoftmax;
  double scale = 1, bias = 0;
  int64_t offset = 0;
  bool fold = false;   // sweep: make the states
  bool weigh = false;  // weigh: make gradients and totals

  double reference = 0;         // sweep: the one reference of all rows and columns, integral
  bool running_maxima = false;  // sweep: a reference for each row and column instead
  double* positive = nullptr;   // t of the positives: sweep writes it, weigh reads it
  bool positive_of_y = false;   // positive and positive_weight are indexed by the columns, not by the rows

  const double* positive_weight = nullptr;  // weigh: dL/ds of the positives
  bool one_reference = true;                // weigh: all references equal: one exponential serves row and column
  double gain = 1;            // weigh: the upstream gradient; multiplies both gradients, but not the totals
  bool project = false;       // weigh: gradients with respect to the features before normalisation
  double totals[2] = {0, 0};  // weigh: sums of w and of w * t, out

  void* kept = nullptr;     // T, products of the leading rows, without the factors
  int64_t kept_rows = 0;    // blocks that lie wholly in these rows are kept
  bool kept_ready = false;  // to be read; else to be written

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
