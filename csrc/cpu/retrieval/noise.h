// Gumbel noise by counter: a pair's noise depends on the seed and the pair alone, not on threads or tiles.
//
// The maximum over j of s_ij + G_ij, with G_ij = -log(-log(u)) for uniform u, is a draw from the softmax of s_i.
// fastclip/retrieval/noise.py has the same functions.
#pragma once

#include "../tile.h"

namespace fastclip {
namespace FASTCLIP_CAPABILITY {
namespace {

typedef uint32_t Counters __attribute__((vector_size(kRegister)));

// Two rounds of multiplications and shifts (an integer hash of 32 bits by Chris Wellons, "lowbias32"), with a key each.
template <class W>
FASTCLIP_INLINE W mixed(W h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}
template <class W>
FASTCLIP_INLINE W hashed(W counter, W key, W second) {
  return mixed(mixed(counter ^ key) + second);
}

// The keys of a line: the halves of splitmix64's output (Steele et al., 2014) number `line` of a stream.
struct LineKeys {
  uint32_t first, second;
  LineKeys(uint64_t seed, bool is_column, int64_t line) {
    uint64_t z = seed + 0x9e3779b97f4a7c15u * (2 * uint64_t(line) + is_column + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    first = uint32_t(z), second = uint32_t(z >> 32);
  }
};

// ln(x) of positive normal numbers.
FASTCLIP_INLINE void natural_log(const V<float>& x, V<float>& out) {
  Counters bits;
  memcpy(&bits, &x, sizeof bits);
  const Counters fraction = (bits & 0x7fffffu) | 0x3f800000u;
  V<float> mantissa;
  memcpy(&mantissa, &fraction, sizeof mantissa);
  typedef int32_t Exponents __attribute__((vector_size(kRegister)));
  const Exponents exponent = __builtin_convertvector(bits >> 23, Exponents) - 127;
  out = __builtin_convertvector(exponent, V<float>) * float(kLn2) + log1p_unit<float>(mantissa - 1.f);
}

// -log(-log(u)) for the uniform number 1 - (h + 1/2) / 2^32. Both tails keep their digits: a small h, which makes the
// noise large, and a large one.
FASTCLIP_INLINE void gumbel(const Counters& h, V<float>& out) {
  const V<float> v = (__builtin_convertvector(h, V<float>) + 0.5f) * 0x1p-32f;
  const V<float> rest = (__builtin_convertvector(~h, V<float>) + 0.5f) * 0x1p-32f;
  V<float> of_rest;
  natural_log(rest, of_rest);
  const V<float> small = v < 0.5f ? v / rest : V<float>{};
  const V<float> exponential = v < 0.5f ? log1p_unit<float>(small) : -of_rest;
  natural_log(exponential, out);
  out = -out;
}

}  // namespace
}  // namespace FASTCLIP_CAPABILITY
}  // namespace fastclip
