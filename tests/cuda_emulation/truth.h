// One rectangular block of logits, dense in float64, from the formulas of the operators' contract: what
// tests/dense_block.py is to the tests in Python. Positives are kept apart from negatives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "engine_cuda.h"

namespace driver {

using fastclip::Loss;

using Numbers = std::vector<double>;
constexpr double kLog2E = 1.4426950408889634, kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline double softplus(double v) { return std::max(v, 0.) + std::log1p(std::exp(-std::fabs(v))); }
inline double sigmoid(double v) { return v < 0 ? std::exp(v) / (1 + std::exp(v)) : 1 / (1 + std::exp(-v)); }

struct Tower {
  Numbers features;  // (rows, width), as the engine reads them
  Numbers factor;    // (rows), or empty
  int64_t rows = 0;
};

struct Gradients {
  Numbers x, y;
  double totals[2];
  double condition_x, condition_y, condition_totals;  // the sum of absolute values over the sum
};

class Truth {
 public:
  const int64_t m, n, width;
  const Loss loss;
  const double scale, bias;
  const int64_t offset;
  Numbers t;                              // (m, n)
  double largest_product, largest_logit;  // bounds: rounding errors in exponentials grow with them

  Truth(const Tower& x, const Tower& y, int64_t width, Loss loss, double scale, double bias, int64_t offset)
      : m(x.rows),
        n(y.rows),
        width(width),
        loss(loss),
        scale(scale),
        bias(loss == Loss::kSigmoid ? bias : 0.),
        offset(offset),
        t(size_t(m * n)),
        x_(x),
        y_(y),
        unit_x_(unit(x)),
        unit_y_(unit(y)) {
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++)
        for (int64_t d = 0; d < width; d++) t[i * n + j] += unit_x_[i * width + d] * unit_y_[j * width + d];
    largest_product = longest(unit_x_, m) * longest(unit_y_, n);
    largest_logit = std::fabs(scale) * largest_product + std::fabs(this->bias);
  }

  bool is_positive(int64_t i, int64_t j) const { return j - i == offset; }
  bool has_positive(int64_t i) const { return i + offset >= 0 && i + offset < n; }
  double logit(int64_t i, int64_t j) const { return scale * t[i * n + j] + bias; }

  // t of each row's positive, NaN where it has none here.
  Numbers positives() const {
    Numbers numbers(size_t(m), kNan);
    for (int64_t i = 0; i < m; i++)
      if (has_positive(i)) numbers[i] = t[i * n + i + offset];
    return numbers;
  }

  // States as one number a line, rows first: log2 of the sum of exponentials, or the sum of softplus.
  Numbers states() const {
    Numbers lines(size_t(m + n), 0.), top(size_t(m + n), -kInfinity);
    for_negatives([&](int64_t i, int64_t j) {
      for (const int64_t l : {i, m + j}) top[l] = std::max(top[l], logit(i, j));
    });
    for_negatives([&](int64_t i, int64_t j) {
      for (const int64_t l : {i, m + j})
        lines[l] += loss == Loss::kSoftmax ? std::exp(logit(i, j) - top[l]) : softplus(logit(i, j));
    });
    if (loss == Loss::kSoftmax)
      for (int64_t l = 0; l < m + n; l++) lines[l] = lines[l] > 0 ? (std::log(lines[l]) + top[l]) * kLog2E : -kInfinity;
    return lines;
  }

  // Weights of the negatives, 0 at the positives. references in log2 units, coefficients: rows first.
  Numbers weights(const Numbers& references, const Numbers& coefficients) const {
    Numbers w(size_t(m * n), 0.);
    for_negatives([&](int64_t i, int64_t j) {
      const double s = logit(i, j), a = coefficients[i], b = coefficients[m + j];
      w[i * n + j] = loss == Loss::kSigmoid
                         ? sigmoid(s) * (a + b)
                         : std::exp2(s * kLog2E - references[i]) * a + std::exp2(s * kLog2E - references[m + j]) * b;
    });
    return w;
  }

  // half: fp16 is among the dtypes, in which a zero row has no gradient instead of an infinite one.
  Gradients gradients(Numbers w, const Numbers& positive_weight, double gain, bool project, bool half_x,
                      bool half_y) const {
    Gradients g;
    double sizes[2] = {}, totals[2] = {};
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        double& v = w[i * n + j];
        if (is_positive(i, j)) v += positive_weight[i];
        const double terms[2] = {gain * v, gain * v * t[i * n + j]};
        for (int q = 0; q < 2; q++) totals[q] += terms[q], sizes[q] += std::fabs(terms[q]);
      }
    g.totals[0] = totals[0], g.totals[1] = totals[1];
    g.condition_totals = ratio({sizes[0], sizes[1]}, {totals[0], totals[1]});
    g.x = gradient(w, false, gain, project, half_x, g.condition_x);
    g.y = gradient(w, true, gain, project, half_y, g.condition_y);
    return g;
  }

  static double norm(const Numbers& v) {
    double squares = 0;
    for (const double q : v) squares += q * q;
    return std::sqrt(squares);
  }

 private:
  template <class Function>
  void for_negatives(Function f) const {
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++)
        if (!is_positive(i, j)) f(i, j);
  }

  Numbers unit(const Tower& tower) const {
    Numbers numbers = tower.features;
    if (!tower.factor.empty())
      for (size_t q = 0; q < numbers.size(); q++) numbers[q] *= tower.factor[q / size_t(width)];
    return numbers;
  }

  double longest(const Numbers& units, int64_t rows) const {
    double most = 0;
    for (int64_t i = 0; i < rows; i++)
      most = std::max(most, norm(Numbers(units.begin() + i * width, units.begin() + (i + 1) * width)));
    return most;
  }

  Numbers gradient(const Numbers& w, bool of_y, double gain, bool project, bool half, double& condition) const {
    const int64_t rows = of_y ? n : m, others = of_y ? m : n;
    const Numbers &mine = of_y ? unit_y_ : unit_x_, &other = of_y ? unit_x_ : unit_y_;
    const Numbers& factor = of_y ? y_.factor : x_.factor;
    Numbers g(size_t(rows * width)), sizes(size_t(rows * width));
    for (int64_t r = 0; r < rows; r++) {
      double* const to = &g[r * width];
      double* const size = &sizes[r * width];
      for (int64_t o = 0; o < others; o++)
        for (int64_t d = 0; d < width; d++) {
          const double term = gain * scale * (of_y ? w[o * n + r] : w[r * n + o]) * other[o * width + d];
          to[d] += term, size[d] += std::fabs(term);
        }
      if (!project || factor.empty()) continue;
      const bool clamped = factor[r] >= 0.9999e12;  // the features were divided by a constant
      double along = 0, along_size = 0;
      for (int64_t d = 0; d < width; d++) {
        const double u = clamped ? 0 : mine[r * width + d];
        along += u * to[d], along_size += std::fabs(u * size[d]);
      }
      for (int64_t d = 0; d < width; d++) {
        const double u = clamped ? 0 : mine[r * width + d];
        const double jacobian = clamped && half ? 0 : factor[r];
        to[d] = (to[d] - u * along) * jacobian;
        size[d] = (size[d] + std::fabs(u) * along_size) * jacobian;
      }
    }
    condition = ratio(sizes, g);
    return g;
  }

  static double ratio(const Numbers& size, const Numbers& result) {
    const double of = norm(result);
    return of > 0 ? norm(size) / of : 1.;
  }

  Tower x_, y_;
  Numbers unit_x_, unit_y_;
};

}  // namespace driver
