// The first sweep's epilogue: a tile's negatives fold into one number for each of its rows and columns.
//
// There are no atomics. Four lanes share a row of the tile. Eight lanes of every warp share a column: they exchange
// halves of their sums until each lane has the sums of whole columns of a piece. The warps' sums are then added through
// shared memory.
#pragma once

#include "epilogue.h"

namespace fastclip {
namespace cuda {
namespace fused {

// Each lane passes half of its 2 * kHalf sums to the lane whose index differs in `bit`, and adds the sums it receives
// to its other half.
template <int kHalf, int kSums>
__device__ __forceinline__ void exchange(float (&sum)[kSums], int lane, int bit) {
  const bool upper = lane & bit;
  CUTLASS_PRAGMA_UNROLL
  for (int s = 0; s < kHalf; s++) {
    const float passed = upper ? sum[s] : sum[s + kHalf];
    const float held = upper ? sum[s + kHalf] : sum[s];
    sum[s] = held + __shfl_xor_sync(kWholeWarp, passed, bit);
  }
}

template <int kCount>
__device__ __forceinline__ float sum_of(const float* v) {
  if constexpr (kCount == 1) {
    return *v;
  } else {
    return sum_of<kCount / 2>(v) + sum_of<kCount / 2>(v + kCount / 2);
  }
}

template <class Kind, class Element_, class Layout>
struct Fold : Share<Layout, 1> {
  using Element = Element_;
  using Base = Share<Layout, 1>;

  struct Arguments {
    ChunkView view;
    Folding folding;
  };

  struct Uniform {
    Uniform() = default;
    __device__ __forceinline__ explicit Uniform(const Arguments& arguments)
        : k(affine<Kind>(arguments.view.scale, arguments.view.bias)),
          m(arguments.folding.shift ? *arguments.folding.shift : 0.f) {}
    Affine<float> k;
    float m;
  };

  struct Storage : Base::Storage {
    float sums[Layout::kWarps][Layout::kColumns];
  };

  template <class Where>
  __device__ __forceinline__ Fold(const Arguments& arguments, const Uniform& uniform, Storage& storage,
                                  const Where& where)
      : Base(arguments.view, storage, where), arguments(arguments), uniform(uniform), sums(storage.sums) {}

  __device__ __forceinline__ void begin() {
    this->fetch({{arguments.view.factor_x, 1.f}}, {{arguments.view.factor_y, 1.f}});
  }

  template <class Accumulator>
  __device__ __forceinline__ auto visit(const Accumulator& accumulator, int, int band, int piece) {
    cutlass::Array<float, Layout::kFragment> e;
    CUTLASS_PRAGMA_UNROLL
    for (int q = 0; q < Layout::kFragment; q++)
      e[q] = Kind::fold(this->product(accumulator, q, band), uniform.k, uniform.m);
    if (!this->is_plain) {
      CUTLASS_PRAGMA_UNROLL
      for (int q = 0; q < Layout::kFragment; q++)
        if (!this->is_negative(q, band, piece)) e[q] = 0;
      write_positives(accumulator, band, piece);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < 2; r++) {
      float of_row[Layout::kSlots];
      CUTLASS_PRAGMA_UNROLL
      for (int q = 0; q < Layout::kFragment; q++)
        if (second_row(q) == r) of_row[slot(q)] = e[q];
      const float sum = sum_of<Layout::kSlots>(of_row);
      row_sum[2 * band + r] = piece == 0 ? sum : row_sum[2 * band + r] + sum;
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < Layout::kSlots; s++)
        column_sum[s] = band == 0 && r == 0 ? of_row[s] : column_sum[s] + of_row[s];
    }
    return e;
  }

  // Called after every piece; `barrier` waits for all threads of the tile.
  template <class Buffer, class Barrier, class Results>
  __device__ __forceinline__ void reduce(Buffer&&, const Barrier& barrier, int band, int piece, bool is_last,
                                         const Results&) {
    if (band != Layout::kBands - 1) return;
    const int lane = this->thread % kWarp, warp = this->thread / kWarp;
    exchange<Layout::kSlots / 2>(column_sum, lane, 16);
    exchange<Layout::kSlots / 4>(column_sum, lane, 8);
    exchange<Layout::kSlots / 8>(column_sum, lane, 4);
    CUTLASS_PRAGMA_UNROLL
    for (int s = 0; s < Layout::kSlots / 8; s++) {
      const int at = column_of_slot(lane / 4 * (Layout::kSlots / 8) + s) + lane % 4 * 2;
      sums[warp][piece * Layout::kPieceColumns + at] = column_sum[s];
    }
    if (!is_last) return;
    barrier();
    const Partials& columns = arguments.folding.columns;
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < Layout::kColumns; first += Layout::kThreads) {
      const int c = first + this->thread;
      const int64_t j = int64_t(this->tile_n) * Layout::kColumns + c;
      if (c >= Layout::kColumns || !this->is_inside || j >= arguments.view.columns) continue;
      float sum = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int w = 0; w < Layout::kWarps; w++) sum += sums[w][c];
      columns.data[j * columns.line + this->tile_m * columns.part] = sum;
    }
  }

  __device__ __forceinline__ void end() {
    const Partials& rows = arguments.folding.rows;
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < Layout::kRowsOfThread; r++) {
      const float sum = warp_sum(row_sum[r], 4);
      const int from_first = Base::row_from_first(r);
      if (this->is_inside && this->thread % 4 == 0 && from_first < this->rows_left)
        rows.data[(this->first_row + from_first) * rows.line + this->tile_n * rows.part] = sum;
    }
  }

 private:
  // A row has at most one positive: t is selected among all pairs first and stored once, which needs few branches.
  template <class Accumulator>
  __device__ __forceinline__ void write_positives(const Accumulator& accumulator, int band, int piece) const {
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < 2; r++) {
      const int from_first = Base::row_from_first(2 * band + r);
      float t = 0;
      bool is_here = false;
      CUTLASS_PRAGMA_UNROLL
      for (int q = 0; q < Layout::kFragment; q++) {
        const int c = Base::column_of(q, piece);
        if (second_row(q) != r || c - from_first != this->positive) continue;
        t = this->product(accumulator, q, band);
        is_here = c < this->columns_left;
      }
      if (is_here && from_first < this->rows_left) arguments.folding.positive[this->first_row + from_first] = t;
    }
  }

  const Arguments& arguments;
  const Uniform& uniform;
  float (&sums)[Layout::kWarps][Layout::kColumns];
  float row_sum[Layout::kRowsOfThread], column_sum[Layout::kSlots];
};

}  // namespace fused
}  // namespace cuda
}  // namespace fastclip
