// The truth of a teacher's weights of all pairs, dense in float64.
#pragma once

#include "truth.h"

namespace driver {

class Taught {
 public:
  const int64_t m, n;
  const Numbers logits;  // (m, n), in log2 units
  double largest_logit = 0;

  Taught(int64_t m, int64_t n, Numbers products, double scale)
      : m(m), n(n), logits(scaled(std::move(products), scale * kLog2E)) {
    for (const double l : logits) largest_logit = std::max(largest_logit, std::fabs(l) / kLog2E);
  }

  // For each line, rows first: log2 of its sum of exponentials, and then its mean of t.
  std::pair<Numbers, Numbers> states(const Numbers& t) const {
    Numbers top(size_t(m + n), -kInfinity), sums(size_t(m + n), 0.), means(size_t(m + n), 0.);
    each([&](int64_t q, int64_t l) { top[l] = std::max(top[l], logits[q]); });
    each([&](int64_t q, int64_t l) { sums[l] += std::exp2(logits[q] - top[l]); });
    each([&](int64_t q, int64_t l) { means[l] += std::exp2(logits[q] - top[l]) / sums[l] * t[q]; });
    for (int64_t l = 0; l < m + n; l++) sums[l] = std::log2(sums[l]) + top[l];
    return {sums, means};
  }

  void add_weights(const double* shifts, const double* coefficients, Numbers& w) const {
    each([&](int64_t q, int64_t l) { w[q] += std::exp2(logits[q] - shifts[l]) * coefficients[l]; });
  }

 private:
  static Numbers scaled(Numbers numbers, double by) {
    for (double& v : numbers) v *= by;
    return numbers;
  }

  // Calls f(pair, line) for each pair and both its lines.
  template <class Function>
  void each(Function f) const {
    for (int64_t q = 0; q < m * n; q++) f(q, q / n), f(q, m + q % n);
  }
};

}  // namespace driver
