// Chooses one of two ways to run the threads of a block; see their files.
#pragma once

#if defined(EMULATION_THREADS)
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulation {
#if defined(EMULATION_THREADS)
inline Threads scheduler;
#else
inline Fibers& scheduler = fibers;
#endif
inline int meet_block(bool predicate, Site site) { return scheduler.meet_block(predicate, site); }
inline uint64_t meet_warp(Call kind, unsigned mask, uint64_t value, unsigned source, Site site) {
  return scheduler.meet_warp(kind, mask, value, source, site);
}
}  // namespace emulation
