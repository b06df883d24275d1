// What the CPU engine does with one tile of products: fold it into the state, or turn it into weights.
//
// A tile holds t for `cols` columns by `lanes` rows, the rows side by side in memory: one vector register holds one
// column of 16 (or 8, or 4) rows, a row's sum is a vector, and only column sums are reduced across a register.
// A mask leaves out the positives and the lanes beyond the last row, so that every loop runs over whole registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "epilogues.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

// A sum over all pairs in double that does not lose what its length would (Neumaier): a billion equal terms bias a
// plain one.
struct Sum {
  double value = 0, lost = 0;
  FASTCLIP_INLINE void add(double v) {
    const double next = value + v;
    lost += std::abs(value) >= std::abs(v) ? (value - next) + v : (v - next) + value;
    value = next;
  }
};

template <class T>
struct Tile {
  const T* t;           // (cols, lanes) products, without the factors
  int64_t lanes;        // row stride of t and w, a multiple of 16
  int64_t rows, cols;   // valid part
  int64_t first_lane;   // column c has its positive at lane c + first_lane, where that is a valid lane
  const T* row_factor;  // (lanes)
  const T* col_factor;  // (cols), or null for ones
  double scale_log2, bias_log2;
  T* counts;   // (lanes): 1 for rows, 0 beyond; a column's positive is 0 while it is worked on
  T* scratch;  // (2 lanes)

  T reference;            // fold, one for all
  double* row_reference;  // fold with running maxima
  double* row_sum;
  double* col_reference;
  double* col_sum;
  double* positive;  // fold: t of the positives, at lane i or at column c
  bool positive_of_col;

  const T* a;  // weigh
  const T* b;
  const T* row_references;
  const T* col_references;
  T* w;         // (cols, lanes); may be t itself
  Sum* totals;  // sums over the negatives of w and of w * t
};

// One column at a time: its products, its scale, and its positive masked out.
template <class T>
class Column {
 public:
  const T* const t;
  const double factor;
  const Affine<T> k;

  FASTCLIP_INLINE Column(const Tile<T>& tile, int64_t c)
      : t(tile.t + c * tile.lanes),
        factor(tile.col_factor ? tile.col_factor[c] : T(1)),
        k(tile.scale_log2 * factor, tile.bias_log2),
        lane_(c + tile.first_lane),
        counts_(tile.counts) {
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

// A register of this instruction set.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
template <class T>
struct Register {
  typedef T type __attribute__((vector_size(kRegister)));
};
template <class T>
using V = typename Register<T>::type;
template <class T>
constexpr int64_t kWidth = sizeof(V<T>) / sizeof(T);

template <class T>
FASTCLIP_INLINE void load(const T* p, V<T>& v) {
  memcpy(&v, p, sizeof v);
}
template <class T>
FASTCLIP_INLINE void store(T* p, const V<T>& v) {
  memcpy(p, &v, sizeof v);
}

// Sum of a register, in double and in a fixed order.
template <class T>
FASTCLIP_INLINE double total_of(const V<T>& v) {
  T lanes[kWidth<T>];
  memcpy(lanes, &v, sizeof v);
  for (int64_t half = kWidth<T> / 2; half > 0; half /= 2)
    for (int64_t q = 0; q < half; q++) lanes[q] += lanes[q + half];
  return lanes[0];
}

// States with one reference; with Weigh also the weights of a loss that needs no state, all a_i + b_j being one.
template <class Loss, bool Weigh, class T>
void fold_tile(const Tile<T>& tile) {
  const int64_t lanes = tile.lanes;
  const V<T> m = V<T>{} + tile.reference;
  T* const row = tile.scratch;
  for (int64_t i = 0; i < lanes; i++) row[i] = 0;
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    column.note_positive(tile, c);
    V<T> sum{}, total{}, moment{};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, line;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts), load(row + i, line);
      t = t * factor;
      const V<T> value = counts != T(0) ? Loss::fold(t, column.k, m) : V<T>{};
      sum += value;
      store<T>(row + i, line + value);
      if constexpr (Weigh) {
        const V<T> w = counts != T(0) ? Loss::activation(t, column.k, m) : V<T>{};
        total += w;
        moment += w * t;
        store<T>(tile.w + c * lanes + i, w);
      }
    }
    tile.col_sum[c] = total_of<T>(sum);
    if constexpr (Weigh) {
      tile.totals[0].add(total_of<T>(total));
      tile.totals[1].add(total_of<T>(moment) * column.factor);
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
  T* const largest = tile.scratch;
  T* const row = tile.scratch + lanes;
  for (int64_t i = 0; i < lanes; i++) largest[i] = kLowest, row[i] = 0;
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    column.note_positive(tile, c);
    V<T> highest = V<T>{} + kLowest;
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, line;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts), load(largest + i, line);
      const V<T> l = counts != T(0) ? t * factor * column.k.scale : V<T>{} + kLowest;
      highest = l < highest ? highest : l;
      store<T>(largest + i, l < line ? line : l);
    }
    T lane[kWidth<T>];
    store<T>(lane, highest);
    tile.col_reference[c] = std::ceil(double(*std::max_element(lane, lane + kWidth<T>)));
  }
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
    const V<T> m = V<T>{} + T(tile.col_reference[c]);
    V<T> sum{};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, line, reference;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts), load(row + i, line);
      load(largest + i, reference);
      t = t * factor;
      sum += counts != T(0) ? Loss::fold(t, column.k, m) : V<T>{};
      store<T>(row + i, line + (counts != T(0) ? Loss::fold(t, column.k, reference) : V<T>{}));
    }
    tile.col_sum[c] = total_of<T>(sum);
  }
  for (int64_t i = 0; i < tile.rows; i++) tile.row_sum[i] += row[i];
}

// Weights dL/ds of the negatives, zero at the positives. OneReference: one exponential serves row and column.
template <class Loss, bool OneReference, class T>
void weigh_tile(const Tile<T>& tile) {
  const int64_t lanes = tile.lanes;
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    const V<T> b = V<T>{} + tile.b[c], mb = V<T>{} + tile.col_references[c];
    V<T> total{}, moment{};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, a, w;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts), load(tile.a + i, a);
      t = t * factor;
      if constexpr (OneReference) {
        w = Loss::activation(t, column.k, mb) * (a + b);
      } else {
        V<T> ma;
        load(tile.row_references + i, ma);
        w = Loss::activation(t, column.k, ma) * a + Loss::activation(t, column.k, mb) * b;
      }
      w = counts != T(0) ? w : V<T>{};
      total += w;
      moment += w * t;
      store<T>(tile.w + c * lanes + i, w);
    }
    tile.totals[0].add(total_of<T>(total));
    tile.totals[1].add(total_of<T>(moment) * column.factor);
  }
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
