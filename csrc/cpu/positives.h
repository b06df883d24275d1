// The own positives' terms of gradients and totals, which are added outside the products.
#pragma once

#include "row_strip.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

// The weight dL/ds of the own positive (i, j = i + offset). If both sweeps run in one go, the sweep has just stored its
// t, and the weight is computed from it.
template <class T>
T positive_weight(const Problem& p, int64_t i, int64_t j) {
  const int64_t q = p.positives_by_column ? j : i;
  if (!p.fold) return T(p.positive_weight[q]);
  const double s = p.scale * p.positive[q] + p.bias;
  T weight = 0;
  for_kind(p.kind, [&](auto kind) { weight = T(kind.finish(0, 0, s).positive_weight); });
  return weight;
}

template <class In, class Op, class T>
void add_positives_to_columns(const Problem& p, const RowStrip<In, Op, T>& b, int64_t begin, int64_t cols, T* v) {
  for (int64_t c = 0; c < cols; c++) {
    const int64_t i = begin + c - p.offset - b.begin;
    if (i < 0 || i >= b.rows) continue;
    const T weight = positive_weight<T>(p, b.begin + i, begin + c) * b.factors[i];
    const In* const f = b.features + i * p.x.stride;
    for (int64_t d = 0; d < p.width; d++) v[c * p.width + d] += weight * cast_to<T>(f[d]);
  }
}

// Calls f(i, j) for each row i of the strip whose own positive j lies in the problem.
template <class In, class Op, class T, class Function>
void for_each_positive(const Problem& p, const RowStrip<In, Op, T>& b, Function f) {
  for (int64_t i = b.begin; i < b.begin + b.rows; i++) {
    const int64_t j = i + p.offset;
    if (j >= 0 && j < p.y.rows) f(i, j);
  }
}

template <class In, class Op, class T>
void add_positives_to_totals(const Problem& p, const RowStrip<In, Op, T>& b, Sum* totals) {
  for_each_positive(p, b, [&](int64_t i, int64_t j) {
    const double weight = positive_weight<T>(p, i, j);
    totals[0].add(weight);
    totals[1].add(weight * p.positive[p.positives_by_column ? j : i]);
  });
}

template <class In, class Op, class T>
void add_positives_to_rows(const Problem& p, const RowStrip<In, Op, T>& b) {
  for_each_positive(p, b, [&](int64_t i, int64_t j) {
    const T factor = p.y.factor ? static_cast<const T*>(p.y.factor)[j] : T(1);
    const T weight = positive_weight<T>(p, i, j) * factor;
    const In* const f = static_cast<const In*>(p.y.features) + j * p.y.stride;
    T* const u = b.u + (i - b.begin) * p.width;
    for (int64_t d = 0; d < p.width; d++) u[d] += weight * cast_to<T>(f[d]);
  });
}

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
