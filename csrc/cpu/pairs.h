// The sets of pairs that the CPU engine folds and weighs: which pairs belong to a set, and the map from t to their
// logits.
//
// An object of such a class stands for one column of a tile. Its functions are called for each register of rows.
#pragma once

#include "tile.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

// Masks of all bits or none: the pairs that count for their rows, and those that count for their column.
template <class T>
struct Counted {
  using Mask = typename Integers<V<T>>::type;
  Mask by_row, by_column;
};

// Every pair but the own positives.
template <class T>
struct Plain {
  static constexpr bool kPositives = false;
  static constexpr bool kTaught = false;
  static constexpr bool kApart = false;   // the masks of rows and of columns may differ
  static constexpr bool kBiased = false;  // lines may have biases, whose gradients are sums of weights
  const Affine<T>& k;
  double factor;  // of the column, in the product that is weighed

  FASTCLIP_INLINE Plain(const Tile<T>&, const Column<T>& column, int64_t) : k(column.k), factor(column.factor) {}
  static const TileLines<T>& lines(const Tile<T>& tile) { return tile.negatives; }

  template <class Kind>
  FASTCLIP_INLINE const Affine<T>& map(int64_t) const {
    return k;
  }
  template <class Kind>
  FASTCLIP_INLINE V<T> shift(V<T> m, int64_t) const {
    return m;
  }
  FASTCLIP_INLINE V<T> bias(int64_t) const { return V<T>{}; }
  FASTCLIP_INLINE Counted<T> counted(const V<T>&, const V<T>& counts, int64_t) const {
    const auto mask = counts != T(0);
    return {mask, mask};
  }
  // The product that is weighed, without the factor of its column.
  FASTCLIP_INLINE V<T> weighed(const V<T>& t, int64_t) const { return t; }
};

// Every pair, in the tile of a teacher's products: our products are weighed. Weights are added to those of the other
// sets.
template <class T>
struct Taught : Plain<T> {
  static constexpr bool kTaught = true;
  static constexpr bool kBiased = true;
  const T *const t_of_column, *const row_factor;

  FASTCLIP_INLINE Taught(const Tile<T>& tile, const Column<T>& column, int64_t c)
      : Plain<T>(tile, column, c), t_of_column(tile.other.t + c * tile.lanes), row_factor(tile.other.row_factor) {
    this->factor = tile.other.col_factor ? tile.other.col_factor[c] : T(1);
  }
  FASTCLIP_INLINE V<T> weighed(const V<T>&, int64_t i) const {
    V<T> t, of_row;
    load(t_of_column + i, t), load(row_factor + i, of_row);
    return t * of_row;
  }
};

// Options of a block, as bits. Functions are compiled for no option, for ids alone, for thresholds alone, and for
// kEverything, in which each option may be absent: its pointers are then null. A guide adds its bit to kEverything.
enum Option : unsigned { kIds = 1, kThresholds = 2, kBiases = 4, kEverything = 7, kGuide = 8 };

// The pairs that remain after ids and thresholds or, with Positives, the pairs of equal ids. Logits include the biases
// of their lines. Pointers are copied from the tile, because after each store to a tile the compiler would otherwise
// reload them.
template <class T, unsigned Options, bool Positives>
class Selected {
  static constexpr bool kMayLack = (Options & kEverything) == kEverything;  // pointers of absent options are null
  static constexpr bool kGuided = Options & kGuide;

 public:
  static constexpr bool kPositives = Positives;
  static constexpr bool kTaught = false;
  static constexpr bool kApart = !Positives && (Options & kThresholds);
  static constexpr bool kBiased = Options & kBiases;

  FASTCLIP_INLINE Selected(const Tile<T>& tile, const Column<T>& column, int64_t c)
      : factor(column.factor),
        k_(column.k),
        factor_(T(column.factor)),
        ids_(tile.row_ids),
        thresholds_(tile.row_threshold),
        whole_(tile.row_bias_whole),
        part_(tile.row_bias_part),
        threshold_(tile.col_threshold ? tile.col_threshold[c] : T(0)),
        id_(tile.col_ids ? tile.col_ids[c] : 0),
        bias_(tile.col_bias ? tile.col_bias[c] : 0.) {
    if constexpr (kGuided) {
      guide_ = tile.other.t + c * tile.lanes;
      row_factor_ = tile.other.row_factor;
      guide_factor_ = tile.other.col_factor ? tile.other.col_factor[c] : T(1);
    }
  }
  static const TileLines<T>& lines(const Tile<T>& tile) { return Positives ? tile.positives : tile.negatives; }

  // The map includes the biases. For a kind with a shift it leaves out their integral parts, which shift() subtracts.
  template <class Kind>
  FASTCLIP_INLINE auto map(int64_t i) const {
    constexpr bool kNegated = Positives && Kind::kNegatesPositives;
    if constexpr (!kBiased) {
      return kNegated ? k_.negated() : k_;
    } else {
      V<T> low = number_of<T>(bias_.part), high = number_of<T>(Kind::kHasShift ? T(0) : k_.bias + bias_.whole);
      if (!Kind::kHasShift) low += k_.bias_low;
      if (whole_) {
        V<T> whole, part;
        load(whole_ + i, whole), load(part_ + i, part);
        low += part;
        if (!Kind::kHasShift) high += whole;
      }
      const Affine<T, V<T>, true> k(k_.scale, k_.scale_low, high, low);
      return kNegated ? k.negated() : k;
    }
  }
  template <class Kind>
  FASTCLIP_INLINE V<T> shift(V<T> m, int64_t i) const {
    if constexpr (kBiased && Kind::kHasShift) {
      m -= bias_.whole;
      if (whole_) {
        V<T> whole;
        load(whole_ + i, whole);
        m -= whole;
      }
    }
    return m;
  }
  FASTCLIP_INLINE V<T> bias(int64_t i) const {
    V<T> sum{};
    if constexpr (kBiased) {
      sum += bias_.whole + bias_.part;
      if (whole_) {
        V<T> whole, part;
        load(whole_ + i, whole), load(part_ + i, part);
        sum += whole + part;
      }
    }
    return sum;
  }
  // t includes the factor of its row, but not that of the column.
  FASTCLIP_INLINE Counted<T> counted(const V<T>& t, const V<T>& counts, int64_t i) const {
    typename Counted<T>::Mask mask = counts != T(0);
    if constexpr (Options & kIds) {
      if (!kMayLack || ids_) {
        typename Counted<T>::Mask ids;
        memcpy(&ids, ids_ + i, sizeof ids);
        mask = mask & (Positives ? ids == id_ : ids != id_);
      }
    }
    if constexpr (!kApart) return {mask, mask};
    if (kMayLack && !thresholds_) return {mask, mask};
    V<T> threshold;
    load(thresholds_ + i, threshold);
    const V<T> whole = compared(t, i);
    // A NaN counts, so that it makes its lines NaN.
    return {mask & ~(whole > threshold), mask & ~(whole > threshold_)};
  }
  FASTCLIP_INLINE V<T> weighed(const V<T>& t, int64_t) const { return t; }

  const double factor;

 private:
  // The product that thresholds look at.
  FASTCLIP_INLINE V<T> compared(const V<T>& t, int64_t i) const {
    if constexpr (!kGuided) return t * factor_;
    V<T> guide, of_row;
    load(guide_ + i, guide), load(row_factor_ + i, of_row);
    return guide * of_row * guide_factor_;
  }

  const Affine<T> k_;
  const T factor_;
  const Integer<T>* const ids_;
  const T *const thresholds_, *const whole_, *const part_;
  const T threshold_;
  const Integer<T> id_;
  const LineBias<T> bias_;
  const T *guide_ = nullptr, *row_factor_ = nullptr;
  T guide_factor_ = 1;
};

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
