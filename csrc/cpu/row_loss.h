// The loss of one row from its logits and its teacher logits, in parts that fit the cache.
#pragma once

#include <cstdint>

#include "common/row_loss.h"
#include "cpu/kernels.h"

namespace introkernels::cpu {

// Whether the parts of one row are shared out among threads: only where the call has fewer rows
// than there are threads. The parts are the same either way, and so are the bits.
enum class Spread { kOneThread, kAllThreads };

template <typename T>
class RowLoss {
 public:
  // class_weight: [num_classes], or null for ones; it must outlive this object.
  // kl_without_labels: the KL of a row in which no class has a soft label, 0 or NaN.
  RowLoss(const LossOptions& options, const T* class_weight, int64_t num_classes,
          double kl_without_labels = 0.0)
      : options_(options),
        class_weight_(class_weight),
        num_classes_(num_classes),
        kl_without_labels_(kl_without_labels),
        kernels_(kernels().of<T>()) {}

  RowTerms forward(const T* z, const T* t, int64_t target, Spread spread, RowState* state) const;

  // The gradient [num_classes] of ce_scale * CE + kl_scale * T * KL in the logits. It may take
  // their place.
  void backward(const T* z, const T* t, int64_t target, const RowState& state, double ce_scale,
                double kl_scale, Spread spread, T* grad) const;

  const LossOptions& options() const { return options_; }
  int64_t num_classes() const { return num_classes_; }
  bool ignores(int64_t target) const { return target == options_.ignore_index; }
  double weight(int64_t c) const { return class_weight_ ? double(class_weight_[c]) : 1.0; }

 private:
  LossOptions options_;
  const T* class_weight_;
  int64_t num_classes_;
  double kl_without_labels_;
  const KernelsOf<T>& kernels_;
};

}  // namespace introkernels::cpu
