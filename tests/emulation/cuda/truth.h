// The truth of one block of logits: the formulas of the operators' contract, dense in float64, as in
// tests/support/dense_truth.py. Own positives and positives by id are kept apart from negatives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "cuda/engine.h"

namespace driver {

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

// The options of a block. Empty vectors mean that it has no such option.
struct Masks {
  std::vector<int32_t> ids_x, ids_y;
  bool same_id_positive = false;
  Numbers threshold_x, threshold_y, key_bias;
  Numbers compared;  // (m, n), the products that thresholds look at
};

struct Gradients {
  Numbers x, y, key_bias;
  double totals[2];
  double condition_x, condition_y, condition_totals,
      condition_key_bias;  // sums of absolute values, divided by the sums
};

class Truth {
 public:
  const int64_t m, n, width;
  const bool is_softmax, is_hinge;
  const double scale, bias;
  const int64_t offset;
  const Masks masks;
  Numbers t;                              // (m, n)
  double largest_product, largest_logit;  // bounds: rounding errors in exponentials grow with them
  double reach;                           // a bound of logits, with the biases' range in place of their size

  Numbers levels;  // of a kind with levels: one for each line, in log2 units

  Truth(const Tower& x, const Tower& y, int64_t width, const std::string& kind, double scale, double bias,
        int64_t offset, const Masks& masks)
      : m(x.rows),
        n(y.rows),
        width(width),
        is_softmax(kind == "softmax"),
        is_hinge(kind == "hinge"),
        scale(scale),
        bias(is_softmax ? 0. : bias),
        offset(offset),
        masks(masks),
        t(products(x, y, width)),
        x_(x),
        y_(y),
        unit_x_(unit(x)),
        unit_y_(unit(y)) {
    largest_product = longest(unit_x_, m) * longest(unit_y_, n);
    Numbers biases;
    for (const double v : masks.key_bias)
      if (std::isfinite(v)) biases.push_back(v);
    reach = largest_logit = std::fabs(scale) * largest_product + std::fabs(this->bias);
    if (is_hinge) choose_levels();
    if (biases.empty()) return;
    const auto [least, most] = std::minmax_element(biases.begin(), biases.end());
    largest_logit += std::max(std::fabs(*least), std::fabs(*most)), reach += *most - *least;
  }

  static Numbers products(const Tower& x, const Tower& y, int64_t width) {
    Numbers t(size_t(x.rows * y.rows));
    const Numbers unit_x = unit(x, width), unit_y = unit(y, width);
    for (int64_t i = 0; i < x.rows; i++)
      for (int64_t j = 0; j < y.rows; j++)
        for (int64_t d = 0; d < width; d++) t[i * y.rows + j] += unit_x[i * width + d] * unit_y[j * width + d];
    return t;
  }

  bool is_own(int64_t i, int64_t j) const { return j - i == offset; }
  bool has_own(int64_t i) const { return i + offset >= 0 && i + offset < n; }
  bool is_same(int64_t i, int64_t j) const {
    return !is_own(i, j) && !masks.ids_x.empty() && masks.ids_x[i] == masks.ids_y[j];
  }
  bool is_negative(int64_t i, int64_t j, bool of_row) const {
    const Numbers& threshold = of_row ? masks.threshold_x : masks.threshold_y;
    return !is_own(i, j) && !is_same(i, j) &&
           !(!threshold.empty() && masks.compared[i * n + j] > threshold[of_row ? i : j]);
  }
  double own_logit(int64_t i) const { return scale * t[i * n + i + offset] + bias; }
  double logit(int64_t i, int64_t j) const {
    return scale * t[i * n + j] + bias + (masks.key_bias.empty() ? 0 : masks.key_bias[j]);
  }

  // t of each row's own positive, NaN if the block has none.
  Numbers positives() const {
    Numbers numbers(size_t(m), kNan);
    for (int64_t i = 0; i < m; i++)
      if (has_own(i)) numbers[i] = t[i * n + i + offset];
    return numbers;
  }

  // Calls f(i, j, line, logit) for each pair of negatives, or of positives by id, and each line for which it counts.
  // Line i is row i; line m + j is column j.
  template <class Function>
  void for_pairs(bool of_positives, Function f) const {
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++)
        for (const bool of_row : {true, false}) {
          const double sign = of_positives && !is_softmax ? -1 : 1;
          if (of_positives ? is_same(i, j) : is_negative(i, j, of_row)) f(i, j, of_row ? i : m + j, sign * logit(i, j));
        }
  }

  // How many pairs lie above each line's level.
  Numbers above() const {
    Numbers lines(size_t(m + n), 0.);
    for_pairs(false, [&](int64_t, int64_t, int64_t l, double s) { lines[l] += is_above(s, l); });
    return lines;
  }

  // States as one number for each line, rows first: log2 of the sum of exponentials, or the sum of softplus or of the
  // distances above the level.
  Numbers states(bool of_positives) const {
    Numbers lines(size_t(m + n), 0.), top(size_t(m + n), -kInfinity);
    for_pairs(of_positives, [&](int64_t, int64_t, int64_t l, double s) { top[l] = std::max(top[l], s); });
    for_pairs(of_positives, [&](int64_t, int64_t, int64_t l, double s) {
      if (is_hinge)
        lines[l] += is_above(s, l) ? s - levels[l] / kLog2E : 0;
      else if (s > -kInfinity)
        lines[l] += is_softmax ? std::exp(s - top[l]) : softplus(s);
    });
    if (is_softmax)
      for (int64_t l = 0; l < m + n; l++) lines[l] = lines[l] > 0 ? (std::log(lines[l]) + top[l]) * kLog2E : -kInfinity;
    return lines;
  }

  // Flags of lines that have pairs with a logit above -inf, regardless of thresholds.
  std::vector<char> occupied() const {
    std::vector<char> lines;
    for (const bool of_positives : {false, true}) {
      if (of_positives && !masks.same_id_positive) break;
      const size_t first = lines.size();
      lines.resize(first + size_t(m + n));
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++)
          if ((of_positives ? is_same(i, j) : !is_own(i, j) && !is_same(i, j)) && logit(i, j) > -kInfinity)
            lines[first + i] = lines[first + m + j] = 1;
    }
    return lines;
  }

  // Weights of the pairs, 0 at the own positives. Shifts (in log2 units) and coefficients have rows first, and those of
  // positives by id after those of negatives.
  Numbers weights(const Numbers& shifts, const Numbers& coefficients) const {
    Numbers w(size_t(m * n), 0.);
    for (const bool of_positives : {false, true}) {
      if (of_positives && !masks.same_id_positive) break;
      const int64_t first = of_positives ? m + n : 0;
      for_pairs(of_positives, [&](int64_t i, int64_t j, int64_t l, double s) {
        const double activation = is_softmax ? std::exp2(s * kLog2E - shifts[first + l])
                                  : is_hinge ? is_above(s, l)
                                             : sigmoid(s);
        w[i * n + j] += (of_positives && !is_softmax ? -1 : 1) * activation * coefficients[first + l];
      });
    }
    return w;
  }

  // half_x, half_y: fp16 is among the dtypes, so a zero row has a zero gradient instead of an infinite one.
  Gradients gradients(Numbers w, const Numbers& positive_weight, double gain, bool project, bool half_x,
                      bool half_y) const {
    Gradients g;
    double sizes[2] = {}, totals[2] = {};
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        double& v = w[i * n + j];
        if (is_own(i, j)) v += positive_weight[i];
        const double terms[2] = {gain * v, gain * v * t[i * n + j]};
        for (int q = 0; q < 2; q++) totals[q] += terms[q], sizes[q] += std::fabs(terms[q]);
      }
    g.key_bias.resize(size_t(n));
    Numbers of_columns(static_cast<size_t>(n));
    for (int64_t q = 0; q < m * n; q++) g.key_bias[q % n] += gain * w[q], of_columns[q % n] += std::fabs(gain * w[q]);
    g.condition_key_bias = ratio(of_columns, g.key_bias);
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
  double is_above(double s, int64_t l) const { return s * kLog2E > levels[l] ? 1 : 0; }

  // The level of a line lies in the widest gap between two of its middle logits, so that rounding cannot decide which
  // pairs lie above it.
  void choose_levels() {
    std::vector<Numbers> logits(static_cast<size_t>(m + n));
    for_pairs(false, [&](int64_t, int64_t, int64_t l, double s) {
      if (s > -kInfinity) logits[l].push_back(s * kLog2E);
    });
    for (Numbers& s : logits) {
      std::sort(s.begin(), s.end());
      double level = s.empty() ? 0 : s.front() - 1, widest = 1e-5 * (1 + largest_logit);
      for (size_t q = s.size() / 4 + 1; q < s.size() && q <= s.size() - s.size() / 4; q++)
        if (s[q] - s[q - 1] > widest) widest = s[q] - s[q - 1], level = (s[q] + s[q - 1]) / 2;
      levels.push_back(level);
    }
  }

  static Numbers unit(const Tower& tower, int64_t width) {
    Numbers numbers = tower.features;
    if (!tower.factor.empty())
      for (size_t q = 0; q < numbers.size(); q++) numbers[q] *= tower.factor[q / size_t(width)];
    return numbers;
  }
  Numbers unit(const Tower& tower) const { return unit(tower, width); }

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
