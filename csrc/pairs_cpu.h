// The sets of pairs that the CPU engine folds and weighs: which pairs belong, and how their logits come from t.
//
// A set is built for each column of a tile and asked once for each register of rows.
#pragma once

#include "tile_cpu.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

// Whether pairs count for their rows, and for their column: all bits, or none.
template <class T>
struct Counted {
  using Mask = typename Integers<V<T>>::type;
  Mask by_row, by_column;
};

// Every pair but the own positives.
template <class T>
struct Plain {
  static constexpr bool kPositives = false;
  static constexpr bool kApart = false;  // what counts for rows and for columns may differ
  const Affine<T>& k;

  FASTCLIP_INLINE Plain(const Tile<T>&, const Column<T>& column, int64_t) : k(column.k) {}
  static const TileLines<T>& lines(const Tile<T>& tile) { return tile.negatives; }

  template <class Kind>
  FASTCLIP_INLINE const Affine<T>& map(int64_t) const {
    return k;
  }
  FASTCLIP_INLINE V<T> reference(V<T> m, int64_t) const { return m; }
  FASTCLIP_INLINE V<T> bias(int64_t) const { return V<T>{}; }
  FASTCLIP_INLINE Counted<T> counted(const V<T>&, const V<T>& counts, int64_t) const {
    const auto mask = counts != T(0);
    return {mask, mask};
  }
};

// Those that ids and thresholds leave, or with Positives those of equal ids; logits have the biases of their lines.
template <class T, bool Positives>
class Selected {
 public:
  static constexpr bool kPositives = Positives;
  static constexpr bool kApart = true;

  FASTCLIP_INLINE Selected(const Tile<T>& tile, const Column<T>& column, int64_t c)
      : tile_(tile),
        k_(column.k),
        factor_(T(column.factor)),
        threshold_(tile.col_threshold ? tile.col_threshold[c] : T(0)),
        id_(tile.col_ids ? tile.col_ids[c] : 0),
        bias_(tile.col_bias ? tile.col_bias[c] : 0.) {}
  static const TileLines<T>& lines(const Tile<T>& tile) { return Positives ? tile.positives : tile.negatives; }

  // With a shift the integral part of a bias is taken off the reference.
  template <class Kind>
  FASTCLIP_INLINE Affine<T, V<T>, true> map(int64_t i) const {
    V<T> low = number_of<T>(bias_.part), high = number_of<T>(Kind::kHasShift ? T(0) : k_.bias + bias_.whole);
    if (!Kind::kHasShift) low += k_.bias_low;
    if (tile_.row_bias_part) {
      V<T> whole, part;
      load(tile_.row_bias_whole + i, whole), load(tile_.row_bias_part + i, part);
      low += part;
      if (!Kind::kHasShift) high += whole;
    }
    const Affine<T, V<T>, true> k(k_.scale, k_.scale_low, high, low);
    return Positives && Kind::kNegatesPositives ? k.negated() : k;
  }
  FASTCLIP_INLINE V<T> reference(V<T> m, int64_t i) const {
    m -= bias_.whole;
    if (!tile_.row_bias_whole) return m;
    V<T> whole;
    load(tile_.row_bias_whole + i, whole);
    return m - whole;
  }
  FASTCLIP_INLINE V<T> bias(int64_t i) const {
    V<T> sum = number_of<T>(bias_.whole + bias_.part);
    if (!tile_.row_bias_whole) return sum;
    V<T> whole, part;
    load(tile_.row_bias_whole + i, whole), load(tile_.row_bias_part + i, part);
    return sum + (whole + part);
  }
  // t: with the factor of its row.
  FASTCLIP_INLINE Counted<T> counted(const V<T>& t, const V<T>& counts, int64_t i) const {
    typename Counted<T>::Mask mask = counts != T(0);
    if (tile_.row_ids) {
      typename Counted<T>::Mask ids;
      memcpy(&ids, tile_.row_ids + i, sizeof ids);
      mask = mask & (Positives ? ids == id_ : ids != id_);
    }
    if (Positives || !tile_.row_threshold) return {mask, mask};
    V<T> threshold;
    load(tile_.row_threshold + i, threshold);
    const V<T> whole = t * factor_;
    // A NaN counts, and spoils its lines as it should.
    return {mask & ~(whole > threshold), mask & ~(whole > threshold_)};
  }

 private:
  const Tile<T>& tile_;
  const Affine<T>& k_;
  const T factor_, threshold_;
  const Integer<T> id_;
  const LineBias<T> bias_;
};

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
