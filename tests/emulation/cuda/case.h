// A test case: one block of logits, its options and wanted results; its features in device memory and in float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "buffers.h"
#include "taught.h"

namespace driver {

using fastclip::cuda::Scalar;

struct Case {
  std::string name;
  int64_t m = 5, n = 4, d = 7;
  std::string kind = "softmax";
  Dtype dtype = Dtype::kFloat;
  int64_t offset = 0;
  bool factor_x = false, factor_y = false;
  double scale = 14.3, bias = -3;
  Dtype scalar = Dtype::kDouble;
  bool has_bound = false, has_bias = true;
  double longest = 1;  // the length of x_0, relative to the others
  bool has_zero_row = false;
  int64_t gap = 0, lead = 0;  // elements between rows, and before the first one
  int64_t chunk_rows = 0, chunk_columns = 0;
  int64_t kept_rows = 0;
  bool project = true, needs_x = true, needs_y = true;
  Dtype gradient_x = Dtype::kFloat, gradient_y = Dtype::kFloat;
  bool tf32 = false;
  int32_t ids = 0;  // the number of different ids; 0: no ids
  bool same_id_positive = false;
  double margin = kNan;  // of thresholds over own positives; NaN: no thresholds
  double key_bias = 0;   // their standard deviation; 0: no biases
  double key_bias_mean = 0;
  bool has_vanishing = true;  // one column's bias is -inf
  bool tells_occupied = true;
  bool needs_key_bias = false;
  int64_t target_width = 0;  // 0: no targets
  bool guided = false;       // they are a guide, which thresholds look at; else a teacher
  double target_scale = 20;
  bool quick = false;

  bool is_softmax() const { return kind == "softmax"; }
  bool is_hinge() const { return kind == "hinge"; }
  bool is_plain() const {
    return ids == 0 && std::isnan(margin) && key_bias == 0 && !needs_key_bias && target_width == 0;
  }
  bool has_teacher() const { return target_width > 0 && !guided; }
  // The features of the targets.
  Case of_targets() const {
    Case c = *this;
    c.d = target_width, c.longest = 1, c.has_zero_row = false;
    return c;
  }
  int64_t sets() const { return same_id_positive ? 2 : 1; }
};

inline double roundoff(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return 0x1p-53;
    case Dtype::kFloat:
      return 0x1p-24;
    case Dtype::kBFloat16:
      return 0x1p-8;
    default:
      return 0x1p-11;
  }
}

// Device memory of one number, and the number as it is stored there.
struct One {
  Memory memory;
  Scalar scalar;
  double value;
  One(double wanted, Dtype dtype) : memory(size_of(dtype)), scalar{memory.data(), dtype} {
    store(memory.data(), 0, dtype, wanted);
    value = load(memory.data(), 0, dtype);
  }
};

// A tower in device memory, with NaN in the gaps between rows, and the same tower in float64.
struct Features {
  Memory memory, factor;
  Tower tower;
  fastclip::Side side;
};

inline Features place(const Numbers& numbers, int64_t rows, const Case& c, bool has_factor) {
  Features f;
  const int64_t stride = c.d + c.gap, size = size_of(c.dtype);
  f.memory = Memory((c.lead + (rows - 1) * stride + c.d) * size);
  char* const first = f.memory.data() + c.lead * size;
  f.tower.rows = rows;
  f.tower.features.resize(numbers.size());
  if (has_factor) f.factor = Memory(rows * int64_t(sizeof(float)));
  for (int64_t r = 0; r < rows; r++) {
    double squares = 0;
    for (int64_t d = 0; d < c.d; d++) {
      store(first, r * stride + d, c.dtype, numbers[r * c.d + d]);
      const double v = f.tower.features[r * c.d + d] = load(first, r * stride + d, c.dtype);
      squares += v * v;
    }
    if (!has_factor) continue;
    f.factor.as<float>()[r] = float(1 / std::max(std::sqrt(squares), 1e-12));
    f.tower.factor.push_back(f.factor.as<float>()[r]);
  }
  f.side.features = first, f.side.rows = rows, f.side.stride = stride;
  f.side.factor = f.factor.data();
  return f;
}

// Makes features: of unit length, or of any length if a factor normalises them. Positives are similar to their rows.
inline void invent(const Case& c, Numbers& x, Numbers& y) {
  std::mt19937_64 generator(uint64_t(c.m * 1000003 + c.n * 1009 + c.d));
  std::normal_distribution<double> normal;
  x.resize(size_t(c.m * c.d)), y.resize(size_t(c.n * c.d));
  for (Numbers* numbers : {&x, &y})
    for (double& v : *numbers) v = normal(generator);
  for (int64_t i = 0; i < c.m; i++)
    if (i + c.offset >= 0 && i + c.offset < c.n)
      for (int64_t d = 0; d < c.d; d++) {
        double& v = y[(i + c.offset) * c.d + d];
        v = x[i * c.d + d] + 0.3 * v;
      }
  const auto scale_rows = [&](Numbers& numbers, int64_t rows, bool raw) {
    for (int64_t r = 0; r < rows; r++) {
      double squares = 0;
      for (int64_t d = 0; d < c.d; d++) squares += numbers[r * c.d + d] * numbers[r * c.d + d];
      const double length = raw ? std::pow(10, normal(generator) / 3) : 1;
      for (int64_t d = 0; d < c.d; d++) numbers[r * c.d + d] *= length / std::sqrt(squares);
    }
  };
  scale_rows(x, c.m, c.factor_x), scale_rows(y, c.n, c.factor_y);
  for (int64_t d = 0; d < c.d; d++) x[d] *= c.longest;
  if (c.has_zero_row)
    for (int64_t d = 0; d < c.d; d++) x[(c.m - 1) * c.d + d] = 0;
}

// Returns the middle between the two products of a line on either side of a threshold, so that rounding cannot change
// which pairs are above it.
inline double between(double threshold, const Numbers& line) {
  double below = -kInfinity, above = kInfinity;
  for (const double t : line) (t > threshold ? above : below) = t > threshold ? std::min(above, t) : std::max(below, t);
  return std::isinf(above) ? kInfinity : std::isinf(below) ? -kInfinity : float((above + below) / 2);
}

// t: the products that thresholds look at.
inline Masks invent_masks(const Case& c, const Numbers& t) {
  Masks masks;
  masks.same_id_positive = c.same_id_positive;
  std::mt19937_64 generator(uint64_t(c.m * 31 + c.n));
  std::normal_distribution<double> normal;
  const auto invent_ids = [&](int64_t lines) {
    std::vector<int32_t> ids(static_cast<size_t>(lines));
    for (int32_t& id : ids) id = int32_t(generator() % uint64_t(c.ids)) - 2;
    return ids;
  };
  if (c.ids > 0) masks.ids_x = invent_ids(c.m), masks.ids_y = invent_ids(c.n);
  if (!std::isnan(c.margin)) {
    masks.compared = t;
    masks.threshold_x.assign(size_t(c.m), kInfinity), masks.threshold_y.assign(size_t(c.n), kInfinity);
    for (int64_t i = 0; i < c.m; i++) {
      const int64_t j = i + c.offset;
      if (j < 0 || j >= c.n) continue;
      Numbers row, column;
      for (int64_t q = 0; q < c.n; q++) row.push_back(t[i * c.n + q]);
      for (int64_t q = 0; q < c.m; q++) column.push_back(t[q * c.n + j]);
      masks.threshold_x[i] = between(t[i * c.n + j] + c.margin, row);
      masks.threshold_y[j] = between(t[i * c.n + j] + c.margin, column);
    }
  }
  if (c.key_bias != 0) {
    for (int64_t j = 0; j < c.n; j++) masks.key_bias.push_back(c.key_bias_mean + c.key_bias * normal(generator));
    if (c.has_vanishing) masks.key_bias[c.n / 2] = -kInfinity;
  }
  return masks;
}

// Numbers in device memory; data is null if there are none.
template <class T, class From>
struct Vector {
  Memory memory;
  const T* data = nullptr;
  Vector() = default;
  explicit Vector(const std::vector<From>& numbers) {
    if (numbers.empty()) return;
    memory = Memory(int64_t(numbers.size() * sizeof(T)));
    std::copy(numbers.begin(), numbers.end(), memory.as<T>());
    data = memory.as<T>();
  }
};

}  // namespace driver
