// The CUDA engine's Library, built on torch: memory, matrix products, and the current stream.
//
// Memory and products come from ATen, and the stream from a C function of libtorch_cuda. Therefore this file needs
// neither CUDA's headers nor torch's CUDA headers, which include them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <string_view>
#include <vector>

#include "engine.h"

// From torch's stable C interface; a result other than 0 is an error. It is declared here because its header needs
// CUDA's headers.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastclip {
namespace {

using at::Tensor;

at::ScalarType type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return at::kDouble;
    case Dtype::kBFloat16:
      return at::kBFloat16;
    case Dtype::kHalf:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

// Work space goes back to torch's allocator when the operator returns, which may be before the device has finished with
// it. This is safe because the allocator reuses memory in stream order.
class Torch final : public cuda::Library {
 public:
  explicit Torch(const Tensor& like) : options_(like.options()) {}

  void* allocate(int64_t bytes) override {
    held_.push_back(at::empty({bytes + kAlignment}, options_.dtype(at::kByte)));
    const auto begin = reinterpret_cast<uintptr_t>(held_.back().mutable_data_ptr());
    return reinterpret_cast<void*>((begin + kAlignment - 1) / kAlignment * kAlignment);
  }

  void multiply(const cuda::Matrix& a, const cuda::Matrix& b, const cuda::Matrix& out, bool add) override {
    const Tensor left = view(a), right = view(b);
    Tensor result = view(out);
    if (a.dtype == Dtype::kFloat)
      add ? at::addmm_out(result, result, left, right) : at::mm_out(result, left, right);
    else if (options_.device().is_cpu())  // the CPU multiplies half operands into half results only
      add ? at::addmm_out(result, result, left.to(at::kFloat), right.to(at::kFloat))
          : at::mm_out(result, left.to(at::kFloat), right.to(at::kFloat));
    else if (add)
      add_half_product(left, right, result);
    else
      at::mm_out(result, left, right, at::kFloat);
  }

 private:
  static constexpr int64_t kAlignment = 256;

  Tensor view(const cuda::Matrix& m) const {
    const std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.row_stride, m.column_stride};
    // With a target device torch does not ask the driver for the pointer's device.
    return at::for_blob(m.data, sizes)
        .strides(at::IntArrayRef(strides))
        .target_device(options_.device())
        .options(options_.dtype(type_of(m.dtype)))
        .make_tensor();
  }

  static void add_half_product(const Tensor& left, const Tensor& right, Tensor& result) {
    static std::atomic<bool> in_place{true};
    if (in_place) {
      try {
        at::addmm_out(result, result, left, right, at::kFloat);
        return;
      } catch (const c10::OutOfMemoryError&) {
        throw;
      } catch (const c10::Error& error) {
        // If torch's addmm accepts half-precision outputs only, it raises an error about dtypes before it launches
        // anything. Every other error is passed on.
        if (std::string_view(error.what_without_backtrace()).find("dtype") == std::string_view::npos) throw;
        in_place = false;
      }
    }
    result.add_(at::mm(left, right, at::kFloat));
  }

  at::TensorOptions options_;
  std::vector<Tensor> held_;
};

cuda::Stream current_stream([[maybe_unused]] const Tensor& x) {
  void* stream = nullptr;
#ifndef FASTCLIP_EMULATED
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.device().index(), &stream) == 0,
              "fastclip: torch did not return its current stream on ", x.device());
#endif
  return static_cast<cuda::Stream>(stream);
}

// Makes the features' device the current one, and switches autograd and autocast off for the engine's own products.
class Scope {
 public:
  explicit Scope(const Tensor& x) : device_(x.device()), autocast_(c10::autocast_dispatch_keyset) {}

 private:
  c10::OptionalDeviceGuard device_;
  c10::impl::ExcludeDispatchKeyGuard autocast_;
  at::AutoDispatchBelowADInplaceOrView autograd_;
};

}  // namespace
}  // namespace fastclip
