// The statistics of a tile's columns over one strip of rows, and their merge into those of the earlier strips.
#pragma once

#include <cmath>

#include "row_strip.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

struct TileColumns {
  double shift[2][kMostCols], sum[2][kMostCols];  // [0]: negatives; [1]: positives by id
  double weights[kMostCols];
};

inline void merge_states(const Problem& p, int64_t k, int64_t cols, const Lines& lines, int64_t j0, const double* shift,
                         const double* sum) {
  for (int64_t c = 0; c < cols; c++) {
    double &m = lines.shift[j0 + c], &s = lines.sum[j0 + c];
    const double other = p.running_maxima || p.has_levels ? shift[c] : p.shift;
    if (k == 0) {
      m = other, s = sum[c];
    } else if (p.has_levels) {
      m += other, s += sum[c];
    } else if (other == m || sum[c] == 0) {
      s += sum[c];
    } else if (s == 0) {
      m = other, s = sum[c];
    } else {
      const double top = other > m ? other : m;
      s = s * std::exp2(m - top) + sum[c] * std::exp2(other - top);
      m = top;
    }
  }
}

inline void merge_columns(const Problem& p, int64_t k, int64_t j0, int64_t cols, const TileColumns& found) {
  const Side& y = p.y;
  if (p.fold) {
    merge_states(p, k, cols, y.negatives, j0, found.shift[0], found.sum[0]);
    if (p.same_id_positive) merge_states(p, k, cols, y.positives, j0, found.shift[1], found.sum[1]);
  }
  if (y.key_bias_sum)
    for (int64_t c = 0; c < cols; c++)
      y.key_bias_sum[j0 + c] = k == 0 ? found.weights[c] : y.key_bias_sum[j0 + c] + found.weights[c];
}

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
