// The choices that depend on this machine's CPU: the engine's instruction set, its matrix product, the cache size.
#pragma once

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "problem.h"
#include "retrieval/problem.h"

namespace fastclip {

struct Capability {
  const char* name;
  int (*run)(Problem&);
  double (*largest_norm)(const Features&, int64_t rows, int64_t width, Dtype);
  void (*find_ranks)(const RankScan&);
  void (*find_top)(const TopScan&);
  void (*draw)(const DrawScan&);
  void (*score)(const PairScan&);
};

#define FASTCLIP_CHOICE(name) \
  Capability { #name, name::run, name::largest_norm, name::find_ranks, name::find_top, name::draw, name::score }

// The engine for this machine. It follows torch's own dispatch, so that ATEN_CPU_CAPABILITY governs both.
inline const Capability& capability() {
  static const Capability chosen = [] {
    [[maybe_unused]] const std::string name = at::get_cpu_capability();
#if FASTCLIP_X86
    if (name.rfind("AVX512", 0) == 0 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      return FASTCLIP_CHOICE(AVX512);
    if (name.rfind("AVX", 0) == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return FASTCLIP_CHOICE(AVX2);
#endif
    return FASTCLIP_CHOICE(DEFAULT);
  }();
  return chosen;
}

#undef FASTCLIP_CHOICE

inline bool machine_has_brgemm() {
#if FASTCLIP_X86
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

// True if torch can multiply bf16 operands as they are. A trial product decides, since torch has no query for it.
inline bool machine_has_bf16_products() {
  static const bool has = [] {
    alignas(64) at::BFloat16 a[32 * 32], b[32 * 32];
    alignas(64) float c[32 * 32];
    for (int q = 0; q < 32 * 32; q++) a[q] = b[q] = at::BFloat16(1.f);
    try {
      at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, a, b, c, true);
      at::native::cpublas::brgemm_release(true);
      return c[0] == 32.f && c[32 * 32 - 1] == 32.f;
    } catch (...) {
      return false;
    }
  }();
  return has;
}

// The size of a core's own cache (L2), between 1 MiB and 4 MiB. Less is taken as 1 MiB (AMD's Zen 3 has 512 KiB; a
// virtual machine may report 0), and more as 4 MiB.
inline int64_t core_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t told = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    told = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(told, 1 << 20, 4 << 20);
  }();
  return bytes;
}

inline bool brgemm_wanted() {
  const char* const forced = std::getenv("FASTCLIP_CPU");
  if (!forced || !*forced) return machine_has_brgemm();
  const std::string name(forced);
  TORCH_CHECK_VALUE(name == "brgemm" || name == "mm", "FASTCLIP_CPU must be 'brgemm' or 'mm', got '", name, "'");
  TORCH_CHECK(name == "mm" || machine_has_brgemm(),
              "FASTCLIP_CPU=brgemm, but this machine has no AVX-512 or oneDNN is off");
  return name == "brgemm";
}

}  // namespace fastclip
