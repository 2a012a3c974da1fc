// Vectors of numbers, and the sizes of grids and blocks.
#pragma once

#define INTROKERNELS_EMULATION_VECTORS(T, name, bytes2, bytes4) \
  struct alignas(bytes2) name##2 { T x, y; };                   \
  struct alignas(bytes4) name##4 { T x, y, z, w; };             \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

INTROKERNELS_EMULATION_VECTORS(int, int, 8, 16)
INTROKERNELS_EMULATION_VECTORS(unsigned, uint, 8, 16)
INTROKERNELS_EMULATION_VECTORS(float, float, 8, 16)
INTROKERNELS_EMULATION_VECTORS(double, double, 16, 16)

#undef INTROKERNELS_EMULATION_VECTORS

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;

  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
