// The engine on CUDA: products of chunks by a library, everything else of them by our kernels.
//
// A product is written by the library and read by one kernel, which folds it (epilogue_cuda.h), or turns it into
// weights, which two more products of the library take. Partial sums become states in finalise_cuda.h; maxima_cuda.h
// makes them anew where one reference was not enough; complete_cuda.h turns products of weights into gradients.
#include "first_sweep_cuda.h"
#include "second_sweep_cuda.h"

namespace fastclip {
namespace cuda {

ChunkShape& chunk_shape() {
  static ChunkShape shape = {5632, 11264};
  return shape;
}

void sweep(const Block& block, Scalar bound, double* positive, float* kept, int64_t kept_rows, Library& library) {
  Work w(block, library);
  const std::vector<Chunk> chunks = chunks_of(w.m(), w.n(), kept_rows);
  FirstSweep first(w, chunks, positive);
  if (needs_state(block.loss)) first.set_reference(bound);
  float* const buffer = allocate<float>(library, w.products_size(chunks));
  for (const Chunk& c : chunks) first.fold(c, kept, buffer);
  if (needs_state(block.loss)) first.sweep_maxima();
}

void finish(const Lines& lines) {
  CUDA::for_loss(lines.loss, [&](auto loss) {
    launch({"finish_kernel", lines.count, lines.period, 1, lines.stream}, finish_kernel<decltype(loss)>,
           cdiv(lines.count, kThreads), lines);
  });
}

void weigh(const Block& block, const Weighing& weighing, Library& library) {
  Work w(block, library);
  SecondSweep second(w, weighing, false);
  second.run(nullptr);
  if (second.wants_y()) second.complete_columns();
  second.complete_totals();
}

void sweep_and_weigh(const Block& block, double* positive, const Weighing& weighing, Library& library) {
  if (needs_state(block.loss))
    throw std::invalid_argument("only a loss whose weights need no state can be swept and weighed in one go");
  Work w(block, library);
  w.b.fused = false;  // no fused kernel folds and weighs; each of the two would make the products once more
  FirstSweep first(w, chunks_of(w.m(), w.n(), 0), positive);
  SecondSweep second(w, weighing, true);
  second.run(&first);
  // Only now the positives, whose weights the gradients wait for, are known.
  double* const lines = allocate<double>(library, 3 * w.m());
  finish({block.loss, w.m(), w.m(), block.x.reference, block.x.sum, positive, block.scale, block.bias, lines,
          lines + w.m(), lines + 2 * w.m(), block.stream});
  second.set_positives(positive, lines + 2 * w.m());
  if (second.wants_x()) second.complete_rows(static_cast<const float*>(block.x.gradient), 0, w.m());
  if (second.wants_y()) second.complete_columns();
  second.complete_totals();
}

bool has_fused() { return FASTCLIP_FUSED; }

bool needs_state(Loss loss) {
  bool value = false;
  CUDA::for_loss(loss, [&](auto loss) { value = loss.kNeedsState; });
  return value;
}

bool uses_bias(Loss loss) {
  bool value = false;
  CUDA::for_loss(loss, [&](auto loss) { value = loss.kUsesBias; });
  return value;
}

}  // namespace cuda
}  // namespace fastclip
