// CUDA's small vectors, aligned as CUDA aligns them.
#pragma once

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};

#define EMULATION_VECTORS(T, name)                              \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };            \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };      \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATION_VECTORS(float, float)
EMULATION_VECTORS(int, int)
EMULATION_VECTORS(unsigned, uint)
#undef EMULATION_VECTORS

struct alignas(16) double2 {
  double x, y;
};
constexpr double2 make_double2(double x, double y) { return {x, y}; }
