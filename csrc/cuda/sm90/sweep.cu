// The first sweep on tensor cores.
#include "api.h"
#include "fold.h"
#include "gemm.h"

namespace fastclip {
namespace cuda {
namespace fused {

using SweepLayout = Layout<kSweepTile>;

template <class Kind, class Element>
void sweep(const ChunkView& view, const Folding& folding) {
  using Kernel = typename Product<Fold<Kind, Element, SweepLayout>, SweepLayout, void>::Kernel;
  launch<Kernel>("fused_sweep", view, {{view, folding}, nullptr, {}, nullptr, {}});
}

}  // namespace fused

void fused_sweep(const ChunkView& view, const Folding& folding) {
  fused::for_kernel("fused_sweep", view, [&](auto statistic, auto element) {
    fused::sweep<decltype(statistic), decltype(element)>(view, folding);
  });
}

}  // namespace cuda
}  // namespace fastclip
