// The second sweep's epilogue: the weights of a tile's negatives, which CUTLASS writes, and their sums.
#pragma once

#include "epilogue.h"

namespace fastclip {
namespace cuda {
namespace fused {

template <class Kind, class Element_, class Layout>
struct Weigh : Share<Layout, Kind::kHasShift ? 4 : 3> {
  using Element = Element_;
  using Base = Share<Layout, Kind::kHasShift ? 4 : 3>;
  enum { kFactor, kCoefficient, kSpread, kShift };  // of a line; a kind without a shift has no shifts

  struct Arguments {
    ChunkView view;
    PairWeights weights;
  };

  struct Uniform {
    Uniform() = default;
    __device__ __forceinline__ explicit Uniform(const Arguments& arguments)
        : k(affine<Kind>(arguments.view.scale, arguments.view.bias)),
          two_shifts(Kind::kHasShift && *arguments.weights.shifts_differ != 0) {}
    Affine<float> k;
    bool two_shifts;
  };

  using Storage = typename Base::Storage;

  template <class Where>
  __device__ __forceinline__ Weigh(const Arguments& arguments, const Uniform& uniform, Storage& storage,
                                   const Where& where)
      : Base(arguments.view, storage, where), arguments(arguments), uniform(uniform) {}

  __device__ __forceinline__ void begin() {
    const ChunkView& view = arguments.view;
    const PairWeights& weights = arguments.weights;
    const Vector spread_x = {weights.spread ? view.factor_x : nullptr, 1.f};
    const Vector spread_y = {weights.spread ? view.factor_y : nullptr, 1.f};
    // Absent coefficients are 1 for rows and 0 for columns.
    if constexpr (Kind::kHasShift)
      this->fetch({{view.factor_x, 1.f}, {weights.a, 1.f}, spread_x, {weights.shift_x, 0.f}},
                  {{view.factor_y, 1.f}, {weights.b, 0.f}, spread_y, {weights.shift_y, 0.f}});
    else
      this->fetch({{view.factor_x, 1.f}, {weights.a, 1.f}, spread_x},
                  {{view.factor_y, 1.f}, {weights.b, 0.f}, spread_y});
    CUTLASS_PRAGMA_UNROLL
    for (int r = 0; r < Layout::kRowsOfThread; r++) this->row[kSpread][r] *= weights.enlarged;
  }

  // Nearly all pieces are simple.
  template <class Accumulator>
  __device__ __forceinline__ auto visit(const Accumulator& accumulator, int, int band, int piece) {
    const bool is_simple = this->is_plain && !uniform.two_shifts;
    return is_simple ? weights_of<true>(accumulator, band, piece) : weights_of<false>(accumulator, band, piece);
  }

  __device__ __forceinline__ void end() {
    const float w = warp_sum(sum_w), wt = warp_sum(sum_wt);
    if (!this->is_inside || this->thread % kWarp != 0) return;
    const ChunkView& view = arguments.view;
    const int64_t tiles_n = cdiv(view.columns, Layout::kColumns);
    const int64_t at = (this->tile_m * tiles_n + this->tile_n) * Layout::kWarps + this->thread / kWarp;
    arguments.weights.totals[at] = w;
    arguments.weights.totals[arguments.weights.total_parts + at] = wt;
  }

 private:
  template <bool kSimple, class Accumulator>
  __device__ __forceinline__ auto weights_of(const Accumulator& accumulator, int band, int piece) {
    const Affine<float>& k = uniform.k;
    cutlass::Array<float, Layout::kFragment> written;  // CUTLASS rounds, to nearest
    CUTLASS_PRAGMA_UNROLL
    for (int q = 0; q < Layout::kFragment; q++) {
      const int r = 2 * band + second_row(q), s = slot(q);
      const float a = this->row[kCoefficient][r], b = this->column[kCoefficient][s];
      const float t = this->product(accumulator, q, band);
      float w;
      if constexpr (Kind::kHasShift) {
        w = Kind::activation(t, k, this->row[kShift][r]);
        if (!kSimple && uniform.two_shifts)
          w = w * a + Kind::activation(t, k, this->column[kShift][s]) * b;
        else
          w *= a + b;
      } else {
        w = Kind::activation(t, k, 0.f) * (a + b);
      }
      if (!kSimple && !this->is_negative(q, band, piece)) w = 0;
      sum_w += w;
      sum_wt += w * t;
      written[q] = w * (this->row[kSpread][r] * this->column[kSpread][s]);
    }
    return written;
  }

  const Arguments& arguments;
  const Uniform& uniform;
  float sum_w = 0, sum_wt = 0;
};

}  // namespace fused
}  // namespace cuda
}  // namespace fastclip
