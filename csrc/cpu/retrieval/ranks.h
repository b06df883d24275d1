// Counts the keys above each query's own and the queries above each key's own, in one scan.
//
// A product that differs from a line's own score by more than its error decides. The others, few unless features are
// duplicates, are decided by exact scores; of equal scores the lower index is above. A line's own pair is the best of
// its id, so that no other pair of the id comes before it: ids play no part.
#pragma once

#include <limits>
#include <vector>

#include "scanner.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

// One side's own scores as levels for products, and the largest error of the products with each line.
template <class T>
struct Levels {
  std::vector<T> level, band;
};

template <class In, class T>
struct PreparedRanks : RankScan {
  Levels<T> of_rows, of_columns;

  // bands: makes the bounds of one side from the largest norm of the other.
  template <class MakeBands>
  PreparedRanks(const RankScan& p, MakeBands bands) : RankScan(p) {
    prepare(of_rows, m, x, rows, bands(largest_exact_norm<In>(y, n, width)));
    if (columns.above) prepare(of_columns, n, y, columns, bands(largest_exact_norm<In>(x, m, width)));
  }

 private:
  void prepare(Levels<T>& out, int64_t lines, const Features& features, const Owned& own, const Bands<T>& bands) const {
    out.level.resize(lines), out.band.resize(lines);
    at::parallel_for(0, lines, 256, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; q++) {
        out.band[q] = bands(exact_norm<In>(features, q, width));
        out.level[q] = T(own.score[q]);
      }
    });
  }
};

template <class In, class T>
class RankStrip {
  using Mask = typename Integers<V<T>>::type;

 public:
  using Problem = PreparedRanks<In, T>;

  struct Worker {
    const Problem& p;
    std::vector<int64_t> columns;
    explicit Worker(const Problem& p) : p(p), columns(p.columns.above ? p.n : 0) {}
    void merge() {
      for (size_t j = 0; j < columns.size(); j++) p.columns.above[j] += columns[j];
    }
  };

  RankStrip(const Problem& p, Worker& worker, int64_t begin, int64_t rows, int64_t lanes)
      : p_(p),
        columns_(worker.columns),
        begin_(begin),
        rows_(rows),
        lanes_(lanes),
        counts_(lanes),
        level_(lanes),
        band_(lanes),
        held_(lanes / kWidth<T>) {
    for (int64_t i = 0; i < lanes; i++) {
      level_[i] = i < rows ? p.of_rows.level[begin + i] : std::numeric_limits<T>::infinity();
      band_[i] = i < rows ? p.of_rows.band[begin + i] : T(0);
    }
    for (size_t q = 0; q < held_.size(); q++) held_[q] = lanes_below<T>(q * kWidth<T>, rows);
  }

  void visit(const T* t, int64_t begin, int64_t cols) {
    for (int64_t c = 0; c < cols; c++)
      p_.columns.above ? visit_key<true>(t + c * lanes_, begin + c) : visit_key<false>(t + c * lanes_, begin + c);
  }

  void finish() {}
  void merge() const {
    for (int64_t i = 0; i < rows_; i++) p_.rows.above[begin_ + i] += counts_[i];
  }

 private:
  struct Decided {
    Mask above, near;
  };
  // A NaN, of products that overflow, is near.
  static FASTCLIP_INLINE void decide(const V<T>& difference, const V<T>& band, Decided& out) {
    out.above = difference > band;
    out.near = ~(out.above | (difference < -band));
  }

  template <bool Columns>
  FASTCLIP_INLINE void visit_key(const T* t, int64_t j) {
    Mask above_own{}, near{};
    const V<T> level = number_of<T>(Columns ? p_.of_columns.level[j] : T(0));
    const V<T> band = number_of<T>(Columns ? p_.of_columns.band[j] : T(0));
    for (int64_t i = 0; i < lanes_; i += kWidth<T>) {
      Decided row, column;
      decide_both<Columns>(t, i, level, band, row, column);
      Mask counts;
      memcpy(&counts, counts_.data() + i, sizeof counts);
      counts -= row.above;
      memcpy(counts_.data() + i, &counts, sizeof counts);
      near |= row.near;
      if constexpr (Columns) above_own -= column.above, near |= column.near;
    }
    if constexpr (Columns) columns_[j] += sum_of(above_own);
    if (bits_of<T>(near)) resolve<Columns>(t, j, level, band);
  }

  template <bool Columns>
  FASTCLIP_INLINE void decide_both(const T* products, int64_t i, const V<T>& col_level, const V<T>& col_band,
                                   Decided& row, Decided& column) const {
    V<T> t, level, band;
    load(products + i, t), load(level_.data() + i, level), load(band_.data() + i, band);
    const Mask held = held_[i / kWidth<T>];
    decide(t - level, band, row);
    row.above &= held, row.near &= held;
    if constexpr (Columns) {
      decide(t - col_level, col_band, column);
      column.above &= held, column.near &= held;
    }
  }

  static FASTCLIP_INLINE int64_t sum_of(const Mask& mask) {
    Integer<T> lanes[kWidth<T>];
    memcpy(lanes, &mask, sizeof mask);
    int64_t sum = 0;
    for (const auto lane : lanes) sum += lane;
    return sum;
  }

  template <bool Columns>
  void resolve(const T* t, int64_t j, const V<T>& col_level, const V<T>& col_band) {
    for (int64_t i = 0; i < lanes_; i += kWidth<T>) {
      Decided row, column{};
      decide_both<Columns>(t, i, col_level, col_band, row, column);
      for (uint32_t bits = bits_of<T>(row.near | column.near); bits; bits &= bits - 1) {
        const int q = __builtin_ctz(bits);
        const int64_t query = begin_ + i + q;
        const double score = exact_score<In>(p_, query, j);
        if (row.near[q]) counts_[i + q] += comes_first(score, j, p_.rows, query);
        if (Columns && column.near[q]) columns_[j] += comes_first(score, p_.first_query + query, p_.columns, j);
      }
    }
  }

  static bool comes_first(double score, int64_t index, const Owned& own, int64_t line) {
    return score > own.score[line] || (score == own.score[line] && index < own.index[line]);
  }

  const Problem& p_;
  std::vector<int64_t>& columns_;
  const int64_t begin_, rows_, lanes_;
  std::vector<Integer<T>> counts_;
  std::vector<T> level_, band_;
  std::vector<Mask> held_;
};

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
