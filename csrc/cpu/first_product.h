// The first product of a tile, t = y_tile x_strip^T: of our features, or of targets.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "gemm.h"
#include "row_strip.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

// The rows of y in a tile, as an operand of products.
template <class Op>
struct Operand {
  const Op* rows;
  int64_t stride;
};

template <class In, class Op, class T>
struct FirstProduct {
  static constexpr bool kNarrow = sizeof(Op) < sizeof(T);  // bf16 products
  static constexpr int64_t kChain = 128;                   // terms in one chain of fp32 additions

  bool brgemm;
  Features y;
  int64_t width;
  const Op* transposed;  // the features of the strip, (depth, lanes)
  int64_t lanes;
  Op* rows;  // room for the features of a tile

  Operand<Op> tile(int64_t begin, int64_t cols) const {
    const In* const first = static_cast<const In*>(y.data) + begin * y.stride;
    const int64_t deep = depth<Op>(width);
    if constexpr (std::is_same_v<In, Op>)  // features are operands as they are
      if (deep == width) return {first, y.stride};
    pack_rows<In, Op>(first, y.stride, cols, width, rows, deep);
    return {rows, deep};
  }

  // It goes in pieces of D: one fp32 chain of 512 terms has twice the rounding error of four chains of 128, and at
  // scale 100 an error in t becomes a hundred times as large in the exponential. bf16 rounds more than that and is
  // faster in one piece. room: for the products of a whole tile; it may be `out`.
  void multiply(const Operand<Op>& tile, int64_t cols, T* room, T* out) const {
    const bool ragged = !brgemm && cols % kWhole != 0;
    const int64_t whole = ragged ? round_up(cols, kWhole) : cols, deep = depth<Op>(width);
    const Operand<Op> operand = ragged ? padded(tile, cols, whole) : tile;
    T* const t = ragged ? room : out;
    for (int64_t d = 0, piece = kNarrow ? deep : kChain; d < deep; d += piece)
      gemm(brgemm, d > 0, whole, lanes, std::min(piece, deep - d), operand.rows + d, operand.stride,
           transposed + d * lanes, lanes, t, lanes);
    if (t != out) memcpy(out, t, sizeof(T) * cols * lanes);
  }

 private:
  // BLAS may sum the last rows of a ragged product in another order (MKL on AMD does, with three rows), and a positive
  // would no longer tie with its duplicates. Operands are therefore padded with rows of zeros to a multiple of four.
  static constexpr int64_t kWhole = 4;
  Operand<Op> padded(const Operand<Op>& tile, int64_t cols, int64_t whole) const {
    const int64_t deep = depth<Op>(width);
    for (int64_t c = 0; c < whole; c++)
      if (c >= cols)
        std::fill_n(rows + c * deep, deep, Op(0));
      else if (tile.rows != rows)
        std::copy_n(tile.rows + c * tile.stride, deep, rows + c * deep);
    return {rows, deep};
  }
};

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
