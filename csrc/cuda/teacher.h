// The states of a teacher's lines: for all pairs of a line, own positives included, the sum of e' and that of e' * t,
// where e' is the exponential of the teacher's logit and t our product.
//
// Every line has shifts of its own, so this works at any scale of the teacher. teach_kernel finds the largest logits of
// a tile's rows and columns and folds the tile relative to them. merge_kernel merges what the tiles found into the
// states, in float64 and in a fixed order.
#pragma once

#include "epilogue.h"
#include "maxima.h"

namespace fastclip {
namespace cuda {

// Three numbers of each line and tile: the shift, and the two sums relative to it.
struct TaughtPartials {
  Partials shift, sum, moment;
};

__device__ __forceinline__ void store_partial(const Partials& to, int64_t line, int64_t part, float value) {
  to.data[line * to.line + part * to.part] = value;
}

// 0 for a line whose logits are all -inf or NaN.
__device__ __forceinline__ float shift_above(float largest) { return largest == -INFINITY ? 0.f : ceilf(largest); }

// Tiles, warps and lanes are those of epilogue_kernel. The columns' largest logits are needed before any exponential,
// so the teacher's products are read twice.
static __global__ void __launch_bounds__(kThreads)
    teach_kernel(ChunkView view, Products products, TargetProducts targets, Scalar scale, TaughtPartials rows,
                 TaughtPartials columns) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tiles_n = cdiv(view.columns, kTileColumns);
  const int64_t tile_m = blockIdx.x / tiles_n, tile_n = blockIdx.x % tiles_n;
  const int64_t first_row = tile_m * kTileRows + warp * kRowsOfWarp, first_column = tile_n * kTileColumns;
  const int width = int(view.columns - first_column < kTileColumns ? view.columns - first_column : kTileColumns);
  const auto column_of = [lane](int four, int q) { return (four * kWarp + lane) * 4 + q; };
  const Affine<float> k = affine<CUDA::Softmax>(scale, {});

  float factor_y[kFours][4], target_factor_y[kFours][4];
#pragma unroll
  for (int four = 0; four < kFours; four++)
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int64_t j = first_column + column_of(four, q);
      const bool inside = column_of(four, q) < width;
      factor_y[four][q] = inside && view.factor_y ? view.factor_y[j] : 1.f;
      target_factor_y[four][q] = inside && targets.factor_y ? targets.factor_y[j] : 1.f;
    }
  // Loads the teacher's t of a row.
  const auto load_targets = [&](int64_t i, float (&t)[kFours][4]) {
    const float* const row = targets.products.data + i * targets.products.stride + first_column;
    const float factor_x = targets.factor_x ? targets.factor_x[i] : 1.f;
#pragma unroll
    for (int four = 0; four < kFours; four++) {
      const int c0 = column_of(four, 0);
      load_products(row, c0 + 4 <= width, targets.products.aligned, c0, width, t[four]);
#pragma unroll
      for (int q = 0; q < 4; q++) t[four][q] *= factor_x * target_factor_y[four][q];
    }
  };

  __shared__ float shared[kWarps][kTileColumns];
  float column_shift[kFours][4];
#pragma unroll
  for (int four = 0; four < kFours; four++)
#pragma unroll
    for (int q = 0; q < 4; q++) column_shift[four][q] = -INFINITY;
  for (int row = 0; row < kRowsOfWarp && first_row + row < view.rows; row++) {
    float t[kFours][4] = {};
    load_targets(first_row + row, t);
#pragma unroll
    for (int four = 0; four < kFours; four++)
#pragma unroll
      for (int q = 0; q < 4; q++) column_shift[four][q] = fmaxf(column_shift[four][q], t[four][q] * k.scale);
  }
#pragma unroll
  for (int four = 0; four < kFours; four++)
#pragma unroll
    for (int q = 0; q < 4; q++) shared[warp][column_of(four, q)] = column_shift[four][q];
  __syncthreads();
#pragma unroll
  for (int four = 0; four < kFours; four++)
#pragma unroll
    for (int q = 0; q < 4; q++) {
      float largest = -INFINITY;
      for (int w = 0; w < kWarps; w++) largest = fmaxf(largest, shared[w][column_of(four, q)]);
      column_shift[four][q] = shift_above(largest);
      if (warp == 0 && column_of(four, q) < width)
        store_partial(columns.shift, first_column + column_of(four, q), tile_m, column_shift[four][q]);
    }

  float column_sum[kFours][4] = {}, column_moment[kFours][4] = {};
  for (int row = 0; row < kRowsOfWarp && first_row + row < view.rows; row++) {
    const int64_t i = first_row + row;
    float t[kFours][4] = {}, ours[kFours][4] = {};
    load_targets(i, t);
    const float factor_x = view.factor_x ? view.factor_x[i] : 1.f;
    float largest = -INFINITY;
#pragma unroll
    for (int four = 0; four < kFours; four++) {
      const int c0 = column_of(four, 0);
      load_products(products.data + i * products.stride + first_column, c0 + 4 <= width, products.aligned, c0, width,
                    ours[four]);
#pragma unroll
      for (int q = 0; q < 4; q++)
        if (column_of(four, q) < width) largest = fmaxf(largest, t[four][q] * k.scale);
    }
    const float row_shift = shift_above(warp_max(largest));
    float row_sum = 0, row_moment = 0;
#pragma unroll
    for (int four = 0; four < kFours; four++)
#pragma unroll
      for (int q = 0; q < 4; q++) {
        if (column_of(four, q) >= width) continue;
        const float weighed = ours[four][q] * (factor_x * factor_y[four][q]);
        const float of_row = CUDA::Softmax::fold(t[four][q], k, row_shift);
        const float of_column = CUDA::Softmax::fold(t[four][q], k, column_shift[four][q]);
        row_sum += of_row, row_moment += of_row * weighed;
        column_sum[four][q] += of_column, column_moment[four][q] += of_column * weighed;
      }
    row_sum = warp_sum(row_sum), row_moment = warp_sum(row_moment);
    if (lane != 0) continue;
    store_partial(rows.shift, i, tile_n, row_shift);
    store_partial(rows.sum, i, tile_n, row_sum);
    store_partial(rows.moment, i, tile_n, row_moment);
  }

  const int64_t j = first_column + threadIdx.x;
  __syncthreads();  // `shared` still holds the largest logits
  write_columns(column_sum, shared, columns.sum, tile_m, j, view.columns);
  __syncthreads();
  write_columns(column_moment, shared, columns.moment, tile_m, j, view.columns);
}

// The rows or columns of a chunk, and the memory of their states by the teacher. Like PartLines.
struct TaughtLines {
  TaughtPartials partials;
  int64_t count = 0, first = 0;
  bool begins = true, ends = true;
  double *shift = nullptr, *sum = nullptr, *moment = nullptr;
};

static __global__ void __launch_bounds__(kThreads) merge_kernel(TaughtLines rows, TaughtLines columns) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows.count + columns.count) return;
  const TaughtLines lines = index < rows.count ? rows : columns;
  const int64_t l = index < rows.count ? index : index - rows.count, out = lines.first + l;
  const auto at = [l](const Partials& p, int64_t q) { return double(p.data[l * p.line + q * p.part]); };
  double shift = 0, sum = 0, moment = 0;
  if (!lines.begins) shift = lines.shift[out], sum = lines.sum[out], moment = lines.moment[out];
  for (int64_t q = 0; q < lines.partials.sum.parts; q++) {
    const double found = at(lines.partials.sum, q), other = at(lines.partials.shift, q);
    if (found == 0) continue;  // all logits are -inf
    // Shifts are integral, so the factors are powers of two.
    const double top = sum == 0 || other > shift ? other : shift;
    const double mine = sum == 0 ? 0. : exp2(shift - top), theirs = exp2(other - top);
    sum = sum * mine + found * theirs;
    moment = moment * mine + at(lines.partials.moment, q) * theirs;
    shift = top;
  }
  const bool sound = sum == 0 || (sum >= kLeastRelative && sum <= 0x1p127);
  lines.shift[out] = shift;
  lines.sum[out] = sound || !lines.ends ? sum : double(NAN);
  lines.moment[out] = moment;
}

}  // namespace cuda
}  // namespace fastclip
