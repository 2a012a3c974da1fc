// The loss of one row and its gradient, from its logits and its teacher logits.
//
// A class whose logit is -inf does not exist: it has no probability, no soft label and no part in
// label smoothing. A teacher logit of -inf means that the class has no soft label; a row without
// any soft label has nothing to diverge from, and its KL is 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/options.h"

namespace introkernels {

// What a forward keeps of a row for its backward. Norms are relative to the row's largest logit:
// p_c = exp((z_c - max) - log_norm) loses nothing to a shift common to all logits.
struct RowState {
  double max;              // of the logits
  double log_norm;         // log sum exp(z - max)
  double log_norm_t;       // log sum exp((z - max) / T)
  double teacher_max;      // of the teacher logits
  double teacher_norm_t;   // log sum exp((t - teacher_max) / T)
  double nll;              // -log p_y
  double smoothing_share;  // label_smoothing / number of classes that exist
  double weight_sum;       // of the class weights of the classes that exist
};

// The two terms of a row's loss, without their weights and T^2.
struct RowTerms {
  double ce;
  double kl;
};

// log q_c - log p_c, both softmaxes at T.
template <typename Real>
inline Real log_ratio(Real z, Real t, const RowState& row, Real temperature) {
  const Real teacher_minus_logit = (t - Real(row.teacher_max)) - (z - Real(row.max));
  return teacher_minus_logit / temperature - Real(row.teacher_norm_t - row.log_norm_t);
}

// p_c - q_c; where the two are close, their difference would cancel and is -p expm1(log q - log p).
template <typename Real>
inline Real p_minus_q(Real p, Real q, Real log_q_minus_log_p) {
  if (std::abs(log_q_minus_log_p) < Real(1)) return -p * std::expm1(log_q_minus_log_p);
  return p - q;
}

template <typename Real>
class RowLoss {
 public:
  // class_weight: [num_classes], or null for ones. It must outlive this object.
  RowLoss(const LossOptions& options, const Real* class_weight, int64_t num_classes)
      : options_(options), class_weight_(class_weight), num_classes_(num_classes) {}

  RowTerms forward(const Real* z, const Real* t, int64_t target, RowState* row) const {
    const Real temperature = Real(options_.temperature);
    Real max = kNever;
    Real teacher_max = kNever;
    for (int64_t c = 0; c < num_classes_; ++c) {
      if (z[c] > max) max = z[c];
      if (z[c] != kNever && t[c] > teacher_max) teacher_max = t[c];
    }
    if (max == kNever) max = Real(0);
    if (teacher_max == kNever) teacher_max = Real(0);

    // The target stays out of the sum, so that -log p_y = log(1 + others / e_y) keeps its relative
    // precision where p_y is almost 1.
    Real others = Real(0), at_target = Real(0), sum_t = Real(0), teacher_sum_t = Real(0);
    Real weight_sum = Real(0), weighted_logits = Real(0);
    int64_t num_existing = 0, num_labelled = 0;
    for (int64_t c = 0; c < num_classes_; ++c) {
      if (z[c] == kNever) continue;
      const Real shifted = z[c] - max;
      const Real e = std::exp(shifted);
      if (c == target) {
        at_target = e;
      } else {
        others += e;
      }
      sum_t += std::exp(shifted / temperature);
      weight_sum += weight(c);
      weighted_logits += weight(c) * shifted;
      ++num_existing;
      if (t[c] == kNever) continue;
      teacher_sum_t += std::exp((t[c] - teacher_max) / temperature);
      ++num_labelled;
    }

    row->max = max;
    row->log_norm = std::log(others + at_target);
    row->log_norm_t = std::log(sum_t);
    row->teacher_max = teacher_max;
    row->teacher_norm_t = std::log(teacher_sum_t);
    const bool has_target = z[target] != kNever;
    row->nll = !has_target          ? Real(row->log_norm)
               : at_target > others ? std::log1p(others / at_target)
                                    : Real(row->log_norm) - (z[target] - max);
    row->smoothing_share = options_.label_smoothing / double(num_existing > 0 ? num_existing : 1);
    row->weight_sum = weight_sum;
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    if (num_existing == 0) return {kInfinity, 0.0};

    double ce = weight(target) * row->nll;
    if (options_.label_smoothing > 0) {
      const double nll_of_all = weight_sum * row->log_norm - weighted_logits;
      ce = (1 - options_.label_smoothing) * ce + row->smoothing_share * nll_of_all;
    }
    // The infinity of a target that does not exist comes last, so that no weight of zero turns it
    // into NaN.
    if (!has_target) ce += kInfinity;
    return {ce, num_labelled > 0 ? divergence(z, t, *row) : 0.0};
  }

  // The gradient of ce_scale * CE + kl_scale * KL * T in the logits, T times that of the KL.
  void backward(const Real* z, const Real* t, int64_t target, const RowState& row, Real ce_scale,
                Real kl_scale, Real* grad) const {
    const Real temperature = Real(options_.temperature);
    const Real smoothing = Real(options_.label_smoothing);
    const Real share = Real(row.smoothing_share);
    const Real target_scale = (Real(1) - smoothing) * weight(target);
    for (int64_t c = 0; c < num_classes_; ++c) {
      if (z[c] == kNever) {
        grad[c] = Real(0);
        continue;
      }
      const Real shifted = z[c] - Real(row.max);
      const Real p = std::exp(shifted - Real(row.log_norm));
      // p_y - 1 from the loss itself: the difference would cancel where p_y is almost 1.
      const Real p_minus_target = c == target ? std::expm1(-Real(row.nll)) : p;
      Real grad_ce = target_scale * p_minus_target;
      if (smoothing > Real(0)) grad_ce += share * (Real(row.weight_sum) * p - weight(c));

      const Real p_t = std::exp(shifted / temperature - Real(row.log_norm_t));
      Real grad_kl = p_t;
      if (t[c] != kNever) {
        const Real ratio = log_ratio(z[c], t[c], row, temperature);
        const Real scaled_teacher = (t[c] - Real(row.teacher_max)) / temperature;
        const Real q = std::exp(scaled_teacher - Real(row.teacher_norm_t));
        grad_kl = p_minus_q(p_t, q, ratio);
      } else if (row.teacher_norm_t == double(kNever)) {
        grad_kl = Real(0);
      }
      grad[c] = options_.kl_weight > 0 ? kl_scale * temperature * grad_kl : Real(0);
      if (options_.ce_weight > 0) grad[c] += ce_scale * grad_ce;
    }
  }

  bool ignores(int64_t target) const { return target == options_.ignore_index; }
  Real weight(int64_t c) const { return class_weight_ ? class_weight_[c] : Real(1); }

 private:
  static constexpr Real kNever = -std::numeric_limits<Real>::infinity();

  // KL(q || p) = sum of q d - (q - p) with d = log q - log p: as both distributions sum to one,
  // taking q - p away changes nothing, but makes every term >= 0, so that nothing cancels where q
  // is close to p.
  Real divergence(const Real* z, const Real* t, const RowState& row) const {
    const Real temperature = Real(options_.temperature);
    Real sum = Real(0);
    for (int64_t c = 0; c < num_classes_; ++c) {
      if (z[c] == kNever) continue;
      const Real p = std::exp((z[c] - Real(row.max)) / temperature - Real(row.log_norm_t));
      if (t[c] == kNever) {
        sum += p;
        continue;
      }
      const Real ratio = log_ratio(z[c], t[c], row, temperature);
      const Real scaled_teacher = (t[c] - Real(row.teacher_max)) / temperature;
      const Real q = std::exp(scaled_teacher - Real(row.teacher_norm_t));
      sum += (q == Real(0) ? Real(0) : q * ratio) + p_minus_q(p, q, ratio);
    }
    return sum;
  }

  LossOptions options_;
  const Real* class_weight_;
  int64_t num_classes_;
};

}  // namespace introkernels
