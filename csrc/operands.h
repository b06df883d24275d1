// Checks and conversions of the operators' tensors, for both C++ engines: dtypes, kinds, layouts that products can
// read, shapes that fit each other.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <string_view>

#include "engine.h"
#include "kinds.h"
#include "torch_args.h"

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

inline KindIndex kind_of(std::string_view name) {
  int found = -1;
  PORTABLE::Kinds::each_name([&](KindIndex kind, const char* own) {
    if (name == own) found = int(kind);
  });
  if (found >= 0) return KindIndex(found);
  std::string known;
  PORTABLE::Kinds::each_name(
      [&](KindIndex, const char* own) { known += (known.empty() ? "'" : ", '") + std::string(own) + "'"; });
  TORCH_CHECK_VALUE(false, "kind must be one of ", known, ", got '", name, "'");
}

// The tensor itself, or a contiguous copy: products need unit stride along D and rows that do not overlap.
inline at::Tensor strided(const at::Tensor& x) {
  if (x.dim() != 2) return x;  // check_block rejects it
  return (x.size(1) <= 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) >= x.size(1)) ? x : x.contiguous();
}

// Sets a side's features and factor. The tensors must outlive the side.
inline void set_features(Side& side, const at::Tensor& features, const at::Tensor& factor) {
  side.features = features.const_data_ptr();
  side.rows = features.size(0);
  side.stride = features.size(0) > 1 ? features.stride(0) : features.size(1);
  side.factor = factor.defined() ? factor.const_data_ptr() : nullptr;
}

inline void check_one_element(const char* name, const at::Tensor& value) {
  TORCH_CHECK(value.numel() == 1, name, " must have one element, got shape ", value.sizes());
}

inline void check_scalars(const BlockArguments& block) {
  check_one_element("scale", block.scale);
  if (block.bias) check_one_element("bias", *block.bias);
}

// Checks two optional vectors, one element for each line of their side. If `type` is given, they must have it, and
// either both are given or none.
inline void check_lines(const char* rule, const OptionalTensor& x, const OptionalTensor& y, int64_t m, int64_t n,
                        std::optional<at::ScalarType> type) {
  const auto fits = [&](const OptionalTensor& t, int64_t lines) {
    return !t || (t->sizes() == at::IntArrayRef(lines) && (!type || t->scalar_type() == *type));
  };
  const auto got = [](const OptionalTensor& t) { return t ? c10::str(t->sizes(), " ", t->scalar_type()) : "None"; };
  TORCH_CHECK(fits(x, m) && fits(y, n) && (!type || x.has_value() == y.has_value()), rule, ", got ", got(x), " and ",
              got(y));
}

inline void check_targets(const BlockArguments& block) {
  const OptionalTensor &x = block.x.target, &y = block.y.target;
  const auto fits = [](const OptionalTensor& t, const at::Tensor& features) {
    return !t || (t->dim() == 2 && t->size(0) == features.size(0) && t->numel() > 0 &&
                  t->scalar_type() == features.scalar_type());
  };
  const auto got = [](const OptionalTensor& t) { return t ? c10::str(t->sizes(), " ", t->scalar_type()) : "None"; };
  TORCH_CHECK(fits(x, block.x.features) && fits(y, block.y.features) && x.has_value() == y.has_value() &&
                  (!x || x->size(1) == y->size(1)),
              "target_x must be (M, D'), target_y (N, D') of the features' dtype, or both None, got ", got(x), " and ",
              got(y));
  check_lines("target_factor_x must be (M), target_factor_y (N)", block.x.target_factor, block.y.target_factor,
              block.x.features.size(0), block.y.features.size(0), {});
  TORCH_CHECK(x.has_value() == (block.guided != block.has_teacher()),
              "targets must be a guide (guided) or a teacher (target_scale), not both, got ", got(x), ", ",
              block.guided, " and ", got(block.target_scale));
  TORCH_CHECK(!block.guided || block.x.threshold, "a guide needs threshold_x and threshold_y, got None");
  if (block.target_scale) check_one_element("target_scale", *block.target_scale);
}

inline void check_block(const BlockArguments& block) {
  const at::Tensor &x = block.x.features, &y = block.y.features;
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.scalar_type() == y.scalar_type() &&
                  x.numel() > 0 && y.numel() > 0,
              "x and y must be non-empty (M, D) and (N, D) of one dtype, got ", x.sizes(), " ", x.scalar_type(),
              " and ", y.sizes(), " ", y.scalar_type());
  const int64_t m = x.size(0), n = y.size(0);
  const auto statistic = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_lines("factor_x must be (M), factor_y (N)", block.x.factor, block.y.factor, m, n, {});
  check_lines("ids_x must be (M), ids_y (N), int32, or both None", block.x.ids, block.y.ids, m, n, at::kInt);
  check_lines(statistic == at::kDouble ? "threshold_x must be (M), threshold_y (N), float64, or both None"
                                       : "threshold_x must be (M), threshold_y (N), float32, or both None",
              block.x.threshold, block.y.threshold, m, n, statistic);
  const OptionalTensor& key_bias = block.key_bias;
  TORCH_CHECK(!key_bias || (key_bias->sizes() == at::IntArrayRef(n) && key_bias->is_floating_point()),
              "key_bias must be (N), floating point, got ", key_bias->sizes(), " ", key_bias->scalar_type());
  TORCH_CHECK(!block.same_id_positive || block.x.ids, "positives by id need ids_x and ids_y, got None");
  TORCH_CHECK_VALUE(!(block.same_id_positive && PORTABLE::has_levels(kind_of(block.kind))),
                    "a kind with levels must have no positives by id, got '", block.kind, "'");
  check_targets(block);
  check_scalars(block);
}

// Checks the flags that say which lines have negatives and, with positives by id, which lines have such positives.
inline void check_occupied(const BlockArguments& block, const OptionalTensor& occupied, int64_t lines) {
  TORCH_CHECK(!occupied || (occupied->sizes() == at::IntArrayRef({block.same_id_positive ? 2 : 1, lines}) &&
                            occupied->scalar_type() == at::kBool),
              "occupied must be (1, M + N), with positives by id (2, M + N), bool, got ", occupied->sizes(), " ",
              occupied->scalar_type());
}

// Checks the levels of the lines, which kinds with levels need.
inline void check_levels(const BlockArguments& block, const OptionalTensor& levels, int64_t lines) {
  const auto got = [&] { return levels ? c10::str(levels->sizes(), " ", levels->scalar_type()) : "None"; };
  if (!PORTABLE::has_levels(kind_of(block.kind))) {
    TORCH_CHECK(!levels, "levels must be None for a kind without levels, got ", got());
    return;
  }
  TORCH_CHECK(levels && levels->sizes() == at::IntArrayRef(lines) && levels->scalar_type() == at::kDouble,
              "levels must be (M + N) float64 for a kind with levels, got ", got());
}

// Returns the index of a kind that can finish lines.
inline KindIndex finished_kind_of(std::string_view name) {
  const KindIndex kind = kind_of(name);
  TORCH_CHECK_VALUE(!PORTABLE::has_levels(kind), "a kind with levels must not be finished, got '", name, "'");
  return kind;
}

inline void check_statistics(const BlockArguments& block, const WeighArguments& weigh, int64_t m, int64_t n) {
  const int64_t rows = block.state_rows(), lines = m + n;
  const at::Tensor& coefficients = weigh.coefficients;
  const bool fits = rows > 2 ? coefficients.sizes() == at::IntArrayRef({rows / 2, lines})
                             : coefficients.sizes() == at::IntArrayRef(lines);
  TORCH_CHECK(
      weigh.state.sizes() == at::IntArrayRef({rows, lines}) && weigh.state.scalar_type() == at::kDouble && fits &&
          weigh.positive.sizes() == at::IntArrayRef(m) && weigh.positive_weight.sizes() == at::IntArrayRef(m),
      "state must be (2, M + N) float64, coefficients (M + N), positive and positive_weight (M); with positives "
      "by id state (4, M + N), coefficients (2, M + N); with a teacher 3 more rows and 1 more, got ",
      weigh.state.sizes(), " ", weigh.state.scalar_type(), ", ", coefficients.sizes(), ", ", weigh.positive.sizes(),
      ", ", weigh.positive_weight.sizes());
}

inline void check_in_one_go(const BlockArguments& block, bool is_linear) {
  TORCH_CHECK_VALUE(is_linear, "kind must have weights that need no state, to be swept and weighed in one go, got '",
                    block.kind, "'");
  TORCH_CHECK(block.is_plain(),
              "a block that is swept and weighed in one go must have no ids, thresholds, key_bias or targets");
}

}  // namespace fastclip
