// fastclip's operators on CPU tensors: they allocate results, run the CPU engine, and decide from a sweep's results
// whether one shift was enough.
//
// Schemas, fakes and the choice of an engine are in Python; fastclip/engine/operators.py documents the arguments.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "../kinds.h"
#include "call.h"
#include "shifts.h"
#include "workspace.h"

namespace fastclip {
namespace {

using at::Tensor;

// Allocates memory for `keep` rows of products.
Tensor allocate_kept(const Call& call, int64_t keep) {
  const int64_t rows = std::min(keep, (call.problem.x.rows + 15) / 16 * 16);
  const auto options = call.x.options().dtype(accumulation_type(call.x));
  return Workspace::take({rows * call.problem.y.rows}, options);
}

// ---- sweep ---------------------------------------------------------------------------------------------------------

struct Swept {
  Tensor state, positive;
};

Swept allocate_states(Call& call) {
  const auto options = call.x.options().dtype(at::kDouble);
  const int64_t sets = call.problem.same_id_positive ? 2 : 1, lines = call.m + call.n;
  const int64_t rows = 2 * sets + (call.problem.teacher.is_given ? 3 : 0);
  Swept out{at::empty({rows, lines}, options), at::empty({call.m}, options)};
  double* state = out.state.mutable_data_ptr<double>();
  const auto set = [&](Lines& x, Lines& y) {
    x.shift = state, y.shift = state + call.m;
    x.sum = state + lines, y.sum = state + lines + call.m;
    state += 2 * lines;
  };
  set(call.side_of_x().negatives, call.side_of_y().negatives);
  if (sets == 2) set(call.side_of_x().positives, call.side_of_y().positives);
  if (call.problem.teacher.is_given) {
    set(call.side_of_x().teacher, call.side_of_y().teacher);
    call.side_of_x().teacher.moment = state, call.side_of_y().teacher.moment = state + call.m;
  }
  call.problem.positive = out.positive.mutable_data_ptr<double>();
  std::fill_n(call.problem.positive, call.m, NAN);
  return out;
}

// Ends a sweep with running maxima: lines without pairs get the shift 0, unusable sums become NaN.
void end_running_maxima(double* shift, double* sum, int64_t lines) {
  for (int64_t q = 0; q < lines; q++) {
    if (std::isinf(shift[q]) && shift[q] < 0) {
      shift[q] = 0;  // no pairs
    } else if (!(sum[q] >= 0x1p-100 && sum[q] <= 0x1p127)) {
      sum[q] = NAN;  // a sum is relative to its largest term, so only logits beyond fp32's precision (1e9) get here
    }
  }
}

// Sets the levels of all lines, in the engine's dtype.
void set_levels(Call& call, const Tensor& levels) {
  const Tensor& held = call.held(levels, accumulation_type(call.x));
  const char* const first = static_cast<const char*>(held.const_data_ptr());
  call.side_of_x().negatives.shifts = first;
  call.side_of_y().negatives.shifts = first + held.element_size() * call.m;
}

std::tuple<Tensor, Tensor, Tensor> sweep(const BlockArguments& block, const OptionalTensor& bound,
                                         const OptionalTensor& occupied, const OptionalTensor& levels, int64_t keep) {
  TORCH_CHECK(keep >= 0, "keep must be a number of rows >= 0, got ", keep);
  Call call(block);
  check_occupied(block, occupied, call.m + call.n);
  check_levels(block, levels, call.m + call.n);
  Problem& p = call.problem;
  Swept out = allocate_states(call);
  Tensor kept = allocate_kept(call, keep);
  p.kept = kept.data_ptr();
  p.kept_rows = kept.numel() / p.y.rows;
  p.fold = true;
  set_shifts(call, bound);
  if (levels) set_levels(call, *levels);
  call.run();
  const OptionalTensor flags = occupied ? OptionalTensor(occupied->contiguous()) : std::nullopt;
  p.running_maxima = call.has_shift() && !states_hold(call, flags, block.offset);
  p.teacher.running_maxima = p.teacher.is_given && !teacher_holds(p);
  if (p.running_maxima || p.teacher.running_maxima) {
    p.kept_ready = true;
    call.run();
    const int64_t lines = call.m + call.n, sets = p.same_id_positive ? 2 : 1;
    double* state = out.state.mutable_data_ptr<double>();
    for (int64_t set = 0; set < out.state.size(0) / 2; set++, state += 2 * lines)
      if (set < sets ? p.running_maxima : p.teacher.running_maxima) end_running_maxima(state, state + lines, lines);
  }
  return {out.state, out.positive, kept};
}

// ---- finish --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> finish(const Tensor& state, const Tensor& positive, const Tensor& scale,
                                          const OptionalTensor& bias, std::string_view kind) {
  const int64_t lines = state.dim() == 2 ? state.size(1) : 0, period = positive.numel();
  TORCH_CHECK(lines > 0 && state.size(0) == 2 && state.is_contiguous() && state.scalar_type() == at::kDouble &&
                  positive.is_contiguous() && positive.scalar_type() == at::kDouble && period > 0 &&
                  lines % period == 0,
              "state must be (2, L) and positive (P), P a divisor of L, contiguous float64, got ", state.sizes(), " ",
              state.scalar_type(), ", strides ", state.strides(), ", and ", positive.sizes(), " ",
              positive.scalar_type(), ", strides ", positive.strides());
  const KindIndex found = finished_kind_of(kind);
  const double k = number("scale", scale), k0 = bias ? number("bias", *bias) : 0.0;
  Tensor losses = at::empty({lines}, state.options()), coefficients = at::empty({lines}, state.options()),
         weights = at::empty({lines}, state.options());
  const double* const shift = state.const_data_ptr<double>();
  const double* const t = positive.const_data_ptr<double>();
  double *const l = losses.mutable_data_ptr<double>(), *const c = coefficients.mutable_data_ptr<double>(),
                *const q = weights.mutable_data_ptr<double>();
  at::parallel_for(0, lines, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      PORTABLE::FinishedLine line{NAN, NAN, NAN};  // the compiler does not see that for_kind always calls the function
      PORTABLE::for_kind(found, [&](auto entry) {
        line = entry.finish(shift[i], shift[lines + i], k * t[i % period] + (entry.kHasShift ? 0. : k0));
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
  set(call.side_of_x(), out.u, needs_x);
  set(call.side_of_y(), out.v, needs_y);
  const Tensor& columns = call.swapped ? out.u : out.v;
  if (columns.numel() > 0)
    out.accumulator = columns.scalar_type() == accumulation_type(call.x)
                          ? columns
                          : Workspace::take(columns.sizes(), options.dtype(accumulation_type(call.x)));
  if (out.accumulator.defined()) call.problem.y.accumulator = out.accumulator.data_ptr();
  return out;
}

Tensor totals_of(const Call& call) {
  Tensor totals = at::empty({2}, call.x.options().dtype(at::kDouble));
  for (int q = 0; q < 2; q++) totals.mutable_data_ptr<double>()[q] = call.problem.gain * call.problem.totals[q];
  return totals;
}

// Adds the weights of the own positives to the columns' sums of weights; the sums of tiles leave them out.
void add_own_positives(const Call& call, int64_t offset, const double* weight, double* sums) {
  for (int64_t i = 0; i < call.m; i++)
    if (i + offset >= 0 && i + offset < call.n) sums[i + offset] += weight[i];
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weigh(const BlockArguments& block, const WeighArguments& given) {
  Call call(block);
  Problem& p = call.problem;
  const int64_t lines = call.m + call.n;
  check_statistics(block, given, call.m, call.n);
  TORCH_CHECK(given.state.is_contiguous(), "state must be contiguous, got strides ", given.state.strides());
  Gradients out = allocate_gradients(call, given.needs_x, given.needs_y, given.dtype_x, given.dtype_y);
  const auto statistic = accumulation_type(call.x);
  const double* const m = given.state.const_data_ptr<double>();
  const Tensor& coefficients = call.held(given.coefficients, statistic);
  const auto set = [&](int64_t place, Lines& x, Lines& y) {
    const auto at = [&](const Tensor& t, int64_t line) {
      return static_cast<const char*>(t.const_data_ptr()) + t.element_size() * line;
    };
    const Tensor& shifts = call.held(given.state.select(0, 2 * place), statistic);
    x.shifts = at(shifts, 0), y.shifts = at(shifts, call.m);
    x.coefficients = at(coefficients, place * lines), y.coefficients = at(coefficients, place * lines + call.m);
    return m + 2 * place * lines;
  };
  const auto all_equal = [&](const double* shifts, double first) {
    return std::all_of(shifts, shifts + lines, [&](double shift) { return shift == first; });
  };
  p.one_shift = all_equal(set(0, call.side_of_x().negatives, call.side_of_y().negatives), m[0]);
  int64_t sets = 1;
  if (p.same_id_positive)
    p.one_shift &= all_equal(set(sets++, call.side_of_x().positives, call.side_of_y().positives), m[0]);
  if (p.teacher.is_given) {
    const double* const shifts = set(sets, call.side_of_x().teacher, call.side_of_y().teacher);
    p.teacher.one_shift = all_equal(shifts, shifts[0]);
  }
  p.positive_weight = call.held(given.positive_weight, at::kDouble).const_data_ptr<double>();
  p.positive = const_cast<double*>(call.held(given.positive, at::kDouble).const_data_ptr<double>());
  p.gain = number("gain", given.gain);
  p.project = given.project;
  const Tensor& kept = given.kept;
  TORCH_CHECK(kept.scalar_type() == statistic && kept.is_contiguous() && kept.numel() % p.y.rows == 0,
              "kept must come from a sweep of the same features, got ", kept.sizes(), " ", kept.scalar_type());
  p.kept = const_cast<void*>(kept.const_data_ptr());
  p.kept_rows = kept.numel() / p.y.rows;
  p.kept_ready = true;
  p.weigh = true;
  Tensor key_bias = at::empty({given.needs_key_bias ? call.n : 0}, call.x.options().dtype(at::kDouble));
  if (given.needs_key_bias) {
    // Only the kernels of biased blocks sum weights.
    TORCH_CHECK(block.key_bias, "a gradient of key_bias needs key_bias, got None");
    call.side_of_y().key_bias_sum = key_bias.mutable_data_ptr<double>();
  }
  call.run();
  if (given.needs_key_bias) {
    add_own_positives(call, block.offset, p.positive_weight, key_bias.mutable_data_ptr<double>());
    key_bias.mul_(p.gain);
  }
  return {out.u, out.v, totals_of(call), key_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sweep_and_weigh(const BlockArguments& block, const Tensor& gain,
                                                                   bool needs_x, bool needs_y, bool project) {
  Call call(block);
  Problem& p = call.problem;
  check_in_one_go(block, PORTABLE::is_linear(p.kind));
  const auto statistic = accumulation_type(call.x);
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
  m.impl("sweep.cpu", &Flat<&sweep>::call);
  m.impl("finish.cpu", &finish);
  m.impl("weigh.cpu", FlatWeigh<&weigh>::call);
  m.impl("sweep_and_weigh.cpu", &Flat<&sweep_and_weigh>::call);
}

// The operators have no derivative of their own. A backward through one raises, instead of giving a wrong gradient.
TORCH_LIBRARY_IMPL(fastclip, Autograd, m) {
  for (const char* const name : {"sweep.cpu", "finish.cpu", "weigh.cpu", "sweep_and_weigh.cpu"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastclip
