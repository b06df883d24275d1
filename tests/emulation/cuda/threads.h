// The threads of a block as host threads, which really run concurrently, in any order. Slow, and less strict than
// fibers.h: a mask must name the whole warp, different barriers are not told apart, and a barrier that some threads do
// not reach may hang.
//
// Each barrier orders memory, as does each shuffle, so ThreadSanitizer may miss a missing __syncwarp next to a shuffle.
// A missing __syncthreads is reported if no other barrier lies between the accesses.
#pragma once

#include <atomic>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "meeting.h"
#include "poison.h"
#include "vector_types.h"

inline thread_local uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

inline bool reversed = std::getenv("EMULATION_REVERSED") != nullptr;  // the order of blocks

class Threads {
 public:
  using Body = void (*)(const void* closure);

  void run(dim3 grid, dim3 block, Body body, const void* closure) {
    const std::lock_guard<std::mutex> turn(turn_);
    gridDim = grid, blockDim = block;
    count_ = block.x * block.y * block.z;
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    // Used twice for each block: all threads have left the last block before it is replaced, and all see the new one.
    std::barrier<> all{std::ptrdiff_t(count_)};
    std::vector<std::jthread> threads;
    for (unsigned k = 0; k < count_; k++)
      threads.emplace_back([&, k] {
        threadIdx = {k % block.x, k / block.x % block.y, k / block.x / block.y};
        for (uint64_t b = 0; b < blocks; b++) {
          if (k == 0) begin(reversed ? blocks - 1 - b : b);
          calls_ = barriers_ = 0;
          all.arrive_and_wait();
          body(closure);
          warps_[k / kWarpSize]->arrive_and_drop();
          block_->arrive_and_drop();
          all.arrive_and_wait();
        }
      });
  }

  int meet_block(bool predicate, Site) {
    const unsigned turn = barriers_++;
    votes_[turn % 3] += predicate;
    block_->arrive_and_wait();
    votes_[(turn + 2) % 3] = 0;  // all have read these votes, and none has reached the barrier that counts them again
    return votes_[turn % 3];
  }

  uint64_t meet_warp(Call kind, unsigned mask, uint64_t value, unsigned source, Site site) {
    const unsigned k = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const unsigned warp = k / kWarpSize, first = warp * kWarpSize;
    const unsigned lanes = count_ - first < kWarpSize ? (1u << (count_ - first)) - 1 : 0xffffffffu;
    if ((mask & lanes) != lanes) fail("a mask must name all lanes of the warp", site);
    if (kind != Call::kSyncWarp && mask != lanes) fail("a mask names a lane that the block does not have", site);
    if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask does not name", site);
    const unsigned call = ++calls_;
    Slot* const slots = slots_[call % 2] + first;  // slots of the last call may still be read
    slots[k - first] = {value, call};
    warps_[warp]->arrive_and_wait();
    if (kind == Call::kSyncWarp) return 0;
    uint64_t ballot = 0;
    for (unsigned l = 0; l < kWarpSize; l++) {
      if (!(mask >> l & 1)) continue;
      if (slots[l].call != call) fail("a mask names a lane that has returned", site);
      if (slots[l].value) ballot |= uint64_t(1) << l;
    }
    return kind == Call::kShuffle ? slots[source].value : ballot;
  }

 private:
  struct Slot {
    uint64_t value;
    unsigned call;  // the call that wrote it
  };

  void begin(uint64_t b) {
    poison_shared_memory();
    blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
    block_.emplace(std::ptrdiff_t(count_));
    for (auto& votes : votes_) votes = 0;
    for (unsigned first = 0; first < count_; first += kWarpSize)
      warps_[first / kWarpSize].emplace(std::ptrdiff_t(std::min(kWarpSize, count_ - first)));
    for (auto& slots : slots_)
      for (Slot& slot : slots) slot.call = 0;
  }

  [[noreturn]] static void fail(const char* what, const Site& site) {
    std::fprintf(stderr,
                 "CUDA emulation: %s\n  in block (%u, %u, %u), thread (%u, %u, %u)\n  called from %s:%u in %s\n", what,
                 blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, site.file_name(),
                 site.line(), site.function_name());
    std::abort();
  }

  static inline thread_local unsigned calls_, barriers_;
  unsigned count_ = 0;
  std::optional<std::barrier<>> block_, warps_[kMostThreads / kWarpSize];
  std::atomic<int> votes_[3];
  Slot slots_[2][kMostThreads];
  std::mutex turn_;
};

}  // namespace emulation
