// The product around a fused epilogue: CUTLASS's kernel for sm_90a (TMA, wgmma, warps that only load), and its launch.
#pragma once

#include <cutlass/device_kernel.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/kernel_hardware_info.hpp>

#include "epilogue.h"

// CUTLASS's device asserts are function calls, around which ptxas serialises wgmma (C7510).
#ifndef NDEBUG
#error "compile the fused kernels with -DNDEBUG"
#endif

namespace fastclip {
namespace cuda {
namespace fused {

template <Schedule>
struct Schedules {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};
template <>
struct Schedules<Schedule::kPingPong> {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// The kernel whose visitor's Work folds or weighs the tiles of Layout. Written: void, or the dtype of the written
// values.
template <class Work, class Layout, class Written>
struct Product {
  using Element = typename Work::Element;
  using Schedules = fused::Schedules<Layout::kTile.schedule>;
  using Tile = cute::Shape<cute::Int<Layout::kRows>, cute::Int<Layout::kColumns>, cute::_64>;
  using Piece = cute::Shape<cute::Int<Layout::kBandRows>, cute::Int<Layout::kPieceColumns>>;
  using Cluster = cute::Shape<cute::Int<Layout::kTile.cluster>, cute::_1, cute::_1>;
  static constexpr int kAlignment = 16 / sizeof(Element);

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, Piece, float, float, void,
      cutlass::layout::RowMajor, kAlignment, Written, cutlass::layout::RowMajor, kAlignment,
      typename Schedules::Epilogue, Visitor<Work>>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster, Stages,
      typename Schedules::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
};

// Tiles run in squares, so that the features that the tiles of a square share stay in L2. Returns the edge of the
// squares, in tiles. The grid is rounded up to whole squares, so the edge is the largest that adds at most 1/16 more
// tiles in each direction.
inline int square_edge(int64_t tiles_m, int64_t tiles_n) {
  for (int edge = 8; edge > 1; edge /= 2)
    if (tiles_of(tiles_m, edge) * edge * 16 <= tiles_m * 17 && tiles_of(tiles_n, edge) * edge * 16 <= tiles_n * 17)
      return edge;
  return 1;
}

// Calls f with the kind and the dtype of a view, or throws if the kind has levels or tensor maps cannot describe the
// view. CUTLASS does not throw there: without asserts it writes to stderr and launches the kernel all the same.
template <class Function>
void for_kernel(const char* name, const ChunkView& view, Function f) {
  if (!fused_serves(view) || CUDA::has_levels(view.kind))
    throw std::invalid_argument(std::string(name) + " does not serve this chunk");
  CUDA::for_kind(view.kind, [&](auto statistic) {
    if constexpr (!decltype(statistic)::kHasLevels) {
      if (view.dtype == Dtype::kHalf) return f(statistic, cutlass::half_t());
      f(statistic, cutlass::bfloat16_t());
    }
  });
}

template <class Kernel>
void launch(const char* name, const ChunkView& view, const typename Kernel::EpilogueArguments& epilogue) {
  using Element = typename Kernel::ElementA;
  const LaunchLabel place = {name, view.rows, view.columns, view.width, view.stream};
  int device = 0, processors = 0;
  check(cudaGetDevice(&device), place);
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), place);

  typename Kernel::Arguments arguments;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {int(view.rows), int(view.columns), int(view.width), 1};
  arguments.mainloop.ptr_A = static_cast<const Element*>(view.x);
  arguments.mainloop.dA = {view.stride_x, cute::_1{}, 0};
  arguments.mainloop.ptr_B = static_cast<const Element*>(view.y);
  arguments.mainloop.dB = {view.stride_y, cute::_1{}, 0};
  arguments.epilogue = epilogue;
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = processors;
  const auto tile = typename Kernel::TileShape{};
  arguments.scheduler.max_swizzle_size =
      square_edge(tiles_of(view.rows, cute::size<0>(tile)), tiles_of(view.columns, cute::size<1>(tile)));

  const auto kernel = cutlass::device_kernel<Kernel>;
  const auto parameters = Kernel::to_underlying_arguments(arguments, nullptr);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cute::size<0>(typename Kernel::ClusterShape{}), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = Kernel::get_grid_shape(parameters);
  config.blockDim = Kernel::get_block_shape();
  config.dynamicSmemBytes = Kernel::SharedStorageSize;
  config.stream = view.stream;
  config.attrs = &cluster;
  config.numAttrs = cute::size(typename Kernel::ClusterShape{}) > 1 ? 1 : 0;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize), place);
  check(cudaLaunchKernelEx(&config, kernel, parameters), place);
}

}  // namespace fused
}  // namespace cuda
}  // namespace fastclip
