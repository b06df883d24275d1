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
    b.tf32 = b.tf32 && b.dtype == Dtype::kFloat;
    for (Side* const side : {&b.x, &b.y}) {
      if (b.tf32) round(side->features, side->stride, side->rows, b.width);
      if (b.tf32 && b.has_targets()) round(side->target.data, side->target.stride, side->rows, b.target_width);
    }
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

  static Features targets_of(const Side& side) {
    return {side.target.data, side.rows, side.target.stride, static_cast<const float*>(side.target.factor)};
  }

  ChunkView view_of(const Chunk& c) const {
    ChunkView view;
    view.x = advance(b.x.features, c.row * b.x.stride, b.dtype);
    view.y = advance(b.y.features, c.column * b.y.stride, b.dtype);
    view.rows = c.rows, view.columns = c.columns, view.width = b.width;
    view.stride_x = b.x.stride, view.stride_y = b.y.stride;
    view.dtype = b.dtype, view.kind = b.kind;
    view.factor_x = from(b.x.factor, c.row), view.factor_y = from(b.y.factor, c.column);
    view.scale = b.scale, view.bias = b.bias, view.stream = b.stream;
    view.offset = std::max(-c.rows, std::min(b.offset + c.row - c.column, c.columns));
    return view;
  }

  Chunk whole() const { return {0, m(), 0, n(), false}; }

  // Calls f with the chunk's options (pairs.h), as one of the types that kernels are compiled for. The sweeps set the
  // memory for sums and weights of positives by id. A teacher's weights are no part of them.
  template <class Function>
  void with_options(const Chunk& c, Function f) const {
    if (b.guided) {
      Guided options;
      set_options(options, c);
      options.targets = targets_of(c);
      options.target_x = targets_of(b.x), options.target_y = targets_of(b.y), options.target_width = b.target_width;
      return f(options);
    }
    if (b.has_no_options()) return f(Plain());
    if (!b.x.threshold && !b.y.key_bias && !b.y.key_bias_sum && !b.same_id_positive) {
      Ids options;
      options.x = from(b.x.ids, c.row), options.y = from(b.y.ids, c.column);
      return f(options);
    }
    All options;
    set_options(options, c);
    f(options);
  }

  void set_options(All& options, const Chunk& c) const {
    options.ids_x = from(b.x.ids, c.row), options.ids_y = from(b.y.ids, c.column);
    options.threshold_x = from(b.x.threshold, c.row), options.threshold_y = from(b.y.threshold, c.column);
    if (biases_) options.biases = biases_ + c.column;
    options.same_id_positive = b.same_id_positive;
  }

  // The largest finite bias of each group of kThreads columns, in log2 units.
  const float* largest_biases() const { return largest_biases_; }
  int64_t count_largest_biases() const { return b.y.key_bias ? cdiv(n(), kThreads) : 0; }

  // True if a fused kernel makes and folds the products of a chunk, which are then never in memory.
  bool folds_fused(const Chunk& c) const { return b.fused && !c.kept && fused_serves(view_of(c)); }

  // Rows first .. first + rows - 1 of a tower, as an operand of products.
  Matrix operand(const Side& side, int64_t first, int64_t rows) const {
    return operand(features_of(side), b.width, first, rows);
  }

  // Computes the products x y^T of a chunk, into the memory of the kept products or into the buffer. If they are kept
  // and `ready`, they are not computed again. Returns where they are.
  Products products(const Chunk& c, float* kept, float* buffer, bool ready) {
    Products products{buffer, stride_of(c.columns), true};
    if (c.kept) products = {kept + c.row * n() + c.column, n(), n() % 4 == 0 && is_multiple(kept + c.column, 16)};
    if (!(c.kept && ready)) multiply(features_of(b.x), features_of(b.y), b.width, c, products);
    return products;
  }

  // Allocates memory for the products of one chunk's targets, if there are any.
  void allocate_targets(const std::vector<Chunk>& chunks) {
    int64_t size = 0;
    for (const Chunk& c : chunks) size = std::max(size, c.rows * stride_of(c.columns));
    if (b.has_targets()) target_products_ = allocate<float>(library_, size);
  }

  // Computes the products of a chunk's targets, if there are any, in the place of those of the chunk before.
  void multiply_targets(const Chunk& c) {
    if (b.has_targets()) multiply(targets_of(b.x), targets_of(b.y), b.target_width, c, targets_of(c).products);
  }

  TargetProducts targets_of(const Chunk& c) const {
    return {{target_products_, stride_of(c.columns), true},
            from(b.x.target.factor, c.row),
            from(b.y.target.factor, c.column)};
  }

  // The number of elements of the largest chunk's products, among those that go to the buffer.
  int64_t products_size(const std::vector<Chunk>& chunks) const {
    int64_t size = 0;
    for (const Chunk& c : chunks)
      if (!c.kept && !folds_fused(c)) size = std::max(size, c.rows * stride_of(c.columns));
    return size;
  }

  // Returns a contiguous copy of the features, times the factor if there is one, of their dtype.
  const void* copy_of(const Features& features, int64_t width, bool to_tf32) {
    void* const copy = library_.allocate(features.rows * width * size_of(b.dtype));
    for_features(b.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch(place("copy_kernel"), copy_kernel<T>, cdiv(features.rows, kWarps), features, width, to_tf32,
             static_cast<T*>(copy));
    });
    return copy;
  }

  Block b;

 private:
  // A line's number and those after it, or null if the lines have none.
  static const float* from(const void* numbers, int64_t first) {
    return numbers ? static_cast<const float*>(numbers) + first : nullptr;
  }
  static const int32_t* from(const int32_t* ids, int64_t first) { return ids ? ids + first : nullptr; }

  Matrix operand(const Features& f, int64_t width, int64_t first, int64_t rows) const {
    return {const_cast<void*>(advance(f.data, first * f.stride, b.dtype)), rows, width, f.stride, 1, b.dtype};
  }

  void multiply(const Features& x, const Features& y, int64_t width, const Chunk& c, const Products& out) {
    Matrix columns = operand(y, width, c.column, c.columns);
    std::swap(columns.rows, columns.columns), std::swap(columns.row_stride, columns.column_stride);
    library_.multiply(operand(x, width, c.row, c.rows), columns,
                      {const_cast<float*>(out.data), c.rows, c.columns, out.stride, 1, Dtype::kFloat}, false);
  }

  // Replaces features by a copy that is rounded to tf32.
  void round(const void*& features, int64_t& stride, int64_t rows, int64_t width) {
    features = copy_of({features, rows, stride, nullptr}, width, true), stride = width;
  }

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
  float *largest_biases_ = nullptr, *target_products_ = nullptr;
};

template <class Kind, bool kFold, bool kWeigh, class Out, class Options>
void launch_epilogue(const Work& w, const ChunkView& view, const Products& products, const Folding& folding,
                     const PairWeights& weights, const Options& options) {
  launch(w.place("epilogue_kernel"), epilogue_kernel<Kind, Options, kFold, kWeigh, Out>, epilogue_blocks(view), view,
         products, folding, weights, options);
}

}  // namespace cuda
}  // namespace fastclip
