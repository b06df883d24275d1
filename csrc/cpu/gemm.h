// The CPU engine's matrix product on row-major operands that fit a core's cache: C (m, n) = A (m, k) B (k, n), or +=.
//
// float and bf16 products use oneDNN's batch-reduce GEMM through torch if the machine supports it. Otherwise float
// products use at::mm, and there are no bf16 products. Double products always use at::mm. The B operand of a bf16
// product has rows 2r and 2r + 1 interleaved ("VNNI").
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

// Inside a parallel region at::mm runs on the calling thread alone.
template <class T>
inline void mm(bool add, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
               int64_t ldc) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto view = [](const T* data, int64_t rows, int64_t cols, int64_t stride) {
    return at::from_blob(const_cast<T*>(data), {rows, cols}, {stride, 1},
                         at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  };
  at::Tensor out = view(c, m, n, ldc);
  if (add)
    at::addmm_out(out, out, view(a, m, k, lda), view(b, k, n, ldb));
  else
    at::mm_out(out, view(a, m, k, lda), view(b, k, n, ldb));
}

template <class T>
inline void gemm(bool brgemm, bool add, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                 int64_t ldb, T* c, int64_t ldc) {
  if constexpr (std::is_same_v<T, float>)
    if (brgemm) return at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
  mm(add, m, n, k, a, lda, b, ldb, c, ldc);
}

inline void gemm(bool, bool add, int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda,
                 const at::BFloat16* b, int64_t ldb, float* c, int64_t ldc) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/true);
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
