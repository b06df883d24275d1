// Checks tensors, converts them to the plain arguments of engine.h, and runs the engine for this machine's CPU.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <deque>

#include "../kinds.h"
#include "../operands.h"
#include "capability.h"
#include "problem.h"

namespace fastclip {

// Threads that took part in the last operator.
inline std::atomic<int> threads_used{0};

inline at::ScalarType accumulation_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline double number(const char* name, const at::Tensor& value) {
  check_one_element(name, value);
  return value.item<double>();
}

// A problem and the tensors that its pointers point into. Work is divided among threads by rows, so the longer side
// becomes the rows. `swapped`: the caller's x is problem.y, and its y is problem.x.
struct Call {
  Problem problem;
  at::Tensor x, y;
  bool swapped;
  int64_t m, n;

  explicit Call(const BlockArguments& block)
      : x(strided(block.x.features)),
        y(strided(block.y.features)),
        swapped(lines(x) < lines(y)),
        m(lines(x)),
        n(lines(y)) {
    check_block(block);
    problem.dtype = dtype_of(x.scalar_type());
    problem.kind = kind_of(block.kind);
    problem.has_levels = PORTABLE::has_levels(problem.kind);
    problem.width = x.size(1);
    problem.scale = number("scale", block.scale);
    problem.bias = block.bias && !has_shift() ? number("bias", *block.bias) : 0.0;
    problem.same_id_positive = block.same_id_positive;
    problem.offset = swapped ? -block.offset : block.offset;
    problem.positives_by_column = swapped;
    problem.cache_bytes = core_cache_bytes();
    problem.brgemm = brgemm_wanted();
    problem.bf16_products = problem.brgemm && machine_has_bf16_products();
    set_side(side_of_x(), x, block.x);
    set_side(side_of_y(), y, block.y);
    if (block.x.target) {
      problem.target_width = block.x.target->size(1);
      problem.guided = block.guided;
      problem.teacher.is_given = block.has_teacher();
      if (block.has_teacher()) problem.teacher.scale = number("target_scale", *block.target_scale);
    }
    if (block.key_bias) side_of_y().key_bias = held(*block.key_bias, at::kDouble).const_data_ptr<double>();
  }

  Side& side_of_x() { return swapped ? problem.y : problem.x; }
  Side& side_of_y() { return swapped ? problem.x : problem.y; }

  void run() { threads_used = capability().run(problem); }

  bool has_shift() const { return PORTABLE::has_shift(problem.kind); }

  // The tensor in this dtype, contiguous; it lives as long as the call.
  const at::Tensor& held(const at::Tensor& t, at::ScalarType type) {
    return held_.emplace_back(t.to(type).contiguous());
  }

 private:
  static int64_t lines(const at::Tensor& x) { return x.dim() == 2 ? x.size(0) : 0; }

  void set_side(Side& side, const at::Tensor& features, const SideArguments& given) {
    const auto statistic = accumulation_type(x);
    set_features(side, features, given.factor ? held(*given.factor, statistic) : at::Tensor());
    if (given.target) {
      Side target;  // as the target is laid out
      set_features(target, held_.emplace_back(strided(*given.target)),
                   given.target_factor ? held(*given.target_factor, statistic) : at::Tensor());
      side.target = features_of(target);
    }
    if (given.ids) side.ids = held(*given.ids, at::kInt).const_data_ptr<int32_t>();
    if (given.threshold) side.threshold = held(*given.threshold, statistic).const_data_ptr();
  }

  std::deque<at::Tensor> held_;
};

}  // namespace fastclip
