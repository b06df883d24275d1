// Runs one case through every operator and compares the results with the truth.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "case.h"
#include "judge.h"
#include "kinds.h"
#include "library.h"

namespace driver {

namespace cuda = fastclip::cuda;
using cuda::Block;

inline fastclip::KindIndex kind_of(const std::string& name) {
  fastclip::KindIndex found{-1};
  fastclip::PORTABLE::Kinds::each_name([&](fastclip::KindIndex kind, const char* own) {
    if (name == own) found = kind;
  });
  return found;
}

inline Numbers numbers_of(const void* data, int64_t count, Dtype dtype) {
  Numbers numbers(static_cast<size_t>(count));
  for (int64_t q = 0; q < count; q++) numbers[q] = load(data, q, dtype);
  return numbers;
}

// One tower's gradient in device memory.
struct Gradient {
  Memory memory;
  int64_t count;
  Dtype dtype;
  Gradient(fastclip::Side& side, const Case& c, bool wanted, Dtype dtype) : count(side.rows * c.d), dtype(dtype) {
    side.gradient_dtype = dtype;
    if (!wanted) return;
    memory = Memory((c.lead + count) * size_of(dtype));
    side.gradient = data(c);
  }
  void* data(const Case& c) const { return memory.data() + c.lead * size_of(dtype); }
};

class Run {
 public:
  Run(const Case& c, Judge& judge)
      : c(c),
        judge(judge),
        scale(c.scale, c.scalar),
        bias(c.bias, c.scalar),
        target_scale(c.target_scale, c.scalar),
        truth(make()),
        taught(c.m, c.n, c.has_teacher() ? of_targets : Numbers(), target_scale.value),
        levels(truth.levels),
        states((2 * c.sets() + 3 * c.has_teacher()) * (c.m + c.n) * 8),
        positives(c.m * 8),
        kept(std::max<int64_t>(c.kept_rows * c.n, 1) * 4) {}

  // Everything that the engine wrote, for comparing runs bit by bit.
  Numbers results() {
    cuda::chunk_shape() = {c.chunk_rows ? c.chunk_rows : 5632, c.chunk_columns ? c.chunk_columns : 11264};
    sweep();
    if (!c.is_hinge()) finish();
    weigh();
    if (!c.is_softmax() && !c.is_hinge() && c.is_plain()) sweep_and_weigh();
    return written_;
  }

 private:
  Truth make() {
    Numbers numbers_x, numbers_y;
    invent(c, numbers_x, numbers_y);
    x = place(numbers_x, c.m, c, c.factor_x), y = place(numbers_y, c.n, c, c.factor_y);
    block.x = x.side, block.y = y.side, block.width = c.d, block.dtype = c.dtype, block.kind = kind_of(c.kind);
    block.scale = scale.scalar, block.offset = c.offset, block.tf32 = c.tf32;
    if (c.has_bias) block.bias = bias.scalar;
    if (c.target_width) make_targets();
    const Masks masks = invent_masks(c, c.guided ? of_targets : Truth::products(x.tower, y.tower, c.d));
    ids_x = Vector<int32_t, int32_t>(masks.ids_x), ids_y = Vector<int32_t, int32_t>(masks.ids_y);
    threshold_x = Vector<float, double>(masks.threshold_x), threshold_y = Vector<float, double>(masks.threshold_y);
    key_bias = Vector<double, double>(masks.key_bias);
    block.x.ids = ids_x.data, block.y.ids = ids_y.data, block.y.key_bias = key_bias.data;
    block.x.threshold = threshold_x.data, block.y.threshold = threshold_y.data;
    block.same_id_positive = c.same_id_positive;
    return Truth(x.tower, y.tower, c.d, c.kind, scale.value, c.has_bias ? bias.value : 0, c.offset, masks);
  }

  void make_targets() {
    const Case other = c.of_targets();
    Numbers numbers_x, numbers_y;
    invent(other, numbers_x, numbers_y);
    target_x = place(numbers_x, c.m, other, c.factor_y), target_y = place(numbers_y, c.n, other, c.factor_x);
    block.x.target = features_of(target_x.side), block.y.target = features_of(target_y.side);
    block.target_width = other.d, block.guided = c.guided;
    if (c.has_teacher()) block.target_scale = target_scale.scalar;
    of_targets = Truth::products(target_x.tower, target_y.tower, other.d);
  }

  int64_t lines() const { return c.m + c.n; }

  void set_states(Block& b) const {
    double* state = states.as<double>();
    for (const auto set : {&fastclip::Side::negatives, &fastclip::Side::positives}) {
      fastclip::Lines &of_x = b.x.*set, &of_y = b.y.*set;
      of_x.shift = state, of_y.shift = state + c.m;
      of_x.sum = state + lines(), of_y.sum = state + lines() + c.m;
      of_x.shifts = levels.data ? levels.data : of_x.shift;
      of_y.shifts = levels.data ? levels.data + c.m : of_y.shift;
      state += 2 * lines();
      if (!c.same_id_positive) break;
    }
    if (!c.has_teacher()) return;
    fastclip::Lines &of_x = b.x.teacher, &of_y = b.y.teacher;
    of_x.shift = state, of_x.sum = state + lines(), of_x.moment = state + 2 * lines();
    of_y.shift = of_x.shift + c.m, of_y.sum = of_x.sum + c.m, of_y.moment = of_x.moment + c.m;
    of_x.shifts = of_x.shift, of_y.shifts = of_y.shift;
  }

  void sweep() {
    Block b = block;
    set_states(b);
    std::fill_n(positives.as<double>(), c.m, kNan);
    const One bound(1.01 * truth.largest_product, Dtype::kFloat);
    const Vector<char, char> occupied(truth.occupied());
    cuda::Sweeping sweeping;
    if (c.has_bound) sweeping.bound = bound.scalar;
    if (!c.is_plain() && c.tells_occupied) sweeping.occupied = reinterpret_cast<const bool*>(occupied.data);
    sweeping.positive = positives.as<double>();
    if (c.kept_rows) sweeping.kept = kept.as<float>();
    sweeping.kept_rows = c.kept_rows;
    Library library(c.tf32);
    cuda::sweep(b, sweeping, library);
    judge.expect(c.kept_rows > 0 || library.products == (c.target_width ? 2 : 1) * chunks(),
                 "not one product for each chunk, and one of targets");
    compare_states("sweep");
    if (c.has_teacher()) compare_taught();
    if (c.kept_rows) note(numbers_of(kept.data(), c.kept_rows * c.n, Dtype::kFloat));
  }

  int chunks() const {
    const auto parts = [](int64_t count, int64_t of) { return of ? int((count + of - 1) / of) : 1; };
    return parts(c.m, c.chunk_rows) * parts(c.n, c.target_width ? c.chunk_columns / 2 : c.chunk_columns);
  }

  void compare_states(const std::string& what) {
    const Numbers all = note(numbers_of(states.data(), 2 * c.sets() * lines(), Dtype::kDouble));
    shifts.clear(), sums.clear();
    for (int64_t set = 0; set < c.sets(); set++) {
      const auto begin = all.begin() + 2 * set * lines();
      shifts.insert(shifts.end(), begin, begin + lines());
      sums.insert(sums.end(), begin + lines(), begin + 2 * lines());
    }
    Numbers found = sums, exact;
    for (const bool of_positives : {false, true}) {
      const Numbers of_set = truth.states(of_positives);
      if (!of_positives || c.same_id_positive) exact.insert(exact.end(), of_set.begin(), of_set.end());
    }
    if (c.is_hinge()) {
      const Numbers above = truth.above();
      judge.close(what + ": pairs above levels", shifts, above, 0);
      // The error of a pair's term is one of its logit.
      for (size_t l = 0; l < found.size(); l++) {
        const double size = std::max(exact[l] + above[l], 1e-30);
        found[l] /= size, exact[l] /= size;
      }
      return judge_states(what, found, exact, arithmetic(), 0);
    }
    if (c.is_softmax())
      for (size_t l = 0; l < found.size(); l++) found[l] = std::log2(sums[l]) + shifts[l];
    // Up to this reach one shift is enough, and running maxima would be needlessly slow. Thresholds are exempt, since
    // they may leave a line few pairs or none.
    const bool is_one = std::all_of(shifts.begin(), shifts.end(), [&](double m) { return m == shifts[0]; });
    const bool is_told = c.tells_occupied || c.is_plain();
    if (truth.reach <= (c.is_plain() ? 76 : 40) && std::isnan(c.margin) && is_told)
      judge.expect(is_one, what + ": more than one shift");
    judge_states(what, found, exact, c.is_softmax() ? arithmetic() : 1e-30, c.is_softmax() ? 1e-15 : arithmetic());
  }

  void compare_taught() {
    const Numbers found = note(numbers_of(taught_states(), 3 * lines(), Dtype::kDouble));
    const auto [sums, means] = taught.states(truth.t);
    Numbers found_sums, found_means;
    for (int64_t l = 0; l < lines(); l++) {
      found_sums.push_back(std::log2(found[lines() + l]) + found[l]);
      found_means.push_back(found[2 * lines() + l] / found[lines() + l]);
    }
    judge.close("sweep: state of the teacher, log2", found_sums, sums, taught_arithmetic());
    judge.close("sweep: expectation", found_means, means, 4 * taught_arithmetic() * truth.largest_product);
  }

  const double* taught_states() const { return states.as<double>() + 2 * c.sets() * lines(); }

  void judge_states(const std::string& what, const Numbers& found, const Numbers& exact, double allowed,
                    double relative) {
    judge.close(what + ": state, log2 of softmax's", found, exact, allowed, relative);
    const double terms = (8 + std::sqrt(double(c.d))) * roundoff(c.tf32 ? Dtype::kHalf : Dtype::kFloat);
    judge.close(what + ": positive", note(numbers_of(positives.data(), c.m, Dtype::kDouble)), truth.positives(),
                terms * truth.largest_product);
  }

  // Finishes the rows and, if column i shares its positive with row i, the columns, too.
  void finish() {
    const int64_t count = c.m == c.n && c.offset == 0 ? 2 * c.m : c.m;
    const Memory out(3 * count * 8);
    const double* const state = states.as<double>();
    double* const to = out.as<double>();
    cuda::finish({block.kind, count, c.m, state, state + lines(), positives.as<double>(), block.scale, block.bias, to,
                  to + count, to + 2 * count, nullptr});
    const Numbers found = note(numbers_of(out.data(), 3 * count, Dtype::kDouble)), exact = truth.states(false);
    Numbers losses, coefficients, weights;
    for (int64_t l = 0; l < count; l++) {
      const int64_t i = l % c.m;
      const double s = truth.has_own(i) ? truth.own_logit(i) : kNan;
      const double surplus = exact[l] / kLog2E - s;  // softmax: log(R / P)
      const bool is_softmax = c.is_softmax();
      losses.push_back(is_softmax ? softplus(surplus) : exact[l] + softplus(-s));
      // 1 / (R + P), relative to the line's shift
      coefficients.push_back(is_softmax ? std::exp2(shifts[l] - s * kLog2E) * sigmoid(-surplus) : 1);
      weights.push_back(is_softmax ? -sigmoid(surplus) : -sigmoid(-s));
    }
    const double error = 2 * arithmetic();
    const auto part = [&](int q) { return Numbers(found.begin() + q * count, found.begin() + (q + 1) * count); };
    judge.close("finish: loss", part(0), losses, 1e-30, error);
    judge.close("finish: coefficient", part(1), coefficients, 1e-30, error);
    judge.close("finish: weight", part(2), weights, 1e-30, error);
  }

  void weigh() {
    const int64_t numbers = (c.sets() + c.has_teacher()) * lines();
    const Memory coefficients(numbers * 8), weights(c.m * 8), totals(2 * 8), key_bias_sums(c.n * 8);
    std::mt19937_64 generator(7);
    std::normal_distribution<double> normal;
    // Arbitrary coefficients that bring each line's weights to order 1. Rows without a positive have a weight, too.
    Numbers all = sums;
    if (c.has_teacher()) all.insert(all.end(), taught_states() + lines(), taught_states() + 2 * lines());
    for (int64_t l = 0; l < numbers; l++)
      coefficients.as<double>()[l] = std::exp2(normal(generator) / 3) / (all[l] > 1e-30 ? all[l] : 1);
    for (int64_t i = 0; i < c.m; i++) weights.as<double>()[i] = -sigmoid(normal(generator));
    const One gain(-0.7, Dtype::kDouble);

    Block b = block;
    set_states(b);
    const double* coefficient = coefficients.as<double>();
    for (const auto set : {&fastclip::Side::negatives, &fastclip::Side::positives}) {
      fastclip::Lines &of_x = b.x.*set, &of_y = b.y.*set;
      of_x.sum = of_y.sum = of_x.shift = of_y.shift = nullptr;
      of_x.coefficients = coefficient, of_y.coefficients = coefficient + c.m;
      coefficient += lines();
      if (!c.same_id_positive) break;
    }
    b.x.teacher.coefficients = coefficient, b.y.teacher.coefficients = coefficient + c.m;
    if (c.needs_key_bias) b.y.key_bias_sum = key_bias_sums.as<double>();
    const Gradient dx(b.x, c, c.needs_x, c.gradient_x), dy(b.y, c, c.needs_y, c.gradient_y);
    Library library(c.tf32);
    cuda::weigh(b,
                {positives.as<double>(), weights.as<double>(), gain.scalar, c.kept_rows ? kept.as<float>() : nullptr,
                 c.kept_rows, c.project, totals.as<double>()},
                library);
    Numbers w = truth.weights(shifts, numbers_of(coefficients.data(), numbers, Dtype::kDouble));
    if (c.has_teacher()) taught.add_weights(taught_states(), coefficients.as<double>() + c.sets() * lines(), w);
    compare_gradients("weigh", w, numbers_of(weights.data(), c.m, Dtype::kDouble), gain.value, dx, dy, totals,
                      c.needs_key_bias ? numbers_of(key_bias_sums.data(), c.n, Dtype::kDouble) : Numbers());
  }

  void sweep_and_weigh() {
    Block b = block;
    set_states(b);
    std::memset(states.data(), kUnwritten, size_t(2 * lines() * 8));
    std::fill_n(positives.as<double>(), c.m, kNan);
    const One gain(0.3, Dtype::kFloat);
    const Memory totals(2 * 8);
    const Gradient dx(b.x, c, c.needs_x, Dtype::kFloat), dy(b.y, c, c.needs_y, Dtype::kFloat);
    cuda::Weighing weighing;
    weighing.gain = gain.scalar, weighing.project = c.project, weighing.totals = totals.as<double>();
    Library library(c.tf32);
    cuda::sweep_and_weigh(b, positives.as<double>(), weighing, library);
    compare_states("sweep_and_weigh");
    Numbers weights(size_t(c.m), 0.);
    for (int64_t i = 0; i < c.m; i++)
      if (truth.has_own(i)) weights[i] = -sigmoid(-truth.own_logit(i));
    const Numbers halves(size_t(lines()), 0.5);
    compare_gradients("sweep_and_weigh", truth.weights(shifts, halves), weights, gain.value, dx, dy, totals, {});
  }

  void compare_gradients(const std::string& what, const Numbers& w, const Numbers& positive_weights, double gain,
                         const Gradient& dx, const Gradient& dy, const Memory& totals, const Numbers& key_bias) {
    const auto is_half = [&](const Gradient& g) { return c.dtype == Dtype::kHalf || g.dtype == Dtype::kHalf; };
    const Gradients exact = truth.gradients(w, positive_weights, gain, c.project, is_half(dx), is_half(dy));
    // Only the products that make dx and dy may use weights of less than fp32.
    const double narrow = c.tf32 ? roundoff(Dtype::kHalf) : c.dtype == Dtype::kFloat ? 0 : roundoff(c.dtype);
    const auto compare = [&](const std::string& name, const Gradient& found, bool wanted, const Numbers& truth,
                             double condition) {
      if (!wanted) return;
      const double allowed = condition * (arithmetic() + narrow) + roundoff(found.dtype);
      judge.close_in_norm(what + ": " + name, note(numbers_of(found.data(c), found.count, found.dtype)), truth,
                          allowed);
    };
    compare("dx", dx, c.needs_x, exact.x, exact.condition_x);
    compare("dy", dy, c.needs_y, exact.y, exact.condition_y);
    judge.close_in_norm(what + ": totals", note(numbers_of(totals.data(), 2, Dtype::kDouble)),
                        {exact.totals[0], exact.totals[1]},
                        exact.condition_totals * arithmetic() + roundoff(Dtype::kFloat));
    if (!key_bias.empty())
      judge.close_in_norm(what + ": key bias", note(key_bias), exact.key_bias,
                          exact.condition_key_bias * arithmetic() + roundoff(Dtype::kFloat));
  }

  // The error allowed in one exponential.
  double arithmetic(double largest_logit) const {
    return 8 * roundoff(c.tf32 ? Dtype::kHalf : Dtype::kFloat) * (1 + largest_logit);
  }
  double arithmetic() const { return arithmetic(std::max(truth.largest_logit, taught.largest_logit)); }
  double taught_arithmetic() const { return arithmetic(taught.largest_logit); }

  const Numbers& note(const Numbers& numbers) {
    written_.insert(written_.end(), numbers.begin(), numbers.end());
    noted_ = numbers;
    return noted_;
  }

  const Case& c;
  Judge& judge;
  const One scale, bias, target_scale;
  Features x, y, target_x, target_y;
  Numbers of_targets;  // their products
  Vector<int32_t, int32_t> ids_x, ids_y;
  Vector<float, double> threshold_x, threshold_y;
  Vector<double, double> key_bias;
  Block block;
  const Truth truth;
  const Taught taught;
  const Vector<double, double> levels;
  const Memory states, positives, kept;
  Numbers shifts, sums, written_, noted_;  // of both sets
};

}  // namespace driver
