// The largest norm of features, which bounds their products.
#pragma once

#include <ATen/Parallel.h>

#include "pack.h"
#include "problem.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

template <class T, class In>
T squared_norm(const In* x, int64_t width) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < width; d++) {
    const T v = cast_to<T>(x[d]);
    square += v * v;
  }
  return square;
}

template <class In, class T>
double largest_norm_of(const Features& features, int64_t rows, int64_t width) {
  const In* const x = static_cast<const In*>(features.data);
  return at::parallel_reduce(
      0, rows, at::divup(1 << 15, width), 0.0,
      [&](int64_t begin, int64_t end, double largest) {
        for (int64_t i = begin; i < end; i++) {
          const double square = squared_norm<T>(x + i * features.stride, width);
          if (!(square <= largest)) largest = square;  // NaN stays
        }
        return largest;
      },
      [](double a, double b) { return a <= b ? b : a; });
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
