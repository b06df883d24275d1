// The Python module fastclip._C. Loading it registers the operators. Its functions return build information, the number
// of threads used and the rate of the CPU engine's matrix product, and free the work space.
#include <ATen/Parallel.h>
#include <torch/python.h>

#include <string>
#include <vector>

#include "cpu/call.h"
#include "cpu/gemm_rate.h"
#include "cpu/workspace.h"
#include "cuda/engine.h"

namespace fastclip {
namespace {

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
  PORTABLE::Kinds::each_name([&](KindIndex, const char* name) { kinds.append(name); });
  info["kinds"] = kinds;
  info["capability"] = capability().name;
  info["product"] = brgemm_wanted() ? "brgemm" : "mm";
  info["bf16_products"] = brgemm_wanted() && machine_has_bf16_products();
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
