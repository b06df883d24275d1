// The CUDA engine's plain arguments, and what it takes from a library: memory and matrix products. No torch here, and
// no CUDA header either, so the front compiles beside any torch.
//
// Letters as in engine.h. Every pointer is to device memory. Nothing here waits for the device: what depends on data
// (the shift, whether it was enough, whether one exponential serves) is decided there, so every call can be
// captured in a CUDA graph. Launches go to the given stream of the current device, and one that fails throws
// std::runtime_error with the kernel's name and the block's shape.
#pragma once

#include <cstdint>

#include "../engine.h"

struct CUstream_st;

namespace fastclip {
namespace cuda {

using Stream = CUstream_st*;

// One number on the device.
struct Scalar {
  const void* at = nullptr;
  Dtype dtype = Dtype::kFloat;
};

// Element (r, c) lies at data + r * row_stride + c * column_stride; one of the strides is 1.
struct Matrix {
  void* data = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t row_stride = 0, column_stride = 1;
  Dtype dtype = Dtype::kFloat;
};

class Library {
 public:
  virtual ~Library() = default;
  // Work space, not initialised, aligned to 256 bytes. It lives until the operator's last launch has run.
  virtual void* allocate(int64_t bytes) = 0;
  // out = a b or, to add, out += a b. a and b are of one dtype, out is fp32, as is the accumulation.
  virtual void multiply(const Matrix& a, const Matrix& b, const Matrix& out, bool add) = 0;
};

// A rectangular block of logits. The engine reads features, rows, stride, factor (fp32), ids and threshold (fp32) of
// either Side, and key_bias of y. In the negatives of a Side, and with same_id_positive in its positives,
//   sweep             writes shift and sum
//   weigh             reads shifts and coefficients, both float64
//   sweep_and_weigh   writes shift and sum
// The latter two write gradient and weigh also key_bias_sum of y, where these are not null.
struct Block {
  Side x, y;
  int64_t width = 0;            // D
  Dtype dtype = Dtype::kFloat;  // kFloat, kBFloat16 or kHalf
  Kind kind{};
  bool same_id_positive = false;
  Scalar scale, bias;  // bias.at may be null
  int64_t offset = 0;
  bool tf32 = false;   // products round fp32 operands to tf32, and so does the engine, to nearest
  bool fused = false;  // tiles from the engine's own tensor-core kernels, where they can, else from the library
  Stream stream = nullptr;

  // Every pair but the own positives is a negative of both of its lines, no column has a bias, and nobody asks for
  // one's gradient.
  bool is_plain() const { return !x.ids && !x.threshold && !y.key_bias && !y.key_bias_sum; }
};

// The first sweep's arguments besides the block.
struct Sweeping {
  Scalar bound;  // an upper bound of |t_ij|; bound.at may be null
  // (M + N), rows first, behind them again as many for positives by id: whether a line has any pairs to add up, so that
  // a sum near zero tells of lost ones. Null: every line that is longer than its own positive.
  const bool* occupied = nullptr;
  double* positive = nullptr;  // (M) out: t, only of rows whose own positive lies in the block
  float* kept = nullptr;       // (kept_rows, N) out: products of the leading rows, without the factors
  int64_t kept_rows = 0;
};
void sweep(const Block& block, const Sweeping& sweeping, Library& library);

// Lines, rows or columns, to losses, coefficients and weights of their positives. `period` lines share positives.
struct Finishing {
  Kind kind{};
  int64_t count = 0, period = 0;
  const double *shift = nullptr, *sum = nullptr, *positive = nullptr;
  Scalar scale, bias;
  double *losses = nullptr, *coefficients = nullptr, *weights = nullptr;
  Stream stream = nullptr;
};
void finish(const Finishing& lines);

// What the second sweep needs besides the block.
struct Weighing {
  const double* positive = nullptr;         // (M)
  const double* positive_weight = nullptr;  // (M)
  Scalar gain;
  const float* kept = nullptr;
  int64_t kept_rows = 0;
  bool project = false;      // gradients with respect to the features before normalisation
  double* totals = nullptr;  // (2) out: gain times the sums of w and of w * t
};
void weigh(const Block& block, const Weighing& weighing, Library& library);

// Both in one go, for a linear kind and a plain block. positive (M) out, as in sweep; of the weighing only gain,
// project and totals are read. Gradients are fp32.
void sweep_and_weigh(const Block& block, double* positive, const Weighing& weighing, Library& library);

// Rows and columns of a chunk of products. Tests make it small.
struct ChunkShape {
  int64_t rows, columns;
};
ChunkShape& chunk_shape();

// Whether the fused kernels were compiled.
bool has_fused();

}  // namespace cuda
}  // namespace fastclip
