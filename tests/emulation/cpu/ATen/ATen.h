// The part of torch that the CPU engine uses, in place of torch's header: matrix products in plain loops. Sanitizers
// see every access of these, and none of those in torch's libraries.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

// Called before each product; the driver lets time pass there, or throws.
void before_product();

namespace c10 {
template <class T>
struct CppTypeToScalarType {
  static constexpr bool value = std::is_same_v<T, double>;  // double, else float
};
}  // namespace c10

namespace at {

struct TensorOptions {
  explicit TensorOptions(bool is_double) : is_double(is_double) {}
  bool is_double;
};

struct Tensor {
  void* data;
  int64_t rows, cols, stride;
  bool is_double;
};

struct Sizes {
  Sizes(std::initializer_list<int64_t> two) : first(two.begin()[0]), second(two.begin()[1]) {}
  int64_t first, second;
};

inline Tensor from_blob(void* data, Sizes sizes, Sizes strides, TensorOptions options) {
  return {data, sizes.first, sizes.second, strides.first, options.is_double};
}

template <class T>
void multiply(bool add, const Tensor& a, const Tensor& b, Tensor& out) {
  const T* const x = static_cast<const T*>(a.data);
  const T* const y = static_cast<const T*>(b.data);
  T* const z = static_cast<T*>(out.data);
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < b.cols; j++) {
      T sum = 0;
      for (int64_t k = 0; k < a.cols; k++) sum += x[i * a.stride + k] * y[k * b.stride + j];
      z[i * out.stride + j] = add ? z[i * out.stride + j] + sum : sum;
    }
}

inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  before_product();
  out.is_double ? multiply<double>(false, a, b, out) : multiply<float>(false, a, b, out);
}

inline void addmm_out(Tensor& out, const Tensor&, const Tensor& a, const Tensor& b) {
  before_product();
  out.is_double ? multiply<double>(true, a, b, out) : multiply<float>(true, a, b, out);
}

}  // namespace at
