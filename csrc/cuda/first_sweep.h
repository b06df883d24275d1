// The host side of the first sweep. It launches the kernels for the shift and for the sums of each chunk, and the sweep
// with running maxima, which does nothing on the device if one shift was enough.
#pragma once

#include "finalise.h"
#include "teacher.h"
#include "work.h"

namespace fastclip {
namespace cuda {

// Makes the states of a block, chunk after chunk, and owns the memory of their partial sums.
class FirstSweep {
 public:
  FirstSweep(Work& work, const std::vector<Chunk>& chunks, const Sweeping& sweeping) : w(work), sweeping_(sweeping) {
    int64_t most = 0;
    for (const Chunk& c : chunks) most = std::max(most, partials_of(c));
    partials_ = allocate<float>(w.library(), most);
    has_levels_ = CUDA::has_levels(w.b.kind);
    if (w.b.same_id_positive || has_levels_) second_partials_ = allocate<float>(w.library(), most);
    w.allocate_targets(chunks);
    for (float*& layer : taught_partials_)
      if (w.b.has_teacher()) layer = allocate<float>(w.library(), most);
  }

  void set_shift() {
    const Scalar bound = sweeping_.bound;
    const Features x = Work::features_of(w.b.x), y = Work::features_of(w.b.y);
    const int64_t blocks_x = bound.at ? 0 : norm_blocks(x), blocks_y = bound.at ? 0 : norm_blocks(y);
    float* const squares = allocate<float>(w.library(), blocks_x + blocks_y);
    shift_ = allocate<float>(w.library(), 1);
    flag_ = allocate<int32_t>(w.library(), 1);
    if (blocks_x + blocks_y > 0)
      for_features(w.b.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        launch(w.place("longest_kernel"), longest_kernel<T>, blocks_x + blocks_y, x, y, blocks_x, w.b.width, squares);
      });
    launch(w.place("shift_kernel"), shift_kernel, 1, bound, static_cast<const float*>(squares), blocks_x, blocks_y,
           w.largest_biases(), w.count_largest_biases(), w.b.scale, shift_, flag_);
  }

  Folding folding_of(const Chunk& c) const {
    Folding f;
    f.shift = shift_;
    f.positive = sweeping_.positive + c.row;
    f.rows = rows_of(c, partials_), f.columns = columns_of(c, partials_);
    if (second_partials_)
      f.second_rows = rows_of(c, second_partials_), f.second_columns = columns_of(c, second_partials_);
    if (has_levels_) {
      f.level_x = static_cast<const double*>(w.b.x.negatives.shifts) + c.row;
      f.level_y = static_cast<const double*>(w.b.y.negatives.shifts) + c.column;
    }
    return f;
  }

  void fold(const Chunk& c, float* buffer) {
    const ChunkView view = w.view_of(c);
    const Folding folding = folding_of(c);
#if FASTCLIP_FUSED
    if (w.folds_fused(c)) {
      fused_sweep(view, folding);
      return add_sums(c);
    }
#endif
    const Products products = w.products(c, sweeping_.kept, buffer, false);
    w.multiply_targets(c);
    CUDA::for_kind(w.b.kind, [&](auto statistic) {
      w.with_options(c, [&](auto options) {
        launch_epilogue<decltype(statistic), true, false, void>(w, view, products, folding, {}, options);
      });
    });
    add_sums(c);
    if (w.b.has_teacher()) teach(view, c, products);
  }

  void add_sums(const Chunk& c) {
    Lines x = w.b.x.negatives, y = w.b.y.negatives;
    if (has_levels_) {
      add_above(lines_of_rows(c, second_partials_, nullptr, x.shift));
      add_above(lines_of_columns(c, second_partials_, nullptr, y.shift));
      x.shift = y.shift = nullptr;
    }
    add_sums(c, partials_, x, y, 0);
    if (w.b.same_id_positive) add_sums(c, second_partials_, w.b.x.positives, w.b.y.positives, 1);
  }

  // Launches the kernel that computes the states again if the flag is set, with a shift for each line.
  void sweep_maxima() {
    const Features x = Work::features_of(w.b.x), y = Work::features_of(w.b.y);
    for_features(w.b.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      CUDA::for_kind(w.b.kind, [&](auto statistic) {
        using Kind = decltype(statistic);
        if constexpr (Kind::kHasShift)
          w.with_options(w.whole(), [&](auto options) {
            launch(w.place("maxima_kernel"), maxima_kernel<T, Kind, decltype(options)>, maxima_blocks(x, y), x, y,
                   w.b.width, w.b.scale, w.b.bias, w.b.offset, static_cast<const int32_t*>(flag_), sweeping_.positive,
                   states_of(w.b.x), states_of(w.b.y), options);
          });
      });
    });
  }

 private:
  States states_of(const Side& side) const { return {side.negatives, w.b.same_id_positive ? side.positives : Lines()}; }

  // Folds the teacher's weights of a chunk into the states of its lines.
  void teach(const ChunkView& view, const Chunk& c, const Products& products) {
    const auto& [shift, sum, moment] = taught_partials_;
    const TaughtPartials rows{rows_of(c, shift), rows_of(c, sum), rows_of(c, moment)};
    const TaughtPartials columns{columns_of(c, shift), columns_of(c, sum), columns_of(c, moment)};
    launch(w.place("teach_kernel"), teach_kernel, epilogue_blocks(view), view, products, w.targets_of(c),
           w.b.target_scale, rows, columns);
    const auto lines_of = [](const TaughtPartials& partials, const PartLines& lines, const Lines& states) {
      return TaughtLines{partials,   lines.count,  lines.first, lines.begins,
                         lines.ends, states.shift, states.sum,  states.moment};
    };
    launch(w.place("merge_kernel"), merge_kernel, cdiv(c.rows + c.columns, kThreads),
           lines_of(rows, lines_of_rows(c, sum, nullptr, nullptr), w.b.x.teacher),
           lines_of(columns, lines_of_columns(c, sum, nullptr, nullptr), w.b.y.teacher));
  }

  // set: 0 for negatives, 1 for positives by id.
  void add_sums(const Chunk& c, float* partials, const Lines& x, const Lines& y, int64_t set) {
    const PartLines rows = lines_of_rows(c, partials, x.shift, x.sum);
    const PartLines columns = lines_of_columns(c, partials, y.shift, y.sum);
    const bool* const occupied = sweeping_.occupied ? sweeping_.occupied + set * (w.m() + w.n()) : nullptr;
    launch(w.place("sums_kernel"), sums_kernel, cdiv(c.rows + c.columns, kThreads), rows, columns,
           Occupied{occupied, w.n(), w.b.offset}, Occupied{occupied ? occupied + w.m() : nullptr, w.m(), -w.b.offset},
           static_cast<const float*>(shift_), flag_);
  }

  void add_above(const PartLines& lines) {
    launch(w.place("numbers_kernel"), numbers_kernel, cdiv(lines.count, kThreads), lines);
  }

  PartLines lines_of_rows(const Chunk& c, float* partials, double* shift, double* sum) const {
    const bool ends = c.column + c.columns == w.n();
    return {rows_of(c, partials), c.rows, c.row, c.column == 0, ends, shift, sum};
  }
  PartLines lines_of_columns(const Chunk& c, float* partials, double* shift, double* sum) const {
    const bool ends = c.row + c.rows == w.m();
    return {columns_of(c, partials), c.columns, c.column, c.row == 0, ends, shift, sum};
  }

  Partials rows_of(const Chunk& c, float* partials) const { return {partials, tiles_of(c).across, 1, c.rows}; }
  Partials columns_of(const Chunk& c, float* partials) const {
    const Tiles tiles = tiles_of(c);
    return {partials + tiles.across * c.rows, tiles.down, 1, c.columns};
  }
  struct Tiles {
    int64_t down, across;
  };
  Tiles tiles_of(const Chunk& c) const {
    if (w.folds_fused(c)) return {fused_column_parts(w.view_of(c)), fused_row_parts(w.view_of(c))};
    return {cdiv(c.rows, kTileRows), cdiv(c.columns, kTileColumns)};
  }
  int64_t partials_of(const Chunk& c) const {
    const Tiles tiles = tiles_of(c);
    return tiles.across * c.rows + tiles.down * c.columns;
  }

  Work& w;
  Sweeping sweeping_;
  float *partials_ = nullptr, *second_partials_ = nullptr, *shift_ = nullptr;
  float* taught_partials_[3] = {};  // shifts, sums, moments
  int32_t* flag_ = nullptr;
  bool has_levels_ = false;
};

}  // namespace cuda
}  // namespace fastclip
