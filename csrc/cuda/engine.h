// The CUDA engine's plain arguments, and the interface of the library that gives it memory and matrix products. No
// header of torch is included, since nvcc compiles the engine without torch. No header of CUDA is included, since the
// C++ compiler compiles ops.cpp, which includes this file, without CUDA.
//
// The letters are those of ../engine.h. All pointers are to device memory. No function waits for the device. Decisions
// that depend on data (the shift, whether it was enough, whether one exponential serves row and column) are made on the
// device, so every call can be captured in a CUDA graph. Launches go to the given stream of the current device. A
// launch that fails throws std::runtime_error with the kernel's name and the block's shape.
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
  // Returns uninitialised work space, aligned to 256 bytes. It lives until the operator's last launch has run.
  virtual void* allocate(int64_t bytes) = 0;
  // Computes out = a b or, with add, out += a b. a and b have one dtype; out and the accumulation are fp32.
  virtual void multiply(const Matrix& a, const Matrix& b, const Matrix& out, bool add) = 0;
};

// A rectangular block of logits. The engine reads features, rows, stride, factor (fp32), ids, threshold (fp32) and
// target of either Side, and key_bias of y. In the negatives of a Side, with same_id_positive in its positives, and
// with a teacher in its lines of that name,
//   sweep             writes shift and sum, and of a teacher moment; with levels it reads them from shifts, and
//                     writes numbers of pairs to shift
//   weigh             reads shifts and coefficients, both float64
//   sweep_and_weigh   writes shift and sum
// weigh and sweep_and_weigh write `gradient` unless it is null; weigh also writes key_bias_sum of y unless it is null.
struct Block {
  Side x, y;
  int64_t width = 0;            // D
  Dtype dtype = Dtype::kFloat;  // kFloat, kBFloat16 or kHalf
  KindIndex kind{};
  bool same_id_positive = false;
  int64_t target_width = 0;  // D', 0 without targets
  bool guided = false;       // the targets are a guide: thresholds are compared with their products
  Scalar target_scale;       // of a teacher; at is null without one
  Scalar scale, bias;        // bias.at may be null
  int64_t offset = 0;
  bool tf32 = false;   // products truncate fp32 operands to tf32; the engine rounds them to nearest first
  bool fused = false;  // use the engine's own tensor-core kernels for the chunks that they serve
  Stream stream = nullptr;

  // True without ids, thresholds, biases of columns and a wanted gradient of these.
  bool has_no_options() const { return !x.ids && !x.threshold && !y.key_bias && !y.key_bias_sum; }
  // True if, besides, there are no targets: every pair except own positives is a negative of both its lines.
  bool is_plain() const { return has_no_options() && !has_targets(); }
  bool has_targets() const { return target_width > 0; }
  bool has_teacher() const { return has_targets() && !guided; }
};

// The first sweep's arguments besides the block.
struct Sweeping {
  Scalar bound;  // an upper bound of |t_ij|; bound.at may be null
  // (M + N), rows first, then as many for positives by id: true for lines that have pairs. If the sum of such a line is
  // near zero, terms were lost. Null: every line that has a pair besides its own positive is occupied.
  const bool* occupied = nullptr;
  double* positive = nullptr;  // (M) out: t, for rows whose own positive lies in the block
  float* kept = nullptr;       // (kept_rows, N) out: products of the first rows, without the factors
  int64_t kept_rows = 0;
};
void sweep(const Block& block, const Sweeping& sweeping, Library& library);

// The arguments of finish, which turns the states of lines (rows or columns) into losses, coefficients and weights of
// positives. Line l has positive l % period.
struct Finishing {
  KindIndex kind{};
  int64_t count = 0, period = 0;
  const double *shift = nullptr, *sum = nullptr, *positive = nullptr;
  Scalar scale, bias;
  double *losses = nullptr, *coefficients = nullptr, *weights = nullptr;
  Stream stream = nullptr;
};
void finish(const Finishing& lines);

// The second sweep's arguments besides the block.
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

// Both sweeps in one go, for a linear kind and a plain block. positive (M) is written, as in sweep; only gain, project
// and totals of `weighing` are used. Gradients are fp32.
void sweep_and_weigh(const Block& block, double* positive, const Weighing& weighing, Library& library);

// The largest shape of a chunk of products. Tests make it small.
struct ChunkShape {
  int64_t rows, columns;
};
ChunkShape& chunk_shape();

// True if the fused kernels were compiled.
bool has_fused();

}  // namespace cuda
}  // namespace fastclip
