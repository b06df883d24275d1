// The driver's library for the engine: work space, and matrix products by three loops.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <stdexcept>
#include <vector>

#include "buffers.h"

#if defined(__SANITIZE_THREAD__)
extern "C" void AnnotateBenignRaceSized(const char* file, int line, const volatile void* memory, size_t bytes,
                                        const char* description);
#endif

namespace driver {

using fastclip::cuda::Matrix;

class Library : public fastclip::cuda::Library {
 public:
  explicit Library(bool tf32 = false) : tf32_(tf32) {}

  void* allocate(int64_t bytes) override {
    if (bytes < 1) throw std::logic_error("the engine requested 0 bytes");
    void* const data = memory_.emplace_back(bytes, 256).data();
#if defined(__SANITIZE_THREAD__)
    // Buffers of 4 bytes are flags; races on them are benign, since all threads write the same value.
    if (bytes == 4) AnnotateBenignRaceSized(__FILE__, __LINE__, data, 4, "a flag");
#endif
    return data;
  }

  // Rounds each element once, so that larger errors are the engine's.
  void multiply(const Matrix& a, const Matrix& b, const Matrix& out, bool add) override {
    if (a.dtype != b.dtype || out.dtype != Dtype::kFloat) throw std::logic_error("a product of the wrong dtypes");
    if (a.columns != b.rows || a.rows != out.rows || b.columns != out.columns)
      throw std::logic_error("a product of shapes that do not fit");
    for (const Matrix* matrix : {&a, &b, &out}) {
      const bool by_rows = matrix->column_stride == 1 && matrix->row_stride >= matrix->columns;
      const bool by_columns = matrix->row_stride == 1 && matrix->column_stride >= matrix->rows;
      if (!by_rows && !by_columns)
        throw std::logic_error("a matrix of a product is neither row-major nor column-major");
    }
    products++;
    const std::vector<double> left = dense(a), right = dense(b);
    float* const to = static_cast<float*>(out.data);
    for (int64_t r = 0; r < out.rows; r++)
      for (int64_t c = 0; c < out.columns; c++) {
        double sum = 0;
        for (int64_t k = 0; k < a.columns; k++) sum += left[r * a.columns + k] * right[k * b.columns + c];
        float& element = to[r * out.row_stride + c * out.column_stride];
        element = add ? element + float(sum) : float(sum);
      }
  }

  int products = 0;

 private:
  std::vector<double> dense(const Matrix& matrix) const {
    std::vector<double> numbers(size_t(matrix.rows * matrix.columns));
    for (int64_t r = 0; r < matrix.rows; r++)
      for (int64_t c = 0; c < matrix.columns; c++) {
        const double v = load(matrix.data, r * matrix.row_stride + c * matrix.column_stride, matrix.dtype);
        // Tensor cores would cut these bits off.
        if (tf32_ && matrix.dtype == Dtype::kFloat && __float_as_uint(float(v)) & 0x1fffu && std::isfinite(v))
          throw std::logic_error("an operand of a tf32 product was not rounded to tf32");
        numbers[size_t(r * matrix.columns + c)] = v;
      }
    return numbers;
  }

  bool tf32_;
  std::vector<Memory> memory_;
};

}  // namespace driver
