// The threads of a block as fibers of the launching thread: quick, the same order every time, and strict about who
// meets whom. Each runs until it waits or returns; then the next one that can go on does.
//
// Aborts, with the places in the source, where
//   threads wait for a barrier that others have left out, or at two different ones
//   the lanes that a mask names do not all meet in the same call with the same mask
//   a shuffle or a vote names a lane that has returned or that the block does not have, or reads one it does not name
// With `emulation::reversed`, or EMULATION_REVERSED=1 in the environment, blocks and threads begin from the last one:
// what races, or depends on the order of blocks, gives another result.
//
// Under ThreadSanitizer every fiber is to it a thread of its own, whose accesses are ordered by __syncthreads,
// __syncwarp and launches alone. Not by shuffles and votes: they order nothing on a card either. So a race is found
// whatever the order of execution was. Blocks of a launch follow one another, to it as well: that two blocks write to
// one address of global memory is not reported.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "context.h"
#include "meeting.h"
#include "poison.h"
#include "vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

// A point up to which the memory of several fibers is ordered.
class Order {
 public:
  EMULATION_UNSEEN void release() {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(this);
#endif
  }
  EMULATION_UNSEEN void acquire() {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(this);
#endif
  }

 private:
  char place_ = 0;
};

// Of two, the one in use changes with each meeting: who has left the last one may already be at the next, whose
// accesses must not seem ordered to those who are still leaving.
struct Alternating {
  Order orders[2];
  unsigned meetings = 0;
  EMULATION_UNSEEN Order& now() { return orders[meetings % 2]; }
};

struct Fiber {
  Context context;
  uint3 index;
  WarpCall call;  // the last one
  uint64_t result;
  bool at_barrier;
};

struct Warp {
  unsigned waiting;  // lanes that are in a call
  unsigned gone;     // lanes that have returned, or that the block does not have
};

inline bool reversed = std::getenv("EMULATION_REVERSED") != nullptr;

class Fibers {
 public:
  using Body = void (*)(const void* closure);

  // Launches of several host threads take turns: what is __shared__ exists once.
  EMULATION_UNSEEN void run(dim3 grid, dim3 block, Body body, const void* closure) {
    const std::lock_guard<std::mutex> turn(turn_);
    body_ = body, closure_ = closure;
    gridDim = grid, blockDim = block;
    count_ = block.x * block.y * block.z;
    host_.adopt();
    for (unsigned k = 0; k < count_; k++) {
      fibers_[k].context.prepare(&main_of_fiber);
      fibers_[k].index = {k % block.x, k / block.x % block.y, k / block.x / block.y};
    }
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    for (uint64_t b = 0; b < blocks; b++) {
      const uint64_t q = reversed ? blocks - 1 - b : b;
      blockIdx = {unsigned(q % grid.x), unsigned(q / grid.x % grid.y), unsigned(q / grid.x / grid.y)};
      run_block();
    }
  }

  // Meets all threads of the block that have not returned; how many of them came with a true predicate.
  EMULATION_UNSEEN int meet_block(bool predicate, Site site) {
    Fiber& me = *current_;
    me.call = {Call::kSyncThreads, 0, 0, 0, site};
    if (arrived_ == 0) barrier_ = site;
    if (!is_same(barrier_, site)) fail("threads of a block wait at different barriers");
    Order& order = barrier_orders_.now();
    order.release();
    votes_ += predicate;
    if (++arrived_ == live_) {
      open_barrier();
    } else {
      me.at_barrier = true;
      yield();
    }
    order.acquire();
    return counted_;
  }

  // Meets the lanes of the mask; the value of the source lane, or the lanes whose value is not 0.
  EMULATION_UNSEEN uint64_t meet_warp(Call kind, unsigned mask, uint64_t value, unsigned source, Site site) {
    Fiber& me = *current_;
    const unsigned k = unsigned(current_ - fibers_), lane = k % kWarpSize;
    me.call = {kind, mask, value, source, site};
    if (!(mask >> lane & 1)) fail("a lane is not named by its own mask");
    if (kind == Call::kShuffle && !(mask >> source & 1)) fail("a shuffle reads a lane that its mask does not name");
    Alternating& orders = warp_orders_[k - lane + unsigned(std::countr_zero(mask))];
    Order& order = orders.now();
    if (kind == Call::kSyncWarp) order.release();
    warps_[k / kWarpSize].waiting |= 1u << lane;
    if (!complete_warp(k / kWarpSize, lane)) yield();
    if (kind == Call::kSyncWarp) order.acquire();
    return me.result;
  }

 private:
  EMULATION_UNSEEN void run_block() {
    poison_shared_memory();
    start_.release();
    live_ = count_;
    for (unsigned first = 0; first < count_; first += kWarpSize)
      warps_[first / kWarpSize] = {0, count_ - first < kWarpSize ? ~0u << (count_ - first) : 0u};
    for (unsigned k = 0; k < count_; k++) make_ready(fibers_[reversed ? count_ - 1 - k : k]);
    current_ = nullptr;
    yield();
    if (live_) fail("no thread can go on");
    end_.acquire();
  }

  static EMULATION_UNSEEN void main_of_fiber();
  EMULATION_UNSEEN void loop_of_fiber() {
    Context::begin();
    for (;;) {
      start_.acquire();
      body_(closure_);
      end_.release();
      leave();
    }
  }

  EMULATION_UNSEEN void leave() {
    live_--;
    if (live_ && arrived_ == live_) open_barrier();
    const unsigned k = unsigned(current_ - fibers_), mine = k / kWarpSize;
    warps_[mine].gone |= 1u << k % kWarpSize;
    // Lanes may wait for this one alone.
    for (unsigned l = 0; l < kWarpSize; l++)
      if (warps_[mine].waiting >> l & 1) complete_warp(mine, l);
    yield();
  }

  EMULATION_UNSEEN void open_barrier() {
    barrier_orders_.meetings++;
    counted_ = votes_, votes_ = 0, arrived_ = 0;
    for (unsigned k = 0; k < count_; k++) {
      if (!fibers_[k].at_barrier) continue;
      fibers_[k].at_barrier = false;
      make_ready(fibers_[k]);
    }
  }

  // Whether all lanes of the call that a lane waits in have come; then they have their results and are ready.
  EMULATION_UNSEEN bool complete_warp(unsigned which, unsigned lane) {
    Warp& warp = warps_[which];
    Fiber* const lanes = fibers_ + which * kWarpSize;
    const WarpCall& call = lanes[lane].call;
    const unsigned absent = call.mask & ~warp.waiting, present = call.mask & warp.waiting;
    if (absent & warp.gone && call.kind != Call::kSyncWarp)  // which CUDA defines for the lanes that are left
      fail("a mask names a lane that has returned or that the block does not have", call);
    if (absent & ~warp.gone) return false;
    uint64_t ballot = 0;
    for (unsigned left = present; left; left &= left - 1) {
      const unsigned l = unsigned(std::countr_zero(left));
      const WarpCall& other = lanes[l].call;
      if (other.value) ballot |= uint64_t(1) << l;
      if (is_alike(other, call)) continue;
      // It may come later, from a meeting of its own; but not if it waits for this lane.
      if (other.mask >> lane & 1) fail("lanes wait for one another in different calls", call);
      return false;
    }
    warp.waiting &= ~present;
    warp_orders_[which * kWarpSize + unsigned(std::countr_zero(call.mask))].meetings++;
    for (unsigned left = present; left; left &= left - 1) {
      Fiber& fiber = lanes[std::countr_zero(left)];
      fiber.result = call.kind == Call::kShuffle ? lanes[fiber.call.source].call.value : ballot;
      if (&fiber != current_) make_ready(fiber);
    }
    return true;
  }

  EMULATION_UNSEEN void make_ready(Fiber& fiber) { ready_[last_++ % kMostThreads] = &fiber; }

  // Lets the next fiber go on, or the host where there is none; returns when this one is next.
  EMULATION_UNSEEN void yield() {
    Context& mine = current_ ? current_->context : host_;
    Fiber* const next = next_ == last_ ? nullptr : ready_[next_++ % kMostThreads];
    current_ = next;
    if (next) threadIdx = next->index;
    mine.switch_to(next ? next->context : host_);
  }

  // Tells what the current thread was doing, and where the others wait: a line for each place and mask.
  [[noreturn]] EMULATION_UNSEEN void fail(const char* what) { fail(what, current_ ? current_->call : WarpCall{}); }
  [[noreturn]] EMULATION_UNSEEN void fail(const char* what, const WarpCall& call) {
    std::fprintf(stderr, "CUDA emulation: %s\n  in block (%u, %u, %u)", what, blockIdx.x, blockIdx.y, blockIdx.z);
    if (current_) std::fprintf(stderr, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
    std::fprintf(stderr, "\n");
    if (call.site.line()) describe("called from", call);
    for (unsigned k = 0; k < count_; k++) {
      if (!is_waiting(k)) continue;
      unsigned first = count_, alike = 0;
      for (unsigned l = 0; l < count_; l++)
        if (is_waiting(l) && is_alike(fibers_[l].call, fibers_[k].call)) first = std::min(first, l), alike++;
      char who[64];
      std::snprintf(who, sizeof who, "%u waiting, the first of them thread %u, at", alike, k);
      if (first == k) describe(who, fibers_[k].call);
    }
    std::fflush(stderr);
    std::abort();
  }
  EMULATION_UNSEEN bool is_waiting(unsigned k) const {
    return fibers_[k].at_barrier || warps_[k / kWarpSize].waiting >> k % kWarpSize & 1;
  }
  static EMULATION_UNSEEN bool is_alike(const WarpCall& a, const WarpCall& b) {
    return a.kind == b.kind && a.mask == b.mask && is_same(a.site, b.site);
  }
  static EMULATION_UNSEEN void describe(const char* who, const WarpCall& call) {
    static const char* const names[] = {"__syncthreads", "__syncwarp", "a shuffle", "a vote"};
    std::fprintf(stderr, "  %s %s, mask %08x, %s:%u in %s\n", who, names[int(call.kind)], call.mask,
                 call.site.file_name(), call.site.line(), call.site.function_name());
  }

  Fiber fibers_[kMostThreads];
  Warp warps_[kMostThreads / kWarpSize];
  unsigned count_ = 0, live_ = 0, arrived_ = 0;
  Fiber* current_ = nullptr;  // null for the host
  Context host_;
  Fiber* ready_[kMostThreads];
  unsigned next_ = 0, last_ = 0;

  Site barrier_;
  int votes_ = 0, counted_ = 0;
  Alternating barrier_orders_, warp_orders_[kMostThreads];
  Order start_, end_;

  Body body_ = nullptr;
  const void* closure_ = nullptr;
  std::mutex turn_;
};

inline Fibers fibers;

inline void Fibers::main_of_fiber() { fibers.loop_of_fiber(); }

}  // namespace emulation
