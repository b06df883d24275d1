// Every loss once, for the CPU and the CUDA engine.
//
// A loss is three functions. The engine makes the tiles of <x_i, y_j>, keeps the positives out, and calls
//   fold(t, k, m)        what a negative adds to the sum that its row and its column remember
//   activation(t, k, m)  its weight dL/ds up to the factor (a_i + b_j) of its row and column
// with t = <x_i, y_j>, the logit in log2 units l = t * k.scale + k.bias, and m the reference of the row or the column.
// Positives never pass through here: they stay apart until the third function finishes a line (a row or a column):
//   finish(reference, sum, s)   its loss, its coefficient a or b, and the weight dL/ds of its positive, of logit s
// A pair's loss is half its row's plus half its column's.
//
// Nothing in this file includes torch, allocates, or branches on data: the CPU compiler turns each function into one
// vector instruction sequence per 4, 8 or 16 pairs, nvcc into straight-line code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTCLIP_INLINE __host__ __device__ __forceinline__
#else
#define FASTCLIP_INLINE inline __attribute__((always_inline))
#endif

// The CPU engine is compiled once per instruction set. Each copy lives in a namespace of its own: were the names shared,
// the linker would keep one copy of each inline function, perhaps one with instructions that the machine does not have.
#ifndef FASTCLIP_CAPABILITY
#define FASTCLIP_CAPABILITY PORTABLE
#endif

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

constexpr double kLog2E = 1.4426950408889634;  // exp(x) = exp2(x * kLog2E)
constexpr double kLn2 = 0.6931471805599453;

// The logit in log2 units as a map of t. fp32 splits scale and bias in two parts: rounding the scale alone would cost
// 2^-24 relative, which at a logit of 144 (scale 100) is an error of 6e-6 in the exponential.
template <class T>
struct Affine {
  T scale, scale_low, bias, bias_low;
  Affine() = default;
  FASTCLIP_INLINE Affine(double scale_log2, double bias_log2)
      : scale(T(scale_log2)), scale_low(T(scale_log2 - double(T(scale_log2)))), bias(T(bias_log2)),
        bias_low(T(bias_log2 - double(T(bias_log2)))) {}
};

// Nearest integer for |a| < 2^22, by letting the addition round: the one form that every vector instruction set has.
FASTCLIP_INLINE float nearest(float a) { return (a + 12582912.f) - 12582912.f; }

FASTCLIP_INLINE float at_least(float a, float low) { return a < low ? low : a; }  // keeps NaN
FASTCLIP_INLINE float at_most(float a, float high) { return a > high ? high : a; }

// 2^(r + f) for integral r and |f| <= 1/2 (a little more is harmless): relative error 3e-9 before rounding (minimax).
// Below 2^-126 the result is zero: a denormal costs a hundred cycles on some CPUs and is lost on GPUs anyway.
FASTCLIP_INLINE float exp2_split(float r, float f) {
  float q = 1.5594678e-4f;
  q = q * f + 1.34066439e-3f;
  q = q * f + 9.61769297e-3f;
  q = q * f + 5.55031055e-2f;
  q = q * f + 2.402265278e-1f;
  q = q * f + 6.931472150e-1f;
  q = q * f + 1.f;
  const int32_t bits = (int32_t(r) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return r < -126.f ? 0.f : q * power;
}

// 2^(t * scale - m). With an integral m the subtraction is exact, so the error is that of t and of one rounding,
// whatever the size of the logit.
FASTCLIP_INLINE float exp2_relative(float t, const Affine<float>& k, float m) {
  const float r = nearest(at_most(at_least(t * k.scale - m, -150.f), 128.f));
  const float f = (t * k.scale - (m + r)) + t * k.scale_low;
  return exp2_split(r, f);
}
FASTCLIP_INLINE double exp2_relative(double t, const Affine<double>& k, double m) { return exp2(t * k.scale - m); }

// log(1 + u) for u in [0, 1]; relative error 5e-9 before rounding, also where u is small.
FASTCLIP_INLINE float log1p_unit(float u) {
  float q = -3.24402461e-3f;
  q = q * u + 1.985145949e-2f;
  q = q * u - 5.695952952e-2f;
  q = q * u + 1.060365441e-1f;
  q = q * u - 1.530559230e-1f;
  q = q * u + 1.967593917e-1f;
  q = q * u - 2.495413364e-1f;
  q = q * u + 3.332996242e-1f;
  q = q * u - 4.999990242e-1f;
  q = q * u + 1.f;
  return q * u;
}
FASTCLIP_INLINE double log1p_unit(double u) { return log1p(u); }

// Logit l in log2 units and 2^-|l|.
FASTCLIP_INLINE void magnitude(float t, const Affine<float>& k, float& l, float& u) {
  l = t * k.scale + k.bias;
  const float r = nearest(at_most(at_least(l, -150.f), 150.f));
  const float f = (t * k.scale + (k.bias - r)) + (t * k.scale_low + k.bias_low);
  u = exp2_split(l > 0.f ? -r : r, l > 0.f ? -f : f);
}
FASTCLIP_INLINE void magnitude(double t, const Affine<double>& k, double& l, double& u) {
  l = t * k.scale + k.bias;
  u = exp2(l > 0. ? -l : l);
}

struct Line {
  double loss, coefficient, positive_weight;
};

FASTCLIP_INLINE double softplus(double z) { return (z > 0 ? z : 0.) + log1p(exp(z > 0 ? -z : z)); }

// CLIP's two-way softmax (arXiv 2103.00020): a row remembers the sum of the exponentials of its negatives, relative to m.
// The bias cancels between numerator and denominator.
struct Softmax {
  template <class T>
  static FASTCLIP_INLINE T fold(T t, const Affine<T>& k, T m) {
    return exp2_relative(t, k, m);
  }
  template <class T>
  static FASTCLIP_INLINE T activation(T t, const Affine<T>& k, T m) {
    return exp2_relative(t, k, m);
  }
  // log(1 + R / P) in the log domain, where neither needs to be representable; the sums themselves for the weights.
  static FASTCLIP_INLINE Line finish(double reference, double sum, double s) {
    const double sum_and_positive = sum + exp2(s * kLog2E - reference);
    const double total = sum_and_positive < 2.3e-308 ? 2.3e-308 : sum_and_positive;  // no negatives, positive underflows
    return {softplus((log2(sum) + reference) * kLn2 - s), 1 / total, -sum / total};
  }
};

// SigLIP's pairwise sigmoid (arXiv 2303.15343): a row remembers the sum of softplus(s) of its negatives.
struct Sigmoid {
  template <class T>
  static FASTCLIP_INLINE T fold(T t, const Affine<T>& k, T) {
    T l, u;
    magnitude(t, k, l, u);
    return (l > T(0) ? l * T(kLn2) : T(0)) + log1p_unit(u);
  }
  template <class T>
  static FASTCLIP_INLINE T activation(T t, const Affine<T>& k, T) {
    T l, u;
    magnitude(t, k, l, u);
    return (l > T(0) ? T(1) : u) / (T(1) + u);
  }
  static FASTCLIP_INLINE Line finish(double, double sum, double s) { return {sum + softplus(-s), 1., -1 / (1 + exp(s))}; }
};

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
