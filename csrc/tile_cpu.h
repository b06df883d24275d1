// What the CPU engine does with one tile of products: fold it into the state, or turn it into weights.
//
// A tile holds t for `cols` columns by `lanes` rows, the rows side by side in memory: one vector register holds one
// column of 16 (or 8, or 4) rows, a row's sum is a vector, and only column sums are reduced across a register.
// A mask leaves out the positives and the lanes beyond the last row, so that every loop runs over whole registers.
#pragma once

#include <algorithm>
#include <limits>

#include "epilogues.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

template <class T>
struct Tile {
  const T* t;          // (cols, lanes) products, without the factors
  int64_t lanes;       // row stride of t and w, a multiple of 16
  int64_t rows, cols;  // valid part
  int64_t first_lane;  // column c has its positive at lane c + first_lane, where that is a valid lane
  const T* row_factor;  // (lanes)
  const T* col_factor;  // (cols), or null for ones
  double scale_log2, bias_log2;
  T* counts;           // (lanes): 1 for rows, 0 beyond; a column's positive is 0 while it is worked on
  T* scratch;          // (2 lanes)

  T reference;        // fold, one for all
  double* row_reference;  // fold with running maxima
  double* row_sum;
  double* col_reference;
  double* col_sum;
  double* positive;   // fold: t of the positives, at lane i or at column c
  bool positive_of_col;

  const T* a;         // weigh
  const T* b;
  const T* row_references;
  const T* col_references;
  T* w;               // (cols, lanes); may be t itself
  double* totals;     // sums over the negatives of w and of w * t
};

// One column at a time: its products, its scale, and its positive masked out.
template <class T>
class Column {
 public:
  const T* const t;
  const double factor;
  const Affine<T> k;

  FASTCLIP_INLINE Column(const Tile<T>& tile, int64_t c)
      : t(tile.t + c * tile.lanes), factor(tile.col_factor ? tile.col_factor[c] : T(1)),
        k(tile.scale_log2 * factor, tile.bias_log2), lane_(c + tile.first_lane), counts_(tile.counts) {
    if (lane_ < 0 || lane_ >= tile.rows) lane_ = -1;
    if (lane_ >= 0) counts_[lane_] = 0;
  }
  FASTCLIP_INLINE ~Column() {
    if (lane_ >= 0) counts_[lane_] = 1;
  }
  FASTCLIP_INLINE void note_positive(const Tile<T>& tile, int64_t c) const {
    if (lane_ >= 0)
      tile.positive[tile.positive_of_col ? c : lane_] = double(t[lane_]) * tile.row_factor[lane_] * factor;
  }

 private:
  int64_t lane_;
  T* const counts_;
};

// States with one reference; with Weigh also the weights of a loss that needs no state, all a_i + b_j being one.
template <class Loss, bool Weigh, class T>
void fold_tile(const Tile<T>& tile) {
  const int64_t lanes = tile.lanes;
  const T* const factor = tile.row_factor;
  const T* const counts = tile.counts;
  const T m = tile.reference;
  T* const row = tile.scratch;
  for (int64_t i = 0; i < lanes; i++) row[i] = 0;
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    column.note_positive(tile, c);
    const T* const t = column.t;
    const Affine<T> k = column.k;
    T* const w = Weigh ? tile.w + c * lanes : nullptr;
    T sum = 0, total = 0, moment = 0;
#pragma omp simd reduction(+ : sum, total, moment)
    for (int64_t i = 0; i < lanes; i++) {
      const T ti = t[i] * factor[i];
      const T v = counts[i] != 0 ? Loss::fold(ti, k, m) : T(0);
      row[i] += v;
      sum += v;
      if constexpr (Weigh) {
        const T wi = counts[i] != 0 ? Loss::activation(ti, k, m) : T(0);
        w[i] = wi;
        total += wi;
        moment += wi * ti;
      }
    }
    tile.col_sum[c] = sum;
    if constexpr (Weigh) {
      tile.totals[0] += total;
      tile.totals[1] += double(moment) * column.factor;
    }
  }
  for (int64_t i = 0; i < tile.rows; i++) tile.row_sum[i] += row[i];
}

// States with running maxima: each row, and each column of this tile, relative to the largest of its own negatives,
// rounded up to an integer so that exp2_relative stays exact. Right at any scale.
template <class Loss, class T>
void fold_tile_running(const Tile<T>& tile) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const int64_t lanes = tile.lanes;
  const T* const factor = tile.row_factor;
  const T* const counts = tile.counts;
  T* const largest = tile.scratch;
  T* const row = tile.scratch + lanes;
  for (int64_t i = 0; i < lanes; i++) largest[i] = kLowest;
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    column.note_positive(tile, c);
    const T* const t = column.t;
    const T scale = column.k.scale;
    T highest = kLowest;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < lanes; i++) {
      const T l = counts[i] != 0 ? t[i] * factor[i] * scale : kLowest;
      largest[i] = l < largest[i] ? largest[i] : l;
      highest = l < highest ? highest : l;
    }
    tile.col_reference[c] = std::ceil(double(highest));
  }
  for (int64_t i = 0; i < lanes; i++) row[i] = 0;
  for (int64_t i = 0; i < tile.rows; i++) {
    const double before = tile.row_reference[i], now = std::ceil(double(largest[i]));
    if (!(now <= before)) {
      tile.row_reference[i] = now;
      if (tile.row_sum[i] != 0) tile.row_sum[i] *= std::exp2(before - now);
    }
    largest[i] = T(tile.row_reference[i]);
  }
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    const T* const t = column.t;
    const Affine<T> k = column.k;
    const T m = T(tile.col_reference[c]);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < lanes; i++) {
      const T ti = t[i] * factor[i];
      row[i] += counts[i] != 0 ? Loss::fold(ti, k, largest[i]) : T(0);
      sum += counts[i] != 0 ? Loss::fold(ti, k, m) : T(0);
    }
    tile.col_sum[c] = sum;
  }
  for (int64_t i = 0; i < tile.rows; i++) tile.row_sum[i] += row[i];
}

// Weights dL/ds of the negatives, zero at the positives. OneReference: one exponential serves row and column.
template <class Loss, bool OneReference, class T>
void weigh_tile(const Tile<T>& tile) {
  const int64_t lanes = tile.lanes;
  const T* const factor = tile.row_factor;
  const T* const counts = tile.counts;
  const T* const a = tile.a;
  const T* const ma = tile.row_references;
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    const T* const t = column.t;
    const Affine<T> k = column.k;
    T* const w = tile.w + c * lanes;
    const T b = tile.b[c], mb = tile.col_references[c];
    T total = 0, moment = 0;
#pragma omp simd reduction(+ : total, moment)
    for (int64_t i = 0; i < lanes; i++) {
      const T ti = t[i] * factor[i];
      const T all = OneReference ? Loss::activation(ti, k, mb) * (a[i] + b)
                                 : Loss::activation(ti, k, ma[i]) * a[i] + Loss::activation(ti, k, mb) * b;
      const T wi = counts[i] != 0 ? all : T(0);
      w[i] = wi;
      total += wi;
      moment += wi * ti;
    }
    tile.totals[0] += total;
    tile.totals[1] += double(moment) * column.factor;
  }
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
