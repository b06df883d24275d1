// The only torch front: fastclip's operators on CPU tensors.
//
// Schemas, fakes and the choice of an engine live in Python (fastclip/ops.py says what each argument means); this file
// allocates, asks the engine for what is wanted, and decides what needs all of a sweep's results.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "call_cpu.h"
#include "epilogues.h"
#include "workspace.h"

namespace fastclip {
namespace {

using at::Tensor;
using std::optional;

using PORTABLE::kLog2E;

// Room for `keep` rows of products.
Tensor allocate_kept(const Call& call, int64_t keep) {
  const int64_t rows = std::min(keep, (call.problem.x.rows + 15) / 16 * 16);
  const auto options = call.x.options().dtype(statistic_of(call.x));
  return Workspace::take({rows * call.problem.y.rows}, options);
}

// ---- sweep ---------------------------------------------------------------------------------------------------------

// The one reference of all logits: it puts the largest possible one at 2^t, high enough for the smallest row to stay
// within fp32, low enough for a sum over 2^27 columns not to overflow.
void set_reference(Call& call, const optional<Tensor>& bound) {
  Problem& p = call.problem;
  const bool wide = p.dtype == Dtype::kDouble;
  double largest;
  if (bound) {
    largest = number("bound", *bound);
  } else {
    const auto norm = capability().largest_norm;
    largest = (p.x.factor ? 1.0 : norm(p.x, p)) * (p.y.factor ? 1.0 : norm(p.y, p));
  }
  // The margin covers the rounding of norms and products; the reference is one that T can hold, since the engine and
  // the finish must speak of the same.
  const double top = std::abs(p.scale) * largest * kLog2E * (1 + 1e-5);
  const double headroom = wide ? 900 : 100, depth = wide ? 1000 : 120;
  const double t = std::min(std::max(0.0, 2 * top - depth), headroom);
  p.reference = std::ceil(top - t);
  if (!wide && double(float(p.reference)) != p.reference)
    p.reference = std::nextafterf(float(p.reference), std::numeric_limits<float>::infinity());
}

// Whether one reference was enough: a row or column whose R + P is smaller may have lost terms that count.
bool states_hold(const Call& call) {
  const Problem& p = call.problem;
  const double least = std::exp2(p.dtype == Dtype::kDouble ? -900. : -78.);
  const auto holds = [&](const Side& side, int64_t other, int64_t offset, bool indexes_positive) {
    for (int64_t i = 0; i < side.rows; i++) {
      const int64_t j = i + offset;
      double sum = side.sum[i];
      if (j >= 0 && j < other) sum += std::exp2(p.scale * kLog2E * p.positive[indexes_positive ? i : j] - p.reference);
      if (!(sum >= least)) return false;
    }
    return true;
  };
  return holds(p.x, p.y.rows, p.offset, !p.positive_of_y) && holds(p.y, p.x.rows, -p.offset, p.positive_of_y);
}

struct Swept {
  Tensor state, positive;
};

Swept allocate_states(Call& call) {
  const auto options = call.x.options().dtype(at::kDouble);
  Swept out{at::empty({2, call.m + call.n}, options), at::empty({call.m}, options)};
  double* const state = out.state.mutable_data_ptr<double>();
  call.first().reference = state, call.first().sum = state + call.m + call.n;
  call.second().reference = state + call.m, call.second().sum = state + 2 * call.m + call.n;
  call.problem.positive = out.positive.mutable_data_ptr<double>();
  std::fill_n(call.problem.positive, call.m, NAN);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sweep(const Tensor& x, const Tensor& y, const optional<Tensor>& factor_x,
                                         const optional<Tensor>& factor_y, const Tensor& scale,
                                         const optional<Tensor>& bias, const optional<Tensor>& bound, int64_t offset,
                                         std::string_view loss, int64_t keep) {
  TORCH_CHECK(keep >= 0, "keep must be a number of rows >= 0, got ", keep);
  Call call(x, y, factor_x, factor_y, scale, bias, offset, loss);
  Problem& p = call.problem;
  Swept out = allocate_states(call);
  Tensor kept = allocate_kept(call, keep);
  p.kept = kept.data_ptr();
  p.kept_rows = kept.numel() / p.y.rows;
  p.fold = true;
  if (call.needs_state()) set_reference(call, bound);
  call.run();
  if (call.needs_state() && !states_hold(call)) {
    p.running_maxima = true;
    p.kept_ready = true;
    call.run();
    const int64_t lines = call.m + call.n;
    double *const reference = out.state.mutable_data_ptr<double>(), *const sum = reference + lines;
    for (int64_t q = 0; q < lines; q++) {
      if (std::isinf(reference[q]) && reference[q] < 0) {
        reference[q] = 0;  // no negatives
      } else if (!(sum[q] >= 0x1p-100 && sum[q] <= 0x1p127)) {
        sum[q] = NAN;  // relative to its own largest term: logits beyond 1e9 have outgrown the dtype
      }
    }
  }
  return {out.state, out.positive, kept};
}

// ---- finish --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> finish(const Tensor& state, const Tensor& positive, const Tensor& scale,
                                          const optional<Tensor>& bias, std::string_view loss) {
  const int64_t lines = state.dim() == 2 ? state.size(1) : 0, period = positive.numel();
  TORCH_CHECK(lines > 0 && state.size(0) == 2 && state.is_contiguous() && state.scalar_type() == at::kDouble &&
                  positive.is_contiguous() && positive.scalar_type() == at::kDouble && period > 0 &&
                  lines % period == 0,
              "state must be (2, L) and positive (L) or a divisor, contiguous float64, got ", state.sizes(), " and ",
              positive.sizes());
  const Loss name = loss_of(loss);
  const double k = number("scale", scale), k0 = bias ? number("bias", *bias) : 0.0;
  Tensor losses = at::empty({lines}, state.options()), coefficients = at::empty({lines}, state.options()),
         weights = at::empty({lines}, state.options());
  const double* const reference = state.const_data_ptr<double>();
  const double* const t = positive.const_data_ptr<double>();
  double *const l = losses.mutable_data_ptr<double>(), *const c = coefficients.mutable_data_ptr<double>(),
                *const q = weights.mutable_data_ptr<double>();
  at::parallel_for(0, lines, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      PORTABLE::Line line{NAN, NAN, NAN};  // as far as the compiler knows, for_loss may call nothing
      PORTABLE::for_loss(name, [&](auto loss) {
        line = loss.finish(reference[i], reference[lines + i], k * t[i % period] + (loss.kUsesBias ? k0 : 0.));
      });
      l[i] = line.loss, c[i] = line.coefficient, q[i] = line.positive_weight;
    }
  });
  return {losses, coefficients, weights};
}

// ---- weigh ---------------------------------------------------------------------------------------------------------

struct Gradients {
  Tensor u, v, accumulator;
};

Gradients allocate_gradients(Call& call, bool needs_x, bool needs_y, at::ScalarType dtype_x, at::ScalarType dtype_y) {
  const int64_t width = call.problem.width;
  const auto options = call.x.options();
  Gradients out;
  out.u = Workspace::take({needs_x ? call.m : 0, width}, options.dtype(dtype_x));
  out.v = Workspace::take({needs_y ? call.n : 0, width}, options.dtype(dtype_y));
  const auto set = [](Side& side, Tensor& gradient, bool needed) {
    side.gradient = needed ? gradient.data_ptr() : nullptr;
    side.gradient_dtype = dtype_of(gradient.scalar_type());
  };
  set(call.first(), out.u, needs_x);
  set(call.second(), out.v, needs_y);
  const Tensor& columns = call.swapped ? out.u : out.v;
  if (columns.numel() > 0)
    out.accumulator = columns.scalar_type() == statistic_of(call.x)
                          ? columns
                          : Workspace::take(columns.sizes(), options.dtype(statistic_of(call.x)));
  if (out.accumulator.defined()) call.problem.y.accumulator = out.accumulator.data_ptr();
  return out;
}

Tensor totals_of(const Call& call) {
  Tensor totals = at::empty({2}, call.x.options().dtype(at::kDouble));
  for (int q = 0; q < 2; q++) totals.mutable_data_ptr<double>()[q] = call.problem.gain * call.problem.totals[q];
  return totals;
}

std::tuple<Tensor, Tensor, Tensor> weigh(const Tensor& x, const Tensor& y, const optional<Tensor>& factor_x,
                                         const optional<Tensor>& factor_y, const Tensor& scale,
                                         const optional<Tensor>& bias, const Tensor& state, const Tensor& positive,
                                         const Tensor& coefficients, const Tensor& positive_weight, const Tensor& gain,
                                         const Tensor& kept, int64_t offset, std::string_view loss, bool needs_x,
                                         bool needs_y, bool project, at::ScalarType dtype_x, at::ScalarType dtype_y) {
  Call call(x, y, factor_x, factor_y, scale, bias, offset, loss);
  Problem& p = call.problem;
  const int64_t lines = call.m + call.n;
  TORCH_CHECK(
      state.sizes() == at::IntArrayRef({2, lines}) && state.is_contiguous() && state.scalar_type() == at::kDouble &&
          coefficients.sizes() == at::IntArrayRef(lines) && positive.sizes() == at::IntArrayRef(call.m) &&
          positive_weight.sizes() == at::IntArrayRef(call.m),
      "state must be (2, M + N) contiguous float64, coefficients (M + N), positive and positive_weight (M), got ",
      state.sizes(), ", ", coefficients.sizes(), ", ", positive.sizes(), ", ", positive_weight.sizes());
  Gradients out = allocate_gradients(call, needs_x, needs_y, dtype_x, dtype_y);
  const auto statistic = statistic_of(x);
  const Tensor references = state.select(0, 0).to(statistic).contiguous();
  const Tensor both = coefficients.to(statistic).contiguous();
  const Tensor weight = positive_weight.to(at::kDouble).contiguous();
  const Tensor t = positive.to(at::kDouble).contiguous();
  const int64_t bytes = both.element_size() * call.m;
  const auto behind = [bytes](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()) + bytes; };
  call.first().references = references.const_data_ptr(), call.second().references = behind(references);
  call.first().coefficients = both.const_data_ptr(), call.second().coefficients = behind(both);
  p.positive_weight = weight.const_data_ptr<double>();
  p.positive = const_cast<double*>(t.const_data_ptr<double>());
  const double* const m = state.const_data_ptr<double>();
  for (int64_t q = 1; q < lines && p.one_reference; q++) p.one_reference = m[q] == m[0];
  p.gain = number("gain", gain);
  p.project = project;
  TORCH_CHECK(kept.scalar_type() == statistic && kept.is_contiguous() && kept.numel() % p.y.rows == 0,
              "kept must come from a sweep of the same features, got ", kept.sizes(), " ", kept.scalar_type());
  p.kept = const_cast<void*>(kept.const_data_ptr());
  p.kept_rows = kept.numel() / p.y.rows;
  p.kept_ready = true;
  p.weigh = true;
  call.run();
  return {out.u, out.v, totals_of(call)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sweep_and_weigh(
    const Tensor& x, const Tensor& y, const optional<Tensor>& factor_x, const optional<Tensor>& factor_y,
    const Tensor& scale, const optional<Tensor>& bias, const Tensor& gain, int64_t offset, std::string_view loss,
    bool needs_x, bool needs_y, bool project) {
  Call call(x, y, factor_x, factor_y, scale, bias, offset, loss);
  Problem& p = call.problem;
  TORCH_CHECK(!call.needs_state(), "only a loss whose weights need no state can be swept and weighed in one go");
  const auto statistic = statistic_of(x);
  Swept swept = allocate_states(call);
  Gradients out = allocate_gradients(call, needs_x, needs_y, statistic, statistic);
  p.gain = number("gain", gain);
  p.project = project;
  p.fold = p.weigh = true;
  call.run();
  return {swept.state, swept.positive, out.u, out.v, totals_of(call)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("sweep.cpu", &sweep);
  m.impl("finish.cpu", &finish);
  m.impl("weigh.cpu", &weigh);
  m.impl("sweep_and_weigh.cpu", &sweep_and_weigh);
}

// The operators have no derivative of their own, and silence would be a wrong gradient: a backward through one fails.
TORCH_LIBRARY_IMPL(fastclip, Autograd, m) {
  for (const char* const name : {"sweep.cpu", "finish.cpu", "weigh.cpu", "sweep_and_weigh.cpu"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastclip
