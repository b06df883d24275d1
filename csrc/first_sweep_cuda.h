// The host's side of the first sweep: the reference, the sums of each chunk, and what follows if one reference was not
// enough.
#pragma once

#include "finalise_cuda.h"
#include "maxima_cuda.h"
#include "work_cuda.h"

namespace fastclip {
namespace cuda {

// The states of a block, chunk after chunk, and the memory that their partial sums take.
class FirstSweep {
 public:
  FirstSweep(Work& work, const std::vector<Chunk>& chunks, double* positive) : w(work), positive_(positive) {
    int64_t most = 0;
    for (const Chunk& c : chunks) most = std::max(most, partials_of(c));
    partials_ = allocate<float>(w.library(), most);
  }

  void set_reference(Scalar bound) {
    const Features x = Work::features_of(w.b.x), y = Work::features_of(w.b.y);
    const int64_t blocks_x = bound.at ? 0 : norm_blocks(x), blocks_y = bound.at ? 0 : norm_blocks(y);
    float* const squares = allocate<float>(w.library(), blocks_x + blocks_y);
    reference_ = allocate<float>(w.library(), 1);
    flag_ = allocate<int32_t>(w.library(), 1);
    if (blocks_x + blocks_y > 0)
      for_features(w.b.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        launch(w.place("longest_kernel"), longest_kernel<T>, blocks_x + blocks_y, x, y, blocks_x, w.b.width, squares);
      });
    launch(w.place("reference_kernel"), reference_kernel, 1, bound, static_cast<const float*>(squares), blocks_x,
           blocks_y, w.b.scale, reference_, flag_);
  }

  Folding folding_of(const Chunk& c) const {
    const Tiles tiles = tiles_of(c);
    Folding f;
    f.reference = reference_;
    f.positive = positive_ + c.row;
    f.rows = {partials_, tiles.across, 1, c.rows};
    f.columns = {partials_ + tiles.across * c.rows, tiles.down, 1, c.columns};
    return f;
  }

  void fold(const Chunk& c, float* kept, float* buffer) {
    const Part part = w.part_of(c);
    const Folding folding = folding_of(c);
#if FASTCLIP_FUSED
    if (w.folds_fused(c)) {
      fused_sweep(part, folding);
      return add_sums(c, folding);
    }
#endif
    const Products products = w.products(c, kept, buffer, false);
    CUDA::for_loss(w.b.loss, [&](auto loss) {
      launch_epilogue<decltype(loss), true, false, void>(w, part, products, folding, {});
    });
    add_sums(c, folding);
  }

  void add_sums(const Chunk& c, const Folding& f) {
    const Side &x = w.b.x, &y = w.b.y;
    const PartLines rows = {f.rows, c.rows, c.row, c.column == 0, c.column + c.columns == w.n(), x.reference, x.sum};
    const PartLines columns = {f.columns, c.columns, c.column, c.row == 0, c.row + c.rows == w.m(), y.reference, y.sum};
    launch(w.place("sums_kernel"), sums_kernel, cdiv(c.rows + c.columns, kThreads), rows, columns, positives(),
           w.b.scale, static_cast<const float*>(reference_), flag_);
  }

  // Where the flag is set the states are made anew, with a reference for each line.
  void sweep_maxima() {
    const Features x = Work::features_of(w.b.x), y = Work::features_of(w.b.y);
    for_features(w.b.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      CUDA::for_loss(w.b.loss, [&](auto loss) {
        using Loss = decltype(loss);
        if constexpr (Loss::kNeedsState)
          launch(w.place("maxima_kernel"), maxima_kernel<T, Loss>, maxima_blocks(x, y), x, y, w.b.width, w.b.scale,
                 w.b.bias, w.b.offset, static_cast<const int32_t*>(flag_), positive_,
                 States{w.b.x.reference, w.b.x.sum}, States{w.b.y.reference, w.b.y.sum});
      });
    });
  }

 private:
  PositivesOf positives() const { return {positive_, w.m(), w.n(), w.b.offset}; }
  struct Tiles {
    int64_t down, across;
  };
  Tiles tiles_of(const Chunk& c) const {
    if (w.folds_fused(c)) return {fused_column_parts(w.part_of(c)), fused_row_parts(w.part_of(c))};
    return {cdiv(c.rows, kTileRows), cdiv(c.columns, kTileColumns)};
  }
  int64_t partials_of(const Chunk& c) const {
    const Tiles tiles = tiles_of(c);
    return tiles.across * c.rows + tiles.down * c.columns;
  }

  Work& w;
  double* positive_;
  float *partials_ = nullptr, *reference_ = nullptr;
  int32_t* flag_ = nullptr;
};

}  // namespace cuda
}  // namespace fastclip
