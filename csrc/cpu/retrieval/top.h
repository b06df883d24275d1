// The k highest scores of each query, exact and in order: descending, of equal scores the lower index first.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "scanner.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

struct Scored {
  double score;
  int64_t index;
  bool operator<(const Scored& other) const {  // comes before
    return score > other.score || (score == other.score && index < other.index);
  }
};

// The keys that may be among a query's k best. A key enters if its product reaches `floor`. When there is no more room,
// the floor rises to the k-th largest product less twice the error: k keys score higher than anything below it. If that
// leaves too many, since features are duplicates, exact scores choose k.
template <class In, class T>
class Candidates {
 public:
  void open(const TopScan& p, int64_t query, double band) {
    p_ = &p, query_ = query, band_ = band;
    found_.reserve(std::min(room(), p.n));
  }
  T floor() const { return floor_; }

  void add(double t, int64_t key) {
    found_.push_back({t, key});
    if (int64_t(found_.size()) == room()) raise_floor();
  }

  // Keeps the k best, with exact scores, in order.
  void choose() {
    if (int64_t(found_.size()) > p_->k) cut();
    for (Scored& s : found_) s.score = exact_score<In>(*p_, query_, s.index);
    const int64_t kept = std::min<int64_t>(p_->k, found_.size());
    std::partial_sort(found_.begin(), found_.begin() + kept, found_.end());
    found_.resize(kept);
  }
  const std::vector<Scored>& found() const { return found_; }

 private:
  int64_t room() const { return 2 * p_->k + 64; }

  // Raises the floor and leaves out what is below it.
  void cut() {
    const auto kth = found_.begin() + p_->k - 1;
    std::nth_element(found_.begin(), kth, found_.end());
    // A band that is infinite, of products that overflow, leaves the floor.
    set_floor(kth->score - 2 * band_);
    const auto end =
        std::partition(found_.begin(), found_.end(), [&](const Scored& s) { return !(s.score < double(floor_)); });
    found_.erase(end, found_.end());
  }
  void raise_floor() {
    cut();
    if (int64_t(found_.size()) <= p_->k + 32) return;
    choose();
    set_floor(found_.back().score - band_);
  }
  // Rounds down.
  void set_floor(double value) {
    T rounded = T(value);
    if (double(rounded) > value) rounded = std::nextafter(rounded, -std::numeric_limits<T>::infinity());
    if (rounded > floor_) floor_ = rounded;
  }

  const TopScan* p_ = nullptr;
  int64_t query_ = 0;
  double band_ = 0;
  T floor_ = -std::numeric_limits<T>::infinity();
  std::vector<Scored> found_;
};

template <class In, class T>
struct PreparedTop : TopScan {
  Bands<T> bands;
  template <class MakeBands>
  PreparedTop(const TopScan& p, MakeBands bands)
      : TopScan(p), bands(bands(largest_exact_norm<In>(p.y, p.n, p.width))) {}
};

template <class In, class T>
class TopStrip {
  using Mask = typename Integers<V<T>>::type;

 public:
  using Problem = PreparedTop<In, T>;
  struct Worker {
    explicit Worker(const Problem&) {}
    void merge() {}
  };

  TopStrip(const Problem& p, Worker&, int64_t begin, int64_t rows, int64_t lanes)
      : p_(p),
        begin_(begin),
        rows_(rows),
        lanes_(lanes),
        floor_(lanes),
        ceiling_(lanes),
        band_(rows),
        candidates_(rows) {
    for (int64_t i = 0; i < lanes; i++) {
      if (i < rows) band_[i] = p.bands(exact_norm<In>(p.x, begin + i, p.width));
      // Nothing reaches the floor of a lane without a query.
      floor_[i] = i < rows ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
      ceiling_[i] = i < rows ? T(p.max_score) + band_[i] : -std::numeric_limits<T>::infinity();
      if (i < rows) candidates_[i].open(p, begin + i, band_[i]);
    }
  }

  void visit(const T* t, int64_t begin, int64_t cols) {
    for (int64_t c = 0; c < cols; c++)
      for (int64_t i = 0; i < lanes_; i += kWidth<T>) {
        V<T> products, floor, ceiling;
        load(t + c * lanes_ + i, products), load(floor_.data() + i, floor), load(ceiling_.data() + i, ceiling);
        // A NaN, of products that overflow, enters.
        for (uint32_t bits = bits_of<T>(~((products < floor) | (products > ceiling))); bits; bits &= bits - 1)
          enter(t[c * lanes_ + i + __builtin_ctz(bits)], i + __builtin_ctz(bits), begin + c);
      }
  }

  void finish() {
    for (auto& of_query : candidates_) of_query.choose();
  }
  void merge() const {
    for (int64_t i = 0; i < rows_; i++) merge(candidates_[i].found(), begin_ + i);
  }

 private:
  void enter(T t, int64_t i, int64_t key) {
    const int64_t query = begin_ + i;
    if ((p_.excludes_own && key == query) || (p_.ids_x && p_.ids_x[query] == p_.ids_y[key])) return;
    const bool may_exceed = !(double(t) < p_.max_score - 2 * double(band_[i]));
    if (may_exceed && exact_score<In>(p_, query, key) > p_.max_score) return;
    candidates_[i].add(std::isfinite(t) ? t : exact_score<In>(p_, query, key), key);
    floor_[i] = candidates_[i].floor();
  }

  // Merges the strip's best into the results of the query, which hold those of its other keys.
  void merge(const std::vector<Scored>& found, int64_t query) const {
    double* const scores = p_.scores + query * p_.k;
    int64_t* const indices = p_.indices + query * p_.k;
    std::vector<Scored> all(found);
    for (int64_t q = 0; q < p_.k && indices[q] >= 0; q++) all.push_back({scores[q], indices[q]});
    std::sort(all.begin(), all.end());
    for (int64_t q = 0; q < std::min<int64_t>(p_.k, all.size()); q++)
      scores[q] = all[q].score, indices[q] = all[q].index;
  }

  const Problem& p_;
  const int64_t begin_, rows_, lanes_;
  std::vector<T> floor_, ceiling_, band_;
  std::vector<Candidates<In, T>> candidates_;
};

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
