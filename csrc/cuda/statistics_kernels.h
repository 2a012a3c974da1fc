// The choice among the kernels that find statistics.
#pragma once

#include "cuda/explanations.h"
#include "cuda/number.h"

namespace introkernels::cuda {

// Calls start.operator()<S>() for the type of the gradients.
template <typename Start>
void with_gradient_type(const Explanations& explanations, const Start& start) {
  switch (explanations.gradient_type) {
    case NumberType::kFloat64:
      return start.template operator()<double>();
    case NumberType::kFloat32:
      return start.template operator()<float>();
    case NumberType::kBFloat16:
      return start.template operator()<BFloat16>();
    case NumberType::kFloat16:
      return start.template operator()<Float16>();
  }
}

// Calls start.operator()<S, kVectors, kCenter>() for the type of the gradients and how to read
// them.
template <typename Start>
void with_kernel(const Explanations& explanations, const StatisticsPlan& plan, const Start& start) {
  const auto with_center = [&]<typename S, bool kVectors>() {
    if (explanations.center) {
      start.template operator()<S, kVectors, true>();
    } else {
      start.template operator()<S, kVectors, false>();
    }
  };
  const auto with_type = [&]<typename S>() {
    if (plan.in_vectors) {
      with_center.template operator()<S, true>();
    } else {
      with_center.template operator()<S, false>();
    }
  };
  with_gradient_type(explanations, with_type);
}

}  // namespace introkernels::cuda
