// Exponentials of vectors, for arguments <= 0: a softmax never needs others. The relative error is
// that of rounding x once, and a unit in the last place; results below the smallest normal number
// are 0; NaN stays NaN.
#pragma once

#include "cpu/simd/vec.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

template <typename T>
struct ExpConstants;

// `kCoefficients` are those of exp(r) from the constant upwards: its first two terms, and from
// there on the polynomial that interpolates (exp(r) - 1 - r) / r^2 at Chebyshev nodes of |r| <=
// log(2) / 2; it errs by 1e-8 (float) and 2e-17 (double) of exp(r).
template <>
struct ExpConstants<float> {
  static constexpr float kCoefficients[] = {1.0F,         1.0F,         0.5F,         0.16666576F,
                                            0.041666556F, 0.008363203F, 0.0013926213F};
  // log(2) as a sum. One float errs by 2e-9; the first of two doubles leaves room for exact
  // products with n.
  static constexpr float kLog2[] = {0.6931471806F};
  static constexpr float kLowest = -87.0F;  // exp(-87) is the last normal number, roughly
  // Adding it rounds to an integer n, and leaves the exponent of 2^n in the last bits.
  static constexpr float kRounder = 0x1.8p23F + 127;
  static constexpr int kMantissaBits = 23;
};
template <>
struct ExpConstants<double> {
  static constexpr double kCoefficients[] = {1.0,
                                             1.0,
                                             0.5,
                                             0.16666666666666669,
                                             0.04166666666662399,
                                             0.008333333333330051,
                                             0.0013888888917281794,
                                             0.00019841269863105968,
                                             2.480152119021773e-05,
                                             2.7557268378684192e-06,
                                             2.7620138719733994e-07,
                                             2.5100424157005067e-08};
  static constexpr double kLog2[] = {0x1.62e42fefa3p-1, 2.8235290563031577e-13};
  static constexpr double kLowest = -708.0;
  static constexpr double kRounder = 0x1.8p52 + 1023;
  static constexpr int kMantissaBits = 52;
};

// exp(x) = 2^n exp(r) for x = n log(2) + r with |r| <= log(2) / 2.
template <typename T>
INTROKERNELS_INLINE Vec<T> exp(const Vec<T>& x) {
  using C = ExpConstants<T>;
  using UnsignedPart = typename Vec<std::make_unsigned_t<typename IntOf<T>::type>>::Part;
  const Vec<T> shifted =
      multiply_add(x, broadcast(T(1.4426950408889634074)), broadcast(C::kRounder));
  const Vec<T> n = shifted - broadcast(C::kRounder);
  Vec<T> r = x;
  for (const T part : C::kLog2) r = multiply_add(n, broadcast(-part), r);
  constexpr int kDegree = int(std::size(C::kCoefficients)) - 1;
  Vec<T> sum = broadcast(C::kCoefficients[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) {
    sum = multiply_add(sum, r, broadcast(C::kCoefficients[i]));
  }
  // The rounder's own bits vanish in the shift.
  const Vec<T> power = from_parts<T>([&](int i) {
    return typename Vec<T>::Part(UnsignedPart(shifted.part[i]) << C::kMantissaBits);
  });
  // A product, in which NaN stays NaN whatever its bits.
  return select(x < broadcast(C::kLowest), Vec<T>{}, sum * power);
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
