// The scan: strips of queries visit tiles of keys, and a visitor sees the products of each tile.
//
// A visitor is made for a strip of queries: Visitor(p, worker, begin, rows, lanes). Its visit(t, begin, cols) sees the
// products t (cols, lanes) of the keys from `begin` on, the queries side by side. finish() follows the last key, then
// merge() adds the strip's results to those of others. Visitor::Worker(p) holds the results of a thread, over all its
// strips, and its merge() adds them to those of others. Both merge() are called under a lock. Threads take strips in any
// order, and the keys of few queries are divided among threads, too: results must not depend on the order of visits.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "../first_product.h"
#include "../row_strip.h"
#include "exact.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

template <class In, class Op, class T, class Visitor>
class Scanner {
  using Product = FirstProduct<In, Op, T>;
  using Problem = typename Visitor::Problem;
  static constexpr bool kNarrow = sizeof(Op) < sizeof(T);

 public:
  explicit Scanner(const Problem& p) : p_(p) {
    const int64_t threads = at::get_num_threads();
    rows_ = std::clamp<int64_t>(round_up((p.m + threads - 1) / threads, kLane), kLane, kMostRows);
    strips_ = (p.m + rows_ - 1) / rows_;
    cols_ = kNarrow ? 256 : 128;
    const int64_t tiles = (p.n + cols_ - 1) / cols_;
    const int64_t parts = std::clamp<int64_t>((threads + strips_ - 1) / strips_, 1, tiles);
    part_ = (tiles + parts - 1) / parts * cols_;
    parts_ = (p.n + part_ - 1) / part_;
  }

  void run() {
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), strips_ * parts_);
    at::parallel_for(0, threads, 1, [this](int64_t begin, int64_t end) {
      for (; begin < end; begin++) work();
    });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr int64_t kMostRows = 256;

  void work() noexcept {
    try {
      typename Visitor::Worker worker(p_);
      for (int64_t k; !failed_ && (k = next_++) < strips_ * parts_;) scan(worker, k / parts_, k % parts_);
      const std::lock_guard<std::mutex> lock(mutex_);
      worker.merge();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
    if (p_.brgemm) at::native::cpublas::brgemm_release(kNarrow);
  }

  void scan(typename Visitor::Worker& worker, int64_t strip, int64_t part) {
    const int64_t begin = strip * rows_, rows = std::min(rows_, p_.m - begin), lanes = round_up(rows, kLane);
    const int64_t deep = depth<Op>(p_.width);
    arena.reset(sizeof(Op) * deep * (lanes + cols_) + sizeof(T) * cols_ * lanes + 1024);
    Op* const transposed = arena.take<Op>(deep * lanes);
    Op* const room = arena.take<Op>(deep * cols_);
    T* const t = arena.take<T>(cols_ * lanes);
    pack_transposed<In, Op>(static_cast<const In*>(p_.x.data) + begin * p_.x.stride, p_.x.stride, rows, p_.width, lanes,
                            transposed);
    const Product product{p_.brgemm, p_.y, p_.width, transposed, lanes, room};
    Visitor visitor(p_, worker, begin, rows, lanes);
    const int64_t end = std::min((part + 1) * part_, p_.n);
    for (int64_t j = part * part_; j < end && !failed_; j += cols_) {
      const int64_t cols = std::min(cols_, end - j);
      product.multiply(product.tile(j, cols), cols, t, t);
      visitor.visit(t, j, cols);
    }
    visitor.finish();
    const std::lock_guard<std::mutex> lock(mutex_);
    visitor.merge();
  }

  const Problem& p_;
  int64_t rows_, strips_, cols_, part_, parts_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
};

// Makes the bounds of the errors of Scanner's products with lines up to a norm.
template <class In, class Op, class T>
Bands<T> bands_of(const Scan& p, double largest_other) {
  constexpr bool kNarrow = sizeof(Op) < sizeof(T);
  const double rounding = p.brgemm || sizeof(T) == sizeof(double) ? 0 : p.rounding;
  return {p.width, kNarrow ? p.width : FirstProduct<In, Op, T>::kChain, rounding, largest_other};
}

// Lanes that hold queries, as a mask of a register's lanes from lane i on.
template <class T>
FASTCLIP_INLINE typename Integers<V<T>>::type lanes_below(int64_t i, int64_t rows) {
  typename Integers<V<T>>::type lanes{};
  for (int64_t q = 0; q < kWidth<T>; q++) lanes[q] = i + q < rows ? -1 : 0;
  return lanes;
}

// A mask as bits, one a lane.
template <class T>
FASTCLIP_INLINE uint32_t bits_of(const typename Integers<V<T>>::type& mask) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4)
    return _mm512_movepi32_mask(reinterpret_cast<const __m512i&>(mask));
  else
    return _mm512_movepi64_mask(reinterpret_cast<const __m512i&>(mask));
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4)
    return _mm256_movemask_ps(reinterpret_cast<const __m256&>(mask));
  else
    return _mm256_movemask_pd(reinterpret_cast<const __m256d&>(mask));
#else
  uint32_t bits = 0;
  for (int64_t q = 0; q < kWidth<T>; q++) bits |= uint32_t(mask[q] & 1) << q;
  return bits;
#endif
}

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
