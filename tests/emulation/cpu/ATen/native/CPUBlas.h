// In place of torch's header; see ../ATen.h. These products take the operands of oneDNN's batch-reduce GEMM.
#pragma once

#include "../ATen.h"

namespace at::native::cpublas {

inline void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float* a,
                   const float* b, float* c, bool /*is_vnni*/) {
  before_product();
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float sum = 0;
      for (int64_t d = 0; d < k; d++) sum += a[i * lda + d] * b[d * ldb + j];
      c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
    }
}

// Rows 2 r and 2 r + 1 of B are interleaved.
inline void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const BFloat16* a,
                   const BFloat16* b, float* c, bool /*is_vnni*/) {
  before_product();
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float sum = 0;
      for (int64_t d = 0; d < k; d++) sum += float(a[i * lda + d]) * float(b[d / 2 * 2 * ldb + 2 * j + d % 2]);
      c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
    }
}

inline void brgemm_release(bool) {}

}  // namespace at::native::cpublas
