// The streaming engine on CPU threads: sweep, weigh, or both in one go, for any M, N, D and offset.
//
// The rows are cut in blocks, the columns in tiles. A thread takes a block, keeps its features (transposed), its
// statistics and its gradient in its own L2 cache, and marches over the tiles:
//     t = y_tile x_block^T            one product
//     fold, or w = weights of t       tile_cpu.h
//     v_tile += w x_block             second product
//     u_block += w^T y_tile           third product
// What belongs to a tile (column statistics, v) is touched by one block after the other: block k waits at each tile
// until block k - 1 has left it. So the order of every sum is fixed, whatever the number of threads, nothing is added
// atomically, and besides the outputs only a few MiB per thread exist.
#include <ATen/Parallel.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "engine.h"
#include "gemm_cpu.h"
#include "pack_cpu.h"
#include "tile_cpu.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

// Work space of one thread, kept from call to call: fresh pages would cost more than a small loss.
class Arena {
 public:
  ~Arena() { std::free(base_); }
  void reset(int64_t bytes) {
    if (bytes > size_) {
      std::free(base_);
      size_ = 0;
      base_ = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)));
      if (!base_) throw std::bad_alloc();
      size_ = bytes;
    }
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    T* const p = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * int64_t(sizeof(T)), 64);
    return p;
  }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};
thread_local Arena arena;

constexpr int64_t kMostCols = 256;

// Rows to a block and columns to a tile: enough of them to share, few enough for each to be worth its transposition and
// its visits to v, and small enough that what a block keeps stays in a 2 MiB L2 cache (a 1 MiB one costs 3 %). bf16
// products are so fast that visits count more. Functions of the sizes alone, so that results do not depend on the
// number of threads.
int64_t block_rows(int64_t rows, bool narrow) {
  return std::clamp<int64_t>(round_up(rows / 16, kLane), 64, narrow ? 512 : 128);
}
int64_t tile_cols(int64_t cols, bool narrow) { return cols < 1024 ? 64 : narrow ? kMostCols : 128; }

template <class Out, class T>
void store_row(const T* g, T scale, int64_t width, Out* out) {
  for (int64_t d = 0; d < width; d++) out[d] = cast_to<Out>(g[d] * scale);
}

// One row of a gradient, complete: gain, the normalisation's Jacobian, the output's dtype.
template <class In, class T>
void finish_row(const Problem& p, const Side& side, int64_t row, const T* g) {
  const int64_t width = p.width;
  T scale = T(p.gain * p.scale);
  const T factor = side.factor ? static_cast<const T*>(side.factor)[row] : T(1);
  // A norm below 1e-12 was clamped: the features were divided by a constant, and nothing is projected out.
  const bool clamped = !(factor < T(0.9999e12));
  const In* const x = static_cast<const In*>(side.features) + row * side.stride;
  char* const base = static_cast<char*>(side.gradient);
  if (p.project) scale *= factor;
  // 1e12 times anything overflows fp16: there a zero row has no gradient rather than an infinite one.
  if (p.project && clamped && (std::is_same_v<In, at::Half> || side.gradient_dtype == Dtype::kHalf)) scale = 0;
  if (p.project && !clamped) {
    double along = 0;
    T partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t d = 0; d < width; d++) partial += g[d] * cast_to<T>(x[d]);
    along = double(partial) * factor * factor;
    T* const projected = const_cast<T*>(g);
    for (int64_t d = 0; d < width; d++) projected[d] -= T(along) * cast_to<T>(x[d]);
  }
  switch (side.gradient_dtype) {
    case Dtype::kDouble:
      return store_row(g, scale, width, reinterpret_cast<double*>(base) + row * width);
    case Dtype::kFloat:
      return store_row(g, scale, width, reinterpret_cast<float*>(base) + row * width);
    case Dtype::kBFloat16:
      return store_row(g, scale, width, reinterpret_cast<at::BFloat16*>(base) + row * width);
    case Dtype::kHalf:
      return store_row(g, scale, width, reinterpret_cast<at::Half*>(base) + row * width);
  }
}

template <class In, class Op, class T>
class Engine {
  static constexpr bool kNarrow = sizeof(Op) < sizeof(T);  // bf16 products
  static constexpr bool kDirect = std::is_same_v<In, Op>;  // features are operands as they are
  static constexpr int64_t kChain = 128;                   // terms summed in one go

 public:
  explicit Engine(Problem& p)
      : p_(p),
        block_(block_rows(p.x.rows, kNarrow)),
        tile_(tile_cols(p.y.rows, kNarrow)),
        blocks_((p.x.rows + block_ - 1) / block_),
        tiles_((p.y.rows + tile_ - 1) / tile_),
        passed_(new std::atomic<int64_t>[tiles_]),
        totals_(new Sum[2 * blocks_]) {
    for (int64_t j = 0; j < tiles_; j++) passed_[j].store(0, std::memory_order_relaxed);
  }

  int run() {
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), blocks_);
    at::parallel_for(0, threads, 1, [this](int64_t begin, int64_t end) {
      for (; begin < end; begin++) work();
    });
    if (error_) std::rethrow_exception(error_);
    for (int q = 0; q < 2; q++) {
      Sum all;
      for (int64_t k = 0; k < blocks_; k++) all.add(totals_[2 * k + q].value), all.add(totals_[2 * k + q].lost);
      p_.totals[q] = all.value + all.lost;
    }
    return workers_;
  }

 private:
  void work() noexcept {
    bool joined = false;
    try {
      for (int64_t k; !failed_ && (k = next_++) < blocks_;) {
        if (!joined) workers_++;
        joined = true;
        march(k);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
    if (joined && p_.brgemm) at::native::cpublas::brgemm_release(kNarrow);
  }

  // Until block k - 1 has left tile j.
  void wait(int64_t j, int64_t k) const {
    for (int spins = 0; passed_[j].load(std::memory_order_acquire) < k; spins++) {
      if (failed_) throw std::runtime_error("another thread of the engine failed");
      if (spins > 4096) std::this_thread::yield();
    }
  }

  void march(int64_t k) {
    const Side &x = p_.x, &y = p_.y;
    const int64_t width = p_.width, depth = round_up(width, kPair<Op>), i0 = k * block_;
    const int64_t rows = std::min(block_, x.rows - i0), lanes = round_up(rows, kLane);
    const bool u_wanted = p_.weigh && x.gradient, v_wanted = p_.weigh && y.gradient;
    const In* const features = static_cast<const In*>(x.features) + i0 * x.stride;
    const bool kept = i0 + rows <= p_.kept_rows;
    const bool multiply = !(kept && p_.kept_ready);

    arena.reset(sizeof(T) * (2 * tile_ * lanes + rows * width + 6 * lanes) +
                sizeof(Op) * (2 * lanes * depth + 2 * tile_ * (lanes + depth)) + 4096);
    Op* const transposed = arena.take<Op>(depth * lanes);
    Op* const operand = arena.take<Op>(lanes * depth);  // of the second product, unless the features serve
    T* const products = arena.take<T>(tile_ * lanes);
    T* const weights = arena.take<T>(tile_ * lanes);
    Op* const weights_v = arena.take<Op>(tile_ * lanes);
    Op* const weights_u = arena.take<Op>(lanes * round_up(tile_, kLane));
    Op* const tile_rows = arena.take<Op>(tile_ * depth);
    Op* const tile_pairs = arena.take<Op>(tile_ * width);
    T* const u = arena.take<T>(rows * width);
    T* const factors = arena.take<T>(lanes);
    T* const counts = arena.take<T>(lanes);
    T* const coefficients = arena.take<T>(lanes);
    T* const references = arena.take<T>(lanes);
    T* const scratch = arena.take<T>(2 * lanes);

    const T* const given = static_cast<const T*>(x.factor);
    const bool coefficients_given = p_.weigh && !p_.fold;
    for (int64_t i = 0; i < lanes; i++) {
      const int64_t row = i0 + std::min(i, rows - 1);
      factors[i] = given ? given[row] : T(1);
      counts[i] = i < rows;
      coefficients[i] = coefficients_given ? static_cast<const T*>(x.coefficients)[row] : T(1);
      references[i] = coefficients_given ? static_cast<const T*>(x.references)[row] : T(0);
    }
    if (multiply) pack_transposed<In, Op>(features, x.stride, rows, width, lanes, transposed);
    if (v_wanted) {
      if constexpr (kNarrow)
        pack_pairs(features, x.stride, rows, lanes, width, operand);
      else if constexpr (!kDirect)
        pack_rows<In, Op>(features, x.stride, rows, width, operand, width);
    }
    if (p_.fold)
      for (int64_t i = i0; i < i0 + rows; i++) {
        x.reference[i] = p_.running_maxima ? -std::numeric_limits<double>::infinity() : p_.reference;
        x.sum[i] = 0;
      }

    for (int64_t j = 0; j < tiles_; j++) {
      const int64_t j0 = j * tile_, cols = std::min(tile_, y.rows - j0);
      const In* const y_rows = static_cast<const In*>(y.features) + j0 * y.stride;
      const Op* a = nullptr;
      int64_t lda = 0;
      if constexpr (kDirect) {
        a = y_rows, lda = y.stride;
      }
      if (!kDirect || depth != width) {
        pack_rows<In, Op>(y_rows, y.stride, cols, width, tile_rows, depth);
        a = tile_rows, lda = depth;
      }
      T* const t = kept ? static_cast<T*>(p_.kept) + i0 * y.rows + j0 * lanes : products;
      if (multiply)
        // In pieces of D: a sum of 512 terms in one fp32 chain loses twice as much as four of 128, and at scale 100 an
        // error in t is a hundred times as large in the exponential. bf16 rounds more than that, and wants long chains.
        for (int64_t d = 0, piece = kNarrow ? depth : kChain; d < depth; d += piece)
          gemm(p_.brgemm, d > 0, cols, lanes, std::min(piece, depth - d), a + d, lda, transposed + d * lanes, lanes, t,
               lanes);

      Tile<T> tile;
      tile.t = t;
      tile.lanes = lanes, tile.rows = rows, tile.cols = cols;
      tile.first_lane = j0 - p_.offset - i0;
      tile.row_factor = factors;
      tile.col_factor = y.factor ? static_cast<const T*>(y.factor) + j0 : nullptr;
      tile.scale_log2 = p_.scale * kLog2E, tile.bias_log2 = p_.bias * kLog2E;
      tile.counts = counts, tile.scratch = scratch;
      tile.w = kept ? weights : products;
      tile.totals = totals_.get() + 2 * k;
      double reference[kMostCols], sum[kMostCols];
      if (p_.fold) {
        tile.reference = T(p_.reference);
        tile.row_reference = x.reference + i0, tile.row_sum = x.sum + i0;
        tile.col_reference = reference, tile.col_sum = sum;
        tile.positive = p_.positive + (p_.positive_of_y ? j0 : i0);
        tile.positive_of_col = p_.positive_of_y;
      }
      if (coefficients_given) {
        tile.a = coefficients, tile.b = static_cast<const T*>(y.coefficients) + j0;
        tile.row_references = references, tile.col_references = static_cast<const T*>(y.references) + j0;
      }
      transform(tile);

      wait(j, k);
      if (p_.fold) merge_columns(k, j0, cols, reference, sum);
      if (v_wanted) {
        const Op* wv = nullptr;
        if constexpr (std::is_same_v<Op, T>) wv = tile.w;
        if (kNarrow || given) {
          pack_weights(tile.w, lanes, cols, factors, weights_v);
          wv = weights_v;
        }
        const Op* b = operand;
        int64_t ldb = width, inner = kNarrow ? lanes : rows;
        if constexpr (kDirect && !kNarrow) b = features, ldb = x.stride;
        T* const v = static_cast<T*>(y.accumulator) + j0 * width;
        gemm(p_.brgemm, k > 0, cols, width, inner, wv, lanes, b, ldb, v, width);
        add_positives(x, i0, rows, factors, j0, cols, v);
        if (k == blocks_ - 1)
          for (int64_t c = 0; c < cols; c++) finish_row<In>(p_, y, j0 + c, v + c * width);
      }
      passed_[j].store(k + 1, std::memory_order_release);

      if (u_wanted) {
        const int64_t inner = round_up(cols, kPair<Op>), ldw = round_up(cols, kLane);
        pack_weights_transposed(tile.w, lanes, cols, tile.col_factor, weights_u, ldw);
        const Op* b = a;
        int64_t ldb = lda;
        if constexpr (kNarrow) {
          pack_pairs(y_rows, y.stride, cols, inner, width, tile_pairs);
          b = tile_pairs, ldb = width;
        }
        gemm(p_.brgemm, j > 0, rows, width, inner, weights_u, ldw, b, ldb, u, width);
      }
    }
    if (p_.weigh) add_positives_to_totals(i0, rows, totals_.get() + 2 * k);
    if (u_wanted) {
      add_positives_to_rows(i0, rows, u);
      for (int64_t i = 0; i < rows; i++) finish_row<In>(p_, x, i0 + i, u + i * width);
    }
  }

  void transform(const Tile<T>& tile) const {
    const bool softmax = p_.loss == Loss::kSoftmax;
    if (p_.fold && p_.weigh) return fold_tile<Sigmoid, true>(tile);
    if (p_.fold && p_.running_maxima) return fold_tile_running<Softmax>(tile);
    if (p_.fold) return softmax ? fold_tile<Softmax, false>(tile) : fold_tile<Sigmoid, false>(tile);
    if (!softmax) return weigh_tile<Sigmoid, true>(tile);
    return p_.one_reference ? weigh_tile<Softmax, true>(tile) : weigh_tile<Softmax, false>(tile);
  }

  void merge_columns(int64_t k, int64_t j0, int64_t cols, const double* reference, const double* sum) const {
    for (int64_t c = 0; c < cols; c++) {
      double &m = p_.y.reference[j0 + c], &s = p_.y.sum[j0 + c];
      const double other = p_.running_maxima ? reference[c] : p_.reference;
      if (k == 0) {
        m = other, s = sum[c];
      } else if (other == m || sum[c] == 0) {
        s += sum[c];
      } else if (s == 0) {
        m = other, s = sum[c];
      } else {
        const double top = other > m ? other : m;
        s = s * std::exp2(m - top) + sum[c] * std::exp2(other - top);
        m = top;
      }
    }
  }

  // dL/ds of pair (i, j = i + offset), whichever side it is indexed by; in one go it comes from the product just made.
  T positive_weight(int64_t i, int64_t j) const {
    const int64_t q = p_.positive_of_y ? j : i;
    if (p_.fold) {
      const Affine<T> flipped(-p_.scale * kLog2E, -p_.bias * kLog2E);
      return -Sigmoid::activation(T(p_.positive[q]), flipped, T(0));
    }
    return T(p_.positive_weight[q]);
  }

  void add_positives(const Side& x, int64_t i0, int64_t rows, const T* factors, int64_t j0, int64_t cols, T* v) const {
    for (int64_t c = 0; c < cols; c++) {
      const int64_t i = j0 + c - p_.offset;
      if (i < i0 || i >= i0 + rows) continue;
      const T weight = positive_weight(i, j0 + c) * factors[i - i0];
      const In* const f = static_cast<const In*>(x.features) + i * x.stride;
      for (int64_t d = 0; d < p_.width; d++) v[c * p_.width + d] += weight * cast_to<T>(f[d]);
    }
  }

  void add_positives_to_totals(int64_t i0, int64_t rows, Sum* totals) const {
    for (int64_t i = i0; i < i0 + rows; i++) {
      const int64_t j = i + p_.offset;
      if (j < 0 || j >= p_.y.rows) continue;
      const double weight = positive_weight(i, j);
      totals[0].add(weight);
      totals[1].add(weight * p_.positive[p_.positive_of_y ? j : i]);
    }
  }

  void add_positives_to_rows(int64_t i0, int64_t rows, T* u) const {
    for (int64_t i = i0; i < i0 + rows; i++) {
      const int64_t j = i + p_.offset;
      if (j < 0 || j >= p_.y.rows) continue;
      const T factor = p_.y.factor ? static_cast<const T*>(p_.y.factor)[j] : T(1);
      const T weight = positive_weight(i, j) * factor;
      const In* const f = static_cast<const In*>(p_.y.features) + j * p_.y.stride;
      for (int64_t d = 0; d < p_.width; d++) u[(i - i0) * p_.width + d] += weight * cast_to<T>(f[d]);
    }
  }

  Problem& p_;
  const int64_t block_, tile_, blocks_, tiles_;
  std::unique_ptr<std::atomic<int64_t>[]> passed_;  // blocks that have left each tile
  std::unique_ptr<Sum[]> totals_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> workers_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
};

template <class T, class In>
T squared_norm(const In* x, int64_t width) {
  T square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < width; d++) {
    const T v = cast_to<T>(x[d]);
    square += v * v;
  }
  return square;
}

template <class In, class T>
double largest_norm_of(const Side& side, int64_t width) {
  const In* const x = static_cast<const In*>(side.features);
  return at::parallel_reduce(
      0, side.rows, at::divup(1 << 15, width), 0.0,
      [&](int64_t begin, int64_t end, double largest) {
        for (int64_t i = begin; i < end; i++) {
          const double square = squared_norm<T>(x + i * side.stride, width);
          if (!(square <= largest)) largest = square;  // NaN stays
        }
        return largest;
      },
      [](double a, double b) { return a <= b ? b : a; });
}

}  // namespace

double largest_norm(const Side& side, const Problem& p) {
  switch (p.dtype) {
    case Dtype::kDouble:
      return std::sqrt(largest_norm_of<double, double>(side, p.width));
    case Dtype::kFloat:
      return std::sqrt(largest_norm_of<float, float>(side, p.width));
    case Dtype::kHalf:
      return std::sqrt(largest_norm_of<at::Half, float>(side, p.width));
    case Dtype::kBFloat16:
      return std::sqrt(largest_norm_of<at::BFloat16, float>(side, p.width));
  }
  return 0;
}

int run(Problem& problem) {
  switch (problem.dtype) {
    case Dtype::kDouble:
      return Engine<double, double, double>(problem).run();
    case Dtype::kFloat:
      return Engine<float, float, float>(problem).run();
    case Dtype::kHalf:
      return Engine<at::Half, float, float>(problem).run();
    case Dtype::kBFloat16:
      if (problem.half_products) return Engine<at::BFloat16, at::BFloat16, float>(problem).run();
      return Engine<at::BFloat16, float, float>(problem).run();
  }
  return 0;
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
