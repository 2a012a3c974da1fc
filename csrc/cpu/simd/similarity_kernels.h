// Teacher logits from a row's explanations, and what split soft labels add up.
#pragma once

#include "common/similarity.h"
#include "cpu/kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/numbers.h"
#include "cpu/simd/row_kernels.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

// Cosines of 16 classes whose squared norms all lie in the range of float; false where not. S is
// the type of the statistics.
template <typename S>
INTROKERNELS_INLINE bool fast_cosines(const S* dots, const S* sq_norms, double inverse_norm_target,
                                      Double* lower, Double* upper) {
  Float guess;
  Double first, second, first_dots, second_dots;
  const Vec<S> least = Vec<S>::of(1e-30), most = Vec<S>::of(1e30);
  if constexpr (sizeof(S) == sizeof(float)) {
    const Float both = load(sq_norms), both_dots = load(dots);
    if (!all((both > least) & (both < most))) return false;
    guess = Float::of(1.0) / sqrt(both);
    first = half_in_double<0>(both);
    second = half_in_double<1>(both);
    first_dots = half_in_double<0>(both_dots);
    second_dots = half_in_double<1>(both_dots);
  } else {
    first = load(sq_norms);
    second = load(sq_norms + Double::kLanes);
    if (!all((first > least) & (first < most) & (second > least) & (second < most))) return false;
    guess = Float::of(1.0) / sqrt(in_float(first, second));
    first_dots = load(dots);
    second_dots = load(dots + Double::kLanes);
  }
  const Double target = broadcast(inverse_norm_target);
  const auto cosines = [&](const Double& dot,
                           const Double& inverse_norm) __attribute__((always_inline)) {
    // In this order NaN passes.
    return max(Double::of(-1.0), min(Double::of(1.0), dot * (inverse_norm * target)));
  };
  *lower = cosines(first_dots, refined_inverse_root(first, half_in_double<0>(guess)));
  *upper = cosines(second_dots, refined_inverse_root(second, half_in_double<1>(guess)));
  return true;
}

// In double for every T: statistics may be, and small angles show in the last digits of a float.
template <typename S, typename T>
void teacher_logits(const S* dots, const S* sq_norms, int64_t count, double sq_norm_target,
                    Similarity kind, double temperature, T* out) {
  const Double target = broadcast(sq_norm_target), factor = broadcast(1 / temperature);
  const auto logits_of = [&](const Double& s) __attribute__((always_inline)) {
    return (s - Double::of(1.0)) * factor;
  };
  const auto similarities_at = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t rest = std::clamp<int64_t>(count - k, 0, Double::kLanes);
    const bool full = rest == Double::kLanes;
    const Double dot = full ? load_as<double>(dots + k) : load_first_as<double>(dots + k, rest);
    const Double sq_norm =
        full ? load_as<double>(sq_norms + k) : load_first_as<double>(sq_norms + k, rest);
    return similarity_to_target(dot, sq_norm, target, kind);
  };
  const bool may_be_fast = sizeof(T) == sizeof(float) && kind == Similarity::kCosine &&
                           sq_norm_target > 1e-30 && sq_norm_target < 1e30;
  const double inverse_norm_target = 1 / std::sqrt(sq_norm_target);
  for (int64_t k = 0; k < count; k += Vec<T>::kLanes) {
    Vec<T> logits;
    if constexpr (sizeof(T) == sizeof(float)) {
      Double lower, upper;
      if (!may_be_fast || k + Float::kLanes > count ||
          !fast_cosines(dots + k, sq_norms + k, inverse_norm_target, &lower, &upper)) {
        lower = similarities_at(k);
        upper = similarities_at(k + Double::kLanes);
      }
      logits = in_float(logits_of(lower), logits_of(upper));
    } else {
      logits = logits_of(similarities_at(k));
    }
    if (k + Vec<T>::kLanes <= count) {
      store(out + k, logits);
    } else {
      store_first(out + k, count - k, logits);
    }
  }
}

template <typename T>
double sum_exp_without(const T* values, int64_t count, int64_t target, double max,
                       double temperature) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const Vec<T> top = broadcast(T(max)), inverse_temperature = broadcast(T(1 / temperature));
  Sum<T> sum;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    for_each_vector<T>(
        begin, std::min(begin + kBlock, count),
        [&](int64_t c, const auto& read, const auto&) __attribute__((always_inline)) {
          const Vec<T> v = read(values, kNever);
          const Vec<T> e = exp((v - top) * inverse_temperature);
          sum.add(holds<T>(c, target) ? select(lane_of<T>(c, target), Vec<T>{}, e) : e);
        });
    sum.end_block();
  }
  return sum.total();
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
