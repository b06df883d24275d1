// Runs the fused epilogues on the CPU, with all threads of a tile, and compares them with double. Prints JSON.
//
//   emulate sweep|weigh rows columns offset softmax|sigmoid bf16|fp16 factors coefficients shifts scale
//     factors, coefficients: 0 or 1;  shifts: one or two
#include <cstdio>
#include <cstring>
#include <string>

#include "collective.h"
#include "cuda/sm90/api.h"
#include "cuda/sm90/fold.h"
#include "cuda/sm90/weights.h"
#include "truth.h"

namespace emulated {

namespace cuda = fastclip::cuda;  // named in full, because CCCL has a ::cuda, too
namespace kinds = fastclip::CUDA;

constexpr float kUntouched = -12345.f;

// Errors are relative to at least this: smaller sums do not matter beside a line's others.
constexpr double kLeast = 0x1p-100;

// The largest errors of a case, relative to the truth or to the sum of magnitudes.
struct Errors {
  double rows = 0, columns = 0, positives = 0, weights = 0, totals = 0;
  bool stays_inside = true, is_deterministic = true;
};

void note(double& worst, double got, double truth, double size) {
  const double error = got == truth ? 0 : std::fabs(got - truth) / std::fmax(size, kLeast);
  worst = std::fmax(worst, std::isfinite(error) ? error : 1e300);
}

// A device array between margins that must stay unwritten.
template <class T>
struct Guarded {
  static constexpr size_t kMargin = 64;
  explicit Guarded(int64_t count) : memory(size_t(count) + 2 * kMargin, T(kUntouched)) {}
  T* data() { return memory.data() + kMargin; }
  T operator[](int64_t k) const { return memory[kMargin + size_t(k)]; }
  bool is_untouched(int64_t k) const { return (*this)[k] == T(kUntouched); }
  bool is_whole() const {
    for (size_t k = 0; k < kMargin; k++)
      if (memory[k] != T(kUntouched) || memory[memory.size() - 1 - k] != T(kUntouched)) return false;
    return true;
  }
  std::vector<T> memory;
};

template <class T>
bool same_bits(const Guarded<T>& a, const Guarded<T>& b) {
  return std::memcmp(a.memory.data(), b.memory.data(), a.memory.size() * sizeof(T)) == 0;
}

const float* pointer(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

cuda::ChunkView view_of(const Pairs& p, const double* scale, const double* bias) {
  cuda::ChunkView view;
  view.rows = p.rows, view.columns = p.columns, view.offset = p.offset;
  view.factor_x = pointer(p.factor_x), view.factor_y = pointer(p.factor_y);
  view.scale = {scale, fastclip::Dtype::kDouble}, view.bias = {bias, fastclip::Dtype::kDouble};
  return view;
}

// One tile more than needed, since schedulers round the number of tiles up.
int rounded_up(int64_t lines, int lines_of_tile) { return int(cuda::tiles_of(lines, lines_of_tile)) + 1; }

template <class Kind, class Element, const cuda::FusedTile& kTile>
Errors sweep(const Pairs& p) {
  using Layout = fused::Layout<kTile>;
  using Work = fused::Fold<Kind, Element, Layout>;
  const cuda::ChunkView view = view_of(p, &p.scale, &p.bias);
  const int64_t tiles_m = cuda::fused_column_parts(view), tiles_n = cuda::fused_row_parts(view);
  const int64_t line = 3;  // an arbitrary stride
  struct Results {
    Guarded<float> rows, columns;
    Guarded<double> positive;
  };
  const auto run = [&](unsigned seed) {
    Results r{Guarded<float>(p.rows * line * tiles_n), Guarded<float>(p.columns * line * tiles_m),
              Guarded<double>(p.rows)};
    typename Work::Arguments arguments{view, {}};
    arguments.folding.shift = pointer(p.shift_x);
    arguments.folding.positive = r.positive.data();
    arguments.folding.rows = {r.rows.data(), tiles_n, line, p.rows * line};
    arguments.folding.columns = {r.columns.data(), tiles_m, line * tiles_m, line};
    Collective<Work, Layout>::run(
        view, arguments, rounded_up(p.rows, Layout::kRows), rounded_up(p.columns, Layout::kColumns), seed,
        [&](int i, int j) { return p.product(i, j); }, [](int, int, float) {});
    return r;
  };
  const Results r = run(0);
  Errors e;
  e.stays_inside = r.rows.is_whole() && r.columns.is_whole() && r.positive.is_whole();
  for (const unsigned seed : {1u, 2u, 3u}) {
    const Results again = run(seed);
    e.is_deterministic = e.is_deterministic && same_bits(r.rows, again.rows) && same_bits(r.columns, again.columns) &&
                         same_bits(r.positive, again.positive);
  }

  std::vector<double> of_row(size_t(p.rows * tiles_n)), of_column(size_t(p.columns * tiles_m));
  const double m = p.is_softmax ? p.shift_x[0] : 0;
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t j = 0; j < p.columns; j++) {
      const double folded = p.fold(i, j, m);
      of_row[size_t(i * tiles_n + j / Layout::kColumns)] += folded;
      of_column[size_t(j * tiles_m + i / Layout::kRows)] += folded;
    }
  int64_t written = 0;
  for (int64_t k = 0; k < int64_t(r.rows.memory.size()); k++) written += r.rows.memory[size_t(k)] != kUntouched;
  for (int64_t k = 0; k < int64_t(r.columns.memory.size()); k++) written += r.columns.memory[size_t(k)] != kUntouched;
  e.stays_inside = e.stays_inside && written == p.rows * tiles_n + p.columns * tiles_m;
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t q = 0; q < tiles_n; q++) {
      const double truth = of_row[size_t(i * tiles_n + q)];
      note(e.rows, r.rows[i * line + q * p.rows * line], truth, truth);
    }
  for (int64_t j = 0; j < p.columns; j++)
    for (int64_t q = 0; q < tiles_m; q++) {
      const double truth = of_column[size_t(j * tiles_m + q)];
      note(e.columns, r.columns[j * line * tiles_m + q * line], truth, truth);
    }
  for (int64_t i = 0; i < p.rows; i++) {
    const int64_t j = i + p.offset;
    if (j >= 0 && j < p.columns)
      note(e.positives, r.positive[i], p.t(i, j), std::fabs(p.t(i, j)));
    else
      e.stays_inside = e.stays_inside && r.positive.is_untouched(i);
  }
  return e;
}

template <class Kind, class Element, const cuda::FusedTile& kTile>
Errors weigh(const Pairs& p, bool spread, float enlarged) {
  using Layout = fused::Layout<kTile>;
  using Work = fused::Weigh<Kind, Element, Layout>;
  constexpr double kLeastNormal = std::is_same_v<Element, cutlass::half_t> ? 0x1p-14 : 0;
  const cuda::ChunkView view = view_of(p, &p.scale, &p.bias);
  const int64_t tiles_n = cuda::tiles_of(p.columns, Layout::kColumns), parts = cuda::fused_total_parts(view);
  int32_t shifts_differ = 0;
  for (const float m : p.shift_x) shifts_differ |= m != p.shift_x[0];
  for (const float m : p.shift_y) shifts_differ |= m != p.shift_x[0];
  struct Results {
    Guarded<float> out, totals;
  };
  const auto run = [&](unsigned seed) {
    Results r{Guarded<float>(p.rows * p.columns), Guarded<float>(2 * parts)};
    typename Work::Arguments arguments{view, {}};
    cuda::PairWeights& weights = arguments.weights;
    weights.shift_x = pointer(p.shift_x), weights.shift_y = pointer(p.shift_y);
    weights.shifts_differ = &shifts_differ;
    weights.a = pointer(p.a), weights.b = pointer(p.b);
    weights.spread = spread, weights.enlarged = enlarged;
    weights.totals = r.totals.data(), weights.total_parts = parts;
    Collective<Work, Layout>::run(
        view, arguments, rounded_up(p.rows, Layout::kRows), rounded_up(p.columns, Layout::kColumns), seed,
        [&](int i, int j) { return p.product(i, j); },
        [&](int i, int j, float w) {
          if (i < p.rows && j < p.columns) r.out.data()[i * p.columns + j] = w;  // as TMA does
        });
    return r;
  };
  const Results r = run(0);
  Errors e;
  e.stays_inside = r.totals.is_whole();
  for (const unsigned seed : {1u, 2u, 3u}) {
    const Results again = run(seed);
    e.is_deterministic = e.is_deterministic && same_bits(r.out, again.out) && same_bits(r.totals, again.totals);
  }
  const int warps = Layout::kWarps;
  std::vector<double> truth[3] = {std::vector<double>(size_t(parts)), std::vector<double>(size_t(parts)),
                                  std::vector<double>(size_t(parts))};
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t j = 0; j < p.columns; j++) {
      const double w = p.weight(i, j), t = p.t(i, j);
      const double spreading = spread && p.product(i, j) != 0 ? t / p.product(i, j) : 1;
      const double out = w * enlarged * spreading;
      note(e.weights, r.out[i * p.columns + j], out, std::fmax(std::fabs(out), kLeastNormal));
      // A tile's warps take 16 rows each of every band.
      const int64_t warp = i % Layout::kRows % Layout::kBandRows / 16;
      const int64_t at = (i / Layout::kRows * tiles_n + j / Layout::kColumns) * warps + warp;
      truth[0][size_t(at)] += w;
      truth[1][size_t(at)] += w * t;
      truth[2][size_t(at)] += std::fabs(w * t);
    }
  for (int64_t k = 0; k < parts; k++) {
    e.stays_inside = e.stays_inside && !r.totals.is_untouched(k) && !r.totals.is_untouched(parts + k);
    note(e.totals, r.totals[k], truth[0][size_t(k)], truth[0][size_t(k)]);
    note(e.totals, r.totals[parts + k], truth[1][size_t(k)], truth[2][size_t(k)]);
  }
  return e;
}

Errors run_case(char** given) {
  const std::string sweeps = given[1], kind = given[5], dtype = given[6], shifts = given[9];
  std::mt19937 random(1);
  Pairs p;
  p.rows = std::atoll(given[2]), p.columns = std::atoll(given[3]), p.offset = std::atoll(given[4]);
  p.is_softmax = kind == "softmax";
  p.scale = std::atof(given[10]), p.bias = p.is_softmax ? 0 : -0.3 * p.scale;
  const bool has_factors = std::atoi(given[7]) != 0, is_half = dtype == "fp16";
  p.products = numbers(p.rows * p.columns, -1, 1, random);
  if (has_factors) {
    for (float& product : p.products) product *= 9;
    p.factor_x = numbers(p.rows, 0.2, 0.4, random), p.factor_y = numbers(p.columns, 0.2, 0.4, random);
  }
  if (std::atoi(given[8])) p.a = numbers(p.rows, 0.1, 1, random), p.b = numbers(p.columns, 0.1, 1, random);
  if (p.is_softmax) {
    const float m = std::ceil(float(p.scale * 1.4427 * (has_factors ? 1.44 : 1)));
    p.shift_x.assign(size_t(p.rows), m), p.shift_y.assign(size_t(p.columns), m);
    if (shifts == "two") {
      for (int64_t i = 0; i < p.rows; i++) p.shift_x[size_t(i)] += float(i % 5);
      for (int64_t j = 0; j < p.columns; j++) p.shift_y[size_t(j)] += float(j % 3);
    }
  }
  const auto run = [&](auto statistic, auto element) {
    using Kind = decltype(statistic);
    using Element = decltype(element);
    if (sweeps == "sweep") return sweep<Kind, Element, cuda::kSweepTile>(p);
    return weigh<Kind, Element, cuda::kWeighTile>(p, !is_half, is_half ? 8192.f : 1.f);
  };
  const auto with_kind = [&](auto element) {
    return p.is_softmax ? run(kinds::Softmax(), element) : run(kinds::Sigmoid(), element);
  };
  return is_half ? with_kind(cutlass::half_t()) : with_kind(cutlass::bfloat16_t());
}

}  // namespace emulated

int main(int count, char** given) {
  if (count != 11) return 2;
  const emulated::Errors e = emulated::run_case(given);
  std::printf(
      "{\"rows\": %.3g, \"columns\": %.3g, \"positives\": %.3g, \"weights\": %.3g, \"totals\": %.3g, "
      "\"stays_inside\": %s, \"is_deterministic\": %s}\n",
      e.rows, e.columns, e.positives, e.weights, e.totals, e.stays_inside ? "true" : "false",
      e.is_deterministic ? "true" : "false");
}
