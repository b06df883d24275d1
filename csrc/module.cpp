// The Python module fastclip._C. Loading it registers the operators. Its functions return build information, the number
// of threads used and the rate of the CPU engine's matrix product, and free the work space.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/python.h>

#include <chrono>
#include <string>
#include <vector>

#include "cpu/call.h"
#include "cpu/workspace.h"
#include "cuda/engine.h"

namespace fastclip {
namespace {

using at::Tensor;

// The rate of the engine's matrix product on operands that stay in cache, summed over all threads, in GFLOP/s. `bench`
// reports times relative to this limit.
double gemm_rate(const std::string& dtype, int64_t m, int64_t n, int64_t k, double seconds) {
  TORCH_CHECK_VALUE(dtype == "float32" || dtype == "bfloat16", "dtype must be 'float32' or 'bfloat16', got '", dtype,
                    "'");
  const bool narrow = dtype == "bfloat16";
  TORCH_CHECK(machine_has_brgemm() && (!narrow || machine_has_half_products()), "this machine has no brgemm for ",
              dtype);
  using Clock = std::chrono::steady_clock;
  const int threads = at::get_num_threads();
  std::vector<double> rates(threads, 0.0);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) {
      const auto make = [&](int64_t size, at::ScalarType type) { return at::zeros({size}, at::TensorOptions(type)); };
      const auto type = narrow ? at::kBFloat16 : at::kFloat;
      const Tensor a = make(m * k, type), b = make(k * n, type), c = make(m * n, at::kFloat);
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

// If the library does not load, fastclip/engine/backends.py finds this text in its file.
[[gnu::used]] const char kBuiltAgainst[] = "fastclip built against torch " FASTCLIP_TORCH_VERSION;

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = FASTCLIP_COMPILER;
  info["torch"] = FASTCLIP_TORCH_VERSION;
#if FASTCLIP_X86
  info["capabilities"] = std::vector<std::string>{"DEFAULT", "AVX2", "AVX512"};
#else
  info["capabilities"] = std::vector<std::string>{"DEFAULT"};
#endif
  pybind11::list kinds;
  PORTABLE::Kinds::each_name([&](Kind, const char* name) { kinds.append(name); });
  info["kinds"] = kinds;
  info["capability"] = capability().name;
  info["product"] = brgemm_wanted() ? "brgemm" : "mm";
  info["half_products"] = brgemm_wanted() && machine_has_half_products();
  info["threads"] = at::get_num_threads();
  info["openmp"] =
#ifdef _OPENMP
      true;
#else
      false;
#endif
#ifdef FASTCLIP_CUDA_VERSION
  pybind11::dict engine;
  engine["version"] = FASTCLIP_CUDA_VERSION;
  engine["architectures"] = std::vector<std::string>{FASTCLIP_CUDA_ARCHITECTURES};
  engine["fused"] = cuda::has_fused();
  info["cuda"] = engine;
#else
  info["cuda"] = false;
  info["why_no_cuda"] = FASTCLIP_WHY_NO_CUDA;
#endif
  return info;
}

}  // namespace
}  // namespace fastclip

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled half of fastclip: registers the operators of the CPU and the CUDA engine; build information.";
  m.def("build_info", &fastclip::build_info,
        "Compiler, torch built against, instruction sets, product, threads, CUDA.");
  m.def("threads_used", [] { return fastclip::threads_used.load(); }, "Threads that took part in the last operator.");
  m.def("release_workspace", &fastclip::Workspace::release, "Frees the buffers that wait for the next step.");
  m.def("gemm_rate", &fastclip::gemm_rate, pybind11::arg("dtype"), pybind11::arg("m") = 64, pybind11::arg("n") = 128,
        pybind11::arg("k") = 512, pybind11::arg("seconds") = 0.5, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "GFLOP/s of the engine's product on cache-resident operands, all threads together.");
}
