// The kinds of statistic, written once for the CPU and the CUDA engine.
//
// The engine makes the tiles of products t, keeps the own positives out, and calls two functions of a kind:
//   fold(t, k, m)        what a pair adds to the sums of its row and of its column
//   activation(t, k, m)  the pair's weight dL/ds, up to the factor (a_i + b_j) of its row and column
// Here t = <x_i, y_j> times the factors of both lines, t * k.scale + k.bias is the logit in log2 units, and m is the
// shift of the row or the column, or its level in a kind with levels. A third function finishes a line whose own
// positive has the logit s:
//   finish(shift, sum, s)   the line's loss, its coefficient a_i or b_j, and the weight dL/ds of the positive
// Only fused losses (fastclip.clip_loss, siglip_loss) call `finish`, but the operator is compiled for every kind, so
// each needs one (NoFinish in a kind with levels, which the operator refuses). A pair's loss is half its row's loss
// plus half its column's. To add a kind, add a struct with these three functions and an entry in `Kinds`.
//
// This file does not include torch, allocate, or branch on data. On the CPU, fold and activation are one sequence of
// vector instructions for 4, 8 or 16 pairs in float; in double (2, 4 or 8 pairs) they call the C library for each pair.
// On a GPU they are straight-line code for one pair. finish is scalar code in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "engine.h"

#if defined(__CUDACC__)
#define FASTCLIP_INLINE __host__ __device__ __forceinline__
#else
#define FASTCLIP_INLINE inline __attribute__((always_inline))
#endif

// 1 in the CUDA engine: V is float, and exponentials use exp2f, one instruction of the GPU.
#ifndef FASTCLIP_CUDA_MATH
#define FASTCLIP_CUDA_MATH 0
#endif

// The CPU engine is compiled once per instruction set, each time in a namespace of its own. If the copies shared names,
// the linker would keep one copy of each inline function, perhaps one with instructions that the machine lacks.
#ifndef FASTCLIP_CAPABILITY
#define FASTCLIP_CAPABILITY PORTABLE
#endif

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

constexpr double kLog2E = 1.4426950408889634;  // exp(x) = exp2(x * kLog2E)
constexpr double kLn2 = 0.6931471805599453;

// The affine map from t to the logit in log2 units. In fp32, scale and bias are each split into a high and a low part:
// a rounded scale alone has a relative error of 2^-24, which at a logit of 144 (scale 100) is an error of 6e-6 in the
// exponential.
//
// Biased: lines have biases of their own, held as numbers or vectors of type Bias. A line's bias has an integral part,
// LineBias::whole, and a remainder, `part`. In kinds with a shift, `whole` is subtracted from the shift, which is exact
// since both are integral, and `bias_low` is the remainder. In other kinds `bias` contains `whole`.
template <class T, class Bias = T, bool Biased = false>
struct Affine {
  using Scalar = T;
  static constexpr bool kBiased = Biased;
  T scale, scale_low;
  Bias bias, bias_low;
  Affine() = default;
  FASTCLIP_INLINE Affine(double scale_log2, double bias_log2)
      : scale(T(scale_log2)),
        scale_low(T(scale_log2 - double(T(scale_log2)))),
        bias(Bias{} + T(bias_log2)),
        bias_low(Bias{} + T(bias_log2 - double(T(bias_log2)))) {}
  FASTCLIP_INLINE Affine(T scale, T scale_low, Bias bias, Bias bias_low)
      : scale(scale), scale_low(scale_low), bias(bias), bias_low(bias_low) {}
  FASTCLIP_INLINE Affine negated() const { return Affine(-scale, -scale_low, -bias, -bias_low); }
};

// A line's bias in log2 units: its nearest integer and the remainder. A bias of -inf excludes the line.
template <class T>
struct LineBias {
  T whole, part;
  LineBias() = default;
  FASTCLIP_INLINE explicit LineBias(double bias) {
    const double bias_log2 = bias * kLog2E;
    whole = T(rint(bias_log2));
    part = bias_log2 - bias_log2 == 0 ? T(bias_log2 - double(whole)) : T(0);
  }
};

// The functions below take V, a float, a double, or a vector of either (GCC's and Clang's vector extension): the
// arithmetic and `a < b ? c : d` read the same for all of them.
template <class V>
struct Integers {
  using type = decltype(V{} < V{});
};
template <>
struct Integers<float> {
  using type = int32_t;
};

// Calls a function of the C library for each double of v. There are no polynomials of double accuracy here.
template <class V, class Function>
FASTCLIP_INLINE V for_each(V v, Function function) {
  if constexpr (sizeof(V) == sizeof(double)) {
    return function(v);
  } else {
    for (unsigned q = 0; q < sizeof(V) / sizeof(double); q++) v[q] = function(v[q]);
    return v;
  }
}
struct Exp2 {
  FASTCLIP_INLINE double operator()(double v) const { return exp2(v); }
};
struct Log1p {
  FASTCLIP_INLINE double operator()(double v) const { return log1p(v); }
};

// If |l| < 2^22, l + kRounder is rounded to an integer plus kRounder: with r the integer, the lowest bits of the sum
// are r + 127, the exponent field of 2^r.
constexpr float kRounder = 12582912.f + 127.f;

// 2^(r + f) for z = r + kRounder and |f| <= 1/2 (a little more is harmless). The minimax polynomial has a relative
// error of 3e-9 before rounding. Results below 2^-126 are flushed to zero: denormals cost a hundred cycles on some
// CPUs, and GPUs flush them anyway.
template <class V>
FASTCLIP_INLINE V exp2_split(V z, V f) {
  V q = f * 1.5594678e-4f + 1.34066439e-3f;
  q = q * f + 9.61769297e-3f;
  q = q * f + 5.55031055e-2f;
  q = q * f + 2.402265278e-1f;
  q = q * f + 6.931472150e-1f;
  q = q * f + 1.f;
  typename Integers<V>::type bits;
  memcpy(&bits, &z, sizeof bits);
  bits = bits << 23;
  V power;
  memcpy(&power, &bits, sizeof power);
  return z < kRounder - 126.f ? V{} : q * power;
}

// t * scale - m with one rounding. It compiles to one fused multiply-add; machines without one compute in double.
template <class V>
FASTCLIP_INLINE V product_minus(V t, float scale, V m) {
#if defined(__FMA__) || defined(__aarch64__) || defined(__CUDACC__)
  return t * scale - m;
#else
  if constexpr (sizeof(V) == sizeof(float)) {
    return V(double(t) * scale - m);
  } else {
    typedef double Wide __attribute__((vector_size(2 * sizeof(V))));
    return __builtin_convertvector(__builtin_convertvector(t, Wide) * double(scale) - __builtin_convertvector(m, Wide),
                                   V);
  }
#endif
}

// 2^(t * scale - m). With an integral m the error is that of t and of one rounding, whatever the size of the logit.
// Overflow is infinite; NaN stays NaN.
template <class V, class K>
FASTCLIP_INLINE V exp2_relative(V t, const K& k, V m) {
  if constexpr (sizeof(typename K::Scalar) == sizeof(double)) {
    if constexpr (K::kBiased) return for_each((t * k.scale - m) + k.bias_low, Exp2());
    return for_each(t * k.scale - m, Exp2());
  } else if constexpr (FASTCLIP_CUDA_MATH) {
    if constexpr (K::kBiased) return exp2f(fmaf(t, k.scale, -m) + fmaf(t, k.scale_low, k.bias_low));
    return exp2f(fmaf(t, k.scale_low, fmaf(t, k.scale, -m)));
  } else {
    V low = t * k.scale_low;
    if constexpr (K::kBiased) low += k.bias_low;
    const V l = product_minus(t, k.scale, m) + low;
    const V z = (l > 128.f ? V{} + 128.f : l) + kRounder;
    const V r = z - kRounder, whole = m + r;
    const V lost = r - (whole - m);  // the rounding error of m + r, not 0 if |m| exceeds 2^24
    return exp2_split(z, (product_minus(t, k.scale, whole) - lost) + low);
  }
}

// log(1 + u) for u in [0, 1]; relative error 5e-9 before rounding, for small u too.
template <class T, class V>
FASTCLIP_INLINE V log1p_unit(V u) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return for_each(u, Log1p());
  } else {
    V q = u * -3.24402461e-3f + 1.985145949e-2f;
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
}

// The logit l in log2 units, and u = 2^-|l|.
template <class V, class K>
FASTCLIP_INLINE void magnitude(V t, const K& k, V& l, V& u) {
  l = (t * k.scale + k.bias) + (t * k.scale_low + k.bias_low);
  if constexpr (sizeof(typename K::Scalar) == sizeof(double)) {
    u = for_each(l > 0. ? -l : l, Exp2());
  } else if constexpr (FASTCLIP_CUDA_MATH) {
    u = exp2f(l > 0.f ? -l : l);
  } else {
    const V z = (l > 0.f ? -l : l) + kRounder;
    const V r = z - kRounder;
    const V f = (t * k.scale + (k.bias - (l > 0.f ? -r : r))) + (t * k.scale_low + k.bias_low);
    u = exp2_split(z, l > 0.f ? -f : f);
  }
}

// The logit in log2 units, less m. It is rounded only after m is subtracted, so the error of a logit near m is that of
// t, of m and of the bias.
template <class V, class K>
FASTCLIP_INLINE V relative(V t, const K& k, V m) {
  const V low = t * k.scale_low + k.bias_low;
  if constexpr (sizeof(typename K::Scalar) == sizeof(double))
    return (t * k.scale - (m - k.bias)) + low;
  else
    return product_minus(t, k.scale, m - k.bias) + low;
}

struct FinishedLine {
  double loss, coefficient, positive_weight;
};

// The finish of a kind with levels. The operator refuses such a kind.
struct NoFinish {
  static FASTCLIP_INLINE FinishedLine finish(double, double, double) { return {NAN, NAN, NAN}; }
};

FASTCLIP_INLINE double softplus(double z) { return (z > 0 ? z : 0.) + log1p(exp(z > 0 ? -z : z)); }

// A line's sum is the sum of the exponentials of its pairs, relative to m. finish is CLIP's two-way softmax loss
// (arXiv 2103.00020). A bias common to all logits is left out: it adds the same to each log-sum-exp and each positive.
struct Softmax {
  static constexpr const char* kName = "softmax";
  static constexpr bool kHasShift = true;           // sums are relative to shifts, and weights depend on sums
  static constexpr bool kIsLinear = false;          // `finish` returns coefficients of 1: weights need no state
  static constexpr bool kNegatesPositives = false;  // positives by id fold negated logits; must be false if kHasShift
  static constexpr bool kHasLevels = false;  // the caller gives each line's m; then all other traits must be false
  template <class V, class K>
  static FASTCLIP_INLINE V fold(V t, const K& k, V m) {
    return exp2_relative(t, k, m);
  }
  template <class V, class K>
  static FASTCLIP_INLINE V activation(V t, const K& k, V m) {
    return exp2_relative(t, k, m);
  }
  // The loss is log(1 + R / P), computed in the log domain, since R or P may not be representable. The weights use the
  // sums themselves.
  static FASTCLIP_INLINE FinishedLine finish(double shift, double sum, double s) {
    const double sum_and_positive = sum + exp2(s * kLog2E - shift);
    const double total =
        sum_and_positive < 2.3e-308 ? 2.3e-308 : sum_and_positive;  // no negatives, positive underflows
    return {softplus((log2(sum) + shift) * kLn2 - s), 1 / total, -sum / total};
  }
};

// A line's sum is the sum of softplus(s) of its pairs. finish is SigLIP's pairwise sigmoid loss (arXiv 2303.15343).
struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr bool kHasShift = false;
  static constexpr bool kIsLinear = true;
  static constexpr bool kNegatesPositives = true;
  static constexpr bool kHasLevels = false;
  template <class V, class K>
  static FASTCLIP_INLINE V fold(V t, const K& k, V) {
    using T = typename K::Scalar;
    V l, u;
    magnitude(t, k, l, u);
    return (l > T(0) ? l * T(kLn2) : V{}) + log1p_unit<T>(u);
  }
  template <class V, class K>
  static FASTCLIP_INLINE V activation(V t, const K& k, V) {
    using T = typename K::Scalar;
    V l, u;
    magnitude(t, k, l, u);
    return (l > T(0) ? V{} + T(1) : u) / (u + T(1));
  }
  static FASTCLIP_INLINE FinishedLine finish(double, double sum, double s) {
    return {sum + softplus(-s), 1., -1 / (1 + exp(s))};
  }
};

// A line's sum is the sum of how far its pairs lie above the line's level. The comparisons keep a NaN.
struct Hinge : NoFinish {
  static constexpr const char* kName = "hinge";
  static constexpr bool kHasShift = false;
  static constexpr bool kIsLinear = false;
  static constexpr bool kNegatesPositives = false;
  static constexpr bool kHasLevels = true;
  template <class V, class K>
  static FASTCLIP_INLINE V fold(V t, const K& k, V m) {
    using T = typename K::Scalar;
    const V l = relative(t, k, m);
    return (l < T(0) ? V{} : l) * T(kLn2);
  }
  template <class V, class K>
  static FASTCLIP_INLINE V activation(V t, const K& k, V m) {
    using T = typename K::Scalar;
    const V l = relative(t, k, m);
    return l > T(0) ? V{} + T(1) : l <= T(0) ? V{} : l;
  }
};

// The list of kinds, from which names and dispatch are derived.
template <class... Entries>
struct KindList {
  // Calls f, a host function, with the kind at an index.
  template <class Function>
  static inline __attribute__((always_inline)) void call(KindIndex kind, Function f) {
    int place = 0;
    ((place++ == int(kind) ? f(Entries()) : void()), ...);
  }
  // Calls f(kind, name) for every kind; the kind is its index in the list.
  template <class Function>
  static void each_name(Function f) {
    int place = 0;
    (f(KindIndex(place++), Entries::kName), ...);
  }
};
using Kinds = KindList<Softmax, Sigmoid, Hinge>;

template <class Function>
inline __attribute__((always_inline)) void for_kind(KindIndex kind, Function f) {
  Kinds::call(kind, f);
}

// A trait, such as kHasShift, of a kind that is known at run time only.
template <class Function>
inline bool trait_of(KindIndex kind, Function f) {
  bool value = false;
  for_kind(kind, [&](auto entry) { value = f(entry); });
  return value;
}
inline bool has_shift(KindIndex kind) {
  return trait_of(kind, [](auto entry) { return decltype(entry)::kHasShift; });
}
inline bool has_levels(KindIndex kind) {
  return trait_of(kind, [](auto entry) { return decltype(entry)::kHasLevels; });
}
inline bool is_linear(KindIndex kind) {
  return trait_of(kind, [](auto entry) { return decltype(entry)::kIsLinear; });
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
