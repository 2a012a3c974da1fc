// Exponentials of vectors, for arguments <= 0 (a softmax never needs others; up to rounding they
// may be a little above). Relative error below 2 units in the last place; results below the
// smallest normal number are 0; NaN stays NaN.
#pragma once

#include "cpu/simd/vec.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

template <typename T>
struct ExpConstants;

// `coefficients` are those of the polynomial that interpolates (exp(r) - 1 - r) / r^2 at Chebyshev
// nodes of |r| <= log(2) / 2, from the constant upwards; it errs by 1e-8 (float) and 2e-17 (double)
// of exp(r). log(2) is split so that n * ln2_high is exact.
template <>
struct ExpConstants<float> {
  static constexpr float kCoefficients[] = {0.5F, 0.16666576F, 0.041666556F, 0.008363203F,
                                            0.0013926213F};
  static constexpr float kLog2High = 0x1.62e4p-1F;
  static constexpr float kLog2Low = 1.4286068e-6F;
  static constexpr float kLowest = -87.0F;  // exp(-87) is the last normal number, roughly
  // Adding it rounds to an integer n, and leaves the exponent of 2^n in the last bits.
  static constexpr float kRounder = 0x1.8p23F + 127;
  static constexpr int kMantissaBits = 23;
};
template <>
struct ExpConstants<double> {
  static constexpr double kCoefficients[] = {0.5,
                                             0.16666666666666669,
                                             0.04166666666662399,
                                             0.008333333333330051,
                                             0.0013888888917281794,
                                             0.00019841269863105968,
                                             2.480152119021773e-05,
                                             2.7557268378684192e-06,
                                             2.7620138719733994e-07,
                                             2.5100424157005067e-08};
  static constexpr double kLog2High = 0x1.62e42fefa3p-1;
  static constexpr double kLog2Low = 2.8235290563031577e-13;
  static constexpr double kLowest = -708.0;
  static constexpr double kRounder = 0x1.8p52 + 1023;
  static constexpr int kMantissaBits = 52;
};

// x = n log(2) + r with |r| <= log(2) / 2, and exp(r) = 1 + r + rest; for x >= kLowest.
template <typename T>
struct Reduced {
  Vec<T> r;
  Vec<T> rest;
  Vec<T> power;  // 2^n
};

template <typename T>
INTROKERNELS_INLINE Reduced<T> reduce(const Vec<T>& x) {
  using C = ExpConstants<T>;
  using UnsignedPart = typename Vec<std::make_unsigned_t<typename IntOf<T>::type>>::Part;
  const Vec<T> shifted =
      multiply_add(x, broadcast(T(1.4426950408889634074)), broadcast(C::kRounder));
  const Vec<T> n = shifted - broadcast(C::kRounder);
  Reduced<T> result;
  result.r = multiply_add(n, broadcast(-C::kLog2Low), multiply_add(n, broadcast(-C::kLog2High), x));
  constexpr int kDegree = int(std::size(C::kCoefficients)) - 1;
  Vec<T> sum = broadcast(C::kCoefficients[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) {
    sum = multiply_add(sum, result.r, broadcast(C::kCoefficients[i]));
  }
  result.rest = (result.r * result.r) * sum;
  // The rounder's own bits vanish in the shift.
  result.power = from_parts<T>([&](int i) {
    return typename Vec<T>::Part(UnsignedPart(shifted.part[i]) << C::kMantissaBits);
  });
  return result;
}

template <typename T>
INTROKERNELS_INLINE Vec<T> exp(const Vec<T>& x) {
  const Reduced<T> reduced = reduce(x);
  // A product, in which NaN stays NaN whatever its bits.
  const Vec<T> result = (broadcast(T(1)) + (reduced.r + reduced.rest)) * reduced.power;
  return select(x < broadcast(ExpConstants<T>::kLowest), Vec<T>{}, result);
}

// What a divergence needs of x <= 0, each to full relative precision, also where x is almost 0.
template <typename T>
struct ExpMinus {
  Vec<T> expm1;              // exp(x) - 1
  Vec<T> expm1_minus_x;      // exp(x) - 1 - x
  Vec<T> x_exp_minus_expm1;  // x exp(x) - (exp(x) - 1)
};

template <typename T>
INTROKERNELS_INLINE ExpMinus<T> exp_minus(const Vec<T>& x) {
  // In this order NaN passes.
  const Vec<T> clamped = max(broadcast(ExpConstants<T>::kLowest), x);
  const Reduced<T> reduced = reduce(clamped);
  const Vec<T> expm1_of_r = reduced.r + reduced.rest;
  const Vec<T> exp_of_x = (broadcast(T(1)) + expm1_of_r) * reduced.power;
  // Where n is 0, x is r.
  const Int<T> is_small = reduced.power == broadcast(T(1));
  ExpMinus<T> result;
  result.expm1 = select(is_small, expm1_of_r, exp_of_x - broadcast(T(1)));
  result.expm1_minus_x = select(is_small, reduced.rest, result.expm1 - x);
  result.x_exp_minus_expm1 =
      select(is_small, clamped * result.expm1 - reduced.rest, clamped * exp_of_x - result.expm1);
  return result;
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
