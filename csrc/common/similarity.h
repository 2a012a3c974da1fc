// From explanation statistics to teacher logits: t_c = s_c / tau, whose softmax at T are the soft
// labels of label_mode="softmax". Those of label_mode="split" are given as T log q_c, so that the
// same softmax makes them and one row loss serves both.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/options.h"

namespace introkernels {

// The similarity of an explanation to the target's, clamped to [-1, 1]; 0 where a norm is 0.
template <typename Real>
inline Real similarity_to_target(Real dot, Real sq_norm, Real sq_norm_target, Similarity kind) {
  // Two roots rather than the root of the product, which would underflow.
  const Real scale =
      kind == Similarity::kCosine ? std::sqrt(sq_norm) * std::sqrt(sq_norm_target) : sq_norm_target;
  if (scale == Real(0)) return Real(0);
  // A norm that overflowed says nothing of the angle; dot / inf would pass for a right one.
  if (std::isinf(scale)) return std::numeric_limits<Real>::quiet_NaN();
  const Real s = dot / scale;
  // Written so that NaN passes through.
  return s < Real(-1) ? Real(-1) : (s > Real(1) ? Real(1) : s);
}

// Teacher logits of one row over all num_classes classes: -inf where a class does not exist
// (logits[c] is -inf), was not explained, or has no soft label.
//
// dots, sq_norms: [num_explained]; class_index: [num_explained] or null for all classes in order.
template <typename Real>
void teacher_logits_of_stats(const Real* dots, const Real* sq_norms, const int64_t* class_index,
                             int64_t num_explained, const Real* logits, int64_t num_classes,
                             int64_t target, const LabelOptions& options, Real* teacher) {
  constexpr Real kNever = -std::numeric_limits<Real>::infinity();
  for (int64_t c = 0; c < num_classes; ++c) teacher[c] = kNever;

  Real sq_norm_target = Real(0);
  for (int64_t k = 0; k < num_explained; ++k) {
    if ((class_index ? class_index[k] : k) == target) sq_norm_target = sq_norms[k];
  }
  const Real tau = Real(options.similarity_temperature);
  bool has_target = false;
  bool has_others = false;
  Real top = kNever;
  for (int64_t k = 0; k < num_explained; ++k) {
    const int64_t c = class_index ? class_index[k] : k;
    if (logits[c] == kNever) continue;
    if (c == target) {
      teacher[c] = Real(1) / tau;
      has_target = true;
      continue;
    }
    teacher[c] =
        similarity_to_target(dots[k], sq_norms[k], sq_norm_target, options.similarity) / tau;
    has_others = true;
    if (teacher[c] > top) top = teacher[c];
  }
  if (options.label_mode == LabelMode::kSoftmax) return;

  const Real temperature = Real(options.temperature);
  Real sum = Real(0);
  for (int64_t c = 0; c < num_classes; ++c) {
    if (c != target && teacher[c] != kNever) sum += std::exp((teacher[c] - top) / temperature);
  }
  // Where one of the two sides does not exist, the other one holds all of the mass.
  const Real mass = !has_others ? Real(0) : !has_target ? Real(1) : Real(options.non_target_mass);
  const Real shift = temperature * (std::log(mass) - std::log(sum)) - top;
  for (int64_t c = 0; c < num_classes; ++c) {
    if (c != target && teacher[c] != kNever) teacher[c] += shift;
  }
  if (has_target) teacher[target] = temperature * std::log1p(-mass);
}

}  // namespace introkernels
