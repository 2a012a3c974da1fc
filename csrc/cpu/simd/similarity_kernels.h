// Teacher logits from a row's explanations, and what split soft labels add up.
#pragma once

#include "common/similarity.h"
#include "cpu/kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/numbers.h"
#include "cpu/simd/row_kernels.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

// Cosines of 16 classes whose squared norms all lie in the range of float; false where not.
INTROKERNELS_INLINE bool fast_cosines(const double* dots, const double* sq_norms,
                                      double inverse_norm_target, Double* lower, Double* upper) {
  const Double first = load(sq_norms), second = load(sq_norms + Double::kLanes);
  const Double least = Double::of(1e-30), most = Double::of(1e30);
  const Int<double> in_range =
      (first > least) & (first < most) & (second > least) & (second < most);
  if (!all(in_range)) return false;
  const Float guess = Float::of(1.0) / sqrt(in_float(first, second));
  const Double target = broadcast(inverse_norm_target);
  const auto cosines = [&](const double* dot, const Double& inverse_norm)
                           __attribute__((always_inline)) {
                             const Double s = load(dot) * (inverse_norm * target);
                             // In this order NaN passes.
                             return max(Double::of(-1.0), -max(Double::of(-1.0), -s));
                           };
  *lower = cosines(dots, refined_inverse_root(first, half_in_double<0>(guess)));
  *upper = cosines(dots + Double::kLanes, refined_inverse_root(second, half_in_double<1>(guess)));
  return true;
}

// In double for every T: statistics are, and small angles show in the last digits of a float.
template <typename T>
void teacher_logits(const double* dots, const double* sq_norms, int64_t count,
                    double sq_norm_target, Similarity kind, double temperature, T* out) {
  const Double target = broadcast(sq_norm_target), factor = broadcast(1 / temperature);
  const auto logits_of = [&](const Double& s) __attribute__((always_inline)) {
    return (s - Double::of(1.0)) * factor;
  };
  const auto similarities_at = [&](int64_t k) __attribute__((always_inline)) {
    const int64_t rest = std::clamp<int64_t>(count - k, 0, Double::kLanes);
    const bool full = rest == Double::kLanes;
    const Double dot = full ? load(dots + k) : load_first(dots + k, rest, 0.0);
    const Double sq_norm = full ? load(sq_norms + k) : load_first(sq_norms + k, rest, 0.0);
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
          sum.add(select(lanes_of<T>(c, target), Vec<T>{}, exp((v - top) * inverse_temperature)));
        });
    sum.end_block();
  }
  return sum.total();
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
