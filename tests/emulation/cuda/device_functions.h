// The functions that kernels call: barriers, shuffles, votes, and conversions between numbers and their bits.
#pragma once

#include <cmath>

#include "meeting.h"
#include "scheduler.h"

#define EMULATION_SITE emulation::Site site = emulation::Site::current()

inline void __syncthreads(EMULATION_SITE) { emulation::meet_block(false, site); }
inline int __syncthreads_count(int predicate, EMULATION_SITE) { return emulation::meet_block(predicate != 0, site); }
inline int __syncthreads_or(int predicate, EMULATION_SITE) { return emulation::meet_block(predicate != 0, site) != 0; }
inline int __syncthreads_and(int predicate, EMULATION_SITE) { return emulation::meet_block(predicate == 0, site) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  emulation::meet_warp(emulation::Call::kSyncWarp, mask, 0, 0, site);
}

namespace emulation {
inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarpSize; }
template <class T>
T shuffle(Shuffle kind, unsigned mask, T value, int argument, int width, Site site) {
  const unsigned source = source_lane(kind, lane(), argument, width);
  return value_from<T>(meet_warp(Call::kShuffle, mask, bits_of(value), source, site));
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATION_SITE) {
  return emulation::shuffle(emulation::Shuffle::kIndex, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATION_SITE) {
  return emulation::shuffle(emulation::Shuffle::kUp, mask, value, int(distance), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, EMULATION_SITE) {
  return emulation::shuffle(emulation::Shuffle::kDown, mask, value, int(distance), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATION_SITE) {
  return emulation::shuffle(emulation::Shuffle::kXor, mask, value, bits, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return unsigned(emulation::meet_warp(emulation::Call::kVote, mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return emulation::meet_warp(emulation::Call::kVote, mask, predicate != 0, 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_SITE) {
  return emulation::meet_warp(emulation::Call::kVote, mask, predicate != 0, 0, site) == mask;
}
#undef EMULATION_SITE

inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
