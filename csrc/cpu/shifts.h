// The shift of all lines of a sweep, chosen before it, and whether it was enough.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "call.h"

namespace fastclip {
namespace {

using PORTABLE::kLog2E;

// The highest finite bias of a side's lines; 0 if none has one.
double highest_bias(const Side& side) {
  double highest = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; side.key_bias && j < side.rows; j++) highest = std::max(highest, side.key_bias[j]);
  return highest == -std::numeric_limits<double>::infinity() ? 0 : highest;
}

// An upper bound of the products of features.
double bound_of(const Problem& p, const Features& x, const Features& y, int64_t width) {
  const auto longest = [&](const Features& side, int64_t rows) {
    return side.factor ? 1.0 : capability().largest_norm(side, rows, width, p.dtype);
  };
  return longest(x, p.x.rows) * longest(y, p.y.rows);
}

// Returns a shift of all lines for which the exponential of the largest possible logit is 2^above. `above` is large
// enough that the sum of the smallest row does not underflow fp32, and small enough that a sum over 2^27 columns does
// not overflow. largest: an upper bound of |t|.
double common_shift(const Problem& p, double scale, double largest, double bias) {
  const bool wide = p.dtype == Dtype::kDouble;
  // The margin covers the rounding of norms and products. The shift is rounded to one that T represents, since the
  // engine and the finish must use the same number.
  const double top = std::abs(scale) * largest * kLog2E * (1 + 1e-5);
  const double headroom = wide ? 900 : 100, depth = wide ? 1000 : 120;
  const double above = std::min(std::max(0.0, 2 * top - depth), headroom);
  const double shift = std::ceil(top + bias * kLog2E - above);
  return wide || double(float(shift)) == shift ? shift
                                               : std::nextafterf(float(shift), std::numeric_limits<float>::infinity());
}

void set_shifts(Call& call, const OptionalTensor& bound) {
  Problem& p = call.problem;
  if (call.has_shift()) {
    const double largest = bound ? number("bound", *bound) : bound_of(p, features_of(p.x), features_of(p.y), p.width);
    p.shift = common_shift(p, p.scale, largest, highest_bias(call.side_of_y()));
  }
  if (p.teacher.is_given)
    p.teacher.shift = common_shift(p, p.teacher.scale, bound_of(p, p.x.target, p.y.target, p.target_width), 0);
}

// The lines of one side that have pairs of one set, and therefore a sum above 0.
class Occupied {
 public:
  Occupied(const OptionalTensor& flags, int64_t set, int64_t lines, int64_t first, int64_t others, int64_t offset)
      : flags_(flags ? flags->const_data_ptr<bool>() + set * lines + first : nullptr),
        others_(others),
        offset_(offset) {}
  bool operator()(int64_t line) const {
    if (flags_) return flags_[line];
    const int64_t own = line + offset_;
    return others_ > (own >= 0 && own < others_ ? 1 : 0);
  }

 private:
  const bool* const flags_;
  const int64_t others_, offset_;
};

// True if one shift was enough for a set of pairs. In a sum below `least`, terms that matter may have underflowed.
template <class Predicate>
bool sums_hold(const Problem& p, const Side& side, const Lines& lines, const Predicate& occupied) {
  const double least = std::exp2(p.dtype == Dtype::kDouble ? -900. : -78.);
  for (int64_t i = 0; i < side.rows; i++)
    if (!(lines.sum[i] >= least) && occupied(i)) return false;
  return true;
}

bool states_hold(Call& call, const OptionalTensor& occupied, int64_t offset) {
  const Problem& p = call.problem;
  // With a shift that is not finite even a line without pairs is wrong.
  if (!std::isfinite(p.shift)) return false;
  const Side &x = call.side_of_x(), &y = call.side_of_y();
  const int64_t lines = call.m + call.n;
  for (int64_t set = 0; set < (p.same_id_positive ? 2 : 1); set++) {
    const Occupied of_x(occupied, set, lines, 0, call.n, offset), of_y(occupied, set, lines, call.m, call.m, -offset);
    if (!sums_hold(p, x, set ? x.positives : x.negatives, of_x)) return false;
    if (!sums_hold(p, y, set ? y.positives : y.negatives, of_y)) return false;
  }
  return true;
}

// The same for a teacher, who weighs every pair.
bool teacher_holds(const Problem& p) {
  const auto every = [](int64_t) { return true; };
  return std::isfinite(p.teacher.shift) && sums_hold(p, p.x, p.x.teacher, every) &&
         sums_hold(p, p.y, p.y.teacher, every);
}

}  // namespace
}  // namespace fastclip
