// Large buffers on the CPU: huge pages, and one buffer kept from step to step.
#pragma once

#include <ATen/ATen.h>

#include <cstdlib>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastclip {

constexpr size_t kHugePage = 2 << 20;

// Asks for huge pages in [data, data + bytes). Clearing and mapping fresh 4 KiB pages took an eighth of the gradient of
// a 256 x 32,768 block.
inline void advise_huge([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
};

// The last buffer of kept products waits here for the next step: a quarter of a GiB of fresh pages, which the kernel
// has to clear, costs a twentieth of the whole loss even as huge pages, a tenth as small ones.
class Workspace {
 public:
  static at::Tensor take(int64_t count, const at::TensorOptions& options) {
    const size_t bytes = size_t(count) * options.dtype().itemsize();
    Buffer buffer;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (idle_.size >= bytes && idle_.size / 2 <= bytes) std::swap(buffer, idle_);
    }
    if (!buffer.data) buffer = fresh(bytes);
    return at::from_blob(buffer.data, {count}, [buffer](void*) { give_back(buffer); }, options);
  }
  static void release() { give_back({}); }

 private:
  static Buffer fresh(size_t bytes) {
    const size_t size = bytes > kHugePage ? (bytes + kHugePage - 1) / kHugePage * kHugePage : bytes + 64 - bytes % 64;
    void* const data = std::aligned_alloc(size > kHugePage ? kHugePage : 64, size);
    TORCH_CHECK(data, "fastclip: no memory for ", size, " bytes of work space; lower memory_budget");
    advise_huge(data, size);
    return {data, size};
  }
  static void give_back(Buffer buffer) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::swap(buffer, idle_);
    }
    std::free(buffer.data);
  }

  static inline std::mutex mutex_;
  static inline Buffer idle_;
};

}  // namespace fastclip
