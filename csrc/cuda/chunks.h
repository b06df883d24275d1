// The chunks that a block is cut into. The products of one chunk exist at a time, in fp32. Besides these and one chunk
// of weights, memory holds states and gradients, O((M + N) D).
//
// Each chunk of C x W pairs makes the gradients' products read and write C rows of dx and W rows of dy once more:
// 8 (C + W) D bytes for 4 C W D FLOPs. 5,632 x 11,264 are 44 x 88 tiles of 128: at D = 768 and with tiles of 128 x 256,
// the product for dx is one full wave on 132 multiprocessors, and that for dy is two.
#pragma once

#include <algorithm>
#include <vector>

#include "device.h"

namespace fastclip {
namespace cuda {

// Row strides of products and of weights are multiples of this many elements, so that each row begins on 32 bytes.
constexpr int64_t kStrideUnit = 16;

struct Chunk {
  int64_t row, rows, column, columns;
  bool kept;  // its products lie in the memory of the kept ones
};

// With targets a chunk has two products: it gets half the columns, so that they take no more memory.
inline std::vector<Chunk> chunks_of(int64_t m, int64_t n, int64_t kept_rows, bool has_targets) {
  ChunkShape shape = chunk_shape();
  if (has_targets) shape.columns = std::max<int64_t>(shape.columns / 2, 1);
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < m;) {
    const bool kept = row < kept_rows;
    const int64_t rows = std::min(shape.rows, (kept ? std::min(kept_rows, m) : m) - row);
    for (int64_t column = 0; column < n; column += shape.columns)
      chunks.push_back({row, rows, column, std::min(shape.columns, n - column), kept});
    row += rows;
  }
  return chunks;
}

inline int64_t stride_of(int64_t columns) { return cdiv(columns, kStrideUnit) * kStrideUnit; }

template <class T>
T* allocate(Library& library, int64_t count) {
  return static_cast<T*>(library.allocate(std::max<int64_t>(count, 1) * int64_t(sizeof(T))));
}

}  // namespace cuda
}  // namespace fastclip
