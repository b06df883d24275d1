// The last step of a gradient: from the complete sum of a row to its gradient.
#pragma once

#include "pack.h"
#include "problem.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

template <class Out, class T>
void store_row(const T* g, T scale, int64_t width, Out* out) {
  for (int64_t d = 0; d < width; d++) out[d] = cast_to<Out>(g[d] * scale);
}

// Writes one row of a gradient from its complete sum g: applies gain and scale, the normalisation's Jacobian, and the
// output's dtype. Overwrites g.
template <class In, class T>
void complete_row(const Problem& p, const Side& side, int64_t row, const T* g) {
  const int64_t width = p.width;
  const bool project = p.project && side.factor;
  T scale = T(p.gain * p.scale);
  const T factor = side.factor ? static_cast<const T*>(side.factor)[row] : T(1);
  // A norm below 1e-12 was clamped to 1e-12: the division was by a constant, so its Jacobian has no projection.
  const bool clamped = factor >= T(kClampedFactor);
  const In* const x = static_cast<const In*>(side.features) + row * side.stride;
  char* const base = static_cast<char*>(side.gradient);
  if (project) scale *= factor;
  // A gradient times 1e12 would overflow fp16, so a zero row gets a zero gradient there instead of an infinite one.
  if (project && clamped && (std::is_same_v<In, at::Half> || side.gradient_dtype == Dtype::kHalf)) scale = 0;
  if (project && !clamped) {
    double along = 0;
    T partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t d = 0; d < width; d++) partial += g[d] * cast_to<T>(x[d]);
    along = double(partial) * factor * factor;
    T* const projected = const_cast<T*>(g);
    for (int64_t d = 0; d < width; d++) projected[d] -= T(along) * cast_to<T>(x[d]);
  }
  switch (side.gradient_dtype) {
    case Dtype::kDouble:
      return store_row(g, scale, width, reinterpret_cast<double*>(base) + row * width);
    case Dtype::kFloat:
      return store_row(g, scale, width, reinterpret_cast<float*>(base) + row * width);
    case Dtype::kBFloat16:
      return store_row(g, scale, width, reinterpret_cast<at::BFloat16*>(base) + row * width);
    case Dtype::kHalf:
      return store_row(g, scale, width, reinterpret_cast<at::Half*>(base) + row * width);
  }
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
