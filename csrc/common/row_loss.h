// The loss of one row and its gradient, from its logits z and its teacher logits t: what CPU
// vectors and GPU threads compute alike.
//
// A class whose logit is -inf does not exist: it has no probability, no soft label and no part in
// label smoothing. A teacher logit of -inf means that the class has no soft label.
//
// V is the number type of a backend, a vector of lanes or one number, with the usual operators and
// exp, exp_minus, select, max, abs beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/inline.h"
#include "common/options.h"

namespace introkernels {

// What a forward keeps of a row for its backward. Norms are relative to the row's largest logit, so
// that nothing is lost to a shift common to all logits.
struct RowState {
  double max;             // of the logits
  double norm;            // sum exp(z - max)
  double norm_t;          // sum exp((z - max) / T)
  double teacher_max;     // of the teacher logits of classes that exist
  double teacher_norm_t;  // sum exp((t - teacher_max) / T); 0 where no class has a soft label
  // log q_c - log p_c = ((t_c - teacher_max) - (z_c - max)) / T - ratio_shift
  double ratio_shift;
  double nll;              // -log p_y
  double smoothing_share;  // label_smoothing / number of classes that exist
  double weight_sum;       // of the class weights of the classes that exist
};

// The two terms of a row's loss, without their weights and T^2.
struct RowTerms {
  double ce;
  double kl;
};

// The loss of these terms. A term that is switched off can't spoil it: 0 * inf would be NaN.
INTROKERNELS_INLINE double combine(const RowTerms& terms, const LossOptions& options) {
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

// What a pass over a row whose maxima are known adds up.
struct RowSums {
  // The target stays out of the sum, so that -log p_y = log(1 + others / e_y) keeps its relative
  // precision where p_y is almost 1.
  double others;
  double at_target;
  double sum_t;
  double teacher_sum_t;
  // Read with class weights or label smoothing only.
  double num_existing;
  double weight_sum;
  double weighted_logits;  // sum of weight_c (z_c - max)

  // Of another part of the same row.
  INTROKERNELS_INLINE void add(const RowSums& other) {
    others += other.others;
    at_target += other.at_target;
    sum_t += other.sum_t;
    teacher_sum_t += other.teacher_sum_t;
    num_existing += other.num_existing;
    weight_sum += other.weight_sum;
    weighted_logits += other.weighted_logits;
  }
};

// The cross entropy of a row whose target has the given logit and weight. state->max and
// state->teacher_max are known; this fills in the rest.
INTROKERNELS_INLINE double finish_row(const RowSums& sums, double target_logit,
                                      double target_weight, const LossOptions& options,
                                      RowState* row) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  row->norm = sums.others + sums.at_target;
  row->norm_t = sums.sum_t;
  row->teacher_norm_t = sums.teacher_sum_t;
  // Without any soft label there is no q, and -inf - shift has to stay -inf.
  row->ratio_shift = sums.teacher_sum_t == 0 ? 0.0 : std::log(sums.teacher_sum_t / sums.sum_t);
  const bool has_target = target_logit != -kInfinity;
  const double log_norm = std::log(row->norm);
  row->nll = !has_target                    ? log_norm
             : sums.at_target > sums.others ? std::log1p(sums.others / sums.at_target)
                                            : log_norm - (target_logit - row->max);
  row->smoothing_share =
      options.label_smoothing / (sums.num_existing > 0 ? sums.num_existing : 1.0);
  row->weight_sum = sums.weight_sum;
  if (row->norm == 0) return kInfinity;  // no class exists

  double ce = target_weight * row->nll;
  if (options.label_smoothing > 0) {
    const double nll_of_all = sums.weight_sum * log_norm - sums.weighted_logits;
    ce = (1 - options.label_smoothing) * ce + row->smoothing_share * nll_of_all;
  }
  // The infinity of a target that does not exist comes last, so that no weight of zero turns it
  // into NaN.
  return has_target ? ce : ce + kInfinity;
}

// Sums over the classes of what SoftmaxPair::divergence gives.
struct DivergenceSums {
  double divergence;
  double excess;

  INTROKERNELS_INLINE void add(const DivergenceSums& other) {
    divergence += other.divergence;
    excess += other.excess;
  }
};

// E / (1 + E) - log(1 + E), which is about -E^2 / 2.
INTROKERNELS_INLINE double shift_correction(double excess) {
  if (std::abs(excess) >= 1e-3) return excess / (1 + excess) - std::log1p(excess);
  // Its series, which errs by less than 1e-24 here.
  double sum = 6.0 / 7.0;
  sum = sum * excess - 5.0 / 6.0;
  sum = sum * excess + 4.0 / 5.0;
  sum = sum * excess - 3.0 / 4.0;
  sum = sum * excess + 2.0 / 3.0;
  sum = sum * excess - 1.0 / 2.0;
  return excess * excess * sum;
}

// KL(q || p) from the sums over a row, and the last digits of state->ratio_shift.
//
// The shift is as good as the sums of exponentials it is made of, which is little where q is almost
// p. But both distributions sum to one: the excess E = sum of q - p tells how far the shift was
// off, log(1 + E), and with that taken back
//   KL = (D + E) / (1 + E) - log(1 + E),  D the sum of the parts that were computed.
INTROKERNELS_INLINE double finish_divergence(const DivergenceSums& sums, RowState* state) {
  const double excess = sums.excess;
  state->ratio_shift += std::log1p(excess);
  return sums.divergence / (1 + excess) + shift_correction(excess);
}

// p and q of a class, the two softmaxes at T, through the larger one of them and log q - log p,
// where the logits' differences did not cancel. What is made of them keeps its relative precision
// around p = q; a class without a soft label has a ratio of -inf.
template <typename V>
struct SoftmaxPair {
  V log_ratio;
  V larger;

  // p - q.
  INTROKERNELS_INLINE V difference() const {
    const V distance = larger * exp_minus(-abs(log_ratio)).expm1;
    return select(log_ratio > V{}, distance, -distance);
  }

  struct Divergence {
    V divergence;  // q d - (q - p) with d = log q - log p
    V excess;      // q - p
  };

  // A class's part of KL(q || p) = sum of q d - (q - p): as both sum to one, taking q - p away
  // changes nothing, but makes every part >= 0, so that nothing cancels.
  INTROKERNELS_INLINE Divergence divergence() const {
    const auto parts = exp_minus(-abs(log_ratio));
    const V distance = larger * parts.expm1;
    const auto teacher_is_larger = log_ratio > V{};
    return {larger * select(teacher_is_larger, parts.expm1_minus_x, parts.x_exp_minus_expm1),
            select(teacher_is_larger, -distance, distance)};
  }
};

}  // namespace introkernels
