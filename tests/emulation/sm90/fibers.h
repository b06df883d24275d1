// The threads of a tile as fibers of one host thread, in any order. They are switched only when they wait.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../cuda/context.h"

namespace emulated {

class Fibers {
 public:
  // Runs body(0) .. body(count - 1). Seed 0: in order; 1: in reverse order; others: in a new random order each round.
  void run(unsigned count, unsigned seed, std::function<void(unsigned)> body) {
    count_ = count, body_ = std::move(body);
    threads_.assign(count, {});
    for (unsigned k = 0; k < count; k++) {
      if (contexts_.size() <= k) contexts_.push_back(std::make_unique<emulation::Context>());
      contexts_[k]->prepare(&begin);
    }
    host_.adopt();
    std::vector<unsigned> order(count);
    for (unsigned k = 0; k < count; k++) order[k] = seed == 1 ? count - 1 - k : k;
    std::mt19937 random(seed);
    for (unsigned left = count; left > 0;) {
      if (seed > 1) std::shuffle(order.begin(), order.end(), random);
      const unsigned long before = steps_;
      left = 0;
      for (const unsigned k : order) {
        if (threads_[k].is_done) continue;
        current_ = k;
        host_.switch_to(*contexts_[k]);
        left += !threads_[k].is_done;
      }
      if (left > 0 && steps_ == before) stop("threads wait for one another");
    }
  }

  // Waits until all threads have called this. It does not check that they are at the same barrier.
  void meet_all() {
    const unsigned long meeting = meetings_;
    steps_++;
    if (++arrived_ == count_) {
      arrived_ = 0;
      meetings_++;
      return;
    }
    wait([&] { return meetings_ != meeting; });
  }

  // Returns the value of the lane whose number differs in the bits of `mask`.
  uint32_t exchange(uint32_t value, unsigned mask) {
    Thread& mine = threads_[current_];
    const unsigned partner = current_ ^ mask;
    if (partner / 32 != current_ / 32) stop("a shuffle leaves its warp");
    mine.values[mine.shuffles % 2] = value;
    const unsigned long shuffle = mine.shuffles++;
    steps_++;
    wait([&] { return warp_has_come(shuffle); });
    return threads_[partner].values[shuffle % 2];
  }

 private:
  struct Thread {
    bool is_done = false;
    unsigned long shuffles = 0;
    uint32_t values[2];  // of the last two shuffles: no lane is more than one ahead
  };

  bool warp_has_come(unsigned long shuffle) const {
    const unsigned first = current_ / 32 * 32;
    for (unsigned k = first; k < first + 32; k++)
      if (threads_[k].shuffles <= shuffle) return false;
    return true;
  }

  template <class Condition>
  void wait(Condition condition) {
    const unsigned me = current_;
    while (!condition()) {
      contexts_[me]->switch_to(host_);
      current_ = me;
    }
  }

  static void begin();
  void begin_current() {
    emulation::Context::begin();
    const unsigned me = current_;
    body_(me);
    threads_[me].is_done = true;
    steps_++;
    contexts_[me]->switch_to(host_);
  }

  [[noreturn]] static void stop(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::exit(2);
  }

  std::function<void(unsigned)> body_;
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<emulation::Context>> contexts_;
  emulation::Context host_;
  unsigned count_ = 0, current_ = 0, arrived_ = 0;
  unsigned long meetings_ = 0, steps_ = 0;
};

inline Fibers fibers;
inline void Fibers::begin() { fibers.begin_current(); }

}  // namespace emulated
