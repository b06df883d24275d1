// Exact scores: sums in double of products of features, in one order for every pair.
//
// Equal features have equal scores, wherever they lie. The products of fp32 and half features are exact in double, so
// the error is that of D additions in double.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../pack.h"
#include "problem.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

template <class In>
double exact_score(const In* x, const In* y, int64_t width) {
  constexpr int64_t kSums = 16;
  double sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= width; d += kSums)
    for (int64_t q = 0; q < kSums; q++) sums[q] += cast_to<double>(x[d + q]) * cast_to<double>(y[d + q]);
  for (int64_t q = 0; d + q < width; q++) sums[q] += cast_to<double>(x[d + q]) * cast_to<double>(y[d + q]);
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t q = 0; q < half; q++) sums[q] += sums[q + half];
  return sums[0];
}

template <class In>
double exact_score(const Scan& p, int64_t i, int64_t j) {
  return exact_score(static_cast<const In*>(p.x.data) + i * p.x.stride,
                     static_cast<const In*>(p.y.data) + j * p.y.stride, p.width);
}

template <class In>
double exact_norm(const Features& x, int64_t row, int64_t width) {
  const In* const features = static_cast<const In*>(x.data) + row * x.stride;
  return std::sqrt(exact_score(features, features, width));
}

// The largest norm of rows. In float the squares of small features would underflow.
template <class In>
double largest_exact_norm(const Features& x, int64_t rows, int64_t width) {
  return at::parallel_reduce(
      0, rows, 256, 0.0,
      [&](int64_t begin, int64_t end, double largest) {
        for (int64_t i = begin; i < end; i++) largest = std::max(largest, exact_norm<In>(x, i, width));
        return largest;
      },
      [](double a, double b) { return std::max(a, b); });
}

// Bounds of the errors of a query's or a key's products with the other side, in T.
//
// Any order of n additions has an error below n units in the last place of sum |x_d| |y_d| <= |x| |y|, for the `chain`
// terms that are added at a time and for the chains. Four more are for the scores and their differences, which are
// rounded, too, and 1 % is for the norms. `rounding` is the error of the terms. Denormal operands and terms may be
// flushed to zero. If a partial sum may overflow, no product decides.
template <class T>
class Bands {
 public:
  Bands(int64_t width, int64_t chain, double rounding, double largest_other)
      : error_(1.01 * (kUnit * double(std::min(width, chain) + (width + chain - 1) / chain + 4) + rounding)),
        root_(std::sqrt(double(width))),
        other_(largest_other) {}

  T operator()(double norm) const {
    if (norm * other_ * (1 + error_) > double(std::numeric_limits<T>::max()) / 4)
      return std::numeric_limits<T>::infinity();
    const double flushed = double(std::numeric_limits<T>::min()) * root_ * (norm + other_ + 2 * root_);
    return T(norm * other_ * error_ + flushed) * (1 + std::numeric_limits<T>::epsilon());
  }

 private:
  static constexpr double kUnit = sizeof(T) == sizeof(double) ? 0x1p-53 : 0x1p-24;
  double error_, root_, other_;
};

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
