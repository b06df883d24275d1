// A strip of rows: a thread's operands, statistics and sums while it visits the tiles of columns.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "arena.h"
#include "gemm.h"
#include "pack.h"
#include "problem.h"
#include "tile.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

constexpr int64_t kMostCols = 256;

// strip_rows returns the rows of a strip, tile_cols the columns of a tile. There must be enough strips for all threads,
// and each must be large enough to repay its transposition and its additions to v. A strip's data must also fit its
// core's L2 cache: at D = 512 and 2 MiB, 256 rows take 5 % less time than 128. bf16 products are so fast that the
// additions cost relatively more, so bf16 strips are larger. Neither function depends on the number of threads, so the
// order of sums does not depend on it either. strip_rows does not depend on the product or the instruction set, so
// neither does the layout of kept products.
inline int64_t strip_rows(const Problem& p, int64_t row_bytes) {
  const int64_t fit = p.cache_bytes / 4 / row_bytes / 64 * 64;
  const int64_t most = p.dtype == Dtype::kBFloat16 ? 512 : std::clamp<int64_t>(fit, 128, 256);
  return std::clamp<int64_t>(round_up(p.x.rows / 16, kLane), 64, most);
}
inline int64_t tile_cols(const Problem& p, int64_t row_bytes, bool narrow) {
  if (p.y.rows < 1024) return 64;
  if (narrow) return kMostCols;
  return 128 * row_bytes <= p.cache_bytes / 16 * 3 ? 128 : 64;
}

// The features of a strip's row, ours and targets.
template <class T>
int64_t row_bytes(const Problem& p) {
  return (p.width + p.target_width) * int64_t(sizeof(T));
}

inline bool u_wanted(const Problem& p) { return p.weigh && p.x.gradient; }
inline bool v_wanted(const Problem& p) { return p.weigh && p.y.gradient; }
template <class Op>
int64_t depth(int64_t width) {
  return round_up(width, kPair<Op>);
}
template <class Op>
int64_t depth(const Problem& p) {
  return depth<Op>(p.width);
}

// Coefficients of a strip's rows, and their shifts or levels, for a set of pairs.
template <class T>
struct LaneLines {
  T *coefficients, *shifts;
};

template <class In, class Op, class T>
struct RowStrip {
  int64_t k, begin, rows, lanes;
  const In* features;
  bool kept;       // its products are kept, or will be
  Op* transposed;  // operand of the first product
  Op* operand;     // operand of the second, unless the features themselves are
  T *factors, *counts, *scratch;
  LaneLines<T> negatives, positives, teacher;
  Integer<T>* ids;  // null if the block has none, like the pointers up to bias_part
  T *thresholds, *bias_whole, *bias_part;
  T *products, *weights;  // of one tile
  Op *weights_v, *weights_u;
  Op *tile_rows, *tile_pairs;
  T* u;                                 // (rows, D)
  Op *target_transposed, *target_rows;  // of targets, null without them
  T *target_factors, *target_products;
};

template <class In, class Op, class T>
class RowStrips {
 public:
  RowStrips(const Problem& p, int64_t tile) : p_(p), rows_(strip_rows(p, row_bytes<T>(p))), tile_(tile) {}

  int64_t count() const { return (p_.x.rows + rows_ - 1) / rows_; }

  // Returns strip k: its features packed, its statistics copied to lanes, its sums cleared.
  RowStrip<In, Op, T> open(int64_t k) const {
    const Side& x = p_.x;
    RowStrip<In, Op, T> b;
    b.k = k, b.begin = k * rows_;
    b.rows = std::min(rows_, x.rows - b.begin), b.lanes = round_up(b.rows, kLane);
    b.features = static_cast<const In*>(x.features) + b.begin * x.stride;
    b.kept = b.begin + b.lanes <= p_.kept_rows;

    const int64_t lanes = b.lanes, width = p_.width, of_targets = depth<Op>(p_.target_width);
    arena.reset(sizeof(T) * (3 * tile_ * lanes + b.rows * width + 16 * lanes) +
                sizeof(Op) *
                    (2 * lanes * depth<Op>(p_) + 2 * tile_ * (lanes + depth<Op>(p_)) + (lanes + tile_) * of_targets) +
                8192);
    b.transposed = arena.take<Op>(depth<Op>(p_) * lanes);
    b.operand = arena.take<Op>(lanes * depth<Op>(p_));
    b.products = arena.take<T>(tile_ * lanes);
    b.weights = arena.take<T>(tile_ * lanes);
    b.weights_v = arena.take<Op>(tile_ * lanes);
    b.weights_u = arena.take<Op>(lanes * round_up(tile_, kLane));
    b.tile_rows = arena.take<Op>(tile_ * depth<Op>(p_));
    b.tile_pairs = arena.take<Op>(tile_ * width);
    b.u = arena.take<T>(b.rows * width);
    for (T** const p : {&b.factors, &b.counts}) *p = arena.take<T>(lanes);
    b.scratch = arena.take<T>(3 * lanes);
    for (int64_t i = 0; i < lanes; i++) b.counts[i] = i < b.rows;
    spread(b, x.factor, T(1), b.factors);
    b.target_transposed = b.target_rows = nullptr, b.target_factors = b.target_products = nullptr;
    if (p_.target_width) open_targets(b);
    open_lines(b, x.negatives, b.negatives);
    if (p_.same_id_positive) open_lines(b, x.positives, b.positives);
    b.ids = nullptr, b.thresholds = b.bias_whole = b.bias_part = nullptr;
    if (x.ids) {
      b.ids = arena.take<Integer<T>>(lanes);
      for (int64_t i = 0; i < lanes; i++) b.ids[i] = x.ids[row_of(b, i)];
    }
    if (x.threshold) spread(b, x.threshold, T(0), b.thresholds = arena.take<T>(lanes));
    if (x.key_bias) {
      b.bias_whole = arena.take<T>(lanes), b.bias_part = arena.take<T>(lanes);
      for (int64_t i = 0; i < lanes; i++) {
        const LineBias<T> bias(x.key_bias[row_of(b, i)]);
        b.bias_whole[i] = bias.whole, b.bias_part[i] = bias.part;
      }
    }
    if (!(b.kept && p_.kept_ready)) pack_transposed<In, Op>(b.features, x.stride, b.rows, width, lanes, b.transposed);
    if (v_wanted(p_)) {
      if constexpr (sizeof(Op) < sizeof(T))
        pack_pairs(b.features, x.stride, b.rows, lanes, width, b.operand);
      else if constexpr (!std::is_same_v<In, Op>)
        pack_rows<In, Op>(b.features, x.stride, b.rows, width, b.operand, width);
    }
    if (p_.fold) {
      clear(b, x.negatives);
      if (p_.same_id_positive) clear(b, x.positives);
      if (p_.teacher.is_given) {
        clear(b, x.teacher, p_.teacher.running_maxima, p_.teacher.shift);
        std::fill_n(x.teacher.moment + b.begin, b.rows, 0.);
      }
    }
    if (x.key_bias_sum) std::fill_n(x.key_bias_sum + b.begin, b.rows, 0.);
    return b;
  }

 private:
  // Lanes beyond the last row repeat it.
  int64_t row_of(const RowStrip<In, Op, T>& b, int64_t lane) const { return b.begin + std::min(lane, b.rows - 1); }

  void spread(const RowStrip<In, Op, T>& b, const void* values, T if_none, T* out) const {
    for (int64_t i = 0; i < b.lanes; i++) out[i] = values ? static_cast<const T*>(values)[row_of(b, i)] : if_none;
  }

  void open_lines(const RowStrip<In, Op, T>& b, const Lines& lines, LaneLines<T>& out) const {
    out = {arena.take<T>(b.lanes), arena.take<T>(b.lanes)};
    spread(b, lines.coefficients, T(1), out.coefficients);
    spread(b, lines.shifts, T(0), out.shifts);
  }

  void open_targets(RowStrip<In, Op, T>& b) const {
    const Features& x = p_.x.target;
    const int64_t lanes = b.lanes, width = p_.target_width;
    b.target_transposed = arena.take<Op>(depth<Op>(width) * lanes);
    b.target_rows = arena.take<Op>(tile_ * depth<Op>(width));
    b.target_products = arena.take<T>(tile_ * lanes);
    spread(b, x.factor, T(1), b.target_factors = arena.take<T>(lanes));
    if (p_.teacher.is_given) open_lines(b, p_.x.teacher, b.teacher);
    pack_transposed<In, Op>(static_cast<const In*>(x.data) + b.begin * x.stride, x.stride, b.rows, width, lanes,
                            b.target_transposed);
  }

  void clear(const RowStrip<In, Op, T>& b, const Lines& lines) const {
    clear(b, lines, p_.running_maxima, p_.has_levels ? 0. : p_.shift);
  }
  static void clear(const RowStrip<In, Op, T>& b, const Lines& lines, bool running_maxima, double shift) {
    std::fill_n(lines.shift + b.begin, b.rows, running_maxima ? -std::numeric_limits<double>::infinity() : shift);
    std::fill_n(lines.sum + b.begin, b.rows, 0.);
  }

  const Problem& p_;
  const int64_t rows_, tile_;
};

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
