// The CPU engine's interface, without torch: its arguments and its entry points.
#pragma once

#include "../engine.h"

namespace fastclip {

// Targets with a scale: they weigh all pairs.
struct Teacher {
  bool is_given = false;
  double scale = 0;
  double shift = 0;  // like those of a Problem
  bool running_maxima = false;
  bool one_shift = true;
};

// The CPU engine's arguments: a block, and whether to sweep it (fold), to weigh it, or both. Strips are rows of x.
struct Problem {
  Side x, y;
  int64_t width = 0;  // D
  Dtype dtype = Dtype::kFloat;
  KindIndex kind{};
  bool same_id_positive = false;  // pairs of equal ids are positives; else they are excluded
  double scale = 1, bias = 0;
  int64_t target_width = 0;  // D', 0 without targets
  bool guided = false;       // thresholds are compared with the products of the targets
  Teacher teacher;
  int64_t offset = 0;
  bool fold = false;   // sweep: make the states
  bool weigh = false;  // weigh: make gradients and totals

  double shift = 0;                  // sweep: the shift of all rows and columns, integral
  bool running_maxima = false;       // sweep: each row and column has its own shift instead
  bool has_levels = false;           // sweep: each row and column has a level, in Lines::shifts
  double* positive = nullptr;        // t of the own positives: sweep writes it, weigh reads it
  bool positives_by_column = false;  // positive and positive_weight are indexed by the columns, not by the rows

  const double* positive_weight = nullptr;  // weigh: dL/ds of the own positives
  bool one_shift = true;                    // weigh: all shifts are equal, so row and column share one exponential
  double gain = 1;            // weigh: the upstream gradient; multiplies both gradients, but not the totals
  bool project = false;       // weigh: gradients with respect to the features before normalisation
  double totals[2] = {0, 0};  // weigh: sums of w and of w * t, out

  void* kept = nullptr;     // T, products of the first rows, without the factors
  int64_t kept_rows = 0;    // strips that lie wholly in these rows are kept
  bool kept_ready = false;  // true: the engine reads `kept`; false: it writes `kept`

  // True if every pair except own positives is a negative of both its lines, and no line has a bias.
  bool is_plain() const { return !x.ids && !x.threshold && !x.key_bias && !y.key_bias && !target_width; }

  int64_t cache_bytes = 1 << 20;  // size of a core's own cache (L2)
  bool brgemm = false;            // products use oneDNN's batch-reduce GEMM, else BLAS
  bool bf16_products = false;     // products take bf16 operands as they are; else these are widened to fp32
};

// The CPU engine, compiled once per instruction set.
#define FASTCLIP_DECLARE(capability)                                                \
  namespace capability {                                                            \
  int run(Problem& problem); /* the number of threads that took part */             \
  double largest_norm(const Features& x, int64_t rows, int64_t width, Dtype dtype); \
  }
FASTCLIP_DECLARE(DEFAULT)
FASTCLIP_DECLARE(AVX2)
FASTCLIP_DECLARE(AVX512)
#undef FASTCLIP_DECLARE

}  // namespace fastclip
