// What the CPU engine does with one tile of products: fold it into the state, or turn it into weights.
//
// A tile holds t for `cols` columns by `lanes` rows, the rows side by side in memory: one vector register holds one
// column of 16 (or 8, or 4) rows, a row's sum is a vector, and only column sums are reduced across a register.
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
  const T* row_factor;
  const T* col_factor;
  double scale_log2, bias_log2;

  T reference;        // fold, one for all
  double* row_reference;  // fold with running maxima
  double* row_sum;
  double* col_reference;
  double* col_sum;
  double* positive;   // at lane i, or at column c
  bool positive_of_col;
  T* scratch;         // 2 * lanes

  const T* a;         // weigh
  const T* b;
  const T* row_references;
  const T* col_references;
  T* w;               // (cols, lanes); may be t itself
  double* totals;     // sum of w, of w * t
};

template <class T>
FASTCLIP_INLINE T col_factor(const Tile<T>& tile, int64_t c) {
  return tile.col_factor ? tile.col_factor[c] : T(1);
}

// The lanes of column c without its positive: [0, skip) and [skip + 1, rows); skip = rows where there is none.
template <class T>
FASTCLIP_INLINE int64_t positive_lane(const Tile<T>& tile, int64_t c) {
  const int64_t lane = c + tile.first_lane;
  return lane >= 0 && lane < tile.rows ? lane : tile.rows;
}

template <class T>
FASTCLIP_INLINE void note_positive(const Tile<T>& tile, int64_t c, int64_t lane) {
  if (lane < tile.rows)
    tile.positive[tile.positive_of_col ? c : lane] =
        double(tile.t[c * tile.lanes + lane]) * tile.row_factor[lane] * col_factor(tile, c);
}

// States with one reference; with Weigh also the weights of a loss that needs no state, all coefficients being one.
template <class Loss, bool Weigh, class T>
void fold_tile(const Tile<T>& tile) {
  T* const row = tile.scratch;
  for (int64_t i = 0; i < tile.rows; i++) row[i] = 0;
  for (int64_t c = 0; c < tile.cols; c++) {
    const T* const t = tile.t + c * tile.lanes;
    const T* const factor = tile.row_factor;
    T* const w = Weigh ? tile.w + c * tile.lanes : nullptr;
    const double cf = col_factor(tile, c);
    const Affine<T> k(tile.scale_log2 * cf, tile.bias_log2);
    const T m = tile.reference;
    const int64_t lane = positive_lane(tile, c);
    note_positive(tile, c, lane);
    T sum = 0, total = 0, moment = 0;
    for (int64_t begin = 0, end = lane; begin < tile.rows; begin = end + 1, end = tile.rows) {
#pragma omp simd reduction(+ : sum, total, moment)
      for (int64_t i = begin; i < end; i++) {
        const T ti = t[i] * factor[i];
        const T v = Loss::fold(ti, k, m);
        row[i] += v;
        sum += v;
        if constexpr (Weigh) {
          const T wi = Loss::activation(ti, k, m);
          w[i] = wi;
          total += wi;
          moment += wi * ti;
        }
      }
      if (end == tile.rows) break;
    }
    tile.col_sum[c] = sum;
    if constexpr (Weigh) {
      if (lane < tile.rows) w[lane] = 0;
      for (int64_t i = tile.rows; i < tile.lanes; i++) w[i] = 0;
      tile.totals[0] += total;
      tile.totals[1] += double(moment) * cf;
    }
  }
  for (int64_t i = 0; i < tile.rows; i++) tile.row_sum[i] += row[i];
}

// States with running maxima: each row, and each column of this tile, relative to the largest of its own negatives,
// rounded up to an integer so that exp2_relative stays exact. Right at any scale.
template <class Loss, class T>
void fold_tile_running(const Tile<T>& tile) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  T* const largest = tile.scratch;
  T* const row = tile.scratch + tile.lanes;
  for (int64_t i = 0; i < tile.rows; i++) largest[i] = kLowest;
  for (int64_t c = 0; c < tile.cols; c++) {
    const T* const t = tile.t + c * tile.lanes;
    const T* const factor = tile.row_factor;
    const T scale = T(tile.scale_log2 * col_factor(tile, c));
    const int64_t lane = positive_lane(tile, c);
    note_positive(tile, c, lane);
    T highest = kLowest;
    for (int64_t begin = 0, end = lane; begin < tile.rows; begin = end + 1, end = tile.rows) {
#pragma omp simd reduction(max : highest)
      for (int64_t i = begin; i < end; i++) {
        const T l = t[i] * factor[i] * scale;
        largest[i] = l < largest[i] ? largest[i] : l;  // NaN gets through
        highest = l < highest ? highest : l;
      }
      if (end == tile.rows) break;
    }
    tile.col_reference[c] = std::ceil(double(highest));
  }
  for (int64_t i = 0; i < tile.rows; i++) {
    const double before = tile.row_reference[i], now = std::ceil(double(largest[i]));
    if (!(now <= before)) {
      tile.row_reference[i] = now;
      if (tile.row_sum[i] != 0) tile.row_sum[i] *= std::exp2(before - now);
    }
    largest[i] = T(tile.row_reference[i]);
    row[i] = 0;
  }
  for (int64_t c = 0; c < tile.cols; c++) {
    const T* const t = tile.t + c * tile.lanes;
    const T* const factor = tile.row_factor;
    const Affine<T> k(tile.scale_log2 * col_factor(tile, c), tile.bias_log2);
    const T m = T(tile.col_reference[c]);
    const int64_t lane = positive_lane(tile, c);
    T sum = 0;
    for (int64_t begin = 0, end = lane; begin < tile.rows; begin = end + 1, end = tile.rows) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = begin; i < end; i++) {
        const T ti = t[i] * factor[i];
        row[i] += Loss::fold(ti, k, largest[i]);
        sum += Loss::fold(ti, k, m);
      }
      if (end == tile.rows) break;
    }
    tile.col_sum[c] = sum;
  }
  for (int64_t i = 0; i < tile.rows; i++) tile.row_sum[i] += row[i];
}

// Weights dL/ds of the negatives, zero at the positives. OneReference: one exponential serves row and column.
template <class Loss, bool OneReference, class T>
void weigh_tile(const Tile<T>& tile) {
  for (int64_t c = 0; c < tile.cols; c++) {
    const T* const t = tile.t + c * tile.lanes;
    const T* const factor = tile.row_factor;
    const T* const a = tile.a;
    const T* const ma = tile.row_references;
    T* const w = tile.w + c * tile.lanes;
    const double cf = col_factor(tile, c);
    const Affine<T> k(tile.scale_log2 * cf, tile.bias_log2);
    const T b = tile.b[c], mb = tile.col_references[c];
    const int64_t lane = positive_lane(tile, c);
    T total = 0, moment = 0;
    for (int64_t begin = 0, end = lane; begin < tile.rows; begin = end + 1, end = tile.rows) {
#pragma omp simd reduction(+ : total, moment)
      for (int64_t i = begin; i < end; i++) {
        const T ti = t[i] * factor[i];
        const T wi = OneReference
                         ? Loss::activation(ti, k, mb) * (a[i] + b)
                         : Loss::activation(ti, k, ma[i]) * a[i] + Loss::activation(ti, k, mb) * b;
        w[i] = wi;
        total += wi;
        moment += wi * ti;
      }
      if (end == tile.rows) break;
    }
    if (lane < tile.rows) w[lane] = 0;
    for (int64_t i = tile.rows; i < tile.lanes; i++) w[i] = 0;
    tile.totals[0] += total;
    tile.totals[1] += double(moment) * cf;
  }
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
