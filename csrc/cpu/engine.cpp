// The streaming engine on CPU threads: sweep, weigh, or both in one go, for any M, N, D and offset.
//
// The rows are cut into strips, the columns into tiles. A thread takes a strip, keeps its features (transposed), its
// statistics and its gradient in its core's L2 cache, and visits the tiles in order:
//     t = y_tile x_strip^T            one product, and one more of the targets
//     fold, or w = weights of t       fold.h
//     v_tile += w x_strip             second product
//     u_strip += w^T y_tile           third product
// Strips update a tile's column statistics and v one after another: at each tile, strip k waits until strip k - 1 has
// left it. The order of every sum is therefore the same for any number of threads, nothing is added atomically, and
// besides the outputs the engine needs only a few MiB per thread.
#include <ATen/Parallel.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "complete_row.h"
#include "first_product.h"
#include "fold.h"
#include "gemm.h"
#include "norms.h"
#include "pack.h"
#include "positives.h"
#include "problem.h"
#include "row_strip.h"
#include "tile_columns.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

unsigned options_of(const Problem& p) {
  const bool has_biases = p.x.key_bias || p.y.key_bias || p.same_id_positive;
  return (p.guided ? kGuide : 0) | (p.x.ids ? kIds : 0) | (p.x.threshold ? kThresholds : 0) |
         (has_biases ? kBiases : 0);
}

template <class In, class Op, class T>
class Engine {
  using Strip = RowStrip<In, Op, T>;
  using Product = FirstProduct<In, Op, T>;
  static constexpr bool kNarrow = sizeof(Op) < sizeof(T);  // bf16 products
  static constexpr bool kDirect = std::is_same_v<In, Op>;  // features are operands as they are
  static constexpr int64_t kSpins = 1 << 15;               // about half a millisecond

 public:
  explicit Engine(Problem& p)
      : p_(p),
        tile_(tile_cols(p, row_bytes<T>(p), kNarrow)),
        strips_(p, tile_),
        count_(strips_.count()),
        tiles_((p.y.rows + tile_ - 1) / tile_),
        options_(options_of(p)),
        passed_(new std::atomic<int64_t>[tiles_]),
        totals_(new Sum[2 * count_]) {
    for (int64_t j = 0; j < tiles_; j++) passed_[j].store(0, std::memory_order_relaxed);
  }

  int run() {
    const int64_t threads = std::min<int64_t>(at::get_num_threads(), count_);
    at::parallel_for(0, threads, 1, [this](int64_t begin, int64_t end) {
      for (; begin < end; begin++) work();
    });
    if (error_) std::rethrow_exception(error_);
    for (int q = 0; q < 2; q++) {
      Sum all;
      for (int64_t k = 0; k < count_; k++) all.add(totals_[2 * k + q].value), all.add(totals_[2 * k + q].lost);
      p_.totals[q] = all.value + all.lost;
    }
    return workers_;
  }

 private:
  void work() noexcept {
    bool joined = false;
    try {
      for (int64_t k; !failed_ && (k = next_++) < count_;) {
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

  // Waits until strip k - 1 has left tile j: rarely more than a tile's time, a fifth of a millisecond. Yielding sooner
  // would give the core to any idle-priority process for milliseconds.
  void wait(int64_t j, int64_t k) const {
    for (int64_t spins = 0; passed_[j].load(std::memory_order_acquire) < k; spins++) {
      if (failed_) throw std::runtime_error("another thread of the engine failed");
      if (spins > kSpins) std::this_thread::yield();
#if FASTCLIP_X86
      __builtin_ia32_pause();
#endif
    }
  }

  Product ours(const Strip& b) const {
    return {p_.brgemm, features_of(p_.y), p_.width, b.transposed, b.lanes, b.tile_rows};
  }
  Product of_targets(const Strip& b) const {
    return {p_.brgemm, p_.y.target, p_.target_width, b.target_transposed, b.lanes, b.target_rows};
  }

  void march(int64_t k) {
    const Strip strip = strips_.open(k);
    for (int64_t j = 0; j < tiles_; j++) {
      const int64_t begin = j * tile_, cols = std::min(tile_, p_.y.rows - begin);
      const Product product = ours(strip);
      const Operand<Op> y = product.tile(begin, cols);
      TileColumns columns;
      Tile<T> tile = make_tile(strip, begin, cols, columns);
      if (!strip.kept || !p_.kept_ready) product.multiply(y, cols, strip.products, const_cast<T*>(tile.t));
      if (p_.target_width) multiply_targets(strip, begin, cols);
      transform(tile);
      if (p_.teacher.is_given) transform_by_teacher(teacher_tile(strip, begin, tile, columns));

      wait(j, k);
      merge_columns(p_, k, begin, cols, columns);
      if (v_wanted(p_)) add_to_columns(strip, tile, begin);
      passed_[j].store(k + 1, std::memory_order_release);

      if (u_wanted(p_)) add_to_rows(strip, tile, begin, y);
    }
    close(strip);
  }

  const In* y_features(int64_t begin) const { return static_cast<const In*>(p_.y.features) + begin * p_.y.stride; }

  Tile<T> make_tile(const Strip& b, int64_t begin, int64_t cols, TileColumns& columns) const {
    const Side& y = p_.y;
    Tile<T> tile;
    tile.t = b.kept ? static_cast<T*>(p_.kept) + b.begin * y.rows + begin * b.lanes : b.products;
    // With positives by id or a teacher, weights are made from t in several passes (negatives first), so w must not
    // overwrite t.
    tile.w = b.kept || p_.same_id_positive || p_.teacher.is_given ? b.weights : b.products;
    tile.lanes = b.lanes, tile.rows = b.rows, tile.cols = cols;
    tile.first_lane = begin - p_.offset - b.begin;
    tile.row_factor = b.factors;
    tile.col_factor = y.factor ? static_cast<const T*>(y.factor) + begin : nullptr;
    tile.scale_log2 = p_.scale * kLog2E, tile.bias_log2 = p_.bias * kLog2E;
    tile.counts = b.counts, tile.scratch = b.scratch;
    tile.totals = totals_.get() + 2 * b.k;
    tile.shift = T(p_.shift), tile.running_maxima = p_.running_maxima, tile.one_shift = p_.one_shift;
    if (p_.guided) tile.other = target_products(b, begin);
    if (p_.fold) {
      tile.positive = p_.positive + (p_.positives_by_column ? begin : b.begin);
      tile.positives_by_column = p_.positives_by_column;
    }
    set_lines(tile.negatives, b, p_.x.negatives, y.negatives, b.negatives, begin, columns.negatives);
    if (p_.same_id_positive)
      set_lines(tile.positives, b, p_.x.positives, y.positives, b.positives, begin, columns.positives);
    tile.row_ids = b.ids, tile.row_threshold = b.thresholds;
    tile.row_bias_whole = b.bias_whole, tile.row_bias_part = b.bias_part;
    if (y.ids) tile.col_ids = y.ids + begin;
    if (y.threshold) tile.col_threshold = static_cast<const T*>(y.threshold) + begin;
    if (y.key_bias) tile.col_bias = y.key_bias + begin;
    if (p_.x.key_bias_sum) tile.row_weights = p_.x.key_bias_sum + b.begin;
    if (y.key_bias_sum) {
      tile.col_weights = columns.weights;
      std::fill_n(columns.weights, cols, 0.);
    }
    return tile;
  }

  void set_lines(TileLines<T>& out, const Strip& b, const Lines& x, const Lines& y, const LaneLines<T>& rows,
                 int64_t begin, ColumnStates& columns) const {
    if (p_.fold) {
      out.row_shift = x.shift + b.begin, out.row_sum = x.sum + b.begin;
      out.col_shift = columns.shift, out.col_sum = columns.sum;
      out.row_moment = x.moment ? x.moment + b.begin : nullptr, out.col_moment = columns.moment;
    }
    if (y.coefficients) out.a = rows.coefficients, out.b = static_cast<const T*>(y.coefficients) + begin;
    if (y.shifts) out.row_shifts = rows.shifts, out.col_shifts = static_cast<const T*>(y.shifts) + begin;
  }

  void multiply_targets(const Strip& b, int64_t begin, int64_t cols) const {
    const Product product = of_targets(b);
    product.multiply(product.tile(begin, cols), cols, b.target_products, b.target_products);
  }

  Products<T> target_products(const Strip& b, int64_t begin) const {
    const T* const factor = static_cast<const T*>(p_.y.target.factor);
    return {b.target_products, b.target_factors, factor ? factor + begin : nullptr};
  }

  // The same tile with the teacher's products in the place of ours, and all its pairs as negatives.
  Tile<T> teacher_tile(const Strip& b, int64_t begin, const Tile<T>& ours, TileColumns& columns) const {
    Tile<T> tile = ours;
    const Products<T> products = target_products(b, begin);
    tile.t = products.t, tile.row_factor = products.row_factor, tile.col_factor = products.col_factor;
    tile.other = {ours.t, ours.row_factor, ours.col_factor};
    tile.first_lane = -kMostCols - 1;  // no own positives
    tile.scale_log2 = p_.teacher.scale * kLog2E, tile.bias_log2 = 0;
    tile.shift = T(p_.teacher.shift);
    tile.running_maxima = p_.teacher.running_maxima, tile.one_shift = p_.teacher.one_shift;
    set_lines(tile.negatives, b, p_.x.teacher, p_.y.teacher, b.teacher, begin, columns.teacher);
    return tile;
  }

  // v_tile += w x_strip. The last strip completes the gradient.
  void add_to_columns(const Strip& b, const Tile<T>& tile, int64_t begin) const {
    const Op* w = nullptr;
    if constexpr (std::is_same_v<Op, T>) w = tile.w;
    if (kNarrow || p_.x.factor) {
      pack_weights(tile.w, b.lanes, tile.cols, b.factors, b.weights_v);
      w = b.weights_v;
    }
    Operand<Op> x{b.operand, p_.width};
    if constexpr (kDirect && !kNarrow) x = {b.features, p_.x.stride};
    T* const v = static_cast<T*>(p_.y.accumulator) + begin * p_.width;
    gemm(p_.brgemm, b.k > 0, tile.cols, p_.width, kNarrow ? b.lanes : b.rows, w, b.lanes, x.rows, x.stride, v,
         p_.width);
    add_positives_to_columns(p_, b, begin, tile.cols, v);
    if (b.k == count_ - 1)
      for (int64_t c = 0; c < tile.cols; c++) complete_row<In>(p_, p_.y, begin + c, v + c * p_.width);
  }

  // u_strip += w^T y_tile
  void add_to_rows(const Strip& b, const Tile<T>& tile, int64_t begin, const Operand<Op>& y_rows) const {
    const int64_t inner = round_up(tile.cols, kPair<Op>), stride = round_up(tile.cols, kLane);
    pack_weights_transposed(tile.w, b.lanes, tile.cols, tile.col_factor, b.weights_u, stride);
    Operand<Op> y = y_rows;
    if constexpr (kNarrow) {
      pack_pairs(y_features(begin), p_.y.stride, tile.cols, inner, p_.width, b.tile_pairs);
      y = {b.tile_pairs, p_.width};
    }
    gemm(p_.brgemm, begin > 0, b.rows, p_.width, inner, b.weights_u, stride, y.rows, y.stride, b.u, p_.width);
  }

  void close(const Strip& b) const {
    if (p_.weigh) add_positives_to_totals(p_, b, totals_.get() + 2 * b.k);
    if (!u_wanted(p_)) return;
    add_positives_to_rows(p_, b);
    for (int64_t i = 0; i < b.rows; i++) complete_row<In>(p_, p_.x, b.begin + i, b.u + i * p_.width);
  }

  void transform(const Tile<T>& tile) const {
    for_kind(p_.kind, [&](auto kind) {
      using Kind = decltype(kind);
      switch (options_) {
        case 0:
          return apply<Kind, Plain>(tile);
        case kIds:
          return apply<Kind, Distinct>(tile);
        case kThresholds:
          return apply<Kind, Within>(tile);
        default:
          if (p_.guided)
            apply<Kind, Guided>(tile);
          else
            apply<Kind, Negatives>(tile);
          if (p_.same_id_positive) apply<Kind, Positives>(tile);
      }
    });
  }

  // A teacher's weights are those of a softmax, whatever our kind is.
  void transform_by_teacher(const Tile<T>& tile) const { apply<Softmax, Taught>(tile); }

  template <class Kind, template <class> class Pairs>
  void apply(const Tile<T>& tile) const {
    if constexpr (Kind::kHasLevels) {
      if constexpr (Pairs<T>::kPositives) return;
      p_.fold ? fold_tile_with_levels<Kind, Pairs>(tile) : weigh_tile<Kind, Pairs, false>(tile);
    } else if (p_.fold && p_.weigh) {
      if constexpr (Kind::kIsLinear && std::is_same_v<Pairs<T>, Plain<T>>) fold_tile<Kind, Pairs, true>(tile);
    } else if (p_.fold) {
      if constexpr (Kind::kHasShift)
        if (tile.running_maxima) return fold_tile_running<Kind, Pairs>(tile);
      fold_tile<Kind, Pairs, false>(tile);
    } else {
      if constexpr (Kind::kHasShift)
        if (!tile.one_shift) return weigh_tile<Kind, Pairs, false>(tile);
      weigh_tile<Kind, Pairs, true>(tile);
    }
  }

  Problem& p_;
  const int64_t tile_;
  const RowStrips<In, Op, T> strips_;
  const int64_t count_, tiles_;
  const unsigned options_;
  std::unique_ptr<std::atomic<int64_t>[]> passed_;  // number of strips that have left each tile
  std::unique_ptr<Sum[]> totals_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> workers_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
};

}  // namespace

double largest_norm(const Features& x, int64_t rows, int64_t width, Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return std::sqrt(largest_norm_of<double, double>(x, rows, width));
    case Dtype::kFloat:
      return std::sqrt(largest_norm_of<float, float>(x, rows, width));
    case Dtype::kHalf:
      return std::sqrt(largest_norm_of<at::Half, float>(x, rows, width));
    case Dtype::kBFloat16:
      return std::sqrt(largest_norm_of<at::BFloat16, float>(x, rows, width));
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
      if (problem.bf16_products) return Engine<at::BFloat16, at::BFloat16, float>(problem).run();
      return Engine<at::BFloat16, float, float>(problem).run();
  }
  return 0;
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
