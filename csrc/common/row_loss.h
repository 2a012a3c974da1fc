// The loss of one row and its gradient, from its logits z and its teacher logits t.
//
// A part of a row (vectors of a thread, a block of classes, the share of a thread) is summed up in
// a few numbers relative to its own largest logits, and two parts merge by rescaling to the larger
// ones. All that a loss and its gradient need of a row is made of the merged numbers.
//
// A class whose logit is -inf does not exist: it has no probability, no soft label and no part in
// label smoothing. A teacher logit of -inf means that the class has no soft label.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/inline.h"
#include "common/options.h"

namespace introkernels {

// The two terms of a row's loss, without their weights and T^2.
struct RowTerms {
  double ce;
  double kl;
};

// The loss of these terms. A term that is switched off can't spoil it: 0 * inf would be NaN.
INTROKERNELS_INLINE double combine(const RowTerms& terms, const Options& options) {
  const double kl_factor = options.kl_weight * options.temperature * options.temperature;
  const double kl = options.kl_weight > 0 ? kl_factor * terms.kl : 0.0;
  const double ce = options.ce_weight > 0 ? options.ce_weight * terms.ce : 0.0;
  return kl + ce;
}

// What the mean of the cross entropy is divided by. A sum of 0 leaves nothing to divide by: NaN, as
// in F.cross_entropy, and not the infinity that label smoothing would make of it.
INTROKERNELS_INLINE double total_weight(double sum_of_target_weights) {
  return sum_of_target_weights == 0 ? std::numeric_limits<double>::quiet_NaN()
                                    : sum_of_target_weights;
}

// A part of a row, or all of it; also what a forward keeps of a row for its backward.
struct RowSums {
  double z_max;        // -inf where no class exists
  double t_max;        // of classes that exist; -inf where none of them has a soft label
  double sum;          // sum of exp(z - z_max)
  double sum_t;        // sum of exp((z - z_max) / T)
  double teacher_sum;  // sum of exp((t - t_max) / T)
  double cross;        // sum of exp((t - t_max) / T) ((t - t_max) - (z - z_max)) / T
  // With class weights or label smoothing only, of the classes that exist:
  double num_existing;
  double weight_sum;
  double weighted_logits;  // sum of weight (z - z_max)

  // Those of no class.
  static INTROKERNELS_INLINE RowSums none() {
    constexpr double kNever = -std::numeric_limits<double>::infinity();
    return {kNever, kNever, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
  }

  // The same classes, relative to larger references.
  INTROKERNELS_INLINE RowSums relative_to(double new_z_max, double new_t_max,
                                          double temperature) const {
    // The difference of two infinities is none.
    const double z_step = z_max == new_z_max ? 0.0 : z_max - new_z_max;
    const double t_step = t_max == new_t_max ? 0.0 : t_max - new_t_max;
    if (z_step == 0 && t_step == 0) return *this;
    const double inverse = 1 / temperature;
    const double teacher_scale = std::exp(t_step * inverse);
    RowSums moved = *this;
    moved.z_max = new_z_max;
    moved.t_max = new_t_max;
    moved.sum *= std::exp(z_step);
    moved.sum_t *= std::exp(z_step * inverse);
    moved.teacher_sum *= teacher_scale;
    // Where nothing is left of a part, a step may be infinite.
    moved.cross = moved.teacher_sum == 0
                      ? 0.0
                      : teacher_scale * (cross + teacher_sum * ((t_step - z_step) * inverse));
    if (weight_sum != 0) moved.weighted_logits += weight_sum * z_step;
    return moved;
  }

  // More classes, relative to the same references.
  INTROKERNELS_INLINE void add(const RowSums& other) {
    sum += other.sum;
    sum_t += other.sum_t;
    teacher_sum += other.teacher_sum;
    cross += other.cross;
    num_existing += other.num_existing;
    weight_sum += other.weight_sum;
    weighted_logits += other.weighted_logits;
  }
};

// Two parts of a row as one.
INTROKERNELS_INLINE RowSums merge(const RowSums& a, const RowSums& b, double temperature) {
  const double z_max = a.z_max > b.z_max ? a.z_max : b.z_max;
  const double t_max = a.t_max > b.t_max ? a.t_max : b.t_max;
  RowSums merged = a.relative_to(z_max, t_max, temperature);
  merged.add(b.relative_to(z_max, t_max, temperature));
  return merged;
}

// The terms of a row whose target has the given logit and weight. A teacher that excludes every
// class is no distribution: its KL is NaN.
INTROKERNELS_INLINE RowTerms terms_of(const RowSums& row, double target_logit, double target_weight,
                                      const Options& options) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (row.sum == 0) return {kInfinity, 0.0};  // no class exists
  const double log_sum = std::log(row.sum);
  const bool has_target = target_logit != -kInfinity;
  double ce = has_target ? target_weight * (log_sum - (target_logit - row.z_max)) : 0.0;
  if (options.label_smoothing > 0) {
    const double ce_of_all = row.weight_sum * log_sum - row.weighted_logits;
    ce =
        (1 - options.label_smoothing) * ce + options.label_smoothing / row.num_existing * ce_of_all;
  }
  // The infinity of a target that does not exist comes last, so that no weight of zero turns it
  // into NaN.
  if (!has_target) ce += kInfinity;
  const double kl = row.teacher_sum == 0
                        ? std::numeric_limits<double>::quiet_NaN()
                        : row.cross / row.teacher_sum + std::log(row.sum_t / row.teacher_sum);
  return {ce, kl};
}

// What a row's gradient is made of: that of class c is
//   of_exp exp(z - z_max) - of_target [c = y] - of_weight weight_c
//   + of_exp_t exp((z - z_max) / T) - of_teacher exp((t - t_max) / T).
struct GradientFactors {
  double of_exp;
  double of_target;
  double of_weight;
  double of_exp_t;
  double of_teacher;
};

// The factors for ce_scale * CE + kl_scale * T^2 * KL.
INTROKERNELS_INLINE GradientFactors gradient_factors(const RowSums& row, double target_weight,
                                                     double ce_scale, double kl_scale,
                                                     const Options& options) {
  GradientFactors factors{};
  factors.of_target = ce_scale * (1 - options.label_smoothing) * target_weight;
  if (options.label_smoothing > 0) {
    factors.of_weight = ce_scale * options.label_smoothing / row.num_existing;
  }
  factors.of_exp = (factors.of_target + factors.of_weight * row.weight_sum) / row.sum;
  if (kl_scale != 0) {
    const double kl = kl_scale * options.temperature;
    // Without a soft label 0 / 0: NaN, as the KL.
    factors.of_exp_t = kl / row.sum_t * (row.teacher_sum / row.teacher_sum);
    factors.of_teacher = kl / row.teacher_sum;
  }
  return factors;
}

}  // namespace introkernels
