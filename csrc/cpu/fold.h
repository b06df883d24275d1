// The CPU engine's loops over a tile: they fold a set of pairs into the state, or turn the pairs into weights.
#pragma once

#include <algorithm>
#include <limits>

#include "pairs.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

template <class T>
FASTCLIP_INLINE V<T> where(const typename Counted<T>::Mask& mask, const V<T>& value) {
  return mask ? value : V<T>{};
}

// The sums of rows over a tile; with a teacher also those of e' * t.
template <class Pairs, class T>
FASTCLIP_INLINE void clear_sums(T* row, T* moments, int64_t lanes) {
  for (int64_t i = 0; i < lanes; i++) row[i] = 0;
  if constexpr (Pairs::kTaught)
    for (int64_t i = 0; i < lanes; i++) moments[i] = 0;
}
template <class T>
FASTCLIP_INLINE void add_to_row(T* sums, const V<T>& value) {
  V<T> before;
  load(sums, before);
  store<T>(sums, before + value);
}

// Adds a tile's pairs to the state, with one shift for all lines. Weigh: also writes the weights; only for linear
// kinds, whose coefficients a_i and b_j are 1. A pair's weight is activation * (a_i + b_j) / 2. Here (a_i + b_j) / 2 =
// 1 is already applied; weigh_tile applies a_i + b_j, and its caller halves the gain.
template <class Kind, template <class> class Pairs, bool Weigh, class T>
void fold_tile(const Tile<T>& tile) {
  const int64_t lanes = tile.lanes;
  const TileLines<T>& lines = Pairs<T>::lines(tile);
  const V<T> m = number_of<T>(tile.shift);
  T *const row = tile.scratch, *const moments = tile.scratch + lanes;
  clear_sums<Pairs<T>>(row, moments, lanes);
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    if constexpr (!Pairs<T>::kPositives) column.note_positive(tile, c);
    const Pairs<T> pairs(tile, column, c);
    V<T> sum{}, sum_w{}, sum_wt{}, moment{};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, row_sums;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts), load(row + i, row_sums);
      t = t * factor;
      const auto& k = pairs.template map<Kind>(i);
      const Counted<T> counted = pairs.counted(t, counts, i);
      const V<T> value = Kind::fold(t, k, pairs.template shift<Kind>(m, i));
      sum += where<T>(counted.by_column, value);
      store<T>(row + i, row_sums + where<T>(counted.by_row, value));
      if constexpr (Pairs<T>::kTaught) {
        const V<T> product = where<T>(counted.by_row, value * pairs.weighed(t, i));
        moment += product;
        add_to_row<T>(moments + i, product * T(pairs.factor));
      }
      if constexpr (Weigh) {
        const V<T> w = where<T>(counted.by_row, Kind::activation(t, k, m));
        sum_w += w;
        sum_wt += w * t;
        store<T>(tile.w + c * lanes + i, w);
      }
    }
    lines.col_sum[c] = sum_of_lanes<T>(sum);
    if constexpr (Pairs<T>::kTaught) lines.col_moment[c] = sum_of_lanes<T>(moment) * pairs.factor;
    if constexpr (Weigh) {
      tile.totals[0].add(sum_of_lanes<T>(sum_w));
      tile.totals[1].add(sum_of_lanes<T>(sum_wt) * column.factor);
    }
  }
  for (int64_t i = 0; i < tile.rows; i++) lines.row_sum[i] += row[i];
  if constexpr (Pairs<T>::kTaught)
    for (int64_t i = 0; i < tile.rows; i++) lines.row_moment[i] += moments[i];
}

// Returns the shift for the computation: 0 for a line without pairs, whose shift is -inf (any finite number would do).
template <class T>
FASTCLIP_INLINE T finite_shift(double shift) {
  return shift == -std::numeric_limits<double>::infinity() ? T(0) : T(shift);
}

// Adds a tile's pairs to the sums of their lines, each with a number m of its own. In a kind with levels it also counts
// the pairs above them; with a teacher it sums e' * t. row and extra (lanes): the sums of rows, zero before; extra
// are those numbers, or the sums of e' * t.
template <class Kind, template <class> class Pairs, class T, class Number>
FASTCLIP_INLINE void fold_tile_apart(const Tile<T>& tile, const T* row_m, T* row, T* extra, Number col_m) {
  const int64_t lanes = tile.lanes;
  const TileLines<T>& lines = Pairs<T>::lines(tile);
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    if constexpr (!Pairs<T>::kPositives) column.note_positive(tile, c);
    const Pairs<T> pairs(tile, column, c);
    const V<T> m = number_of<T>(col_m(c));
    V<T> sum{}, others{};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, row_sums, of_row;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts), load(row + i, row_sums);
      load(row_m + i, of_row);
      t = t * factor;
      const auto& k = pairs.template map<Kind>(i);
      const Counted<T> counted = pairs.counted(t, counts, i);
      const V<T> of_column = pairs.template shift<Kind>(m, i);
      of_row = pairs.template shift<Kind>(of_row, i);
      const V<T> by_column = where<T>(counted.by_column, Kind::fold(t, k, of_column));
      const V<T> by_row = where<T>(counted.by_row, Kind::fold(t, k, of_row));
      sum += by_column;
      store<T>(row + i, row_sums + by_row);
      if constexpr (Kind::kHasLevels) {
        others += where<T>(counted.by_column, Kind::activation(t, k, of_column));
        add_to_row<T>(extra + i, where<T>(counted.by_row, Kind::activation(t, k, of_row)));
      } else if constexpr (Pairs<T>::kTaught) {
        const V<T> product = pairs.weighed(t, i);
        others += by_column * product;
        add_to_row<T>(extra + i, by_row * product * T(pairs.factor));
      }
    }
    lines.col_sum[c] = sum_of_lanes<T>(sum);
    if constexpr (Kind::kHasLevels) lines.col_shift[c] = sum_of_lanes<T>(others);
    if constexpr (Pairs<T>::kTaught) lines.col_moment[c] = sum_of_lanes<T>(others) * pairs.factor;
  }
  for (int64_t i = 0; i < tile.rows; i++) lines.row_sum[i] += row[i];
}

// Adds a tile's pairs to the state with running maxima, which works at any scale: the shift of each row, and of each
// column of this tile, is the largest of its own logits, rounded up to an integer so that exp2_relative stays exact.
template <class Kind, template <class> class Pairs, class T>
void fold_tile_running(const Tile<T>& tile) {
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const int64_t lanes = tile.lanes;
  const TileLines<T>& lines = Pairs<T>::lines(tile);
  T* const largest = tile.scratch;
  T *const row = tile.scratch + lanes, *const moments = tile.scratch + 2 * lanes;
  for (int64_t i = 0; i < lanes; i++) largest[i] = kLowest;
  clear_sums<Pairs<T>>(row, moments, lanes);
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    const Pairs<T> pairs(tile, column, c);
    V<T> highest = number_of<T>(kLowest);
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, before;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts),
          load(largest + i, before);
      t = t * factor;
      const Counted<T> counted = pairs.counted(t, counts, i);
      const V<T> all = t * pairs.template map<Kind>(i).scale + pairs.bias(i);
      const V<T> l = counted.by_column ? all : number_of<T>(kLowest);
      const V<T> of_row = counted.by_row ? all : number_of<T>(kLowest);
      highest = l < highest ? highest : l;
      store<T>(largest + i, of_row < before ? before : of_row);
    }
    T lane[kWidth<T>];
    store<T>(lane, highest);
    lines.col_shift[c] = std::ceil(double(*std::max_element(lane, lane + kWidth<T>)));
  }
  for (int64_t i = 0; i < tile.rows; i++) {
    const double before = lines.row_shift[i], now = std::ceil(double(largest[i]));
    if (!(now <= before)) {
      lines.row_shift[i] = now;
      if (lines.row_sum[i] != 0) {
        const double change = std::exp2(before - now);
        lines.row_sum[i] *= change;
        if constexpr (Pairs<T>::kTaught) lines.row_moment[i] *= change;
      }
    }
    largest[i] = finite_shift<T>(lines.row_shift[i]);
  }
  fold_tile_apart<Kind, Pairs>(tile, largest, row, moments,
                               [&](int64_t c) { return finite_shift<T>(lines.col_shift[c]); });
  if constexpr (Pairs<T>::kTaught)
    for (int64_t i = 0; i < tile.rows; i++) lines.row_moment[i] += moments[i];
}

// Adds a tile's pairs to the state of a kind with levels: their numbers above the levels of their lines, and their
// sums.
template <class Kind, template <class> class Pairs, class T>
void fold_tile_with_levels(const Tile<T>& tile) {
  const TileLines<T>& lines = Pairs<T>::lines(tile);
  T *const row = tile.scratch, *const above = row + tile.lanes;
  for (int64_t i = 0; i < tile.lanes; i++) row[i] = above[i] = 0;
  fold_tile_apart<Kind, Pairs>(tile, lines.row_shifts, row, above, [&](int64_t c) { return lines.col_shifts[c]; });
  for (int64_t i = 0; i < tile.rows; i++) lines.row_shift[i] += above[i];
}

// Writes the weights dL/ds of a set of pairs, and zero for other pairs. Weights of positives by id and of a teacher are
// added to those of the negatives. OneShift: row and column share one exponential.
template <class Kind, template <class> class Pairs, bool OneShift, class T>
void weigh_tile(const Tile<T>& tile) {
  using P = Pairs<T>;
  const int64_t lanes = tile.lanes;
  const TileLines<T>& lines = P::lines(tile);
  T* const row = tile.scratch;
  if constexpr (P::kBiased)
    for (int64_t i = 0; i < lanes; i++) row[i] = 0;
  for (int64_t c = 0; c < tile.cols; c++) {
    const Column<T> column(tile, c);
    const P pairs(tile, column, c);
    const V<T> b = number_of<T>(lines.b[c]), mb = number_of<T>(lines.col_shifts[c]);
    V<T> sum_w{}, sum_wt{};
    for (int64_t i = 0; i < lanes; i += kWidth<T>) {
      V<T> t, factor, counts, a, w;
      load(column.t + i, t), load(tile.row_factor + i, factor), load(tile.counts + i, counts), load(lines.a + i, a);
      t = t * factor;
      const auto& k = pairs.template map<Kind>(i);
      const Counted<T> counted = pairs.counted(t, counts, i);
      if constexpr (!OneShift) {
        V<T> ma;
        load(lines.row_shifts + i, ma);
        // The logit of an excluded pair may exceed the line's shift by any amount, and its exponential may overflow, so
        // such pairs are masked after the exponential.
        w = where<T>(counted.by_row, Kind::activation(t, k, pairs.template shift<Kind>(ma, i)) * a) +
            where<T>(counted.by_column, Kind::activation(t, k, pairs.template shift<Kind>(mb, i)) * b);
      } else if constexpr (P::kApart) {
        const V<T> both = where<T>(counted.by_row, a) + where<T>(counted.by_column, b);
        w = where<T>(counted.by_row | counted.by_column,
                     Kind::activation(t, k, pairs.template shift<Kind>(mb, i)) * both);
      } else {
        w = where<T>(counted.by_row, Kind::activation(t, k, pairs.template shift<Kind>(mb, i)) * (a + b));
      }
      if constexpr (P::kPositives && Kind::kNegatesPositives) w = -w;
      sum_w += w;
      sum_wt += w * pairs.weighed(t, i);
      if constexpr (P::kPositives || P::kTaught) {
        V<T> others;
        load(tile.w + c * lanes + i, others);
        store<T>(tile.w + c * lanes + i, others + w);
      } else {
        store<T>(tile.w + c * lanes + i, w);
      }
      if constexpr (P::kBiased) {
        if (tile.row_weights) {
          V<T> row_sums;
          load(row + i, row_sums);
          store<T>(row + i, row_sums + w);
        }
      }
    }
    tile.totals[0].add(sum_of_lanes<T>(sum_w));
    tile.totals[1].add(sum_of_lanes<T>(sum_wt) * pairs.factor);
    if constexpr (P::kBiased)
      if (tile.col_weights) tile.col_weights[c] += sum_of_lanes<T>(sum_w);
  }
  if constexpr (P::kBiased)
    if (tile.row_weights)
      for (int64_t i = 0; i < tile.rows; i++) tile.row_weights[i] += row[i];
}

template <class T>
using Distinct = Selected<T, kIds, false>;
template <class T>
using Within = Selected<T, kThresholds, false>;
template <class T>
using Negatives = Selected<T, kEverything, false>;
template <class T>
using Guided = Selected<T, kEverything | kGuide, false>;
template <class T>
using Positives = Selected<T, kEverything, true>;

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
