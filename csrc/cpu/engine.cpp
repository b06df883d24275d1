// The streaming engine on CPU threads: sweep, weigh, or both in one go, for any M, N, D and offset.
//
// The rows are cut in blocks, the columns in tiles. A thread takes a block, keeps its features (transposed), its
// statistics and its gradient in its own L2 cache, and marches over the tiles:
//     t = y_tile x_block^T            one product
//     fold, or w = weights of t       fold.h
//     v_tile += w x_block             second product
//     u_block += w^T y_tile           third product
// What belongs to a tile (column statistics, v) is touched by one block after the other: block k waits at each tile
// until block k - 1 has left it. So the order of every sum is fixed, whatever the number of threads, nothing is added
// atomically, and besides the outputs only a few MiB per thread exist.
#include "../engine.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "fold.h"
#include "gemm.h"
#include "pack.h"
#include "rows.h"

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
// its visits to v, and small enough that what a block keeps stays in its core's L2 cache: at D = 512 and 2 MiB, 256
// rows take 5 % less time than 128. bf16 products are so fast that visits count more. Nothing here depends on the
// number of threads, on the product or on the instruction set: neither do the order of sums and the layout of kept
// products.
int64_t block_rows(const Problem& p, int64_t row_bytes) {
  const int64_t fit = p.cache_bytes / 4 / row_bytes / 64 * 64;
  const int64_t most = p.dtype == Dtype::kBFloat16 ? 512 : std::clamp<int64_t>(fit, 128, 256);
  return std::clamp<int64_t>(round_up(p.x.rows / 16, kLane), 64, most);
}
int64_t tile_cols(const Problem& p, int64_t row_bytes, bool narrow) {
  if (p.y.rows < 1024) return 64;
  if (narrow) return kMostCols;
  return 128 * row_bytes <= p.cache_bytes / 16 * 3 ? 128 : 64;
}

unsigned options_of(const Problem& p) {
  const bool has_biases = p.x.key_bias || p.y.key_bias || p.same_id_positive;
  return (p.x.ids ? kIds : 0) | (p.x.threshold ? kThresholds : 0) | (has_biases ? kBiases : 0);
}

template <class In, class Op, class T>
class Engine {
  static constexpr bool kNarrow = sizeof(Op) < sizeof(T);  // bf16 products
  static constexpr bool kDirect = std::is_same_v<In, Op>;  // features are operands as they are
  static constexpr int64_t kChain = 128;                   // terms summed in one go
  static constexpr int64_t kSpins = 1 << 15;               // about half a millisecond

 public:
  explicit Engine(Problem& p)
      : p_(p),
        block_(block_rows(p, p.width * int64_t(sizeof(T)))),
        tile_(tile_cols(p, p.width * int64_t(sizeof(T)), kNarrow)),
        blocks_((p.x.rows + block_ - 1) / block_),
        tiles_((p.y.rows + tile_ - 1) / tile_),
        options_(options_of(p)),
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

  // Until block k - 1 has left tile j: rarely more than a tile's time, a fifth of a millisecond. Yielding sooner would
  // hand the core to any idle-priority process for milliseconds.
  void wait(int64_t j, int64_t k) const {
    for (int64_t spins = 0; passed_[j].load(std::memory_order_acquire) < k; spins++) {
      if (failed_) throw std::runtime_error("another thread of the engine failed");
      if (spins > kSpins) std::this_thread::yield();
#if FASTCLIP_X86
      __builtin_ia32_pause();
#endif
    }
  }

  // Coefficients and references of the rows of a block, for the weights of a set of pairs.
  struct LaneLines {
    T *coefficients, *references;
  };

  // A block of rows and what a thread holds of it while it marches over the tiles.
  struct Block {
    int64_t k, begin, rows, lanes;
    const In* features;  // of the block
    bool kept;           // its products are, or are to be
    Op* transposed;      // operand of the first product
    Op* operand;         // of the second, unless the features serve
    T *factors, *counts, *scratch;
    LaneLines negatives, positives;
    Integer<T>* ids;  // null where there are none; so are those that follow
    T *thresholds, *bias_whole, *bias_part;
    T *products, *weights;  // of one tile
    Op *weights_v, *weights_u;
    Op *tile_rows, *tile_pairs;
    T* u;  // (rows, D)
  };

  // Rows of y that a tile multiplies with.
  struct Operand {
    const Op* rows;
    int64_t stride;
  };

  // Sums of the columns of a tile, to be added to those of the blocks before.
  struct Found {
    double reference[2][kMostCols], sum[2][kMostCols];  // of negatives, of positives by id
    double weights[kMostCols];
  };

  void march(int64_t k) {
    const Block block = open(k);
    for (int64_t j = 0; j < tiles_; j++) {
      const int64_t begin = j * tile_, cols = std::min(tile_, p_.y.rows - begin);
      const Operand y = tile_operand(block, begin, cols);
      Found columns;
      Tile<T> tile = make_tile(block, begin, cols, columns);
      multiply(block, tile, y);
      transform(tile);

      wait(j, k);
      merge_columns(k, begin, cols, columns);
      if (v_wanted()) add_to_columns(block, tile, begin);
      passed_[j].store(k + 1, std::memory_order_release);

      if (u_wanted()) add_to_rows(block, tile, begin, y);
    }
    close(block);
  }

  bool u_wanted() const { return p_.weigh && p_.x.gradient; }
  bool v_wanted() const { return p_.weigh && p_.y.gradient; }
  bool weighs_by_state() const { return p_.weigh && !p_.fold; }
  int64_t depth() const { return round_up(p_.width, kPair<Op>); }

  Block open(int64_t k) const {
    const Side& x = p_.x;
    Block b;
    b.k = k, b.begin = k * block_;
    b.rows = std::min(block_, x.rows - b.begin), b.lanes = round_up(b.rows, kLane);
    b.features = static_cast<const In*>(x.features) + b.begin * x.stride;
    b.kept = b.begin + b.lanes <= p_.kept_rows;

    const int64_t lanes = b.lanes, width = p_.width;
    arena.reset(sizeof(T) * (2 * tile_ * lanes + b.rows * width + 12 * lanes) +
                sizeof(Op) * (2 * lanes * depth() + 2 * tile_ * (lanes + depth())) + 8192);
    b.transposed = arena.take<Op>(depth() * lanes);
    b.operand = arena.take<Op>(lanes * depth());
    b.products = arena.take<T>(tile_ * lanes);
    b.weights = arena.take<T>(tile_ * lanes);
    b.weights_v = arena.take<Op>(tile_ * lanes);
    b.weights_u = arena.take<Op>(lanes * round_up(tile_, kLane));
    b.tile_rows = arena.take<Op>(tile_ * depth());
    b.tile_pairs = arena.take<Op>(tile_ * width);
    b.u = arena.take<T>(b.rows * width);
    for (T** const p : {&b.factors, &b.counts}) *p = arena.take<T>(lanes);
    b.scratch = arena.take<T>(2 * lanes);
    for (int64_t i = 0; i < lanes; i++) b.counts[i] = i < b.rows;
    spread(b, x.factor, T(1), b.factors);
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
    if (v_wanted()) {
      if constexpr (kNarrow)
        pack_pairs(b.features, x.stride, b.rows, lanes, width, b.operand);
      else if constexpr (!kDirect)
        pack_rows<In, Op>(b.features, x.stride, b.rows, width, b.operand, width);
    }
    if (p_.fold) {
      clear(b, x.negatives);
      if (p_.same_id_positive) clear(b, x.positives);
    }
    if (x.key_bias_sum) std::fill_n(x.key_bias_sum + b.begin, b.rows, 0.);
    return b;
  }

  // Lanes beyond the last row repeat it.
  int64_t row_of(const Block& b, int64_t lane) const { return b.begin + std::min(lane, b.rows - 1); }

  void spread(const Block& b, const void* values, T if_none, T* out) const {
    for (int64_t i = 0; i < b.lanes; i++) out[i] = values ? static_cast<const T*>(values)[row_of(b, i)] : if_none;
  }

  void open_lines(const Block& b, const Lines& lines, LaneLines& out) const {
    out = {arena.take<T>(b.lanes), arena.take<T>(b.lanes)};
    spread(b, weighs_by_state() ? lines.coefficients : nullptr, T(1), out.coefficients);
    spread(b, weighs_by_state() ? lines.references : nullptr, T(0), out.references);
  }

  void clear(const Block& b, const Lines& lines) const {
    std::fill_n(lines.reference + b.begin, b.rows,
                p_.running_maxima ? -std::numeric_limits<double>::infinity() : p_.reference);
    std::fill_n(lines.sum + b.begin, b.rows, 0.);
  }

  const In* y_features(int64_t begin) const { return static_cast<const In*>(p_.y.features) + begin * p_.y.stride; }

  Operand tile_operand(const Block& b, int64_t begin, int64_t cols) const {
    if constexpr (kDirect)
      if (depth() == p_.width) return {y_features(begin), p_.y.stride};
    pack_rows<In, Op>(y_features(begin), p_.y.stride, cols, p_.width, b.tile_rows, depth());
    return {b.tile_rows, depth()};
  }

  Tile<T> make_tile(const Block& b, int64_t begin, int64_t cols, Found& columns) const {
    const Side& y = p_.y;
    Tile<T> tile;
    tile.t = b.kept ? static_cast<T*>(p_.kept) + b.begin * y.rows + begin * b.lanes : b.products;
    // Weights of positives by id are made of the products after those of the negatives.
    tile.w = b.kept || p_.same_id_positive ? b.weights : b.products;
    tile.lanes = b.lanes, tile.rows = b.rows, tile.cols = cols;
    tile.first_lane = begin - p_.offset - b.begin;
    tile.row_factor = b.factors;
    tile.col_factor = y.factor ? static_cast<const T*>(y.factor) + begin : nullptr;
    tile.scale_log2 = p_.scale * kLog2E, tile.bias_log2 = p_.bias * kLog2E;
    tile.counts = b.counts, tile.scratch = b.scratch;
    tile.totals = totals_.get() + 2 * b.k;
    tile.reference = T(p_.reference);
    if (p_.fold) {
      tile.positive = p_.positive + (p_.positive_of_y ? begin : b.begin);
      tile.positive_of_col = p_.positive_of_y;
    }
    set_lines(tile.negatives, b, p_.x.negatives, y.negatives, b.negatives, begin, columns.reference[0], columns.sum[0]);
    if (p_.same_id_positive)
      set_lines(tile.positives, b, p_.x.positives, y.positives, b.positives, begin, columns.reference[1],
                columns.sum[1]);
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

  void set_lines(TileLines<T>& out, const Block& b, const Lines& x, const Lines& y, const LaneLines& rows,
                 int64_t begin, double* col_reference, double* col_sum) const {
    if (p_.fold) {
      out.row_reference = x.reference + b.begin, out.row_sum = x.sum + b.begin;
      out.col_reference = col_reference, out.col_sum = col_sum;
    }
    if (weighs_by_state()) {
      out.a = rows.coefficients, out.b = static_cast<const T*>(y.coefficients) + begin;
      out.row_references = rows.references, out.col_references = static_cast<const T*>(y.references) + begin;
    }
  }

  // t = y_tile x_block^T, in pieces of D: a sum of 512 terms in one fp32 chain loses twice as much as four of 128, and
  // at scale 100 an error in t is a hundred times as large in the exponential. bf16 rounds more than that, and wants
  // long chains.
  void multiply(const Block& b, const Tile<T>& tile, const Operand& y) const {
    if (b.kept && p_.kept_ready) return;
    const bool ragged = !p_.brgemm && tile.cols % kWhole != 0;
    const int64_t cols = ragged ? round_up(tile.cols, kWhole) : tile.cols;
    const Operand operand = ragged ? padded(b, y, tile.cols, cols) : y;
    T* const t = ragged ? b.products : const_cast<T*>(tile.t);
    for (int64_t d = 0, piece = kNarrow ? depth() : kChain; d < depth(); d += piece)
      gemm(p_.brgemm, d > 0, cols, b.lanes, std::min(piece, depth() - d), operand.rows + d, operand.stride,
           b.transposed + d * b.lanes, b.lanes, t, b.lanes);
    if (t != tile.t) memcpy(const_cast<T*>(tile.t), t, sizeof(T) * tile.cols * b.lanes);
  }

  // BLAS may add up the last rows of a ragged product in an order of their own (MKL on AMD does, with three rows), and
  // a positive would no longer tie with its duplicates: the product gets whole fours, rows of zeros among them.
  static constexpr int64_t kWhole = 4;
  Operand padded(const Block& b, const Operand& y, int64_t cols, int64_t whole) const {
    for (int64_t c = 0; c < whole; c++)
      if (c >= cols)
        std::fill_n(b.tile_rows + c * depth(), depth(), Op(0));
      else if (y.rows != b.tile_rows)
        std::copy_n(y.rows + c * y.stride, depth(), b.tile_rows + c * depth());
    return {b.tile_rows, depth()};
  }

  // v_tile += w x_block; complete once the last block has been here.
  void add_to_columns(const Block& b, const Tile<T>& tile, int64_t begin) const {
    const Op* w = nullptr;
    if constexpr (std::is_same_v<Op, T>) w = tile.w;
    if (kNarrow || p_.x.factor) {
      pack_weights(tile.w, b.lanes, tile.cols, b.factors, b.weights_v);
      w = b.weights_v;
    }
    Operand x{b.operand, p_.width};
    if constexpr (kDirect && !kNarrow) x = {b.features, p_.x.stride};
    T* const v = static_cast<T*>(p_.y.accumulator) + begin * p_.width;
    gemm(p_.brgemm, b.k > 0, tile.cols, p_.width, kNarrow ? b.lanes : b.rows, w, b.lanes, x.rows, x.stride, v,
         p_.width);
    add_positives(b, begin, tile.cols, v);
    if (b.k == blocks_ - 1)
      for (int64_t c = 0; c < tile.cols; c++) finish_row<In>(p_, p_.y, begin + c, v + c * p_.width);
  }

  // u_block += w^T y_tile
  void add_to_rows(const Block& b, const Tile<T>& tile, int64_t begin, const Operand& y_rows) const {
    const int64_t inner = round_up(tile.cols, kPair<Op>), stride = round_up(tile.cols, kLane);
    pack_weights_transposed(tile.w, b.lanes, tile.cols, tile.col_factor, b.weights_u, stride);
    Operand y = y_rows;
    if constexpr (kNarrow) {
      pack_pairs(y_features(begin), p_.y.stride, tile.cols, inner, p_.width, b.tile_pairs);
      y = {b.tile_pairs, p_.width};
    }
    gemm(p_.brgemm, begin > 0, b.rows, p_.width, inner, b.weights_u, stride, y.rows, y.stride, b.u, p_.width);
  }

  void close(const Block& b) const {
    if (p_.weigh) add_positives_to_totals(b, totals_.get() + 2 * b.k);
    if (!u_wanted()) return;
    add_positives_to_rows(b);
    for (int64_t i = 0; i < b.rows; i++) finish_row<In>(p_, p_.x, b.begin + i, b.u + i * p_.width);
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
          apply<Kind, Negatives>(tile);
          if (p_.same_id_positive) apply<Kind, Positives>(tile);
      }
    });
  }

  template <class Kind, template <class> class Pairs>
  void apply(const Tile<T>& tile) const {
    if (p_.fold && p_.weigh) {
      if constexpr (Kind::kIsLinear && std::is_same_v<Pairs<T>, Plain<T>>) fold_tile<Kind, Pairs, true>(tile);
    } else if (p_.fold) {
      if constexpr (Kind::kHasShift)
        if (p_.running_maxima) return fold_tile_running<Kind, Pairs>(tile);
      fold_tile<Kind, Pairs, false>(tile);
    } else {
      if constexpr (Kind::kHasShift)
        if (!p_.one_reference) return weigh_tile<Kind, Pairs, false>(tile);
      weigh_tile<Kind, Pairs, true>(tile);
    }
  }

  void merge_columns(int64_t k, int64_t j0, int64_t cols, const Found& found) const {
    const Side& y = p_.y;
    if (p_.fold) {
      merge_states(k, cols, y.negatives, j0, found.reference[0], found.sum[0]);
      if (p_.same_id_positive) merge_states(k, cols, y.positives, j0, found.reference[1], found.sum[1]);
    }
    if (y.key_bias_sum)
      for (int64_t c = 0; c < cols; c++)
        y.key_bias_sum[j0 + c] = k == 0 ? found.weights[c] : y.key_bias_sum[j0 + c] + found.weights[c];
  }

  void merge_states(int64_t k, int64_t cols, const Lines& lines, int64_t j0, const double* reference,
                    const double* sum) const {
    for (int64_t c = 0; c < cols; c++) {
      double &m = lines.reference[j0 + c], &s = lines.sum[j0 + c];
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
    if (!p_.fold) return T(p_.positive_weight[q]);
    const double s = p_.scale * p_.positive[q] + p_.bias;
    T weight = 0;
    for_kind(p_.kind, [&](auto kind) { weight = T(kind.finish(0, 0, s).positive_weight); });
    return weight;
  }

  void add_positives(const Block& b, int64_t begin, int64_t cols, T* v) const {
    for (int64_t c = 0; c < cols; c++) {
      const int64_t i = begin + c - p_.offset - b.begin;
      if (i < 0 || i >= b.rows) continue;
      const T weight = positive_weight(b.begin + i, begin + c) * b.factors[i];
      const In* const f = b.features + i * p_.x.stride;
      for (int64_t d = 0; d < p_.width; d++) v[c * p_.width + d] += weight * cast_to<T>(f[d]);
    }
  }

  // Calls f(i, j) for each row i of the block whose positive j lies in the problem.
  template <class Function>
  void for_each_positive(const Block& b, Function f) const {
    for (int64_t i = b.begin; i < b.begin + b.rows; i++) {
      const int64_t j = i + p_.offset;
      if (j >= 0 && j < p_.y.rows) f(i, j);
    }
  }

  void add_positives_to_totals(const Block& b, Sum* totals) const {
    for_each_positive(b, [&](int64_t i, int64_t j) {
      const double weight = positive_weight(i, j);
      totals[0].add(weight);
      totals[1].add(weight * p_.positive[p_.positive_of_y ? j : i]);
    });
  }

  void add_positives_to_rows(const Block& b) const {
    for_each_positive(b, [&](int64_t i, int64_t j) {
      const T factor = p_.y.factor ? static_cast<const T*>(p_.y.factor)[j] : T(1);
      const T weight = positive_weight(i, j) * factor;
      const In* const f = y_features(j);
      T* const u = b.u + (i - b.begin) * p_.width;
      for (int64_t d = 0; d < p_.width; d++) u[d] += weight * cast_to<T>(f[d]);
    });
  }

  Problem& p_;
  const int64_t block_, tile_, blocks_, tiles_;
  const unsigned options_;
  std::unique_ptr<std::atomic<int64_t>[]> passed_;  // blocks that have left each tile
  std::unique_ptr<Sum[]> totals_;
  std::atomic<int64_t> next_{0};
  std::atomic<int> workers_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
};

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
