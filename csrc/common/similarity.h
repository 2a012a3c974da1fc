// From explanation statistics to teacher logits. S is float or double.
#pragma once

#include <cmath>
#include <limits>

#include "common/inline.h"
#include "common/options.h"

namespace introkernels {

// The similarity of an explanation to the target's, clamped to [-1, 1]; 0 where a norm is 0.
template <typename S>
INTROKERNELS_INLINE S similarity_to_target(S dot, S sq_norm, S sq_norm_target, Similarity kind) {
  constexpr S kInfinity = std::numeric_limits<S>::infinity();
  // Two roots rather than the root of the product, which would underflow.
  const S scale =
      kind == Similarity::kCosine ? std::sqrt(sq_norm) * std::sqrt(sq_norm_target) : sq_norm_target;
  // A norm that overflowed says nothing of the angle; dot / inf would pass for a right one.
  const S s = scale == kInfinity ? kInfinity - kInfinity : dot / scale;
  // In this order NaN passes.
  const S above = s < S(-1) ? S(-1) : s;
  const S clamped = above > S(1) ? S(1) : above;
  return scale == S(0) ? S(0) : clamped;
}

}  // namespace introkernels
