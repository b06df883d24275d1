// A thread's work space.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "pack.h"

// AddressSanitizer sees overruns from one piece of an arena into the next: the pieces lie apart, and what is not taken
// must not be touched. Other builds have no room between the pieces.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)  // clang's
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FASTCLIP_ROOM_BETWEEN_PIECES 64
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#define FASTCLIP_ROOM_BETWEEN_PIECES 0
#endif

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

// A bump allocator. Its memory is reused from call to call, since fresh pages would cost more than a small loss.
class Arena {
 public:
  ~Arena() { std::free(base_); }
  void reset(int64_t bytes) {
    if (bytes > size_) {
      std::free(base_);
      size_ = 0;
      base_ = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)));
      if (!base_) throw std::bad_alloc();
      size_ = bytes;
    }
    ASAN_POISON_MEMORY_REGION(base_, size_);
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    T* const p = reinterpret_cast<T*>(base_ + used_);
    // Never more than was reserved, so that an overrun of the whole arena is seen, too.
    ASAN_UNPOISON_MEMORY_REGION(p, std::clamp<int64_t>(size_ - used_, 0, count * int64_t(sizeof(T))));
    used_ += round_up(count * int64_t(sizeof(T)), 64) + FASTCLIP_ROOM_BETWEEN_PIECES;
    return p;
  }

 private:
  char* base_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};
thread_local Arena arena;

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
