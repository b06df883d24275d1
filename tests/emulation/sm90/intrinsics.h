// The CUDA functions that CUTLASS's headers and the fused epilogues need, for a C++ compiler.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "fibers.h"

inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline float __shfl_xor_sync(unsigned, float v, int mask) {
  return __uint_as_float(emulated::fibers.exchange(__float_as_uint(v), unsigned(mask)));
}

// Only declared, for templates that are not instantiated.
int __dp4a(int, int, int);
unsigned __dp4a(unsigned, unsigned, unsigned);
unsigned __byte_perm(unsigned, unsigned, unsigned);
__half2 __hfma2(__half2, __half2, __half2);
