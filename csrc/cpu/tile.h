// One tile of products in the CPU engine, which is folded into the state or turned into weights (fold.h).
//
// A tile holds t for `cols` columns by `lanes` rows, the rows side by side in memory: one vector register holds one
// column of 16 (or 8, or 4) rows, row sums are vectors, and only column sums are reduced across a register. A mask
// excludes the own positives and the lanes beyond the last row, so that every loop runs over whole registers. A set of
// pairs (pairs.h) decides which other pairs count.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../kinds.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

// A compensated sum in double (Neumaier). A plain sum over all pairs would be biased: rounding errors of a billion
// equal terms add up.
struct Sum {
  double value = 0, lost = 0;
  FASTCLIP_INLINE void add(double v) {
    const double next = value + v;
    lost += std::abs(value) >= std::abs(v) ? (value - next) + v : (v - next) + value;
    value = next;
  }
};

// An integer as wide as T.
template <class T>
using Integer = std::conditional_t<sizeof(T) == sizeof(double), int64_t, int32_t>;

// Statistics of a tile's lines over one set of pairs, and the coefficients of these pairs' weights.
template <class T>
struct TileLines {
  double *row_shift, *row_sum;  // fold; with levels the shifts are numbers of pairs
  double *col_shift, *col_sum;
  double *row_moment, *col_moment;   // of a teacher
  const T *a, *b;                    // weigh
  const T *row_shifts, *col_shifts;  // weigh; with levels these
};

// Products of a tile's pairs.
template <class T>
struct Products {
  const T* t = nullptr;           // (cols, lanes), without the factors
  const T* row_factor = nullptr;  // (lanes)
  const T* col_factor = nullptr;  // (cols), or null for ones
};

template <class T>
struct Tile {
  const T* t;           // (cols, lanes) products, without the factors
  int64_t lanes;        // row stride of t and w, a multiple of 16
  int64_t rows, cols;   // valid part
  int64_t first_lane;   // the own positive of column c is at lane c + first_lane, if that is valid
  const T* row_factor;  // (lanes)
  const T* col_factor;  // (cols), or null for ones
  double scale_log2, bias_log2;
  T* counts;   // (lanes): 1 for rows, 0 beyond, and 0 at the own positive of the current column
  T* scratch;  // (3 lanes)

  T shift;              // fold: the shift of all lines
  bool running_maxima;  // fold: each line has its own shift instead
  bool one_shift;       // weigh: all shifts are equal
  double* positive;     // fold: t of the own positives, at lane i or at column c
  bool positives_by_column;
  TileLines<T> negatives{}, positives{};  // positives by id

  T* w;         // (cols, lanes); may be t itself
  Sum* totals;  // sums of w and of w * t, without own positives

  // A guide's products or, in the tile of a teacher's products, ours.
  Products<T> other;

  // Null if the block has none.
  const Integer<T>* row_ids = nullptr;  // (lanes)
  const int32_t* col_ids = nullptr;
  const T *row_threshold = nullptr, *col_threshold = nullptr;
  const T *row_bias_whole = nullptr, *row_bias_part = nullptr;  // (lanes)
  const double* col_bias = nullptr;
  double *row_weights = nullptr, *col_weights = nullptr;  // weigh: sums of w, added to
};

// One column of a tile: its products and its scale. Its own positive is masked for as long as the object lives.
template <class T>
class Column {
 public:
  const T* const t;
  const double factor;
  const Affine<T> k;

  FASTCLIP_INLINE Column(const Tile<T>& tile, int64_t c)
      : t(tile.t + c * tile.lanes),
        factor(tile.col_factor ? tile.col_factor[c] : T(1)),
        k(tile.scale_log2 * factor, tile.bias_log2),
        lane_(c + tile.first_lane),
        counts_(tile.counts) {
    if (lane_ < 0 || lane_ >= tile.rows) lane_ = -1;
    if (lane_ >= 0) counts_[lane_] = 0;
  }
  FASTCLIP_INLINE ~Column() {
    if (lane_ >= 0) counts_[lane_] = 1;
  }
  // Stores t of the own positive, if it lies in the tile.
  FASTCLIP_INLINE void note_positive(const Tile<T>& tile, int64_t c) const {
    if (lane_ >= 0)
      tile.positive[tile.positives_by_column ? c : lane_] = double(t[lane_]) * tile.row_factor[lane_] * factor;
  }

 private:
  int64_t lane_;
  T* const counts_;
};

// The bytes of a vector register of this instruction set.
#if defined(__AVX512F__)
constexpr int kRegister = 64;
#elif defined(__AVX__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif
template <class T>
struct Register {
  typedef T type __attribute__((vector_size(kRegister)));
};
template <class T>
using V = typename Register<T>::type;
template <class T>
constexpr int64_t kWidth = sizeof(V<T>) / sizeof(T);

template <class T>
FASTCLIP_INLINE void load(const T* p, V<T>& v) {
  memcpy(&v, p, sizeof v);
}
template <class T>
FASTCLIP_INLINE void store(T* p, const V<T>& v) {
  memcpy(p, &v, sizeof v);
}

// The sum of a register's lanes, in a fixed order.
template <class T>
FASTCLIP_INLINE double sum_of_lanes(const V<T>& v) {
  T lanes[kWidth<T>];
  memcpy(lanes, &v, sizeof v);
  for (int64_t half = kWidth<T> / 2; half > 0; half /= 2)
    for (int64_t q = 0; q < half; q++) lanes[q] += lanes[q + half];
  return lanes[0];
}

template <class T>
FASTCLIP_INLINE V<T> number_of(T value) {
  return V<T>{} + value;
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
