// The CUDA engine: a library makes the matrix products of chunks, and the engine's kernels do the rest.
//
// One kernel (epilogue.h) reads the products of a chunk, and either folds them into partial sums or turns them into
// weights; two more products multiply the weights with the features. finalise.h adds partial sums up to states,
// maxima.h computes the states again if one shift was not enough, and complete.h turns the last products into
// gradients. With targets a chunk has their products, too, and teacher.h folds a teacher's weights.
#include "first_sweep.h"
#include "second_sweep.h"

namespace fastclip {
namespace cuda {

ChunkShape& chunk_shape() {
  static ChunkShape shape = {5632, 11264};
  return shape;
}

void sweep(const Block& block, const Sweeping& sweeping, Library& library) {
  Work w(block, library);
  const std::vector<Chunk> chunks = chunks_of(w.m(), w.n(), sweeping.kept_rows, w.b.has_targets());
  FirstSweep first(w, chunks, sweeping);
  if (CUDA::has_shift(block.kind)) first.set_shift();
  float* const buffer = allocate<float>(library, w.products_size(chunks));
  for (const Chunk& c : chunks) first.fold(c, buffer);
  if (CUDA::has_shift(block.kind)) first.sweep_maxima();
}

void finish(const Finishing& lines) {
  CUDA::for_kind(lines.kind, [&](auto statistic) {
    launch({"finish_kernel", lines.count, lines.period, 1, lines.stream}, finish_kernel<decltype(statistic)>,
           cdiv(lines.count, kThreads), lines);
  });
}

void weigh(const Block& block, const Weighing& weighing, Library& library) {
  Work w(block, library);
  SecondSweep second(w, weighing, false);
  second.run(nullptr);
  if (second.wants_y()) second.complete_columns();
  if (second.wants_key_bias()) second.complete_key_bias();
  second.complete_totals();
}

void sweep_and_weigh(const Block& block, double* positive, const Weighing& weighing, Library& library) {
  if (!CUDA::is_linear(block.kind))
    throw std::invalid_argument("kind must have weights that need no state, to be swept and weighed in one go");
  if (!block.is_plain())
    throw std::invalid_argument(
        "a block that is swept and weighed in one go must have no ids, thresholds, key_bias or targets");
  Work w(block, library);
  w.b.fused = false;  // no fused kernel both folds and weighs; two fused kernels would compute the products twice
  Sweeping sweeping;
  sweeping.positive = positive;
  FirstSweep first(w, chunks_of(w.m(), w.n(), 0, false), sweeping);
  SecondSweep second(w, weighing, true);
  second.run(&first);
  // The gradients need the weights of the positives, which are known only now.
  double* const lines = allocate<double>(library, 3 * w.m());
  finish({block.kind, w.m(), w.m(), block.x.negatives.shift, block.x.negatives.sum, positive, block.scale, block.bias,
          lines, lines + w.m(), lines + 2 * w.m(), block.stream});
  second.set_positives(positive, lines + 2 * w.m());
  if (second.wants_x()) second.complete_rows(static_cast<const float*>(block.x.gradient), 0, w.m());
  if (second.wants_y()) second.complete_columns();
  second.complete_totals();
}

bool has_fused() { return FASTCLIP_FUSED; }

}  // namespace cuda
}  // namespace fastclip
