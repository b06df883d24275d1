// The retrieval operators on CPU tensors. fastclip/retrieval/operators.py has their schemas and documents them.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>

#include "../operands.h"
#include "capability.h"
#include "retrieval/problem.h"

namespace fastclip {
namespace {

using at::Tensor;

// The arguments that all scans share. The tensors must outlive the scan.
struct Given {
  Tensor x, y;
  OptionalTensor ids_x, ids_y;

  Given(const Tensor& queries, const Tensor& keys, const OptionalTensor& of_x, const OptionalTensor& of_y)
      : x(strided(queries)), y(strided(keys)) {
    TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.scalar_type() == y.scalar_type() &&
                    x.numel() > 0 && y.numel() > 0,
                "queries and keys must be non-empty (M, D) and (N, D) of one dtype, got ", x.sizes(), " ",
                x.scalar_type(), " and ", y.sizes(), " ", y.scalar_type());
    TORCH_CHECK(std::max(x.size(0), y.size(0)) < std::numeric_limits<int32_t>::max(),
                "queries and keys must be fewer than 2^31, got ", x.size(0), " and ", y.size(0));
    check_lines("ids_x must be (M), ids_y (N), int32, or both None", of_x, of_y, x.size(0), y.size(0), at::kInt);
    if (of_x) ids_x = of_x->contiguous(), ids_y = of_y->contiguous();
  }

  void set(Scan& p) const {
    p.x = {x.const_data_ptr(), x.stride(0), nullptr}, p.y = {y.const_data_ptr(), y.stride(0), nullptr};
    p.m = x.size(0), p.n = y.size(0), p.width = x.size(1);
    p.dtype = dtype_of(x.scalar_type());
    if (ids_x) p.ids_x = ids_x->const_data_ptr<int32_t>(), p.ids_y = ids_y->const_data_ptr<int32_t>();
    p.brgemm = brgemm_wanted();
    p.bf16_products = p.brgemm && machine_has_bf16_products();
  }
};

// The tensor, contiguous, after a check of its lines and dtype.
Tensor vector_of(const Tensor& t, const char* name, int64_t lines, at::ScalarType type) {
  TORCH_CHECK(t.sizes() == at::IntArrayRef(lines) && t.scalar_type() == type, name, " must be (", lines, ") ", type,
              ", got ", t.sizes(), " ", t.scalar_type());
  return t.contiguous();
}
Tensor indices_below(const Tensor& t, const char* name, int64_t limit) {
  const Tensor held = vector_of(t, name, t.numel(), at::kLong);
  const int64_t* const values = held.const_data_ptr<int64_t>();
  for (int64_t q = 0; q < held.numel(); q++)
    TORCH_CHECK(values[q] >= 0 && values[q] < limit, name, " must be from 0 to ", limit - 1, ", got ", values[q]);
  return held;
}

// One side's own partners, and the counts.
struct Counted {
  Tensor index, score, above;
  Counted(const char* name, const Tensor& own, const Tensor& scores, int64_t lines)
      : index(vector_of(own, name, lines, at::kLong)),
        score(vector_of(scores, name, lines, at::kDouble)),
        above(at::zeros({lines}, at::kLong)) {}
  Owned owned() {
    return {index.const_data_ptr<int64_t>(), score.const_data_ptr<double>(), above.mutable_data_ptr<int64_t>()};
  }
};

std::tuple<Tensor, Tensor> ranks(const Tensor& queries, const Tensor& keys, const Tensor& own_rows,
                                 const Tensor& row_scores, const OptionalTensor& own_columns,
                                 const OptionalTensor& column_scores, int64_t first_query, double rounding) {
  const Given given(queries, keys, std::nullopt, std::nullopt);
  RankScan p;
  given.set(p);
  p.first_query = first_query, p.rounding = rounding;
  Counted rows("own_rows and row_scores", own_rows, row_scores, p.m);
  p.rows = rows.owned();
  TORCH_CHECK(own_columns.has_value() == column_scores.has_value(), "own_columns and column_scores go together");
  if (!own_columns) {
    capability().find_ranks(p);
    return {rows.above, at::empty({0}, at::kLong)};
  }
  Counted columns("own_columns and column_scores", *own_columns, *column_scores, p.n);
  p.columns = columns.owned();
  capability().find_ranks(p);
  return {rows.above, columns.above};
}

std::tuple<Tensor, Tensor> topk(const Tensor& queries, const Tensor& keys, int64_t k, double max_score,
                                const OptionalTensor& ids_x, const OptionalTensor& ids_y, bool excludes_own,
                                double rounding) {
  const Given given(queries, keys, ids_x, ids_y);
  TopScan p;
  given.set(p);
  TORCH_CHECK(k >= 1, "k must be at least 1, got ", k);
  p.k = k, p.max_score = max_score, p.excludes_own = excludes_own, p.rounding = rounding;
  Tensor scores = at::full({p.m, k}, -std::numeric_limits<double>::infinity(), at::kDouble),
         places = at::full({p.m, k}, -1, at::kLong);
  p.scores = scores.mutable_data_ptr<double>(), p.indices = places.mutable_data_ptr<int64_t>();
  capability().find_top(p);
  return {scores, places};
}

std::tuple<Tensor, Tensor> draw(const Tensor& queries, const Tensor& keys, double scale, int64_t seed,
                                const OptionalTensor& ids_x, const OptionalTensor& ids_y, bool excludes_own,
                                int64_t offset, bool columns_wanted) {
  const Given given(queries, keys, ids_x, ids_y);
  DrawScan p;
  given.set(p);
  p.scale = scale, p.seed = uint64_t(seed), p.excludes_own = excludes_own, p.offset = offset;
  Tensor rows = at::empty({p.m}, at::kLong), columns = at::empty({columns_wanted ? p.n : 0}, at::kLong);
  p.rows = rows.mutable_data_ptr<int64_t>();
  if (columns_wanted) p.columns = columns.mutable_data_ptr<int64_t>();
  capability().draw(p);
  return {rows, columns};
}

Tensor pair_scores(const Tensor& queries, const Tensor& keys, const Tensor& i, const Tensor& j) {
  const Given given(queries, keys, std::nullopt, std::nullopt);
  PairScan p;
  given.set(p);
  p.pairs = i.numel();
  TORCH_CHECK(i.sizes() == j.sizes(), "i and j must have one shape, got ", i.sizes(), " and ", j.sizes());
  const Tensor rows = indices_below(i, "i", p.m), columns = indices_below(j, "j", p.n);
  Tensor scores = at::empty({p.pairs}, at::kDouble);
  p.i = rows.const_data_ptr<int64_t>(), p.j = columns.const_data_ptr<int64_t>();
  p.scores = scores.mutable_data_ptr<double>();
  capability().score(p);
  return scores;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("ranks.cpu", &ranks);
  m.impl("topk.cpu", &topk);
  m.impl("draw.cpu", &draw);
  m.impl("pair_scores.cpu", &pair_scores);
}

}  // namespace fastclip
