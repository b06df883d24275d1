// The sweep with running maxima, which works at any scale. It is always launched after the sweep with one shift, and
// returns at once unless the flag says that one shift was not enough. The host does not know which of the two sweeps
// wrote the states.
//
// A thread block owns 64 lines and visits all their pairs, so it needs no partial sums. It computes the products
// itself, without tensor cores, since a library's product cannot depend on a flag on the device. Each pair's product is
// computed twice, by the thread block of its row and by that of its column. Training takes this path only if features
// are not normalised or the scale exceeds about 110.
#pragma once

#include <type_traits>

#include "targets.h"

namespace fastclip {
namespace cuda {

constexpr int kLines = 64;               // of a thread block
constexpr int kDepth = 16;               // elements of D per step
constexpr int kSide = 4;                 // a thread computes kSide x kSide pairs: kSide lines, kSide pairs of each
constexpr int kAcross = kLines / kSide;  // threads that share a line
static_assert(kAcross * kAcross == kThreads, "a thread holds kSide x kSide pairs");
// The sum of a line relative to its own largest term is smaller than this only if its logits exceed fp32's precision.
constexpr double kLeastRelative = 0x1p-100;

// The states of one side's lines; those of positives by id are null if there are none.
struct States {
  Lines negatives, positives;
};

// The least number of thread blocks on a multiprocessor: three for plain blocks; two with options, since the kernels
// would otherwise spill registers.
template <class Options>
constexpr int kMaximaBlocks = std::is_same_v<Options, Plain> ? 3 : 2;

// Copies kDepth elements of each line to shared memory as fp32, with zeros past the edges.
template <class T>
__device__ __forceinline__ void stage(const Features& f, int64_t first, int64_t depth, int64_t width,
                                      float (&to)[kDepth][kLines + 1]) {
  for (int q = threadIdx.x; q < kDepth * kLines; q += kThreads) {
    const int line = q / kDepth, d = q % kDepth;
    const bool inside = first + line < f.rows && depth + d < width;
    to[d][line] = inside ? widen(static_cast<const T*>(f.data)[(first + line) * f.stride + depth + d]) : 0.f;
  }
}

// Adds to t the products of kSide x kSide pairs of each thread. a, b: room for a step.
template <class T>
__device__ __forceinline__ void multiply_lines(const Features& mine, int64_t first, const Features& others,
                                               int64_t first_other, int64_t width, float (&a)[kDepth][kLines + 1],
                                               float (&b)[kDepth][kLines + 1], float (&t)[kSide][kSide]) {
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  for (int64_t depth = 0; depth < width; depth += kDepth) {
    __syncthreads();
    stage<T>(mine, first, depth, width, a);
    stage<T>(others, first_other, depth, width, b);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; d++)
#pragma unroll
      for (int p = 0; p < kSide; p++)
#pragma unroll
        for (int q = 0; q < kSide; q++) t[p][q] += a[d][down * kSide + p] * b[d][across + q * kAcross];
  }
}

// t times the factors of both lines.
__device__ __forceinline__ float normalised(float t, const Features& mine, int64_t line, const Features& others,
                                            int64_t other) {
  if (mine.factor) t *= mine.factor[line];
  if (others.factor) t *= others.factor[other];
  return t;
}

template <class T, class Kind, class Options>
__global__ void __launch_bounds__(kThreads, kMaximaBlocks<Options>)
    maxima_kernel(Features x, Features y, int64_t width, Scalar scale, Scalar bias, int64_t offset, const int32_t* flag,
                  double* positive, States rows, States columns, Options options) {
  static_assert(!Kind::kNegatesPositives, "shifts are the largest of logits with their own sign");
  if (*flag == 0) return;
  const int64_t blocks_x = cdiv(x.rows, kLines);
  const bool is_row = int64_t(blockIdx.x) < blocks_x;
  const Features mine = is_row ? x : y, others = is_row ? y : x;
  const States states = is_row ? rows : columns;
  // The own positive of line l is line l + own_offset of the others.
  const int64_t own_offset = is_row ? offset : -offset;
  const int64_t first = (blockIdx.x - (is_row ? 0 : blocks_x)) * kLines;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const Affine<float> k = affine<Kind>(scale, bias);
  const auto line_of = [&](bool of_row, int64_t l) { return of_row ? options.row(l) : options.column(l); };

  __shared__ float a[kDepth][kLines + 1], b[kDepth][kLines + 1];
  constexpr int kSets = Options::kHasAll ? 2 : 1;  // negatives, positives by id
  float running[kSets][kSide];
  double sum[kSets][kSide] = {};
#pragma unroll
  for (int set = 0; set < kSets; set++)
#pragma unroll
    for (int p = 0; p < kSide; p++) running[set][p] = -INFINITY;
  for (int64_t first_other = 0; first_other < others.rows; first_other += kLines) {
    float t[kSide][kSide] = {};
    multiply_lines<T>(mine, first, others, first_other, width, a, b, t);
    float guide[kSide][kSide] = {};
    if constexpr (Options::kIsGuided)
      multiply_lines<T>(is_row ? options.target_x : options.target_y, first,
                        is_row ? options.target_y : options.target_x, first_other, options.target_width, a, b, guide);
#pragma unroll
    for (int p = 0; p < kSide; p++) {
      const int64_t line = first + down * kSide + p;
      bool counted[kSets][kSide];
      float tops[kSets];
#pragma unroll
      for (int set = 0; set < kSets; set++) tops[set] = -INFINITY;
      typename Options::Bias of_column[kSide] = {};
#pragma unroll
      for (int q = 0; q < kSide; q++) {
        const int64_t other = first_other + across + q * kAcross;
        const bool is_inside = line < mine.rows && other < others.rows;
        Counts counts = {};
        if (is_inside) {
          t[p][q] = normalised(t[p][q], mine, line, others, other);
          float compared = t[p][q];
          if constexpr (Options::kIsGuided)
            compared = normalised(guide[p][q], is_row ? options.target_x : options.target_y, line,
                                  is_row ? options.target_y : options.target_x, other);
          const bool is_own = other == line + own_offset;
          if (is_own && is_row) positive[line] = t[p][q];  // from these products, so that it ties with its duplicates
          of_column[q] = options.template bias<Kind>(is_row ? other : line, k);
          counts = options.counts(line_of(is_row, line), line_of(!is_row, other), compared, !is_own);
        }
        counted[0][q] = counts.mine;
        if constexpr (Options::kHasAll) counted[1][q] = counts.positive;
#pragma unroll
        for (int set = 0; set < kSets; set++)
          if (counted[set][q]) tops[set] = fmaxf(tops[set], t[p][q] * k.scale - shift_of<Kind>(0.f, of_column[q]));
      }
#pragma unroll
      for (int set = 0; set < kSets; set++) {
        const float top = ceilf(warp_max(tops[set], kAcross));
        float& m = running[set][p];
        if (top > m) {
          // Both are integral or infinite, so the factor is a power of two; the first sum is 0.
          sum[set][p] = m == -INFINITY ? 0. : sum[set][p] * exp2(double(m) - double(top));
          m = top;
        }
        float part = 0;
#pragma unroll
        for (int q = 0; q < kSide; q++)
          if (counted[set][q])
            part += Kind::fold(t[p][q], affine_of<Kind>(k, of_column[q], set == 1),
                               shift_of<Kind>(m == -INFINITY ? 0.f : m, of_column[q]));
        sum[set][p] += warp_sum(part, kAcross);
      }
    }
  }
#pragma unroll
  for (int set = 0; set < kSets; set++) {
    const Lines& out = set == 0 ? states.negatives : states.positives;
    if (out.sum == nullptr) continue;
#pragma unroll
    for (int p = 0; p < kSide; p++) {
      const int64_t line = first + down * kSide + p;
      if (across != 0 || line >= mine.rows) continue;
      const bool absent = running[set][p] == -INFINITY;
      const bool sound = absent || (sum[set][p] >= kLeastRelative && sum[set][p] <= 0x1p127);
      out.shift[line] = absent ? 0. : double(running[set][p]);
      out.sum[line] = sound ? sum[set][p] : double(NAN);
    }
  }
}

inline int64_t maxima_blocks(const Features& x, const Features& y) {
  return cdiv(x.rows, kLines) + cdiv(y.rows, kLines);
}

}  // namespace cuda
}  // namespace fastclip
