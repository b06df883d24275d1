// fastclip's operators on CUDA tensors, which run the CUDA engine. fastclip/engine/operators.py documents the
// arguments.
//
// No function reads from the device or waits for it. With FASTCLIP_EMULATED the engine is compiled for the CPU and runs
// on CPU tensors, for tests.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "call.h"

namespace fastclip {
namespace {

// True for float64 features, which the plain PyTorch engine takes. The name is unrelated to plain blocks (is_plain).
bool is_plain_engines(const BlockArguments& b) { return b.x.features.scalar_type() == at::kDouble; }

template <class Result, class... Flattened, class... Rest>
Result call_plain(const char* name, Result (*)(Flattened...), const BlockArguments& b, const Rest&... rest) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "torch")
      .typed<Result(Flattened...)>()
      .call(b.x.features, b.x.factor, b.x.ids, b.x.threshold, b.x.target, b.x.target_factor, b.y.features, b.y.factor,
            b.y.ids, b.y.threshold, b.y.target, b.y.target_factor, b.scale, b.bias, b.key_bias, b.target_scale,
            b.offset, b.kind, b.same_id_positive, b.guided, rest...);
}

std::tuple<Tensor, Tensor, Tensor> sweep(const BlockArguments& arguments, const OptionalTensor& bound,
                                         const OptionalTensor& occupied, const OptionalTensor& levels, int64_t keep) {
  if (is_plain_engines(arguments))
    return call_plain("fastclip::sweep", &Flat<&sweep>::call, arguments, bound, occupied, levels, keep);
  TORCH_CHECK(keep >= 0, "keep must be a number of rows >= 0, got ", keep);
  const Scope scope(arguments.x.features);
  Call call(arguments);
  check_occupied(arguments, occupied, call.m + call.n);
  check_levels(arguments, levels, call.m + call.n);
  const Number most = bound ? Number("bound", *bound, call.x) : Number();
  const Tensor lines = occupied ? occupied->contiguous() : Tensor();
  check_device(call.x, {&lines});
  Swept out = allocate_states(call);
  Tensor kept = call.empty({keep * std::min(call.m, call.n)}, at::kFloat);
  cuda::Sweeping sweeping;
  sweeping.bound = most.scalar;
  if (occupied) sweeping.occupied = lines.const_data_ptr<bool>();
  const Tensor held = levels ? levels->contiguous() : Tensor();
  if (levels) {
    check_device(call.x, {&held});
    call.block.x.negatives.shifts = held.const_data_ptr<double>();
    call.block.y.negatives.shifts = held.const_data_ptr<double>() + call.m;
  }
  sweeping.positive = out.positive.mutable_data_ptr<double>();
  sweeping.kept = kept.mutable_data_ptr<float>();
  sweeping.kept_rows = std::min(kept.numel() / call.n, call.m);
  Torch torch(call.x);
  cuda::sweep(call.block, sweeping, torch);
  return {out.state, out.positive, kept};
}

std::tuple<Tensor, Tensor, Tensor> finish(const Tensor& state, const Tensor& positive, const Tensor& scale,
                                          const OptionalTensor& bias, std::string_view kind) {
  const int64_t count = state.dim() == 2 ? state.size(1) : 0, period = positive.numel();
  TORCH_CHECK(count > 0 && state.size(0) == 2 && state.scalar_type() == at::kDouble &&
                  positive.scalar_type() == at::kDouble && period > 0 && count % period == 0,
              "state must be (2, L) and positive (P), P a divisor of L, float64, got ", state.sizes(), " ",
              state.scalar_type(), " and ", positive.sizes(), " ", positive.scalar_type());
  check_device(state, {&positive});
  const Scope scope(state);
  const Tensor states = state.stride(1) == 1 || count == 1 ? state : state.contiguous(), t = positive.contiguous();
  const Number k("scale", scale, state), k0 = bias ? Number("bias", *bias, state) : Number();
  Tensor losses = at::empty({count}, state.options()), coefficients = at::empty_like(losses),
         weights = at::empty_like(losses);
  cuda::Finishing lines;
  lines.kind = finished_kind_of(kind);
  lines.count = count;
  lines.period = period;
  lines.shift = states.const_data_ptr<double>();
  lines.sum = lines.shift + states.stride(0);
  lines.positive = t.const_data_ptr<double>();
  lines.scale = k.scalar;
  if (!PORTABLE::has_shift(lines.kind)) lines.bias = k0.scalar;
  lines.losses = losses.mutable_data_ptr<double>();
  lines.coefficients = coefficients.mutable_data_ptr<double>();
  lines.weights = weights.mutable_data_ptr<double>();
  lines.stream = current_stream(state);
  cuda::finish(lines);
  return {losses, coefficients, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> weigh(const BlockArguments& arguments, const WeighArguments& given) {
  if (is_plain_engines(arguments))
    return call_plain("fastclip::weigh", FlatWeigh<&weigh>::call, arguments, given.state, given.positive, given.kept,
                      given.coefficients, given.positive_weight, given.gain, given.needs_x, given.needs_y,
                      given.needs_key_bias, given.project, given.dtype_x, given.dtype_y);
  const Scope scope(arguments.x.features);
  Call call(arguments);
  const Tensor &x = call.x, &kept = given.kept;
  const int64_t m = call.m, n = call.n;
  check_statistics(arguments, given, m, n);
  TORCH_CHECK(kept.scalar_type() == at::kFloat && kept.is_contiguous() && kept.numel() % std::min(m, n) == 0,
              "kept must come from a sweep of the same features, got ", kept.sizes(), " ", kept.scalar_type());
  check_device(x, {&given.state, &given.positive, &given.coefficients, &given.positive_weight, &kept});
  const auto doubles = [](const Tensor& t) { return t.to(at::kDouble).contiguous(); };
  const Tensor state = given.state.contiguous(), coefficients = doubles(given.coefficients),
               t = doubles(given.positive), weight = doubles(given.positive_weight);
  const Number upstream("gain", given.gain, x);
  int64_t set = 0;
  const auto set_lines = [&](Lines Side::* lines) {
    const double* const shift = state.const_data_ptr<double>() + 2 * set * (m + n);
    const double* const coefficient = coefficients.const_data_ptr<double>() + set++ * (m + n);
    (call.block.x.*lines).shifts = shift, (call.block.y.*lines).shifts = shift + m;
    (call.block.x.*lines).coefficients = coefficient, (call.block.y.*lines).coefficients = coefficient + m;
  };
  set_lines(&Side::negatives);
  if (call.block.same_id_positive) set_lines(&Side::positives);
  if (call.block.has_teacher()) set_lines(&Side::teacher);
  Gradients out = allocate_gradients(call, given.needs_x, given.needs_y, given.dtype_x, given.dtype_y);
  Tensor key_bias = call.empty({given.needs_key_bias ? n : 0}, at::kDouble);
  if (given.needs_key_bias) call.block.y.key_bias_sum = key_bias.mutable_data_ptr<double>();
  cuda::Weighing weighing;
  weighing.positive = t.const_data_ptr<double>();
  weighing.positive_weight = weight.const_data_ptr<double>();
  weighing.gain = upstream.scalar;
  weighing.kept = kept.const_data_ptr<float>();
  weighing.kept_rows = std::min(kept.numel() / n, m);
  weighing.project = given.project;
  weighing.totals = out.totals.mutable_data_ptr<double>();
  Torch torch(x);
  cuda::weigh(call.block, weighing, torch);
  return {out.dx, out.dy, out.totals, key_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sweep_and_weigh(const BlockArguments& arguments, const Tensor& gain,
                                                                   bool needs_x, bool needs_y, bool project) {
  if (is_plain_engines(arguments))
    return call_plain("fastclip::sweep_and_weigh", &Flat<&sweep_and_weigh>::call, arguments, gain, needs_x, needs_y,
                      project);
  const Scope scope(arguments.x.features);
  Call call(arguments);
  check_in_one_go(arguments, PORTABLE::is_linear(call.block.kind));
  const Number upstream("gain", gain, call.x);
  Swept swept = allocate_states(call);
  Gradients out = allocate_gradients(call, needs_x, needs_y, at::kFloat, at::kFloat);
  cuda::Weighing weighing;
  weighing.gain = upstream.scalar;
  weighing.project = project;
  weighing.totals = out.totals.mutable_data_ptr<double>();
  Torch torch(call.x);
  cuda::sweep_and_weigh(call.block, swept.positive.mutable_data_ptr<double>(), weighing, torch);
  return {swept.state, swept.positive, out.dx, out.dy, out.totals};
}

}  // namespace

#ifdef FASTCLIP_EMULATED
#define FASTCLIP_DISPATCH_KEY CPU
#else
#define FASTCLIP_DISPATCH_KEY CUDA
#endif

TORCH_LIBRARY_IMPL(fastclip, FASTCLIP_DISPATCH_KEY, m) {
  m.impl("sweep.cuda", &Flat<&sweep>::call);
  m.impl("finish.cuda", &finish);
  m.impl("weigh.cuda", FlatWeigh<&weigh>::call);
  m.impl("sweep_and_weigh.cuda", &Flat<&sweep_and_weigh>::call);
}

// The operators have no derivative of their own. A backward through one raises, instead of giving a wrong gradient.
TORCH_LIBRARY_IMPL(fastclip, Autograd, m) {
  for (const char* const name : {"sweep.cuda", "finish.cuda", "weigh.cuda", "sweep_and_weigh.cuda"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastclip

// For tests, which cut small blocks into several chunks: exchanges the largest shape of a chunk with *rows x *columns.
extern "C" [[gnu::visibility("default")]] void fastclip_cuda_swap_chunk_shape(int64_t* rows, int64_t* columns) {
  std::swap(*rows, fastclip::cuda::chunk_shape().rows);
  std::swap(*columns, fastclip::cuda::chunk_shape().columns);
}
