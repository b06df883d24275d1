// The calls at which threads wait for one another, and the values that a warp's lanes exchange.
#pragma once

#include <bit>
#include <cstdint>
#include <source_location>

namespace emulation {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMostThreads = 1024;  // of a block

using Site = std::source_location;

enum class Call : uint8_t { kSyncThreads, kSyncWarp, kShuffle, kVote };

// One lane's call. In a vote, `value` is the predicate. In a shuffle, it has the value's bits, and `source` is the lane
// to read.
struct WarpCall {
  Call kind;
  unsigned mask;
  uint64_t value;
  unsigned source;
  Site site;
};

// Compares places in the source, not addresses, so that a function that is inlined twice is one place.
__attribute__((no_sanitize("thread"))) inline bool is_same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || __builtin_strcmp(a.file_name(), b.file_name()) == 0);
}

// The lane that a shuffle reads: the calling lane itself if the segment of `width` lanes has no such lane.
enum class Shuffle { kIndex, kUp, kDown, kXor };
constexpr unsigned source_lane(Shuffle shuffle, unsigned lane, int argument, int width) {
  const unsigned first = lane & ~unsigned(width - 1), last = first + unsigned(width) - 1;
  switch (shuffle) {
    case Shuffle::kIndex:
      return first + (unsigned(argument) & unsigned(width - 1));
    case Shuffle::kUp:
      return lane < first + unsigned(argument) ? lane : lane - unsigned(argument);
    case Shuffle::kDown:
      return lane + unsigned(argument) > last ? lane : lane + unsigned(argument);
    default:
      return (lane ^ unsigned(argument)) > last ? lane : lane ^ unsigned(argument);
  }
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T value_from(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation
