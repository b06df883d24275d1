// The interface of the CUDA engine's fused tensor-core kernels for sm_90a, which make a product and its epilogue
// without logits in memory. Neither torch nor CUTLASS is included here.
//
// Experimental, and not the default: on an H100 they pass every check against float64 and make this engine faster for
// CLIP at N = 32,768, D = 768 in bf16: 13.8 ms instead of the 17.5 of another run. Triton took 10.8 to 12.2 ms there.
#pragma once

#include "../chunk_view.h"

namespace fastclip {
namespace cuda {

// Cooperative: two warp groups share a tile. Ping-pong: each warp group has its own tile, and the epilogue of one
// overlaps the product of the other. `cluster` is the number of tiles, one below the other, that load their common
// columns together.
enum class Schedule { kCooperative, kPingPong };
struct FusedTile {
  int rows, columns;
  Schedule schedule;
  int cluster;

  constexpr int warps() const { return schedule == Schedule::kCooperative ? 8 : 4; }
};
constexpr FusedTile kSweepTile = {128, 256, Schedule::kCooperative, 1};
constexpr FusedTile kWeighTile = {128, 128, Schedule::kPingPong, 1};

inline int64_t tiles_of(int64_t lines, int lines_of_tile) { return (lines + lines_of_tile - 1) / lines_of_tile; }

// Folding::rows.parts and columns.parts of fused_sweep, which writes a number for each tile of a row or column.
inline int64_t fused_row_parts(const ChunkView& view) { return tiles_of(view.columns, kSweepTile.columns); }
inline int64_t fused_column_parts(const ChunkView& view) { return tiles_of(view.rows, kSweepTile.rows); }

// PairWeights::total_parts of fused_weigh, one for each warp of each tile.
inline int64_t fused_total_parts(const ChunkView& view) {
  return tiles_of(view.rows, kWeighTile.rows) * tiles_of(view.columns, kWeighTile.columns) * kWeighTile.warps();
}

// True if the kernels serve this view on a GPU of compute capability 9.0. Tensor maps need rows that begin on 16 bytes,
// and tiles are counted in 32 bits.
inline bool fused_serves(const ChunkView& view) {
  const auto on_16_bytes = [](const void* features, int64_t stride) {
    return reinterpret_cast<uintptr_t>(features) % 16 == 0 && stride % 8 == 0 && stride > 0 &&
           stride < int64_t(1) << 39;
  };
  const bool is_half = view.dtype == Dtype::kBFloat16 || view.dtype == Dtype::kHalf;
  const int64_t most = int64_t(1) << 30;
  const bool is_sized = view.rows > 0 && view.columns > 0 && view.width > 0 && view.rows <= most &&
                        view.columns <= most && view.width <= most && fused_total_parts(view) <= most;
  return is_half && is_sized && view.width % 8 == 0 && on_16_bytes(view.x, view.stride_x) &&
         on_16_bytes(view.y, view.stride_y);
}

// True if fused_weigh can write these weights: their rows must begin on 16 bytes. It has no form that writes none.
inline bool fused_writes(const PairWeights& weights) {
  return weights.out != nullptr && reinterpret_cast<uintptr_t>(weights.out) % 16 == 0 && weights.stride_out % 8 == 0 &&
         weights.stride_out > 0 && weights.stride_out < int64_t(1) << 39;
}

// The kernels need no work space. fused_sweep writes every partial sum of every line. fused_weigh writes every total,
// and no weights beyond the last column of a row.
void fused_sweep(const ChunkView& view, const Folding& folding);
void fused_weigh(const ChunkView& view, const PairWeights& weights);

}  // namespace cuda
}  // namespace fastclip
