// fused_sweep and fused_weigh for the emulated engine: products made on the CPU, and the epilogues' own code. They are
// in a library of their own, because the engine is emulated with other headers in place of CUDA's.
#include <stdexcept>

#include "collective.h"
#include "cuda/sm90/api.h"
#include "cuda/sm90/fold.h"
#include "cuda/sm90/weights.h"

// The number of calls of each kernel, and of calls of the second with two shifts.
extern "C" {
__attribute__((visibility("default"))) int emulated_sweeps = 0, emulated_weighs = 0, emulated_differ = 0;
}

namespace fastclip {
namespace cuda {

template <class Element>
float product(const ChunkView& view, int i, int j) {
  const Element* const x = static_cast<const Element*>(view.x) + i * view.stride_x;
  const Element* const y = static_cast<const Element*>(view.y) + j * view.stride_y;
  double sum = 0;
  for (int64_t d = 0; d < view.width; d++) sum += double(float(x[d])) * double(float(y[d]));
  return float(sum);
}

template <class Function>
void for_kernel(const ChunkView& view, Function f) {
  if (!fused_serves(view)) throw std::invalid_argument("the fused kernels do not serve this chunk");
  CUDA::for_kind(view.kind, [&](auto statistic) {
    if (view.dtype == Dtype::kHalf) return f(statistic, cutlass::half_t());
    f(statistic, cutlass::bfloat16_t());
  });
}

template <class Work, class Layout, class Written>
void run(const ChunkView& view, const typename Work::Arguments& arguments, Written written) {
  emulated::Collective<Work, Layout>::run(
      view, arguments, int(tiles_of(view.rows, Layout::kRows)), int(tiles_of(view.columns, Layout::kColumns)), 0,
      [&](int i, int j) { return product<typename Work::Element>(view, i, j); }, written);
}

__attribute__((visibility("default"))) void fused_sweep(const ChunkView& view, const Folding& folding) {
  if (folding.rows.parts != fused_row_parts(view) || folding.columns.parts != fused_column_parts(view))
    throw std::invalid_argument("the engine expects other partial sums");
  emulated_sweeps++;
  for_kernel(view, [&](auto statistic, auto element) {
    using Layout = fused::Layout<kSweepTile>;
    run<fused::Fold<decltype(statistic), decltype(element), Layout>, Layout>(view, {view, folding},
                                                                             [](int, int, float) {});
  });
}

__attribute__((visibility("default"))) void fused_weigh(const ChunkView& view, const PairWeights& weights) {
  if (!fused_writes(weights) || weights.total_parts != fused_total_parts(view))
    throw std::invalid_argument("the engine expects other weights or totals");
  emulated_weighs++;
  emulated_differ += *weights.shifts_differ != 0;
  for_kernel(view, [&](auto statistic, auto element) {
    using Element = decltype(element);
    using Layout = fused::Layout<kWeighTile>;
    Element* const out = static_cast<Element*>(weights.out);
    run<fused::Weigh<decltype(statistic), Element, Layout>, Layout>(view, {view, weights}, [&](int i, int j, float w) {
      if (i < view.rows && j < view.columns) out[i * weights.stride_out + j] = Element(w);
    });
  });
}

}  // namespace cuda
}  // namespace fastclip
