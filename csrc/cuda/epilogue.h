// The kernel that reads a tile of products t_ij from memory once. It folds the tile into one number for each of its
// rows and columns, or writes the weights of its pairs, or both. Positives by id have sums of their own; a kind with
// levels, which has no such positives, has numbers of pairs instead.
//
// A warp processes one row after another, 256 columns of each: a lane has two groups of four neighbouring columns. Row
// sums are reduced by shuffles. Column sums stay in registers until the end; then the sums of all warps are added in
// order.
#pragma once

#include <type_traits>

#include "targets.h"

namespace fastclip {
namespace cuda {

constexpr int kTileRows = 64, kTileColumns = 256;
constexpr int kRowsOfWarp = kTileRows / kWarps;
constexpr int kFours = kTileColumns / (4 * kWarp);
static_assert(kTileColumns == kThreads, "a thread finishes a column");

// Loads the products of a row in the columns c0 to c0 + 3, as far as there are such columns. whole: there are all four.
__device__ __forceinline__ void load_products(const float* row, bool whole, bool aligned, int c0, int columns,
                                              float (&t)[4]) {
  if (whole && aligned)
    load_four(row + c0, t);
  else
#pragma unroll
    for (int q = 0; q < 4; q++)
      if (c0 + q < columns) t[q] = row[c0 + q];
}

// Adds the column sums of the thread block's warps, in order, and stores the partial sum of the thread's column.
__device__ __forceinline__ void write_columns(const float (&sums)[kFours][4], float (&shared)[kWarps][kTileColumns],
                                              const Partials& to, int64_t tile_m, int64_t j, int64_t columns) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int four = 0; four < kFours; four++)
#pragma unroll
    for (int q = 0; q < 4; q++) shared[warp][four * 4 * kWarp + 4 * lane + q] = sums[four][q];
  __syncthreads();
  float sum = 0;
  for (int q = 0; q < kWarps; q++) sum += shared[q][threadIdx.x];
  if (j < columns) to.data[j * to.line + tile_m * to.part] = sum;
}

// The least number of thread blocks on a multiprocessor; 0 leaves it to the compiler. With targets it would spill some
// registers to have two.
template <class Options>
constexpr int kEpilogueBlocks = Options::kIsGuided || Options::kIsTaught ? 1 : 0;

// Out: the dtype of the written weights, or void if none are written.
template <class Kind, class Options, bool kFold, bool kWeigh, class Out>
__global__ void __launch_bounds__(kThreads, kEpilogueBlocks<Options>)
    epilogue_kernel(ChunkView view, Products products, Folding folding, PairWeights weights, Options options) {
  constexpr bool kWrites = !std::is_void_v<Out>, kHasAll = Options::kHasAll;
  constexpr bool kHasPositives = kHasAll && !Kind::kHasLevels;  // by id
  constexpr bool kHasSecond = kHasPositives || Kind::kHasLevels;
  constexpr bool kHasTargets = Options::kIsGuided || Options::kIsTaught;
  static_assert(!(kFold && Options::kIsTaught), "teacher.h folds a teacher's weights");
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t tiles_n = cdiv(view.columns, kTileColumns);
  const int64_t tile_m = blockIdx.x / tiles_n, tile_n = blockIdx.x % tiles_n;
  const int64_t first_row = tile_m * kTileRows + warp * kRowsOfWarp, first_column = tile_n * kTileColumns;
  // Columns are counted from the tile's first, so that 32 bits are enough.
  const int columns = int(view.columns - first_column < kTileColumns ? view.columns - first_column : kTileColumns);
  const auto column_of = [lane](int four, int q) { return (four * kWarp + lane) * 4 + q; };

  const Affine<float> k = affine<Kind>(view.scale, view.bias);
  float m = 0;
  bool two_shifts = false;
  if (kFold && folding.shift) m = *folding.shift;
  if (kWeigh && weights.shift_x) {
    m = *weights.shift_x;
    two_shifts = *weights.shifts_differ != 0;
  }

  float factor_y[kFours][4], column_sum[kFours][4] = {};
  float level_y[kFours][4] = {};  // in a kind with levels
  LineWeight column[kFours][4] = {};
  typename Options::Line column_line[kFours][4] = {};
  typename Options::Bias bias[kFours][4] = {};
  // The columns' second sums. With options All also their sums of weights, and the coefficients and shifts for the
  // weights of positives by id.
  float second_sum[kFours][4] = {}, weight_sum[kFours][4] = {};
  LineWeight column_positive[kFours][4] = {};
  // With targets, also their factors, and the numbers of a teacher.
  float target_factor_y[kFours][4] = {};
  LineWeight column_taught[kFours][4] = {};
  Affine<float> k_teacher;
  if constexpr (Options::kIsTaught) k_teacher = affine<CUDA::Softmax>(options.scale, {});
#pragma unroll
  for (int four = 0; four < kFours; four++)
#pragma unroll
    for (int q = 0; q < 4; q++) {
      const int c = column_of(four, q);
      const int64_t j = first_column + c;
      const bool inside = c < columns;
      factor_y[four][q] = inside && view.factor_y ? view.factor_y[j] : 1.f;
      if (inside) {
        column_line[four][q] = options.column(j);
        bias[four][q] = options.template bias<Kind>(j, k);
      }
      if constexpr (kHasTargets)
        target_factor_y[four][q] = inside && options.targets.factor_y ? options.targets.factor_y[j] : 1.f;
      if constexpr (Options::kIsTaught)
        if (inside) column_taught[four][q] = {options.teacher.b[j], options.teacher.shift_y[j]};
      if constexpr (kFold && Kind::kHasLevels)
        if (inside) level_y[four][q] = float(folding.level_y[j]);
      if constexpr (kWeigh) {
        if (inside && weights.b) column[four][q].coefficient = weights.b[j];
        if (inside && two_shifts) column[four][q].shift = weights.shift_y[j];
        if constexpr (kHasPositives) {
          if (inside && options.d) column_positive[four][q].coefficient = options.d[j];
          if (inside && options.d && two_shifts) column_positive[four][q].shift = options.shift_y[j];
        }
      }
    }

  float sum_w = 0, sum_wt = 0;
  for (int row = 0; row < kRowsOfWarp; row++) {
    const int64_t i = first_row + row;
    if (i >= view.rows) break;
    const float* const t_row = products.data + i * products.stride + first_column;
    const int64_t partner = i + view.offset - first_column;
    const int positive = partner >= 0 && partner < columns ? int(partner) : -1;
    const float factor_x = view.factor_x ? view.factor_x[i] : 1.f;
    const typename Options::Line line = options.row(i);
    const float* target_row = nullptr;
    float target_factor_x = 1;
    if constexpr (kHasTargets) {
      target_row = options.targets.products.data + i * options.targets.products.stride + first_column;
      if (options.targets.factor_x) target_factor_x = options.targets.factor_x[i];
    }
    float row_sum = 0, row_second_sum = 0, level_x = 0;
    if constexpr (kFold && Kind::kHasLevels) level_x = float(folding.level_x[i]);
    LineWeight mine = {1, m}, mine_positive = {0, m}, taught = {};
    if constexpr (kWeigh) {
      if (weights.a) mine.coefficient = weights.a[i];
      if (two_shifts) mine.shift = weights.shift_x[i];
      if constexpr (kHasPositives) {
        if (options.c) mine_positive.coefficient = options.c[i];
        if (options.c && two_shifts) mine_positive.shift = options.shift_x[i];
      }
      if constexpr (Options::kIsTaught) taught = {options.teacher.a[i], options.teacher.shift_x[i]};
    }
#pragma unroll
    for (int four = 0; four < kFours; four++) {
      const int c0 = column_of(four, 0);
      if (c0 >= columns) continue;
      const bool whole = c0 + 4 <= columns;
      float t[4] = {}, written[4] = {};
      load_products(t_row, whole, products.aligned, c0, columns, t);
      float target[4] = {};
      if constexpr (kHasTargets)
        load_products(target_row, whole, options.targets.products.aligned, c0, columns, target);
#pragma unroll
      for (int q = 0; q < 4; q++) {
        const float spread = factor_x * factor_y[four][q];
        t[q] *= spread;
        if constexpr (kHasTargets) target[q] *= target_factor_x * target_factor_y[four][q];
        const float compared = Options::kIsGuided ? target[q] : t[q];
        const Counts counts =
            options.counts(line, column_line[four][q], compared, c0 + q < columns && c0 + q != positive);
        const bool counts_for_any = counts.mine || counts.other || counts.positive;
        const auto& own = affine_of<Kind>(k, bias[four][q], counts.positive);
        if (kFold && c0 + q == positive && folding.positive) folding.positive[i] = t[q];
        if constexpr (kFold && Kind::kHasLevels) {
          row_sum += counts.mine ? Kind::fold(t[q], own, level_x) : 0.f;
          row_second_sum += counts.mine ? Kind::activation(t[q], own, level_x) : 0.f;
          column_sum[four][q] += counts.other ? Kind::fold(t[q], own, level_y[four][q]) : 0.f;
          second_sum[four][q] += counts.other ? Kind::activation(t[q], own, level_y[four][q]) : 0.f;
        } else if constexpr (kFold) {
          const float e = counts_for_any ? Kind::fold(t[q], own, shift_of<Kind>(m, bias[four][q])) : 0.f;
          if constexpr (kHasAll) {
            row_sum += counts.mine ? e : 0.f, column_sum[four][q] += counts.other ? e : 0.f;
            row_second_sum += counts.positive ? e : 0.f, second_sum[four][q] += counts.positive ? e : 0.f;
          } else {
            row_sum += e, column_sum[four][q] += e;
          }
        }
        if constexpr (kWeigh) {
          const LineWeight& other = column[four][q];
          float w;
          if constexpr (kHasAll) {
            LineWeight a = mine, b = other;
            if constexpr (kHasPositives) {
              a = choose(counts.positive, mine_positive, mine);
              b = choose(counts.positive, column_positive[four][q], other);
            }
            w = weight_by_role<Kind>(t[q], own, bias[four][q], counts, a, b, two_shifts);
            if constexpr (Options::kIsTaught)
              if (c0 + q < columns) w += taught_weight(target[q], k_teacher, taught, column_taught[four][q]);
            weight_sum[four][q] += w;
          } else {
            w = Kind::activation(t[q], own, mine.shift);
            if (two_shifts)
              w = w * mine.coefficient + Kind::activation(t[q], own, other.shift) * other.coefficient;
            else
              w *= mine.coefficient + other.coefficient;
            w = counts_for_any ? w : 0.f;
          }
          sum_w += w;
          sum_wt += counts_for_any || (Options::kIsTaught && c0 + q < columns) ? w * t[q] : 0.f;
          if constexpr (kWrites) {
            written[q] = w * weights.enlarged;
            if (weights.spread) written[q] *= spread;
            if (std::is_same_v<Out, float> && weights.to_tf32) written[q] = rounded_to_tf32(written[q]);
          }
        }
      }
      if constexpr (kWrites) {
        Out* const out = static_cast<Out*>(weights.out) + i * weights.stride_out + first_column + c0;
        // Rows of weights always begin on 32 bytes, unlike rows of kept products.
        if (whole)
          store_four(out, written);
        else
#pragma unroll
          for (int q = 0; q < 4; q++)
            if (c0 + q < columns) out[q] = narrow<Out>(written[q]);
      }
    }
    if constexpr (kFold) {
      const auto write_row = [&](float sum, const Partials& to) {
        sum = warp_sum(sum);
        if (lane == 0) to.data[i * to.line + tile_n * to.part] = sum;
      };
      write_row(row_sum, folding.rows);
      if constexpr (kHasSecond)
        if (folding.second_rows.data) write_row(row_second_sum, folding.second_rows);
    }
  }

  const int64_t j = first_column + threadIdx.x;
  if constexpr (kFold) {
    __shared__ float shared[kWarps][kTileColumns];
    write_columns(column_sum, shared, folding.columns, tile_m, j, view.columns);
    if constexpr (kHasSecond)
      if (folding.second_columns.data) {
        __syncthreads();
        write_columns(second_sum, shared, folding.second_columns, tile_m, j, view.columns);
      }
  }
  if constexpr (kWeigh && kHasAll) {
    __shared__ float shared[kWarps][kTileColumns];
    if (options.weights.data) write_columns(weight_sum, shared, options.weights, tile_m, j, view.columns);
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

inline int64_t epilogue_blocks(const ChunkView& view) {
  return cdiv(view.rows, kTileRows) * cdiv(view.columns, kTileColumns);
}

}  // namespace cuda
}  // namespace fastclip
