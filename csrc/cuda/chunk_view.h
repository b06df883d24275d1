// The arguments of one launch of the CUDA engine: a chunk of a block, the partial sums of its lines, and the shifts and
// coefficients of its pairs' weights. All are plain pointers to device memory. The kernels that read products from
// memory and those that compute products on tensor cores take the same arguments.
#pragma once

#include "engine.h"

namespace fastclip {
namespace cuda {

// Some rows and columns of a block, treated as a block. The positive of row i is column i + offset; offset lies within
// [-rows, columns].
struct ChunkView {
  const void *x = nullptr, *y = nullptr;  // (rows, width), (columns, width), unit stride along the width
  int64_t rows = 0, columns = 0, width = 0;
  int64_t stride_x = 0, stride_y = 0;
  Dtype dtype = Dtype::kFloat;
  KindIndex kind{};
  const float *factor_x = nullptr, *factor_y = nullptr;  // or null
  Scalar scale, bias;                                    // bias.at may be null
  int64_t offset = 0;
  Stream stream = nullptr;
};

// The products of a chunk in memory.
struct Products {
  const float* data = nullptr;  // without the factors
  int64_t stride = 0;
  bool aligned = false;  // every row begins on 16 bytes
};

// The products t' of the targets of a chunk.
struct TargetProducts {
  Products products;
  const float *factor_x = nullptr, *factor_y = nullptr;  // or null
};

// Partial sums of lines. Number q of line l lies at data[l * line + q * part]; they are added in the order of q.
struct Partials {
  float* data = nullptr;
  int64_t parts = 0;  // how many numbers each line has
  int64_t line = 1, part = 0;
};

// The first sweep: sums of fold(t, k, m) over the negatives of each row and column, and t of the positives. In a kind
// with levels, m is the level of the row or of the column.
struct Folding {
  const float* shift = nullptr;  // m of all lines; null for a kind without a shift
  const double *level_x = nullptr, *level_y = nullptr;
  double* positive = nullptr;  // (rows) of the view; only rows with a positive in the view are written
  Partials rows, columns;
  // Null, or sums over positives by id; with levels the numbers of negatives above them.
  Partials second_rows, second_columns;
};

// The second sweep: w_ij = activation(t, k, m) * (a_i + b_j) of the negatives, 0 for positives.
struct PairWeights {
  const float *shift_x = nullptr, *shift_y = nullptr;  // of rows, of columns: shifts, or levels, or null
  // If *shifts_differ is not 0, shifts differ between lines and each pair needs two exponentials:
  // activation(t, k, m_i) * a_i + activation(t, k, m_j) * b_j.
  const int32_t* shifts_differ = nullptr;
  const float *a = nullptr, *b = nullptr;  // null if a linear kind runs both sweeps in one go: then a_i + b_j is 1
  void* out = nullptr;                     // (rows, columns) of the view's dtype, or null if no gradient is wanted
  int64_t stride_out = 0;
  bool spread = true;       // true: out = w * enlarged * factor_x_i * factor_y_j; false: out = w * enlarged
  float enlarged = 1;       // a power of two
  bool to_tf32 = false;     // fp32 weights are rounded to nearest tf32
  float* totals = nullptr;  // (2, parts): sums of w, then sums of w * t
  int64_t total_parts = 0;
};

}  // namespace cuda
}  // namespace fastclip
