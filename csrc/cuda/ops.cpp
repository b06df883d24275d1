// The torch front of the CUDA engine: fastclip's operators on CUDA tensors (fastclip/engine/operators.py says what each
// argument means).
//
// It includes no CUDA header, torch's own among them, so it compiles beside any torch: memory and products come from
// ATen, the stream from a C function of libtorch_cuda. Nothing here reads a number on the device or waits for one.
// FASTCLIP_EMULATED: the engine was compiled for the CPU and runs on CPU tensors, for tests.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <utility>
#include <vector>

#include "../operands.h"
#include "engine.h"

// Of torch's stable C interface; not 0: an error. Declared here because its header is for builds that have CUDA's.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastclip {
namespace {

using at::Tensor;

// ---- what the engine takes from torch ------------------------------------------------------------------------------

at::ScalarType type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return at::kDouble;
    case Dtype::kBFloat16:
      return at::kBFloat16;
    case Dtype::kHalf:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

// Work space goes back to torch's allocator when the operator returns, which is before the device is done with it: the
// allocator hands it on in the order of the stream.
class Torch final : public cuda::Library {
 public:
  explicit Torch(const Tensor& like) : options_(like.options()) {}

  void* allocate(int64_t bytes) override {
    held_.push_back(at::empty({bytes + kAlignment}, options_.dtype(at::kByte)));
    const auto begin = reinterpret_cast<uintptr_t>(held_.back().mutable_data_ptr());
    return reinterpret_cast<void*>((begin + kAlignment - 1) / kAlignment * kAlignment);
  }

  void multiply(const cuda::Matrix& a, const cuda::Matrix& b, const cuda::Matrix& out, bool add) override {
    const Tensor left = view(a), right = view(b);
    Tensor result = view(out);
    if (a.dtype == Dtype::kFloat)
      add ? at::addmm_out(result, result, left, right) : at::mm_out(result, left, right);
    else if (options_.device().is_cpu())  // which multiplies half operands into half results alone
      add ? at::addmm_out(result, result, left.to(at::kFloat), right.to(at::kFloat))
          : at::mm_out(result, left.to(at::kFloat), right.to(at::kFloat));
    else if (add)
      add_half_product(left, right, result);
    else
      at::mm_out(result, left, right, at::kFloat);
  }

 private:
  static constexpr int64_t kAlignment = 256;

  Tensor view(const cuda::Matrix& m) const {
    const std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.row_stride, m.column_stride};
    // With a target device torch does not ask the driver whose the pointer is.
    return at::for_blob(m.data, sizes)
        .strides(at::IntArrayRef(strides))
        .target_device(options_.device())
        .options(options_.dtype(type_of(m.dtype)))
        .make_tensor();
  }

  static void add_half_product(const Tensor& left, const Tensor& right, Tensor& result) {
    static std::atomic<bool> in_place{true};
    if (in_place) {
      try {
        at::addmm_out(result, result, left, right, at::kFloat);
        return;
      } catch (const c10::OutOfMemoryError&) {
        throw;
      } catch (const c10::Error& error) {
        // A torch whose addmm adds to half precision only says so before it launches anything. Whatever else went wrong
        // must show.
        if (std::string_view(error.what_without_backtrace()).find("dtype") == std::string_view::npos) throw;
        in_place = false;
      }
    }
    result.add_(at::mm(left, right, at::kFloat));
  }

  at::TensorOptions options_;
  std::vector<Tensor> held_;
};

cuda::Stream current_stream([[maybe_unused]] const Tensor& x) {
  void* stream = nullptr;
#ifndef FASTCLIP_EMULATED
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.device().index(), &stream) == 0,
              "fastclip: torch does not tell its current stream of ", x.device());
#endif
  return static_cast<cuda::Stream>(stream);
}

// The features' device is current, and whatever the caller has switched on, such as autocast, does not reach the
// engine's own products.
class Scope {
 public:
  explicit Scope(const Tensor& x) : device_(x.device()), autocast_(c10::autocast_dispatch_keyset) {}

 private:
  c10::OptionalDeviceGuard device_;
  c10::impl::ExcludeDispatchKeyGuard autocast_;
  at::AutoDispatchBelowADInplaceOrView autograd_;
};

// ---- tensors to the engine's arguments -----------------------------------------------------------------------------

// Sees to it that no pointer of another device reaches a kernel.
void check_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* const other : others)
    TORCH_CHECK(!other->defined() || other->device() == first.device(), "operands must be on one device, ",
                first.device(), ", got ", other->device());
}

// A number that stays on the device, and the tensor that it lies in.
struct Number {
  Tensor held;
  cuda::Scalar scalar;
  Number() = default;
  Number(const char* name, const Tensor& value, const Tensor& x) {
    check_one_element(name, value);
    check_device(x, {&value});
    const bool known = value.scalar_type() == at::kDouble || value.scalar_type() == at::kFloat ||
                       value.scalar_type() == at::kBFloat16 || value.scalar_type() == at::kHalf;
    held = known ? value : value.to(at::kDouble);
    scalar = {held.const_data_ptr(), dtype_of(held.scalar_type())};
  }
};

bool tiles_are_fused() {
  const char* const asked = std::getenv("FASTCLIP_CUDA_TILES");
  if (!asked || !*asked) return false;
  const std::string_view name(asked);
  TORCH_CHECK_VALUE(name == "library" || name == "fused", "FASTCLIP_CUDA_TILES must be 'library' or 'fused', got '",
                    name, "'");
  TORCH_CHECK(name == "library" || cuda::has_fused(),
              "FASTCLIP_CUDA_TILES=fused, but fastclip was built without the fused kernels");
  return name == "fused";
}

bool tf32_is_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// A block with the tensors that its pointers point into.
struct Call {
  Tensor x, y, key_bias;
  Number scale, bias;
  cuda::Block block;
  int64_t m = 0, n = 0;

  explicit Call(const BlockArguments& b) : x(strided(b.x.features)), y(strided(b.y.features)) {
    check_block(b);
    check_device(x, {&y});
    m = x.size(0), n = y.size(0);
    block.kind = kind_of(b.kind);
    block.same_id_positive = b.same_id_positive;
    set_side(block.x, x, b.x), set_side(block.y, y, b.y);
    if (b.key_bias) {
      check_device(x, {&*b.key_bias});
      key_bias = b.key_bias->to(at::kDouble).contiguous();
      block.y.key_bias = key_bias.const_data_ptr<double>();
    }
    scale = Number("scale", b.scale, x);
    if (b.bias) bias = Number("bias", *b.bias, x);
    block.width = x.size(1);
    block.dtype = dtype_of(x.scalar_type());
    block.scale = scale.scalar;
    if (!PORTABLE::has_shift(block.kind)) block.bias = bias.scalar;
    block.offset = std::clamp(b.offset, -m, n);  // beyond the block every offset is alike
    block.tf32 = block.dtype == Dtype::kFloat && tf32_is_allowed();
    block.fused = tiles_are_fused();
    block.stream = current_stream(x);
  }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const { return at::empty(sizes, x.options().dtype(type)); }
  int64_t sets() const { return block.same_id_positive ? 2 : 1; }

 private:
  void set_side(Side& side, const Tensor& features, const SideArguments& arguments) {
    const auto hold = [&](const OptionalTensor& lines, at::ScalarType type) -> const void* {
      if (!lines) return nullptr;
      check_device(x, {&*lines});
      held_.push_back(lines->to(type).contiguous());
      return held_.back().const_data_ptr();
    };
    set_features(side, features, Tensor());
    side.factor = hold(arguments.factor, at::kFloat);
    side.ids = static_cast<const int32_t*>(hold(arguments.ids, at::kInt));
    side.threshold = hold(arguments.threshold, at::kFloat);
  }

  std::vector<Tensor> held_;
};

// What a sweep returns besides gradients.
struct Swept {
  Tensor state, positive;
};

Swept allocate_states(Call& call) {
  const int64_t lines = call.m + call.n;
  Swept out{call.empty({2 * call.sets(), lines}, at::kDouble), call.empty({call.m}, at::kDouble)};
  if (call.block.offset < 0 || call.m + call.block.offset > call.n) out.positive.fill_(NAN);  // rows without one
  double* const state = out.state.mutable_data_ptr<double>();
  for (const auto set : {&Side::negatives, &Side::positives}) {
    if (set == &Side::positives && call.sets() == 1) break;
    double* const reference = set == &Side::positives ? state + 2 * lines : state;
    double* const sum = reference + lines;
    (call.block.x.*set).reference = reference, (call.block.y.*set).reference = reference + call.m;
    (call.block.x.*set).sum = sum, (call.block.y.*set).sum = sum + call.m;
  }
  return out;
}

struct Gradients {
  Tensor dx, dy, totals;
};

Gradients allocate_gradients(Call& call, bool needs_x, bool needs_y, at::ScalarType dtype_x, at::ScalarType dtype_y) {
  const auto allocate = [&](Side& side, bool needed, at::ScalarType type) {
    side.gradient_dtype = dtype_of(type);
    Tensor gradient = call.empty({needed ? side.rows : 0, call.block.width}, type);
    if (needed) side.gradient = gradient.mutable_data_ptr();
    return gradient;
  };
  Gradients out;
  out.dx = allocate(call.block.x, needs_x, dtype_x);
  out.dy = allocate(call.block.y, needs_y, dtype_y);
  out.totals = call.empty({2}, at::kDouble);
  return out;
}

// float64 features are the plain engine's.
bool is_plain_engines(const BlockArguments& b) { return b.x.features.scalar_type() == at::kDouble; }

template <class Result, class... Flattened, class... Rest>
Result call_plain(const char* name, Result (*)(Flattened...), const BlockArguments& b, const Rest&... rest) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "torch")
      .typed<Result(Flattened...)>()
      .call(b.x.features, b.x.factor, b.x.ids, b.x.threshold, b.y.features, b.y.factor, b.y.ids, b.y.threshold, b.scale,
            b.bias, b.key_bias, b.offset, b.kind, b.same_id_positive, rest...);
}

// ---- operators -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> sweep(const BlockArguments& arguments, const OptionalTensor& bound,
                                         const OptionalTensor& occupied, int64_t keep) {
  if (is_plain_engines(arguments))
    return call_plain("fastclip::sweep", &Flat<&sweep>::call, arguments, bound, occupied, keep);
  TORCH_CHECK(keep >= 0, "keep must be a number of rows >= 0, got ", keep);
  const Scope scope(arguments.x.features);
  Call call(arguments);
  check_occupied(arguments, occupied, call.m + call.n);
  const Number most = bound ? Number("bound", *bound, call.x) : Number();
  const Tensor lines = occupied ? occupied->contiguous() : Tensor();
  check_device(call.x, {&lines});
  Swept out = allocate_states(call);
  Tensor kept = call.empty({keep * std::min(call.m, call.n)}, at::kFloat);
  cuda::Sweeping sweeping;
  sweeping.bound = most.scalar;
  if (occupied) sweeping.occupied = lines.const_data_ptr<bool>();
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
              "state must be (2, L) and positive (L) or a divisor, float64, got ", state.sizes(), " ",
              state.scalar_type(), " and ", positive.sizes(), " ", positive.scalar_type());
  check_device(state, {&positive});
  const Scope scope(state);
  const Tensor states = state.stride(1) == 1 || count == 1 ? state : state.contiguous(), t = positive.contiguous();
  const Number k("scale", scale, state), k0 = bias ? Number("bias", *bias, state) : Number();
  Tensor losses = at::empty({count}, state.options()), coefficients = at::empty_like(losses),
         weights = at::empty_like(losses);
  cuda::Finishing lines;
  lines.kind = kind_of(kind);
  lines.count = count;
  lines.period = period;
  lines.reference = states.const_data_ptr<double>();
  lines.sum = lines.reference + states.stride(0);
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
  const auto set_lines = [&](Lines Side::* lines, int64_t set) {
    const double* const reference = state.const_data_ptr<double>() + 2 * set * (m + n);
    const double* const coefficient = coefficients.const_data_ptr<double>() + set * (m + n);
    (call.block.x.*lines).references = reference, (call.block.y.*lines).references = reference + m;
    (call.block.x.*lines).coefficients = coefficient, (call.block.y.*lines).coefficients = coefficient + m;
  };
  set_lines(&Side::negatives, 0);
  if (call.sets() == 2) set_lines(&Side::positives, 1);
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

// The operators have no derivative of their own, and silence would be a wrong gradient: a backward through one fails.
TORCH_LIBRARY_IMPL(fastclip, Autograd, m) {
  for (const char* const name : {"sweep.cuda", "finish.cuda", "weigh.cuda", "sweep_and_weigh.cuda"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastclip

// For tests: small blocks, too, in several chunks. Puts the shape that there was in the place of the new one.
extern "C" [[gnu::visibility("default")]] void fastclip_cuda_swap_chunk_shape(int64_t* rows, int64_t* columns) {
  std::swap(*rows, fastclip::cuda::chunk_shape().rows);
  std::swap(*columns, fastclip::cuda::chunk_shape().columns);
}
