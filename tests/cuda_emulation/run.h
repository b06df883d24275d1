// One case through every operator, each of its results compared with the truth.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "case.h"
#include "judge.h"
#include "library.h"

namespace driver {

namespace cuda = fastclip::cuda;
using cuda::Block;

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
        truth(make()),
        states(2 * (c.m + c.n) * 8),
        positives(c.m * 8),
        kept(std::max<int64_t>(c.kept_rows * c.n, 1) * 4) {}

  // Everything that the engine wrote, for comparing runs bit by bit.
  Numbers results() {
    cuda::chunk_shape() = {c.chunk_rows ? c.chunk_rows : 5632, c.chunk_columns ? c.chunk_columns : 11264};
    sweep();
    finish();
    weigh();
    if (c.loss == Loss::kSigmoid) sweep_and_weigh();
    return written_;
  }

 private:
  Truth make() {
    Numbers numbers_x, numbers_y;
    invent(c, numbers_x, numbers_y);
    x = place(numbers_x, c.m, c, c.factor_x), y = place(numbers_y, c.n, c, c.factor_y);
    block.x = x.side, block.y = y.side, block.width = c.d, block.dtype = c.dtype, block.loss = c.loss;
    block.scale = scale.scalar, block.offset = c.offset, block.tf32 = c.tf32;
    if (c.has_bias) block.bias = bias.scalar;
    return Truth(x.tower, y.tower, c.d, c.loss, scale.value, c.has_bias ? bias.value : 0, c.offset);
  }

  void set_states(Block& b) const {
    double* const state = states.as<double>();
    b.x.reference = state, b.y.reference = state + c.m;
    b.x.sum = state + c.m + c.n, b.y.sum = state + c.m + c.n + c.m;
  }

  void sweep() {
    Block b = block;
    set_states(b);
    std::fill_n(positives.as<double>(), c.m, kNan);
    const One bound(1.01 * truth.largest_product, Dtype::kFloat);
    Library library(c.tf32);
    cuda::sweep(b, c.has_bound ? bound.scalar : Scalar(), positives.as<double>(),
                c.kept_rows ? kept.as<float>() : nullptr, c.kept_rows, library);
    compare_states("sweep");
    if (c.kept_rows) note(numbers_of(kept.data(), c.kept_rows * c.n, Dtype::kFloat));
  }

  void compare_states(const std::string& what) {
    const int64_t lines = c.m + c.n;
    const Numbers all = note(numbers_of(states.data(), 2 * lines, Dtype::kDouble));
    references.assign(all.begin(), all.begin() + lines);
    const Numbers sums(all.begin() + lines, all.end());
    Numbers found = sums;
    if (c.loss == Loss::kSoftmax)
      for (int64_t l = 0; l < lines; l++) found[l] = std::log2(sums[l]) + references[l];
    // Up to here one reference is always enough; whoever takes running maxima all the same is slow.
    const bool is_one = std::all_of(references.begin(), references.end(), [&](double m) { return m == references[0]; });
    if (truth.largest_logit <= 76) judge.expect(is_one, what + ": more than one reference");
    const Numbers exact = truth.states();
    if (c.loss == Loss::kSoftmax)
      judge.close(what + ": log2 of the state", found, exact, arithmetic(), 1e-15);
    else
      judge.close(what + ": state", found, exact, 1e-30, arithmetic());
    const double terms = (8 + std::sqrt(double(c.d))) * roundoff(c.tf32 ? Dtype::kHalf : Dtype::kFloat);
    judge.close(what + ": positive", note(numbers_of(positives.data(), c.m, Dtype::kDouble)), truth.positives(),
                terms * truth.largest_product);
  }

  // Of the rows, and of the columns, too, where each of them shares its positive with the row of its number.
  void finish() {
    const int64_t count = c.m == c.n && c.offset == 0 ? 2 * c.m : c.m;
    const Memory out(3 * count * 8);
    const double* const state = states.as<double>();
    double* const to = out.as<double>();
    cuda::finish({c.loss, count, c.m, state, state + c.m + c.n, positives.as<double>(), block.scale, block.bias, to,
                  to + count, to + 2 * count, nullptr});
    const Numbers found = note(numbers_of(out.data(), 3 * count, Dtype::kDouble)), lines = truth.states();
    Numbers losses, coefficients, weights;
    for (int64_t l = 0; l < count; l++) {
      const int64_t i = l % c.m;
      const double s = truth.has_positive(i) ? truth.logit(i, i + c.offset) : kNan;
      const double surplus = lines[l] / kLog2E - s;  // softmax: log(R / P)
      const bool is_softmax = c.loss == Loss::kSoftmax;
      losses.push_back(is_softmax ? softplus(surplus) : lines[l] + softplus(-s));
      // 1 / (R + P), relative to the line's reference
      coefficients.push_back(is_softmax ? std::exp2(references[l] - s * kLog2E) * sigmoid(-surplus) : 1);
      weights.push_back(is_softmax ? -sigmoid(surplus) : -sigmoid(-s));
    }
    const double error = 2 * arithmetic();
    const auto part = [&](int q) { return Numbers(found.begin() + q * count, found.begin() + (q + 1) * count); };
    judge.close("finish: loss", part(0), losses, 1e-30, error);
    judge.close("finish: coefficient", part(1), coefficients, 1e-30, error);
    judge.close("finish: weight", part(2), weights, 1e-30, error);
  }

  void weigh() {
    const Numbers sums = numbers_of(states.as<double>() + c.m + c.n, c.m + c.n, Dtype::kDouble);
    const Memory coefficients((c.m + c.n) * 8), weights(c.m * 8), totals(2 * 8);
    std::mt19937_64 generator(7);
    std::normal_distribution<double> normal;
    // Any numbers will do that bring each line's weights to order 1. Rows without a positive have a weight, too.
    for (int64_t l = 0; l < c.m + c.n; l++)
      coefficients.as<double>()[l] = std::exp2(normal(generator) / 3) / (sums[l] > 0 ? sums[l] : 1);
    for (int64_t i = 0; i < c.m; i++) weights.as<double>()[i] = -sigmoid(normal(generator));
    const One gain(-0.7, Dtype::kDouble);

    Block b = block;
    set_states(b);
    b.x.sum = b.y.sum = nullptr;
    b.x.coefficients = coefficients.as<double>(), b.y.coefficients = coefficients.as<double>() + c.m;
    const Gradient dx(b.x, c, c.needs_x, c.gradient_x), dy(b.y, c, c.needs_y, c.gradient_y);
    Library library(c.tf32);
    cuda::weigh(b,
                {positives.as<double>(), weights.as<double>(), gain.scalar, c.kept_rows ? kept.as<float>() : nullptr,
                 c.kept_rows, c.project, totals.as<double>()},
                library);
    const Numbers w = truth.weights(references, numbers_of(coefficients.data(), c.m + c.n, Dtype::kDouble));
    compare_gradients("weigh", w, numbers_of(weights.data(), c.m, Dtype::kDouble), gain.value, dx, dy, totals);
  }

  void sweep_and_weigh() {
    Block b = block;
    set_states(b);
    std::memset(states.data(), kUnwritten, size_t(2 * (c.m + c.n) * 8));
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
      if (truth.has_positive(i)) weights[i] = -sigmoid(-truth.logit(i, i + c.offset));
    const Numbers halves(size_t(c.m + c.n), 0.5);
    compare_gradients("sweep_and_weigh", truth.weights(references, halves), weights, gain.value, dx, dy, totals);
  }

  void compare_gradients(const std::string& what, const Numbers& w, const Numbers& positive_weights, double gain,
                         const Gradient& dx, const Gradient& dy, const Memory& totals) {
    const auto is_half = [&](const Gradient& g) { return c.dtype == Dtype::kHalf || g.dtype == Dtype::kHalf; };
    const Gradients exact = truth.gradients(w, positive_weights, gain, c.project, is_half(dx), is_half(dy));
    // Only the products that make dx and dy may take weights in less than fp32.
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
  }

  // The error of one careful exponential.
  double arithmetic() const { return 8 * roundoff(c.tf32 ? Dtype::kHalf : Dtype::kFloat) * (1 + truth.largest_logit); }

  const Numbers& note(const Numbers& numbers) {
    written_.insert(written_.end(), numbers.begin(), numbers.end());
    noted_ = numbers;
    return noted_;
  }

  const Case& c;
  Judge& judge;
  const One scale, bias;
  Features x, y;
  Block block;
  const Truth truth;
  const Memory states, positives, kept;
  Numbers references, written_, noted_;
};

}  // namespace driver
