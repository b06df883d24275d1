// The operators' arguments, bundled as in fastclip/engine/block.py, and the flat functions that torch registers.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

namespace fastclip {

using OptionalTensor = std::optional<at::Tensor>;

// The rows or the columns of a block.
struct SideArguments {
  const at::Tensor& features;
  const OptionalTensor &factor, &ids, &threshold, &target, &target_factor;
};

struct BlockArguments {
  SideArguments x, y;
  const at::Tensor& scale;
  const OptionalTensor &bias, &key_bias, &target_scale;
  int64_t offset;
  std::string_view kind;
  bool same_id_positive, guided;

  bool is_plain() const { return !x.ids && !x.threshold && !key_bias && !x.target; }
  bool has_teacher() const { return target_scale.has_value(); }
  int64_t state_rows() const { return (same_id_positive ? 4 : 2) + (has_teacher() ? 3 : 0); }
};

// The other arguments of `weigh`: the statistics from a sweep, coefficients made from their upstream gradients, and
// which results are wanted.
struct WeighArguments {
  const at::Tensor &state, &positive, &kept;
  const at::Tensor &coefficients, &positive_weight, &gain;
  bool needs_x, needs_y, needs_key_bias, project;
  at::ScalarType dtype_x, dtype_y;
};

// `Flat<&f>::call` takes the schema's flat arguments and calls f(block, ...).
template <auto function>
struct Flat;
template <class Result, class... Rest, Result (*function)(const BlockArguments&, Rest...)>
struct Flat<function> {
  static Result call(const at::Tensor& x, const OptionalTensor& factor_x, const OptionalTensor& ids_x,
                     const OptionalTensor& threshold_x, const OptionalTensor& target_x,
                     const OptionalTensor& target_factor_x, const at::Tensor& y, const OptionalTensor& factor_y,
                     const OptionalTensor& ids_y, const OptionalTensor& threshold_y, const OptionalTensor& target_y,
                     const OptionalTensor& target_factor_y, const at::Tensor& scale, const OptionalTensor& bias,
                     const OptionalTensor& key_bias, const OptionalTensor& target_scale, int64_t offset,
                     std::string_view kind, bool same_id_positive, bool guided, Rest... rest) {
    return function({{x, factor_x, ids_x, threshold_x, target_x, target_factor_x},
                     {y, factor_y, ids_y, threshold_y, target_y, target_factor_y},
                     scale,
                     bias,
                     key_bias,
                     target_scale,
                     offset,
                     kind,
                     same_id_positive,
                     guided},
                    rest...);
  }
};

// The same for a function f(block, weigh arguments).
template <auto function>
struct FlatWeigh {
  using Result = decltype(function(std::declval<const BlockArguments&>(), std::declval<const WeighArguments&>()));
  static Result bundled(const BlockArguments& block, const at::Tensor& state, const at::Tensor& positive,
                        const at::Tensor& kept, const at::Tensor& coefficients, const at::Tensor& positive_weight,
                        const at::Tensor& gain, bool needs_x, bool needs_y, bool needs_key_bias, bool project,
                        at::ScalarType dtype_x, at::ScalarType dtype_y) {
    return function(block, {state, positive, kept, coefficients, positive_weight, gain, needs_x, needs_y,
                            needs_key_bias, project, dtype_x, dtype_y});
  }
  static constexpr auto call = &Flat<&bundled>::call;
};

}  // namespace fastclip
