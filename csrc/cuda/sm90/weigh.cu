// The second sweep's weights on tensor cores.
#include "api.h"
#include "gemm.h"
#include "weights.h"

namespace fastclip {
namespace cuda {
namespace fused {

using WeighLayout = Layout<kWeighTile>;

template <class Kind, class Element>
void weigh(const ChunkView& view, const PairWeights& weights) {
  using Kernel = typename Product<Weigh<Kind, Element, WeighLayout>, WeighLayout, Element>::Kernel;
  launch<Kernel>(
      "fused_weigh", view,
      {{view, weights}, nullptr, {}, static_cast<Element*>(weights.out), {weights.stride_out, cute::_1{}, 0}});
}

}  // namespace fused

void fused_weigh(const ChunkView& view, const PairWeights& weights) {
  if (!fused_writes(weights)) throw std::invalid_argument("fused_weigh needs rows of `out` that begin on 16 bytes");
  fused::for_kernel("fused_weigh", view, [&](auto statistic, auto element) {
    fused::weigh<decltype(statistic), decltype(element)>(view, weights);
  });
}

}  // namespace cuda
}  // namespace fastclip
