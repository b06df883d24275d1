// The right results of a chunk's sweeps, in double, from the definitions of the kinds.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace emulated {

struct Pairs {
  int64_t rows, columns, offset;
  bool is_softmax;
  double scale, bias;
  std::vector<float> products;            // (rows, columns), without the factors
  std::vector<float> factor_x, factor_y;  // empty: all 1
  std::vector<float> a, b;                // empty: a_i + b_j = 1
  std::vector<float> shift_x, shift_y;

  float product(int64_t i, int64_t j) const { return products[size_t(i * columns + j)]; }
  double t(int64_t i, int64_t j) const {
    double t = product(i, j);
    if (!factor_x.empty()) t *= factor_x[size_t(i)];
    if (!factor_y.empty()) t *= factor_y[size_t(j)];
    return t;
  }
  bool is_positive(int64_t i, int64_t j) const { return j == i + offset; }
  double s(int64_t i, int64_t j) const { return scale * t(i, j) + bias; }

  double fold(int64_t i, int64_t j, double m) const {
    if (is_positive(i, j)) return 0;
    if (is_softmax) return std::exp2((s(i, j) - bias) / std::log(2.) - m);
    return std::log1p(std::exp(-std::fabs(s(i, j)))) + std::fmax(s(i, j), 0.);
  }
  double weight(int64_t i, int64_t j) const {
    if (is_positive(i, j)) return 0;
    const double a_i = a.empty() ? 1 : a[size_t(i)], b_j = b.empty() ? 0 : b[size_t(j)];
    if (!is_softmax) return (a_i + b_j) / (1 + std::exp(-s(i, j)));
    return fold(i, j, shift_x[size_t(i)]) * a_i + fold(i, j, shift_y[size_t(j)]) * b_j;
  }
};

inline std::vector<float> numbers(int64_t count, double least, double most, std::mt19937& random) {
  std::uniform_real_distribution<double> of(least, most);
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = float(of(random));
  return v;
}

}  // namespace emulated
