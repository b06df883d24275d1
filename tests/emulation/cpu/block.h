// A random block for the CPU engine: its operands and outputs in buffers that are exactly as large as documented.
#pragma once

#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "cpu/pack.h"
#include "cpu/problem.h"

using fastclip::Dtype;
using fastclip::Lines;
using fastclip::Problem;
using fastclip::Side;

struct Case {
  Dtype dtype;
  fastclip::KindIndex kind;
  int64_t m, n, d;
  int64_t offset = 0;
  bool ids = false, thresholds = false, key_bias = false, same_id_positive = false;
  bool guided = false, taught = false, normalized = false;
  int64_t pad = 0;   // unused elements between the rows of features
  int64_t kept = 0;  // rows
  bool brgemm = false, bf16_products = false;
};

class Block {
 public:
  Problem p;

  Block(const Case& c, unsigned seed) : c_(c), random_(seed) {
    p.dtype = c.dtype, p.kind = c.kind, p.width = c.d, p.offset = c.offset;
    p.scale = 3, p.bias = -1, p.shift = 4;
    p.has_levels = fastclip::PORTABLE::has_levels(c.kind);
    p.same_id_positive = c.same_id_positive, p.guided = c.guided;
    p.brgemm = c.brgemm, p.bf16_products = c.bf16_products;
    p.x.rows = c.m, p.y.rows = c.n;
    p.positive = doubles(c.m, NAN);
    p.kept = made(c.kept * c.n * statistic()), p.kept_rows = c.kept;
    for (Side* side : {&p.x, &p.y}) fill(*side);
    if (c.key_bias) p.y.key_bias = normal(c.n);
    if (c.guided || c.taught) {
      p.target_width = c.d / 2 + 1;
      for (Side* side : {&p.x, &p.y})
        side->target = {features(side->rows, p.target_width), p.target_width + c.pad, factors(side->rows)};
      p.teacher.is_given = c.taught, p.teacher.scale = 2, p.teacher.shift = 3;
    }
    for (Side* side : {&p.x, &p.y}) {
      state(side->negatives, side->rows, false);
      if (c.same_id_positive) state(side->positives, side->rows, false);
      if (c.taught) state(side->teacher, side->rows, true);
    }
    if (p.has_levels)
      for (Side* side : {&p.x, &p.y}) side->negatives.shifts = numbers(side->rows, 0, 0.5);
  }

  // Sets what a weigh takes beside a sweep's outputs.
  void prepare_weigh(bool one_shift) {
    p.weigh = true, p.one_shift = p.teacher.one_shift = one_shift, p.gain = 0.7, p.project = c_.normalized;
    p.positive_weight = normal(c_.m);
    for (Side* side : {&p.x, &p.y}) {
      coefficients(side->negatives, side->rows, one_shift ? 0 : 1);
      if (c_.same_id_positive) coefficients(side->positives, side->rows, one_shift ? 0 : 1);
      if (c_.taught) coefficients(side->teacher, side->rows, one_shift ? 0 : 1);
      side->gradient = out(side->rows * c_.d * statistic());
      side->gradient_dtype = c_.dtype == Dtype::kDouble ? Dtype::kDouble : Dtype::kFloat;
    }
    p.y.accumulator = p.y.gradient;
    if (c_.key_bias) p.y.key_bias_sum = static_cast<double*>(out(c_.n * 8));
  }

  // The bytes of all outputs.
  std::string outputs() const {
    std::string all;
    for (const auto& [data, bytes] : outputs_) all.append(static_cast<const char*>(data), bytes);
    all.append(reinterpret_cast<const char*>(p.totals), sizeof p.totals);
    return all;
  }

 private:
  int64_t statistic() const { return c_.dtype == Dtype::kDouble ? 8 : 4; }
  int64_t element() const { return c_.dtype == Dtype::kDouble ? 8 : c_.dtype == Dtype::kFloat ? 4 : 2; }

  void* made(int64_t bytes) { return buffers_.emplace_back(bytes).data(); }
  void* out(int64_t bytes) {
    void* const data = made(bytes);
    outputs_.emplace_back(data, bytes);
    return data;
  }
  double* doubles(int64_t count, double value) {
    double* const data = static_cast<double*>(out(8 * count));
    std::fill_n(data, count, value);
    return data;
  }
  double draw() { return std::normal_distribution<double>()(random_); }
  double* normal(int64_t count) {
    double* const data = static_cast<double*>(made(8 * count));
    for (int64_t i = 0; i < count; i++) data[i] = draw();
    return data;
  }
  // Numbers of T.
  void* numbers(int64_t count, double mean, double spread) {
    void* const data = made(count * statistic());
    for (int64_t i = 0; i < count; i++) {
      const double value = mean + spread * draw();
      if (statistic() == 8)
        static_cast<double*>(data)[i] = value;
      else
        static_cast<float*>(data)[i] = float(value);
    }
    return data;
  }
  void* factors(int64_t rows) { return c_.normalized ? numbers(rows, 1, 0.1) : nullptr; }

  // The last row has no padding behind it.
  void* features(int64_t rows, int64_t width) {
    const int64_t count = (rows - 1) * (width + c_.pad) + width;
    void* const data = made(count * element());
    for (int64_t i = 0; i < count; i++) {
      const double value = draw() / std::sqrt(double(width));
      if (c_.dtype == Dtype::kDouble) static_cast<double*>(data)[i] = value;
      if (c_.dtype == Dtype::kFloat) static_cast<float*>(data)[i] = float(value);
      if (c_.dtype == Dtype::kHalf) static_cast<at::Half*>(data)[i] = float(value);
      if (c_.dtype == Dtype::kBFloat16) static_cast<at::BFloat16*>(data)[i] = float(value);
    }
    return data;
  }

  void fill(Side& side) {
    side.features = features(side.rows, c_.d), side.stride = c_.d + c_.pad, side.factor = factors(side.rows);
    if (c_.ids || c_.same_id_positive) {
      int32_t* const ids = static_cast<int32_t*>(made(4 * side.rows));
      for (int64_t i = 0; i < side.rows; i++) ids[i] = int32_t(random_() % 7);
      side.ids = ids;
    }
    if (c_.thresholds || c_.guided) side.threshold = numbers(side.rows, 0.1, 0.2);
  }

  void state(Lines& lines, int64_t rows, bool has_moment) {
    lines.shift = doubles(rows, 0), lines.sum = doubles(rows, 0);
    if (has_moment) lines.moment = doubles(rows, 0);
  }

  void coefficients(Lines& lines, int64_t rows, double spread) {
    lines.coefficients = numbers(rows, 0.01, 0.01);
    if (!p.has_levels) lines.shifts = numbers(rows, 4, spread);
  }

  Case c_;
  std::mt19937 random_;
  std::deque<std::vector<char>> buffers_;
  std::vector<std::pair<const void*, size_t>> outputs_;
};
