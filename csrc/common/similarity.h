// From explanation statistics to similarities. V is a backend's number type, see row_loss.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/inline.h"
#include "common/options.h"

namespace introkernels {

// The similarity of an explanation to the target's, clamped to [-1, 1]; 0 where a norm is 0.
template <typename V>
INTROKERNELS_INLINE V similarity_to_target(const V& dot, const V& sq_norm, const V& sq_norm_target,
                                           Similarity kind) {
  const V zero{}, one = V::of(1.0);
  const V infinity = V::of(std::numeric_limits<double>::infinity());
  // Two roots rather than the root of the product, which would underflow.
  const V scale =
      kind == Similarity::kCosine ? sqrt(sq_norm) * sqrt(sq_norm_target) : sq_norm_target;
  // A norm that overflowed says nothing of the angle; dot / inf would pass for a right one.
  const V s = select(scale == infinity, infinity - infinity, dot / scale);
  // In this order NaN passes.
  const V above = select(s < -one, -one, s);
  return select(scale == zero, zero, select(above > one, one, above));
}

// sqrt(x)^-1 from a guess that is good to d, good to 1.5 d^2: a step of Newton's method. A root and
// a division of floats, which make the guess, cost a fraction of those of doubles.
template <typename V>
INTROKERNELS_INLINE V refined_inverse_root(const V& x, const V& guess) {
  return guess * (V::of(1.5) - (V::of(0.5) * x) * (guess * guess));
}

// What split labels add to the teacher logits of the classes other than the target, once their
// largest is taken away, and the target's own logit.
struct SplitLogits {
  double shift_of_others;
  double of_target;
};

// Labels at T of 1 - mass at the target and mass shared out among the others, as the sum of
// exp((t_c - max) / T) over those that have a label says.
INTROKERNELS_INLINE SplitLogits split_logits(bool has_others, double sum_of_others, bool has_target,
                                             const LabelOptions& options) {
  // Where one of the two sides does not exist, the other one holds all of the mass.
  const double mass = !has_others ? 0.0 : !has_target ? 1.0 : options.non_target_mass;
  const double of_others = has_others
                               ? options.temperature * (std::log(mass) - std::log(sum_of_others))
                               : -std::numeric_limits<double>::infinity();
  const double of_target = options.temperature * std::log1p(-mass);
  const double largest = of_others > of_target ? of_others : of_target;
  return {of_others - largest, of_target - largest};
}

}  // namespace introkernels
