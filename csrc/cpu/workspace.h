// A caching allocator for large CPU buffers, in huge pages.
//
// The operating system clears every fresh page. For the gradient of a 256 x 32,768 block the clearing takes an eighth
// of the loss's time, and for the kept products of a square block a twentieth; with pages of 4 KiB it would take twice
// as long. The products and gradients that one step frees are therefore cached for the next, as in a GPU's caching
// allocator.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastclip {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
};

class Workspace {
 public:
  // An uninitialised tensor. Small ones come from torch's allocator, which is quick for them.
  static at::Tensor take(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const size_t bytes = size_t(c10::multiply_integers(sizes)) * options.dtype().itemsize();
    if (bytes < kSmallest) return at::empty(sizes, options);
    Buffer* const buffer = new Buffer(find(bytes));
    report(*buffer, int64_t(buffer->size));
    c10::DataPtr data(buffer->data, buffer, &give_back, at::kCPU);
    // With torch's allocator the storage can be resized like any other.
    auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, std::move(data),
                                                         at::getCPUAllocator(), /*resizable=*/true);
    at::Tensor out = at::detail::make_tensor<at::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), options.dtype());
    out.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    return out;
  }

  // Frees all idle buffers.
  static void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    clear();
  }

 private:
  static constexpr size_t kSmallest = 1 << 20, kHugePage = 2 << 20;
  static constexpr size_t kMostIdle = 512 << 20;  // one step of 65,536 pairs of 512 features

  static Buffer find(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      Buffer* best = nullptr;
      for (Buffer& b : idle_)
        if (b.size >= bytes && b.size / 2 <= bytes && (!best || b.size < best->size)) best = &b;
      if (best) return std::exchange(*best, {});
      // Sizes have changed: idle buffers of the old sizes would only add to the peak.
      clear();
    }
    return fresh(bytes);
  }

  static Buffer fresh(size_t bytes) {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* const data = std::aligned_alloc(kHugePage, size);
    TORCH_CHECK(data, "fastclip: no memory for ", size, " bytes of work space; lower memory_budget");
#if defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);
#endif
    return {data, size};
  }

  static void give_back(void* context) {
    Buffer buffer = *static_cast<Buffer*>(context);
    delete static_cast<Buffer*>(context);
    report(buffer, -int64_t(buffer.size));
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      size_t idle = 0;
      for (const Buffer& b : idle_) idle += b.size;
      // The buffer replaces the smallest idle one (an empty place has 0 bytes) if it is larger and the idle buffers
      // then stay within kMostIdle. The one of the two that is not kept is freed.
      Buffer& least = *std::min_element(idle_.begin(), idle_.end(), smaller);
      if (smaller(least, buffer) && idle - least.size + buffer.size <= kMostIdle) std::swap(least, buffer);
    }
    std::free(buffer.data);
  }

  // Reports the bytes in use to torch's profiler, as torch's own allocator does.
  static void report(const Buffer& buffer, int64_t change) {
    in_use_ += change;
    c10::reportMemoryUsageToProfiler(buffer.data, change, size_t(in_use_.load()), 0, at::kCPU);
  }

  static bool smaller(const Buffer& a, const Buffer& b) { return a.size < b.size; }
  static void clear() {
    for (Buffer& b : idle_) std::free(std::exchange(b, {}).data);
  }

  // Four places for the buffers of one step: products, two gradients, and the wide accumulator of a half gradient. They
  // are not freed at exit, since tensors may outlive a library's static objects.
  static inline std::mutex mutex_;
  static inline std::array<Buffer, 4> idle_;
  static inline std::atomic<int64_t> in_use_{0};
};

}  // namespace fastclip
