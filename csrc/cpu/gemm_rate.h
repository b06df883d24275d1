// Measures the rate of the engine's matrix product.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <chrono>
#include <string>
#include <vector>

#include "capability.h"

namespace fastclip {

// The rate of the engine's matrix product on operands that stay in cache, summed over all threads, in GFLOP/s. `bench`
// reports times relative to this limit.
inline double gemm_rate(const std::string& dtype, int64_t m, int64_t n, int64_t k, double seconds) {
  TORCH_CHECK_VALUE(dtype == "float32" || dtype == "bfloat16", "dtype must be 'float32' or 'bfloat16', got '", dtype,
                    "'");
  const bool narrow = dtype == "bfloat16";
  TORCH_CHECK(machine_has_brgemm() && (!narrow || machine_has_bf16_products()), "this machine has no brgemm for ",
              dtype);
  using Clock = std::chrono::steady_clock;
  const int threads = at::get_num_threads();
  std::vector<double> rates(threads, 0.0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) {
      const auto make = [&](int64_t size, at::ScalarType type) { return at::zeros({size}, at::TensorOptions(type)); };
      const auto type = narrow ? at::kBFloat16 : at::kFloat;
      const at::Tensor a = make(m * k, type), b = make(k * n, type), c = make(m * n, at::kFloat);
      const auto once = [&] {
        namespace blas = at::native::cpublas;
        if (narrow)
          blas::brgemm(m, n, k, k, n, n, false, a.const_data_ptr<at::BFloat16>(), b.const_data_ptr<at::BFloat16>(),
                       c.mutable_data_ptr<float>(), true);
        else
          blas::brgemm(m, n, k, k, n, n, false, a.const_data_ptr<float>(), b.const_data_ptr<float>(),
                       c.mutable_data_ptr<float>(), false);
      };
      for (int q = 0; q < 10; q++) once();
      const auto start = Clock::now();
      double elapsed = 0;
      int64_t calls = 0;
      while (elapsed < seconds) {
        for (int q = 0; q < 20; q++) once();
        calls += 20;
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      }
      rates[begin] = 2e-9 * double(m) * double(n) * double(k) * double(calls) / elapsed;
      at::native::cpublas::brgemm_release(narrow);
    }
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total;
}

}  // namespace fastclip
