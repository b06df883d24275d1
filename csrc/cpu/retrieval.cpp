// Scans of all pairs of queries and keys on CPU threads, which keep no matrix of scores: ranks, the k best, draws.
#include "retrieval/draw.h"
#include "retrieval/ranks.h"
#include "retrieval/top.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

template <class In, class Op, class T>
struct Types {};

// Calls f with the types of features, of products' operands and of products.
template <class Function>
void for_types(const Scan& p, Function f) {
  switch (p.dtype) {
    case Dtype::kDouble:
      return f(Types<double, double, double>());
    case Dtype::kFloat:
      return f(Types<float, float, float>());
    case Dtype::kHalf:
      return f(Types<at::Half, float, float>());
    case Dtype::kBFloat16:
      if (p.bf16_products) return f(Types<at::BFloat16, at::BFloat16, float>());
      return f(Types<at::BFloat16, float, float>());
  }
}

}  // namespace

void find_ranks(const RankScan& p) {
  for_types(p, [&]<class In, class Op, class T>(Types<In, Op, T>) {
    const PreparedRanks<In, T> prepared(p, [&](double norm) { return bands_of<In, Op, T>(p, norm); });
    Scanner<In, Op, T, RankStrip<In, T>>(prepared).run();
  });
}

void find_top(const TopScan& p) {
  for_types(p, [&]<class In, class Op, class T>(Types<In, Op, T>) {
    const PreparedTop<In, T> prepared(p, [&](double norm) { return bands_of<In, Op, T>(p, norm); });
    Scanner<In, Op, T, TopStrip<In, T>>(prepared).run();
  });
}

void draw(const DrawScan& p) {
  const PreparedDraw prepared(p);
  for_types(p,
            [&]<class In, class Op, class T>(Types<In, Op, T>) { Scanner<In, Op, T, DrawStrip<T>>(prepared).run(); });
  for (int64_t i = 0; i < p.m; i++) p.rows[i] = prepared.of_rows[i].place;
  if (p.columns)
    for (int64_t j = 0; j < p.n; j++) p.columns[j] = prepared.of_columns[j].place;
}

void score(const PairScan& p) {
  for_types(p, [&]<class In, class Op, class T>(Types<In, Op, T>) {
    at::parallel_for(0, p.pairs, 256, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; q++) p.scores[q] = exact_score<In>(p, p.i[q], p.j[q]);
    });
  });
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
