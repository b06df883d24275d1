// Exact scores: sums in double of products of features, in one order for every pair.
//
// Equal features have equal scores, wherever they lie. The products of fp32 and half features are exact in double, so
// the error is that of D additions in double.
#pragma once

#include <cmath>
#include <limits>

#include "../norms.h"
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

// The largest error of a product t relative to |x| |y|, for sums of up to `chain` terms at a time. Any order of n
// additions has an error below n units in the last place of sum |x_d| |y_d| <= |x| |y|; four more are for the scores
// and their differences, which are rounded, too, and 1 % is for the norms.
template <class T>
double largest_error(int64_t width, int64_t chain) {
  const double unit = sizeof(T) == sizeof(double) ? 0x1p-53 : 0x1p-24;
  return 1.01 * unit * double(std::min(width, chain) + (width + chain - 1) / chain + 4);
}

// The norms of rows, times `factor`.
template <class In, class T>
void scaled_norms(const Features& x, int64_t begin, int64_t rows, int64_t width, double factor, T* out) {
  for (int64_t i = 0; i < rows; i++) {
    const In* const row = static_cast<const In*>(x.data) + (begin + i) * x.stride;
    // The smallest normal number covers products that underflow.
    out[i] = T(std::sqrt(exact_score(row, row, width)) * factor) + std::numeric_limits<T>::min();
  }
}

template <class In, class T>
double largest_norm(const Features& x, int64_t rows, int64_t width) {
  return std::sqrt(largest_norm_of<In, T>(x, rows, width));
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
