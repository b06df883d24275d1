// The statistics of a tile's columns over one strip of rows, and their merge into those of the earlier strips.
#pragma once

#include <cmath>

#include "row_strip.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

// The states of a tile's columns over one set of pairs.
struct ColumnStates {
  double shift[kMostCols], sum[kMostCols], moment[kMostCols];
};

struct TileColumns {
  ColumnStates negatives, positives, teacher;  // positives by id
  double weights[kMostCols];
};

// common: the shift of all lines, or null if each has its own.
inline void merge_states(int64_t k, int64_t cols, const Lines& lines, int64_t j0, const double* common,
                         const ColumnStates& found) {
  for (int64_t c = 0; c < cols; c++) {
    const int64_t j = j0 + c;
    double &m = lines.shift[j], &s = lines.sum[j];
    const double other = common ? *common : found.shift[c], sum = found.sum[c];
    double mine = 1, theirs = 1;
    if (k == 0) m = other, s = 0;
    if (other != m && sum != 0) {
      const double top = s == 0 || other > m ? other : m;
      mine = s == 0 ? 0 : std::exp2(m - top), theirs = std::exp2(other - top);
      m = top;
    }
    s = s * mine + sum * theirs;
    if (lines.moment) lines.moment[j] = (k == 0 ? 0 : lines.moment[j] * mine) + found.moment[c] * theirs;
  }
}

// With levels, shifts are numbers of pairs.
inline void add_states(int64_t k, int64_t cols, const Lines& lines, int64_t j0, const ColumnStates& found) {
  for (int64_t c = 0; c < cols; c++) {
    double &above = lines.shift[j0 + c], &sum = lines.sum[j0 + c];
    above = k == 0 ? found.shift[c] : above + found.shift[c];
    sum = k == 0 ? found.sum[c] : sum + found.sum[c];
  }
}

inline void merge_columns(const Problem& p, int64_t k, int64_t j0, int64_t cols, const TileColumns& found) {
  const Side& y = p.y;
  if (p.fold) {
    const double* const common = p.running_maxima ? nullptr : &p.shift;
    if (p.has_levels)
      add_states(k, cols, y.negatives, j0, found.negatives);
    else
      merge_states(k, cols, y.negatives, j0, common, found.negatives);
    if (p.same_id_positive) merge_states(k, cols, y.positives, j0, common, found.positives);
    if (p.teacher.is_given)
      merge_states(k, cols, y.teacher, j0, p.teacher.running_maxima ? nullptr : &p.teacher.shift, found.teacher);
  }
  if (y.key_bias_sum)
    for (int64_t c = 0; c < cols; c++)
      y.key_bias_sum[j0 + c] = k == 0 ? found.weights[c] : y.key_bias_sum[j0 + c] + found.weights[c];
}

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
