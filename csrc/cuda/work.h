// A block on the host: its features in the form that products take, its chunks, and the products of a chunk.
#pragma once

#include "chunks.h"
#include "copies.h"
#include "epilogue.h"
#include "sm90/api.h"

// 1 if the fused kernels, which need CUTLASS, are compiled and linked.
#ifndef FASTCLIP_FUSED
#define FASTCLIP_FUSED 0
#endif

namespace fastclip {
namespace cuda {

// A block whose features are in the form that its products take.
class Work {
 public:
  Work(const Block& block, Library& library) : b(block), library_(library) {
    for (Side* const side : {&b.x, &b.y})
      if (b.tf32 && b.dtype == Dtype::kFloat) replace(*side, copy_of(*side, nullptr, true));
    b.tf32 = b.tf32 && b.dtype == Dtype::kFloat;
    b.offset = std::max(-m(), std::min(b.offset, n()));
    // The fused kernels serve plain blocks of kinds without levels.
    b.fused = b.fused && has_fused() && b.is_plain() && !CUDA::has_levels(b.kind) && is_sm_90();
    if (b.y.key_bias) make_biases();
  }

  int64_t m() const { return b.x.rows; }
  int64_t n() const { return b.y.rows; }
  Library& library() { return library_; }
  LaunchLabel place(const char* kernel) const { return {kernel, m(), n(), b.width, b.stream}; }

  static Features features_of(const Side& side) {
    return {side.features, side.rows, side.stride, static_cast<const float*>(side.factor)};
  }

  ChunkView view_of(const Chunk& c) const {
    const auto at = [](const void* factor, int64_t first) {
      return factor ? static_cast<const float*>(factor) + first : nullptr;
    };
    ChunkView view;
    view.x = advance(b.x.features, c.row * b.x.stride, b.dtype);
    view.y = advance(b.y.features, c.column * b.y.stride, b.dtype);
    view.rows = c.rows, view.columns = c.columns, view.width = b.width;
    view.stride_x = b.x.stride, view.stride_y = b.y.stride;
    view.dtype = b.dtype, view.kind = b.kind;
    view.factor_x = at(b.x.factor, c.row), view.factor_y = at(b.y.factor, c.column);
    view.scale = b.scale, view.bias = b.bias, view.stream = b.stream;
    view.offset = std::max(-c.rows, std::min(b.offset + c.row - c.column, c.columns));
    return view;
  }

  Chunk whole() const { return {0, m(), 0, n(), false}; }

  // Calls f with the chunk's options (pairs.h), as one of the types that kernels are compiled for. The sweeps set the
  // memory for sums and weights of positives by id.
  template <class Function>
  void with_options(const Chunk& c, Function f) const {
    const auto ids = [&](const Side& side, int64_t first) { return side.ids ? side.ids + first : nullptr; };
    const auto threshold = [&](const Side& side, int64_t first) {
      return side.threshold ? static_cast<const float*>(side.threshold) + first : nullptr;
    };
    if (b.is_plain()) return f(Plain());
    if (!b.x.threshold && !b.y.key_bias && !b.y.key_bias_sum && !b.same_id_positive) {
      Ids options;
      options.x = ids(b.x, c.row), options.y = ids(b.y, c.column);
      return f(options);
    }
    All options;
    options.ids_x = ids(b.x, c.row), options.ids_y = ids(b.y, c.column);
    options.threshold_x = threshold(b.x, c.row), options.threshold_y = threshold(b.y, c.column);
    if (biases_) options.biases = biases_ + c.column;
    options.same_id_positive = b.same_id_positive;
    f(options);
  }

  // The largest finite bias of each group of kThreads columns, in log2 units.
  const float* largest_biases() const { return largest_biases_; }
  int64_t count_largest_biases() const { return b.y.key_bias ? cdiv(n(), kThreads) : 0; }

  // True if a fused kernel makes and folds the products of a chunk, which are then never in memory.
  bool folds_fused(const Chunk& c) const { return b.fused && !c.kept && fused_serves(view_of(c)); }

  // Rows first .. first + rows - 1 of a tower, as an operand of products.
  Matrix operand(const Side& side, int64_t first, int64_t rows) const {
    void* const data = const_cast<void*>(advance(side.features, first * side.stride, b.dtype));
    return {data, rows, b.width, side.stride, 1, b.dtype};
  }

  // Computes the products x y^T of a chunk, into the memory of the kept products or into the buffer. If they are kept
  // and `ready`, they are not computed again. Returns where they are.
  Products products(const Chunk& c, float* kept, float* buffer, bool ready) {
    Products products{buffer, stride_of(c.columns), true};
    if (c.kept) products = {kept + c.row * n() + c.column, n(), n() % 4 == 0 && is_multiple(kept + c.column, 16)};
    if (!(c.kept && ready)) {
      Matrix y = operand(b.y, c.column, c.columns);
      std::swap(y.rows, y.columns), std::swap(y.row_stride, y.column_stride);
      float* const out = const_cast<float*>(products.data);
      library_.multiply(operand(b.x, c.row, c.rows), y, {out, c.rows, c.columns, products.stride, 1, Dtype::kFloat},
                        false);
    }
    return products;
  }

  // The number of elements of the largest chunk's products, among those that go to the buffer.
  int64_t products_size(const std::vector<Chunk>& chunks) const {
    int64_t size = 0;
    for (const Chunk& c : chunks)
      if (!c.kept && !folds_fused(c)) size = std::max(size, c.rows * stride_of(c.columns));
    return size;
  }

  // Returns a contiguous copy of the features, times the factor if there is one, of their dtype.
  const void* copy_of(const Side& side, const void* factor, bool to_tf32) {
    void* const copy = library_.allocate(side.rows * b.width * size_of(b.dtype));
    Features from = features_of(side);
    from.factor = static_cast<const float*>(factor);
    for_features(b.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch(place("copy_kernel"), copy_kernel<T>, cdiv(side.rows, kWarps), from, b.width, to_tf32,
             static_cast<T*>(copy));
    });
    return copy;
  }

  void replace(Side& side, const void* copy) const { side.features = copy, side.stride = b.width; }

  Block b;

 private:
  bool is_sm_90() const {
    int device = 0, major = 0, minor = 0;
    const LaunchLabel here = place("cudaDeviceGetAttribute");
    check(cudaGetDevice(&device), here);
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), here);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), here);
    return major == 9 && minor == 0;
  }

  void make_biases() {
    biases_ = allocate<LineBias<float>>(library_, n());
    largest_biases_ = allocate<float>(library_, count_largest_biases());
    CUDA::for_kind(b.kind, [&](auto statistic) {
      launch(place("biases_kernel"), biases_kernel<decltype(statistic)>, cdiv(n(), kThreads), b.y.key_bias, n(), b.bias,
             biases_, largest_biases_);
    });
  }

  Library& library_;
  LineBias<float>* biases_ = nullptr;
  float* largest_biases_ = nullptr;
};

template <class Kind, bool kFold, bool kWeigh, class Out, class Options>
void launch_epilogue(const Work& w, const ChunkView& view, const Products& products, const Folding& folding,
                     const PairWeights& weights, const Options& options) {
  launch(w.place("epilogue_kernel"), epilogue_kernel<Kind, Options, kFold, kWeigh, Out>, epilogue_blocks(view), view,
         products, folding, weights, options);
}

}  // namespace cuda
}  // namespace fastclip
