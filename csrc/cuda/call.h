// Checks tensors, converts them to the plain arguments of cuda/engine.h, and allocates the results.
#pragma once

#include <atomic>
#include <cstdlib>
#include <initializer_list>

#include "../operands.h"
#include "engine.h"
#include "torch_library.h"

namespace fastclip {
namespace {

// Raises unless all tensors are on one device: a kernel must not get a pointer of another.
void check_device(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* const other : others)
    TORCH_CHECK(!other->defined() || other->device() == first.device(), "operands must be on one device, ",
                first.device(), ", got ", other->device());
}

// A number that stays on the device, and the tensor that holds it.
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

// A block and the tensors that its pointers point into.
struct Call {
  Tensor x, y, key_bias;
  Number scale, bias, target_scale;
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
    if (b.x.target) block.target_width = b.x.target->size(1);
    block.guided = b.guided;
    if (b.has_teacher()) target_scale = Number("target_scale", *b.target_scale, x);
    block.target_scale = target_scale.scalar;
    scale = Number("scale", b.scale, x);
    if (b.bias) bias = Number("bias", *b.bias, x);
    block.width = x.size(1);
    block.dtype = dtype_of(x.scalar_type());
    block.scale = scale.scalar;
    if (!PORTABLE::has_shift(block.kind)) block.bias = bias.scalar;
    block.offset = std::clamp(b.offset, -m, n);  // all offsets beyond the block are equivalent
    block.tf32 = block.dtype == Dtype::kFloat && tf32_is_allowed();
    block.fused = tiles_are_fused();
    block.stream = current_stream(x);
  }

  Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const { return at::empty(sizes, x.options().dtype(type)); }

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
    if (!arguments.target) return;
    check_device(x, {&*arguments.target});
    Side target;  // as the target is laid out
    set_features(target, held_.emplace_back(strided(*arguments.target)), Tensor());
    target.factor = hold(arguments.target_factor, at::kFloat);
    side.target = features_of(target);
  }

  std::vector<Tensor> held_;
};

// The results of a sweep, without kept products.
struct Swept {
  Tensor state, positive;
};

Swept allocate_states(Call& call) {
  const int64_t lines = call.m + call.n;
  const int64_t rows = (call.block.same_id_positive ? 4 : 2) + (call.block.has_teacher() ? 3 : 0);
  Swept out{call.empty({rows, lines}, at::kDouble), call.empty({call.m}, at::kDouble)};
  if (call.block.offset < 0 || call.m + call.block.offset > call.n) out.positive.fill_(NAN);  // for rows without one
  double* state = out.state.mutable_data_ptr<double>();
  const auto set = [&](Lines Side::* set) {
    Lines &of_x = call.block.x.*set, &of_y = call.block.y.*set;
    of_x.shift = state, of_y.shift = state + call.m;
    of_x.sum = state + lines, of_y.sum = state + lines + call.m;
    state += 2 * lines;
  };
  set(&Side::negatives);
  if (call.block.same_id_positive) set(&Side::positives);
  if (call.block.has_teacher()) {
    set(&Side::teacher);
    call.block.x.teacher.moment = state, call.block.y.teacher.moment = state + call.m;
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

}  // namespace
}  // namespace fastclip
