// The host side of the second sweep: chunks of weights, two products of each, and the kernels that complete gradients
// and sums. Linear kinds can run both sweeps in one go.
#pragma once

#include "complete.h"
#include "first_sweep.h"

namespace fastclip {
namespace cuda {

class SecondSweep {
 public:
  // also_fold: both sweeps run in one go; the weights need no state.
  SecondSweep(Work& work, const Weighing& weighing, bool also_fold) : w(work), weighing_(weighing), fold_(also_fold) {
    const bool is_fp16 = w.b.dtype == Dtype::kHalf;
    // fp16 has no numbers below 6e-8, so weights are multiplied by 2^13 in fp16. They are at most 2, or 4
    // with a teacher, since the caller scales the coefficients, so the products are at most 2^15, and fp16's largest
    // number is about 2^16.
    weights_.enlarged = is_fp16 ? 8192.f : 1.f;
    weights_.spread = !is_fp16;
    weights_.to_tf32 = w.b.tf32;
    x_operand_ = w.b.x, y_operand_ = w.b.y;
    if (is_fp16 && wants_y()) multiply_by_factors(x_operand_);
    if (is_fp16 && wants_x()) multiply_by_factors(y_operand_);
    const bool has_shifts = CUDA::has_shift(w.b.kind) || CUDA::has_levels(w.b.kind);
    const auto common = static_cast<const double*>(w.b.x.negatives.shifts);
    if (!fold_) set_operands(w.b.x.negatives, w.b.y.negatives, has_shifts, common, weights_);
    if (w.b.same_id_positive) set_operands(w.b.x.positives, w.b.y.positives, has_shifts, common, positives_);
    if (w.b.has_teacher()) set_operands(w.b.x.teacher, w.b.y.teacher, true, nullptr, teacher_);
    totals_ = allocate<double>(w.library(), 2);
  }

  bool wants_x() const { return w.b.x.gradient != nullptr; }
  bool wants_y() const { return w.b.y.gradient != nullptr; }
  bool wants_key_bias() const { return w.b.y.key_bias_sum != nullptr; }

  // first: the first sweep if both run in one go, else null.
  void run(FirstSweep* first) {
    const std::vector<Chunk> chunks = chunks_of(w.m(), w.n(), fold_ ? 0 : weighing_.kept_rows, w.b.has_targets());
    allocate_buffers(chunks);
    for (const Chunk& c : chunks) {
      const PairWeights weights = weights_of(c);
      const Folding folding = first ? first->folding_of(c) : Folding();
      weigh(c, folding, weights);
      launch(w.place("totals_kernel"), totals_kernel, 2, static_cast<const float*>(weights.totals), weights.total_parts,
             c.row == 0 && c.column == 0, totals_);
      if (wants_key_bias()) add_key_bias(c);
      if (first) first->add_sums(c);
      multiply(c, weights);
    }
  }

  // The last steps. If both sweeps run in one go, they come after the weights of the positives are known.
  void complete_rows(const float* product, int64_t first, int64_t rows) const {
    complete(w.b.x, w.b.y, product, first, rows, w.b.offset, false);
  }
  void complete_columns() const { complete(w.b.y, w.b.x, product_y_, 0, w.n(), -w.b.offset, true); }
  void complete_totals() const {
    launch(w.place("complete_totals_kernel"), complete_totals_kernel, 1, static_cast<const double*>(totals_),
           weighing_.positive_weight, weighing_.positive, weighing_.gain, w.m(), w.n(), w.b.offset, weighing_.totals);
  }
  void complete_key_bias() const {
    launch(w.place("complete_key_bias_kernel"), complete_key_bias_kernel, cdiv(w.n(), kThreads), w.b.y.key_bias_sum,
           weighing_.positive_weight, weighing_.gain, w.m(), w.n(), w.b.offset);
  }
  void set_positives(const double* positive, const double* weight) {
    weighing_.positive = positive, weighing_.positive_weight = weight;
  }

 private:
  void multiply_by_factors(Side& operand) const {
    if (operand.factor)
      operand.features = w.copy_of(Work::features_of(operand), w.b.width, false), operand.stride = w.b.width;
  }

  // Launches the kernel that converts the states x and y (of one set: negatives, positives by id, or a teacher's pairs)
  // to fp32, into `to`. common: see operands_kernel.
  void set_operands(const Lines& x, const Lines& y, bool has_shifts, const double* common, PairWeights& to) {
    const int64_t lines = w.m() + w.n();
    float* const coefficients = allocate<float>(w.library(), lines);
    float* const shifts = has_shifts ? allocate<float>(w.library(), lines) : nullptr;
    if (differ_ == nullptr) {
      differ_ = allocate<int32_t>(w.library(), 1);
      check(cudaMemsetAsync(differ_, 0, sizeof *differ_, w.b.stream), w.place("cudaMemsetAsync"));
    }
    const auto of = [&](const Lines& side, int64_t count, int64_t first) {
      return StateLines{static_cast<const double*>(side.shifts), static_cast<const double*>(side.coefficients), count,
                        shifts ? shifts + first : nullptr, coefficients + first};
    };
    launch(w.place("operands_kernel"), operands_kernel, cdiv(lines, kThreads), of(x, w.m(), 0), of(y, w.n(), w.m()),
           common, differ_);
    to.a = coefficients, to.b = coefficients + w.m();
    to.shifts_differ = differ_;
    if (has_shifts) to.shift_x = shifts, to.shift_y = shifts + w.m();
  }

  void allocate_buffers(const std::vector<Chunk>& chunks) {
    int64_t products = 0, weights = 0, rows = 0, parts = 0;
    const bool wants_any = wants_x() || wants_y();
    for (const Chunk& c : chunks) {
      const int64_t size = c.rows * stride_of(c.columns);
      if (!c.kept && !is_fused(c)) products = std::max(products, size);
      if (wants_any && !in_place(c)) weights = std::max(weights, size);
      rows = std::max(rows, c.rows);
      parts = std::max(parts, total_parts(c));
    }
    products_ = allocate<float>(w.library(), products);
    w.allocate_targets(chunks);
    if (weights > 0) separate_ = w.library().allocate(weights * size_of(w.b.dtype));
    weights_.totals = allocate<float>(w.library(), 2 * parts);
    if (wants_key_bias()) {
      int64_t sums = 0;
      for (const Chunk& c : chunks) sums = std::max(sums, cdiv(c.rows, kTileRows) * c.columns);
      key_bias_ = allocate<float>(w.library(), sums);
    }
    const auto is_float = [](const Side& side) { return side.gradient_dtype == Dtype::kFloat; };
    if (wants_x() && !is_float(w.b.x)) product_x_ = allocate<float>(w.library(), rows * w.b.width);
    if (wants_y())
      product_y_ =
          is_float(w.b.y) ? static_cast<float*>(w.b.y.gradient) : allocate<float>(w.library(), w.n() * w.b.width);
  }

  // True if a fused kernel weighs the chunk: it always writes weights and never folds.
  bool is_fused(const Chunk& c) const { return w.folds_fused(c) && !fold_ && (wants_x() || wants_y()); }

  int64_t total_parts(const Chunk& c) const {
    const ChunkView view = w.view_of(c);
    return is_fused(c) ? fused_total_parts(view) : epilogue_blocks(view);
  }

  // True if weights overwrite the products they are made from: fp32 weights do, unless the products are kept.
  bool in_place(const Chunk& c) const { return w.b.dtype == Dtype::kFloat && !c.kept; }

  PairWeights weights_of(const Chunk& c) const {
    PairWeights weights = weights_;
    if (wants_x() || wants_y()) weights.out = in_place(c) ? products_ : separate_;
    weights.stride_out = stride_of(c.columns);
    weights.total_parts = total_parts(c);
    begin_at(weights, c);
    return weights;
  }

  static void begin_at(PairWeights& weights, const Chunk& c) {
    if (weights.a) weights.a += c.row, weights.b += c.column;
    if (weights.shift_x) weights.shift_x += c.row, weights.shift_y += c.column;
  }

  Partials key_bias_of(const Chunk& c) const { return {key_bias_, cdiv(c.rows, kTileRows), 1, c.columns}; }

  void add_key_bias(const Chunk& c) const {
    const PartLines columns = {key_bias_of(c),          c.columns, c.column,          c.row == 0,
                               c.row + c.rows == w.m(), nullptr,   w.b.y.key_bias_sum};
    launch(w.place("numbers_kernel"), numbers_kernel, cdiv(c.columns, kThreads), columns);
  }

  void add_positives(Plain&, const Chunk&) const {}
  void add_positives(All& options, const Chunk& c) const {
    if (wants_key_bias()) options.weights = key_bias_of(c);
    PairWeights positives = positives_;
    begin_at(positives, c);
    options.c = positives.a, options.d = positives.b;
    options.shift_x = positives.shift_x, options.shift_y = positives.shift_y;
  }

  Taught taught_options(const Chunk& c) const {
    Taught options;
    w.set_options(options, c);
    options.targets = w.targets_of(c), options.scale = w.b.target_scale;
    options.teacher = teacher_;
    begin_at(options.teacher, c);
    return options;
  }

  void weigh(const Chunk& c, const Folding& folding, const PairWeights& weights) {
    const ChunkView view = w.view_of(c);
#if FASTCLIP_FUSED
    if (is_fused(c)) return fused_weigh(view, weights);
#endif
    const Products products = w.products(c, const_cast<float*>(weighing_.kept), products_, true);
    w.multiply_targets(c);
    CUDA::for_kind(w.b.kind, [&](auto statistic) {
      using Kind = decltype(statistic);
      const auto run = [&](auto* type) {
        using Out = std::remove_pointer_t<decltype(type)>;
        if constexpr (Kind::kIsLinear)
          if (fold_) return launch_epilogue<Kind, true, true, Out>(w, view, products, folding, weights, Plain());
        const auto launch_with = [&](auto options) {
          add_positives(options, c);
          launch_epilogue<Kind, false, true, Out>(w, view, products, folding, weights, options);
        };
        if (w.b.has_teacher())
          launch_with(taught_options(c));
        else
          w.with_options(c, launch_with);
      };
      if (weights.out)
        for_features(w.b.dtype, run);
      else
        run(static_cast<void*>(nullptr));
    });
  }

  void multiply(const Chunk& c, const PairWeights& weights) {
    const Matrix out = {weights.out, c.rows, c.columns, weights.stride_out, 1, w.b.dtype};
    if (wants_x()) {
      float* const product = product_x_ ? product_x_ : static_cast<float*>(w.b.x.gradient) + c.row * w.b.width;
      w.library().multiply(out, w.operand(y_operand_, c.column, c.columns),
                           {product, c.rows, w.b.width, w.b.width, 1, Dtype::kFloat}, c.column > 0);
      if (!fold_ && c.column + c.columns == w.n()) complete_rows(product, c.row, c.rows);
    }
    if (wants_y()) {
      const Matrix transposed = {out.data, out.columns, out.rows, out.column_stride, out.row_stride, out.dtype};
      w.library().multiply(transposed, w.operand(x_operand_, c.row, c.rows),
                           {product_y_ + c.column * w.b.width, c.columns, w.b.width, w.b.width, 1, Dtype::kFloat},
                           c.row > 0);
    }
  }

  void complete(const Side& mine, const Side& partner, const float* product, int64_t first, int64_t rows,
                int64_t offset, bool by_partner) const {
    Completion c;
    c.product = product;
    c.mine = Work::features_of(mine), c.partner = Work::features_of(partner);
    c.rows = rows, c.first = first, c.width = w.b.width, c.offset = offset;
    c.weight = weighing_.positive_weight, c.by_partner = by_partner;
    c.gain = weighing_.gain, c.scale = w.b.scale;
    c.shrink = 1 / weights_.enlarged, c.spread = weights_.spread;
    c.project = weighing_.project && mine.factor != nullptr;
    c.clamped_is_zero = weighing_.project && (w.b.dtype == Dtype::kHalf || mine.gradient_dtype == Dtype::kHalf);
    c.gradient_dtype = mine.gradient_dtype;
    c.gradient = const_cast<void*>(advance(mine.gradient, first * w.b.width, mine.gradient_dtype));
    const int64_t four = 4 * size_of(w.b.dtype);
    const bool aligned = w.b.width % 4 == 0 && mine.stride % 4 == 0 && partner.stride % 4 == 0 &&
                         is_multiple(mine.features, four) && is_multiple(partner.features, four) &&
                         is_multiple(product, 16) && is_multiple(c.gradient, 16);
    for_features(w.b.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch(w.place("complete_kernel"), aligned ? complete_kernel<T, 4> : complete_kernel<T, 1>, cdiv(rows, kWarps),
             c);
    });
  }

  Work& w;
  Weighing weighing_;
  bool fold_;
  Side x_operand_, y_operand_;
  PairWeights weights_, positives_, teacher_;  // the last two have shifts, coefficients and `shifts_differ` only
  int32_t* differ_ = nullptr;
  float* key_bias_ = nullptr;
  float *products_ = nullptr, *product_x_ = nullptr, *product_y_ = nullptr;
  void* separate_ = nullptr;
  double* totals_ = nullptr;
};

}  // namespace cuda
}  // namespace fastclip
