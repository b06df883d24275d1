// The driver's device memory, which is host memory: numbers of any dtype, and buffers of exactly the requested size,
// filled with NaN, so that a sanitizer detects overruns and a comparison detects elements that were not written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cuda/engine.h"

namespace driver {

using fastclip::Dtype;

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2; }

inline double load(const void* data, int64_t at, Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return static_cast<const double*>(data)[at];
    case Dtype::kFloat:
      return static_cast<const float*>(data)[at];
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
    default:
      return __half2float(static_cast<const __half*>(data)[at]);
  }
}

inline void store(void* data, int64_t at, Dtype dtype, double value) {
  switch (dtype) {
    case Dtype::kDouble:
      static_cast<double*>(data)[at] = value;
      break;
    case Dtype::kFloat:
      static_cast<float*>(data)[at] = float(value);
      break;
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(float(value));
      break;
    default:
      static_cast<__half*>(data)[at] = __float2half_rn(float(value));
  }
}

// A byte that makes a NaN of any dtype.
inline constexpr int kUnwritten = 0xff;

class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes, int64_t alignment = 16) {
    void* data = nullptr;
    if (posix_memalign(&data, size_t(alignment), size_t(bytes)) != 0) throw std::bad_alloc();
    data_.reset(static_cast<char*>(data));
    std::memset(data, kUnwritten, size_t(bytes));
  }
  char* data() const { return data_.get(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
};

}  // namespace driver
