// Tensors as both engines take them: names of dtypes and losses, a layout that products can read, what fits together.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "engine.h"

namespace fastclip {

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

inline Loss loss_of(std::string_view name) {
  if (name == "softmax") return Loss::kSoftmax;
  TORCH_CHECK_VALUE(name == "sigmoid", "loss must be 'softmax' or 'sigmoid', got '", name, "'");
  return Loss::kSigmoid;
}

// Unit stride along D and rows that do not overlap, as the products need.
inline at::Tensor strided(const at::Tensor& x) {
  if (x.dim() != 2) return x;  // refused in a moment
  return (x.size(1) <= 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1)) ? x : x.contiguous();
}

// Sets what of a side is there from the start. The tensors must outlive it.
inline void set_features(Side& side, const at::Tensor& features, const at::Tensor& factor) {
  side.features = features.const_data_ptr();
  side.rows = features.size(0);
  side.stride = features.size(0) > 1 ? features.stride(0) : features.size(1);
  side.factor = factor.defined() ? factor.const_data_ptr() : nullptr;
}

inline void check_one_element(const char* name, const at::Tensor& value) {
  TORCH_CHECK(value.numel() == 1, name, " must have one element, got shape ", value.sizes());
}

inline void check_block(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& factor_x,
                        const std::optional<at::Tensor>& factor_y) {
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.scalar_type() == y.scalar_type() &&
                  x.numel() > 0 && y.numel() > 0,
              "x and y must be non-empty (M, D) and (N, D) of one dtype, got ", x.sizes(), " ", x.scalar_type(),
              " and ", y.sizes(), " ", y.scalar_type());
  const auto check_factor = [](const std::optional<at::Tensor>& factor, int64_t lines) {
    TORCH_CHECK(!factor || factor->sizes() == at::IntArrayRef(lines), "factor_x must be (M), factor_y (N), got ",
                factor->sizes());
  };
  check_factor(factor_x, x.size(0));
  check_factor(factor_y, y.size(0));
}

}  // namespace fastclip
