// Tensors to the plain arguments of engine.h, checked, and the run of the engine that this machine can run.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string_view>

#include "capability_cpu.h"
#include "engine.h"
#include "epilogues.h"

namespace fastclip {

// Threads that took part in the last operator.
inline std::atomic<int> threads_used{0};

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::kDouble;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    default:
      TORCH_CHECK_TYPE(false, "features must be float64, float32, bfloat16 or float16, got ", type);
  }
}

inline at::ScalarType statistic_of(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Unit stride along D and rows that do not overlap, as the products need.
inline at::Tensor strided(const at::Tensor& x) {
  if (x.dim() != 2) return x;  // refused in a moment
  return (x.size(1) <= 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1)) ? x : x.contiguous();
}

inline double number(const char* name, const at::Tensor& value) {
  TORCH_CHECK(value.numel() == 1, name, " must have one element, got shape ", value.sizes());
  return value.item<double>();
}

inline Loss loss_of(std::string_view name) {
  if (name == "softmax") return Loss::kSoftmax;
  TORCH_CHECK_VALUE(name == "sigmoid", "loss must be 'softmax' or 'sigmoid', got '", name, "'");
  return Loss::kSigmoid;
}

// A problem with the tensors that its pointers point into. The longer tower supplies the rows: they are what threads
// share. `swapped` says that x and y changed places.
struct Call {
  Problem problem;
  at::Tensor x, y, factor_x, factor_y;
  bool swapped;
  int64_t m, n;

  Call(const at::Tensor& x_in, const at::Tensor& y_in, const std::optional<at::Tensor>& fx,
       const std::optional<at::Tensor>& fy, const at::Tensor& scale, const std::optional<at::Tensor>& bias,
       int64_t offset, std::string_view loss)
      : x(strided(x_in)), y(strided(y_in)), swapped(lines(x_in) < lines(y_in)), m(lines(x_in)), n(lines(y_in)) {
    TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.scalar_type() == y.scalar_type() && m > 0 &&
                    n > 0 && x.size(1) > 0,
                "x and y must be non-empty (M, D) and (N, D) of one dtype, got ", x.sizes(), " ", x.scalar_type(),
                " and ", y.sizes(), " ", y.scalar_type());
    const auto statistic = statistic_of(x);
    check_factor(fx, m);
    check_factor(fy, n);
    if (fx) factor_x = fx->to(statistic).contiguous();
    if (fy) factor_y = fy->to(statistic).contiguous();
    problem.dtype = dtype_of(x.scalar_type());
    problem.loss = loss_of(loss);
    problem.width = x.size(1);
    problem.scale = number("scale", scale);
    problem.bias = bias && uses_bias() ? number("bias", *bias) : 0.0;
    problem.offset = swapped ? -offset : offset;
    problem.positive_of_y = swapped;
    problem.cache_bytes = core_cache_bytes();
    problem.brgemm = brgemm_wanted();
    problem.half_products = problem.brgemm && machine_has_half_products();
    set(first(), x, factor_x);
    set(second(), y, factor_y);
  }

  Side& first() { return swapped ? problem.y : problem.x; }
  Side& second() { return swapped ? problem.x : problem.y; }

  void run() { threads_used = capability().run(problem); }

  bool uses_bias() const {
    return trait([](auto loss) { return loss.kUsesBias; });
  }
  bool needs_state() const {
    return trait([](auto loss) { return loss.kNeedsState; });
  }

 private:
  static int64_t lines(const at::Tensor& x) { return x.dim() == 2 ? x.size(0) : 0; }
  static void check_factor(const std::optional<at::Tensor>& factor, int64_t lines) {
    TORCH_CHECK(!factor || factor->sizes() == at::IntArrayRef(lines), "factor_x must be (M), factor_y (N), got ",
                factor->sizes());
  }
  template <class Function>
  bool trait(Function f) const {
    bool value = false;
    PORTABLE::for_loss(problem.loss, [&](auto loss) { value = f(loss); });
    return value;
  }
  static void set(Side& side, const at::Tensor& features, const at::Tensor& factor) {
    side.features = features.const_data_ptr();
    side.rows = features.size(0);
    side.stride = features.size(0) > 1 ? features.stride(0) : features.size(1);
    side.factor = factor.defined() ? factor.const_data_ptr() : nullptr;
  }
};

}  // namespace fastclip
