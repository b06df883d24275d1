// Draws a negative for each query, and for each key, from the softmax of its logits: Gumbel's trick in one scan.
#pragma once

#include <limits>
#include <vector>

#include "noise.h"
#include "scanner.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

// The largest perturbed logit so far, and its place; of equal ones the lower place.
struct Drawn {
  float logit = -std::numeric_limits<float>::infinity();
  int64_t place = -1;
  void take(float other, int64_t at) {
    if (other > logit || (other == logit && place >= 0 && at < place)) logit = other, place = at;
  }
};

struct PreparedDraw : DrawScan {
  mutable std::vector<Drawn> of_rows, of_columns;
  explicit PreparedDraw(const DrawScan& p) : DrawScan(p), of_rows(p.m), of_columns(p.columns ? p.n : 0) {}
};

template <class T>
class DrawStrip {
  using Mask = typename Integers<V<float>>::type;
  static constexpr int64_t kLanes = kWidth<float>;

 public:
  using Problem = PreparedDraw;

  struct Worker {
    const Problem& p;
    std::vector<Drawn> columns;
    explicit Worker(const Problem& p) : p(p), columns(p.of_columns.size()) {}
    void merge() {
      for (size_t j = 0; j < columns.size(); j++)
        if (columns[j].place >= 0) p.of_columns[j].take(columns[j].logit, columns[j].place);
    }
  };

  DrawStrip(const Problem& p, Worker& worker, int64_t begin, int64_t rows, int64_t lanes)
      : p_(p),
        columns_(worker.columns),
        begin_(begin),
        rows_(rows),
        lanes_(lanes),
        first_(lanes),
        second_(lanes),
        logits_(lanes, -std::numeric_limits<float>::infinity()),
        places_(lanes, -1),
        ids_(p.ids_x ? lanes : 0),
        t_(lanes) {
    for (int64_t i = 0; i < lanes; i++) {
      const LineKeys keys(p.seed, false, begin + i);
      first_[i] = keys.first, second_[i] = keys.second;
      if (p.ids_x) ids_[i] = i < rows ? p.ids_x[begin + i] : 0;
    }
  }

  void visit(const T* t, int64_t begin, int64_t cols) {
    for (int64_t c = 0; c < cols; c++) visit_key(t + c * lanes_, begin + c);
  }

  void finish() {}
  void merge() const {
    for (int64_t i = 0; i < rows_; i++)
      if (places_[i] >= 0) p_.of_rows[begin_ + i].take(logits_[i], places_[i]);
  }

 private:
  void visit_key(const T* t, int64_t j) {
    const T scale = T(p_.scale);
    for (int64_t i = 0; i < lanes_; i++) t_[i] = float(t[i] * scale);
    const LineKeys keys(p_.seed, true, j);
    const int64_t own = p_.excludes_own ? j - p_.offset - begin_ : -1;
    const bool draws_columns = !columns_.empty();
    constexpr float kLowest = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < lanes_; i += kLanes) {
      Mask counted = lanes_below<float>(i, rows_);
      if (own >= i && own < i + kLanes) counted[own - i] = 0;
      if (p_.ids_x) {
        Mask ids;
        memcpy(&ids, ids_.data() + i, sizeof ids);
        counted = counted & (ids != p_.ids_y[j]);
      }
      V<float> logit, noise;
      load(t_.data() + i, logit);
      logit = counted ? logit : V<float>{} + kLowest;
      Counters first, second;
      memcpy(&first, first_.data() + i, sizeof first), memcpy(&second, second_.data() + i, sizeof second);
      gumbel(hashed(Counters{} + uint32_t(j), first, second), noise);
      const V<float> of_row = logit + noise;
      V<float> best;
      load(logits_.data() + i, best);
      const Mask better = of_row > best;
      if (bits_of<float>(better)) {
        store<float>(logits_.data() + i, better ? of_row : best);
        Mask places;
        memcpy(&places, places_.data() + i, sizeof places);
        places = better ? Mask{} + int32_t(j) : places;
        memcpy(places_.data() + i, &places, sizeof places);
      }
      if (draws_columns) {
        Counters rows;
        for (int64_t q = 0; q < kLanes; q++) rows[q] = uint32_t(begin_ + i + q);
        gumbel(hashed(rows, Counters{} + keys.first, Counters{} + keys.second), noise);
        const V<float> of_column = logit + noise;
        for (uint32_t bits = bits_of<float>(of_column > columns_[j].logit); bits; bits &= bits - 1)
          columns_[j].take(of_column[__builtin_ctz(bits)], begin_ + i + __builtin_ctz(bits));
      }
    }
  }

  const Problem& p_;
  std::vector<Drawn>& columns_;
  const int64_t begin_, rows_, lanes_;
  std::vector<uint32_t> first_, second_;
  std::vector<float> logits_;
  std::vector<int32_t> places_, ids_;
  std::vector<float> t_;
};

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
