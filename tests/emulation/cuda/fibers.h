// The threads of a block as fibers of the launching thread: quick, deterministic, and strict about barriers and masks.
// Each fiber runs until it waits or returns; then the next one that can continue runs.
//
// Aborts, naming places in the source, if
//   threads wait at a barrier that others do not reach, or at two different barriers
//   the lanes that a mask names do not all meet in the same call with the same mask
//   a shuffle or a vote names a lane that has returned or that the block lacks, or reads a lane that it does not name
// With `emulation::reversed`, or EMULATION_REVERSED=1 in the environment, blocks and threads run in reverse order:
// races, and dependence on the order of blocks, give another result.
//
// ThreadSanitizer treats every fiber as a thread. Only __syncthreads, __syncwarp and launches order their accesses;
// shuffles and votes do not, as they order nothing on a GPU. Races are therefore found whatever the order of execution.
// The blocks of a launch count as ordered: if two blocks write to one address of global memory, no race is reported.
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

// A synchronisation point: accesses before release() are ordered before those after acquire().
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

// Two synchronisation points that alternate from meeting to meeting. A fiber that has left one meeting may already be
// at the next, and its accesses must not seem ordered to fibers that are still leaving the first.
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

  // Launches of several host threads take turns, since __shared__ memory exists once.
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

  // Waits for all threads of the block that have not returned; returns the number of true predicates.
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

  // Waits for the lanes of the mask; returns the value of the source lane or, for a vote, the lanes whose value is not
  // 0.
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
    // Other lanes may have waited for this one only.
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

  // True if all lanes of a lane's call have arrived; they then have their results and become ready.
  EMULATION_UNSEEN bool complete_warp(unsigned which, unsigned lane) {
    Warp& warp = warps_[which];
    Fiber* const lanes = fibers_ + which * kWarpSize;
    const WarpCall& call = lanes[lane].call;
    const unsigned absent = call.mask & ~warp.waiting, present = call.mask & warp.waiting;
    if (absent & warp.gone && call.kind != Call::kSyncWarp)  // CUDA allows __syncwarp among the remaining lanes
      fail("a mask names a lane that has returned or that the block does not have", call);
    if (absent & ~warp.gone) return false;
    uint64_t ballot = 0;
    for (unsigned left = present; left; left &= left - 1) {
      const unsigned l = unsigned(std::countr_zero(left));
      const WarpCall& other = lanes[l].call;
      if (other.value) ballot |= uint64_t(1) << l;
      if (is_alike(other, call)) continue;
      // The other lane may arrive later, after another meeting, unless it waits for this lane.
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

  // Switches to the next ready fiber, or to the host if there is none; returns when this fiber runs again.
  EMULATION_UNSEEN void yield() {
    Context& mine = current_ ? current_->context : host_;
    Fiber* const next = next_ == last_ ? nullptr : ready_[next_++ % kMostThreads];
    current_ = next;
    if (next) threadIdx = next->index;
    mine.switch_to(next ? next->context : host_);
  }

  // Prints the current thread's call, and a message for each place and mask at which other threads wait.
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
