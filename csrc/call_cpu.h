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
#include "operands.h"

namespace fastclip {

// Threads that took part in the last operator.
inline std::atomic<int> threads_used{0};

inline at::ScalarType statistic_of(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline double number(const char* name, const at::Tensor& value) {
  check_one_element(name, value);
  return value.item<double>();
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
    check_block(x, y, fx, fy);
    const auto statistic = statistic_of(x);
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
    set_features(first(), x, factor_x);
    set_features(second(), y, factor_y);
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
  template <class Function>
  bool trait(Function f) const {
    bool value = false;
    PORTABLE::for_loss(problem.loss, [&](auto loss) { value = f(loss); });
    return value;
  }
};

}  // namespace fastclip
