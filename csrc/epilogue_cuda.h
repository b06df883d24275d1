// The epilogue of a product in memory: a tile of t_ij is read once, folded into one number for each of its rows and
// columns, or weighed, or both.
//
// A warp takes rows one after another, 256 columns of each: a lane holds two times four neighbours. Sums of a row end
// in shuffles; sums of columns stay in registers until the warps' are added, in order.
#pragma once

#include <type_traits>

#include "device_cuda.h"

namespace fastclip {
namespace cuda {

constexpr int kTileRows = 64, kTileColumns = 256;
constexpr int kRowsOfWarp = kTileRows / kWarps;
constexpr int kFours = kTileColumns / (4 * kWarp);
static_assert(kTileColumns == kThreads, "a thread finishes a column");

struct Products {
  const float* data = nullptr;  // without the factors
  int64_t stride = 0;
  bool aligned = false;  // every row begins on 16 bytes
};

// A column's part in the weights of its pairs.
struct ColumnWeight {
  float b, reference;
};

// Out: the dtype of the weights, or void where only their sums are wanted or there are none.
template <class Loss, bool kFold, bool kWeigh, class Out>
__global__ void __launch_bounds__(kThreads)
    epilogue_kernel(Part part, Products products, Folding folding, PairWeights weights) {
  constexpr bool kWrites = !std::is_void_v<Out>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tiles_n = cdiv(part.columns, kTileColumns);
  const int64_t tile_m = blockIdx.x / tiles_n, tile_n = blockIdx.x % tiles_n;
  const int64_t first_row = tile_m * kTileRows + warp * kRowsOfWarp, first_column = tile_n * kTileColumns;
  // Within a tile 32 bits do: columns are counted from its first one.
  const int columns = int(part.columns - first_column < kTileColumns ? part.columns - first_column : kTileColumns);
  const auto column_of = [lane](int four, int q) { return (four * kWarp + lane) * 4 + q; };

  const Affine<float> k = affine<Loss>(part.scale, part.bias);
  float m = 0;
  bool two_references = false;
  if (kFold && folding.reference) m = *folding.reference;
  if (kWeigh && weights.reference_x) {
    m = *weights.reference_x;
    two_references = *weights.differ != 0;
  }

  float factor_y[kFours][4], column_sum[kFours][4] = {};
  ColumnWeight column[kFours][4] = {};
#pragma unroll
  for (int four = 0; four < kFours; four++)
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int c = column_of(four, q);
      const int64_t j = first_column + c;
      const bool inside = c < columns;
      factor_y[four][q] = inside && part.factor_y ? part.factor_y[j] : 1.f;
      if constexpr (kWeigh) {
        if (inside && weights.b) column[four][q].b = weights.b[j];
        if (inside && two_references) column[four][q].reference = weights.reference_y[j];
      }
    }

  float sum_w = 0, sum_wt = 0;
  for (int row = 0; row < kRowsOfWarp; row++) {
    const int64_t i = first_row + row;
    if (i >= part.rows) break;
    const float* const t_row = products.data + i * products.stride + first_column;
    const int64_t partner = i + part.offset - first_column;
    const int positive = partner >= 0 && partner < columns ? int(partner) : -1;
    const float factor_x = part.factor_x ? part.factor_x[i] : 1.f;
    float a = 1, reference = m, row_sum = 0;
    if constexpr (kWeigh) {
      if (weights.a) a = weights.a[i];
      if (two_references) reference = weights.reference_x[i];
    }
#pragma unroll
    for (int four = 0; four < kFours; four++) {
      const int c0 = column_of(four, 0);
      if (c0 >= columns) continue;
      const bool whole = c0 + 4 <= columns;
      float t[4] = {}, written[4] = {};
      if (whole && products.aligned)
        load_four(t_row + c0, t);
      else
#pragma unroll
        for (int q = 0; q < 4; q++)
          if (c0 + q < columns) t[q] = t_row[c0 + q];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float spread = factor_x * factor_y[four][q];
        t[q] *= spread;
        const bool live = c0 + q < columns && c0 + q != positive;
        if (kFold && c0 + q == positive && folding.positive) folding.positive[i] = t[q];
        if constexpr (kFold) {
          const float e = live ? Loss::fold(t[q], k, m) : 0.f;
          row_sum += e;
          column_sum[four][q] += e;
        }
        if constexpr (kWeigh) {
          const ColumnWeight& other = column[four][q];
          float w = Loss::activation(t[q], k, reference);
          if (two_references)
            w = w * a + Loss::activation(t[q], k, other.reference) * other.b;
          else
            w *= a + other.b;
          w = live ? w : 0.f;
          sum_w += w;
          sum_wt += live ? w * t[q] : 0.f;
          if constexpr (kWrites) {
            written[q] = w * weights.enlarged;
            if (weights.spread) written[q] *= spread;
            if (std::is_same_v<Out, float> && weights.to_tf32) written[q] = rounded_to_tf32(written[q]);
          }
        }
      }
      if constexpr (kWrites) {
        Out* const out = static_cast<Out*>(weights.out) + i * weights.stride_out + first_column + c0;
        // Rows of weights begin on 32 bytes; what they are made from may be kept products, which need not.
        if (whole)
          store_four(out, written);
        else
#pragma unroll
          for (int q = 0; q < 4; q++)
            if (c0 + q < columns) out[q] = narrow<Out>(written[q]);
      }
    }
    if constexpr (kFold) {
      row_sum = warp_sum(row_sum);
      if (lane == 0) folding.rows.data[i * folding.rows.line + tile_n * folding.rows.part] = row_sum;
    }
  }

  if constexpr (kFold) {
    __shared__ float shared[kWarps][kTileColumns];
#pragma unroll
    for (int four = 0; four < kFours; four++)
#pragma unroll
      for (int q = 0; q < 4; q++) shared[warp][four * 4 * kWarp + 4 * lane + q] = column_sum[four][q];
    __syncthreads();
    const int64_t j = tile_n * kTileColumns + threadIdx.x;
    float sum = 0;
    for (int q = 0; q < kWarps; q++) sum += shared[q][threadIdx.x];
    if (j < part.columns) folding.columns.data[j * folding.columns.line + tile_m * folding.columns.part] = sum;
  }
  if constexpr (kWeigh) {
    __shared__ float shared[2][kWarps];
    sum_w = warp_sum(sum_w), sum_wt = warp_sum(sum_wt);
    if (lane == 0) shared[0][warp] = sum_w, shared[1][warp] = sum_wt;
    __syncthreads();
    if (threadIdx.x < 2) {
      float sum = 0;
      for (int q = 0; q < kWarps; q++) sum += shared[threadIdx.x][q];
      weights.totals[threadIdx.x * weights.total_parts + blockIdx.x] = sum;
    }
  }
}

inline int64_t epilogue_blocks(const Part& part) {
  return cdiv(part.rows, kTileRows) * cdiv(part.columns, kTileColumns);
}

}  // namespace cuda
}  // namespace fastclip
