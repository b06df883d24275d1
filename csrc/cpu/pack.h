// Copies between the layouts of the CPU engine: widening, transposing, interleaving for bf16 products.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "../kinds.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {

constexpr int64_t kLane = 16;
FASTCLIP_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Converts an element. bf16 is rounded with integer arithmetic, which lets compilers vectorise the loops around it; NaN
// stays NaN.
template <class To, class From>
FASTCLIP_INLINE To cast_to(From v) {
  if constexpr (std::is_same_v<To, at::BFloat16> && std::is_same_v<From, float>) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return at::BFloat16(uint16_t(v != v ? 0x7fc0u : rounded), at::BFloat16::from_bits());
  } else if constexpr (std::is_same_v<To, at::Half> && std::is_same_v<From, double>) {
    return at::Half(float(v));
  } else {
    return static_cast<To>(v);
  }
}

// Sixteen rows of sixteen 4-byte words, transposed in registers: four rounds of pairwise shuffles.
typedef uint32_t Words __attribute__((vector_size(64)));

// Results are written to references: returning such a vector has no stable ABI below AVX-512, and compilers warn of it.
FASTCLIP_INLINE void even_quarters(const Words& a, const Words& b, Words& out) {
  out = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
}
FASTCLIP_INLINE void odd_quarters(const Words& a, const Words& b, Words& out) {
  out = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}

FASTCLIP_INLINE void transpose_words(Words (&r)[16]) {
  Words s[16];
  for (int i = 0; i < 16; i += 2) {  // interleave the words of two rows
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
  for (int i = 0; i < 16; i += 4)  // then of four: quarter l of r[i + q] holds word 4 l + q of rows i .. i + 3
    for (int j = 0; j < 2; j++) {
      const Words a = s[i + j], b = s[i + j + 2];
      r[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      r[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
  for (int q = 0; q < 4; q++) {  // gather the quarters of all sixteen rows
    Words low_even, low_odd, high_even, high_odd;
    even_quarters(r[q], r[4 + q], low_even), odd_quarters(r[q], r[4 + q], low_odd);
    even_quarters(r[8 + q], r[12 + q], high_even), odd_quarters(r[8 + q], r[12 + q], high_odd);
    even_quarters(low_even, high_even, s[q]), even_quarters(low_odd, high_odd, s[4 + q]);
    odd_quarters(low_even, high_even, s[8 + q]), odd_quarters(low_odd, high_odd, s[12 + q]);
  }
  for (int i = 0; i < 16; i++) r[i] = s[i];
}

// The rows that a product's packed B operand interleaves: two in bf16.
template <class Op>
constexpr int64_t kPair = std::is_same_v<Op, at::BFloat16> ? 2 : 1;

// Loads sixteen words of Op from `row`, starting at element d; elements from `width` on are zero.
template <class In, class Op>
FASTCLIP_INLINE void load_words(const In* row, int64_t d, int64_t width, Words& words) {
  constexpr int64_t kCount = 64 / sizeof(Op);
  if (std::is_same_v<In, Op> && d + kCount <= width) {
    memcpy(&words, row + d, 64);
  } else {
    Op elements[kCount];
    for (int64_t q = 0; q < kCount; q++) elements[q] = d + q < width ? cast_to<Op>(row[d + q]) : Op(0);
    memcpy(&words, elements, 64);
  }
}

// out (width, lanes) = the transpose of `rows` rows of x, zero beyond them; bf16 rows of out are interleaved in pairs.
template <class In, class Op>
void pack_transposed(const In* x, int64_t stride, int64_t rows, int64_t width, int64_t lanes, Op* out) {
  if constexpr (sizeof(Op) == 8) {
    for (int64_t i = 0; i < lanes; i++)
      for (int64_t d = 0; d < width; d++) out[d * lanes + i] = i < rows ? cast_to<Op>(x[i * stride + d]) : Op(0);
  } else {
    uint32_t* const words = reinterpret_cast<uint32_t*>(out);
    const int64_t count = (width + kPair<Op> - 1) / kPair<Op>;
    for (int64_t i0 = 0; i0 < lanes; i0 += kLane)
      for (int64_t d0 = 0; d0 < count; d0 += kLane) {
        Words r[16];
        for (int64_t i = 0; i < kLane; i++)
          if (i0 + i < rows) {
            const In* const row = x + (i0 + i) * stride;
            load_words<In, Op>(row, d0 * kPair<Op>, width, r[i]);
            // Sixteen rows at once are more streams than hardware prefetchers follow.
            __builtin_prefetch(row + kLane * stride + d0 * kPair<Op>);
          } else {
            r[i] = Words{};
          }
        transpose_words(r);
        for (int64_t d = 0; d < kLane && d0 + d < count; d++) memcpy(words + (d0 + d) * lanes + i0, &r[d], 64);
      }
  }
}

// out (rows, out_stride) = x, converted to Op; zero from width to out_stride.
template <class In, class Op>
void pack_rows(const In* x, int64_t stride, int64_t rows, int64_t width, Op* out, int64_t out_stride) {
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t d = 0; d < width; d++) out[i * out_stride + d] = cast_to<Op>(x[i * stride + d]);
    for (int64_t d = width; d < out_stride; d++) out[i * out_stride + d] = Op(0);
  }
}

// out (padded / 2, width, 2) = the rows of x, interleaved in pairs; zero from `rows` to `padded`.
inline void pack_pairs(const at::BFloat16* x, int64_t stride, int64_t rows, int64_t padded, int64_t width,
                       at::BFloat16* out) {
  for (int64_t i = 0; i < padded; i += 2) {
    const at::BFloat16* const low = x + i * stride;
    const at::BFloat16* const high = low + stride;
    uint32_t* const words = reinterpret_cast<uint32_t*>(out + i * width);
    if (i + 1 < rows) {
      for (int64_t d = 0; d < width; d++) words[d] = uint32_t(low[d].x) | uint32_t(high[d].x) << 16;
    } else {
      for (int64_t d = 0; d < width; d++) words[d] = i < rows ? low[d].x : 0;
    }
  }
}

// out (rows, out_stride) = the transpose of w (cols, lanes) times the columns' factors; zero from cols to out_stride.
template <class T, class Op>
void pack_weights_transposed(const T* w, int64_t lanes, int64_t cols, const T* factor, Op* out, int64_t out_stride) {
  for (int64_t c0 = 0; c0 < out_stride; c0 += kLane) {
    T f[kLane];
    for (int64_t c = 0; c < kLane; c++) f[c] = c0 + c >= cols ? T(0) : factor ? factor[c0 + c] : T(1);
    for (int64_t i0 = 0; i0 < lanes; i0 += kLane) {
      T block[kLane][kLane];
      if constexpr (sizeof(T) == 4) {
        Words r[16];
        for (int64_t c = 0; c < kLane; c++) {
          r[c] = Words{};
          if (c0 + c < cols) memcpy(&r[c], w + (c0 + c) * lanes + i0, 64);
        }
        transpose_words(r);
        memcpy(block, r, sizeof block);
      } else {
        for (int64_t i = 0; i < kLane; i++)
          for (int64_t c = 0; c < kLane; c++) block[i][c] = c0 + c < cols ? w[(c0 + c) * lanes + i0 + i] : T(0);
      }
      for (int64_t i = 0; i < kLane; i++) {
        Op* const row = out + (i0 + i) * out_stride + c0;
        for (int64_t c = 0; c < kLane; c++) row[c] = cast_to<Op>(block[i][c] * f[c]);
      }
    }
  }
}

// out (cols, lanes) = w times the rows' factors.
template <class T, class Op>
void pack_weights(const T* w, int64_t lanes, int64_t cols, const T* factor, Op* out) {
  for (int64_t c = 0; c < cols; c++)
    for (int64_t i = 0; i < lanes; i++) out[c * lanes + i] = cast_to<Op>(w[c * lanes + i] * factor[i]);
}

}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
