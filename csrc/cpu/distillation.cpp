// Distillation from given teacher logits.
#include <algorithm>
#include <limits>

#include "cpu/row_loop.h"
#include "cpu/validate.h"

namespace introkernels::cpu {

namespace {

constexpr double kNever = -std::numeric_limits<double>::infinity();

auto teacher_of(const Input& teacher_logits) {
  return [&teacher_logits] {
    return [&teacher_logits](int64_t row, const double* z, int64_t, double* t) {
      const int64_t num_classes = teacher_logits.size(1);
      teacher_logits.read(row, 0, num_classes, t);
      for (int64_t c = 0; c < num_classes; ++c) {
        if (z[c] != kNever && t[c] != kNever) return;
      }
      // A teacher that excludes every class is no distribution: as torch's softmax, NaN.
      std::fill(t, t + num_classes, std::numeric_limits<double>::quiet_NaN());
    };
  };
}

}  // namespace

LossOutputs distillation_forward(const Tensor& logits, const Tensor& teacher_logits,
                                 const Tensor& target, const std::optional<Tensor>& weight,
                                 double temperature, double ce_weight, double kl_weight,
                                 int64_t ignore_index, double label_smoothing, int64_t reduction) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const Input z(logits), t(teacher_logits);
  const Indices y(target);
  check_targets(y, z.size(1), ignore_index);
  const std::vector<double> class_weight = values_of(weight);
  const RowLoss<double> loss(options, weight ? class_weight.data() : nullptr, z.size(1));
  LossCollector collector(logits, z.size(0), wide_dtype(logits), options);
  forward_rows(z, y, loss, teacher_of(t), &collector);
  return collector.finish();
}

Tensor distillation_backward(const Tensor& grad_loss, const Tensor& logits,
                             const Tensor& teacher_logits, const Tensor& target,
                             const Tensor& row_state, const Tensor& totals,
                             const std::optional<Tensor>& weight, double temperature,
                             double ce_weight, double kl_weight, int64_t ignore_index,
                             double label_smoothing, int64_t reduction) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const Input z(logits), t(teacher_logits);
  const Indices y(target);
  check_targets(y, z.size(1), ignore_index);
  const std::vector<double> class_weight = values_of(weight);
  const RowLoss<double> loss(options, weight ? class_weight.data() : nullptr, z.size(1));
  Tensor grad_logits = new_empty(logits, {z.size(0), z.size(1)}, logits.scalar_type());
  backward_rows(z, y, loss, states_of(row_state), LossScales(grad_loss, totals, options),
                teacher_of(t), Output(grad_logits));
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("distillation_forward", TORCH_BOX(&distillation_forward));
  library.impl("distillation_backward", TORCH_BOX(&distillation_backward));
}

}  // namespace introkernels::cpu
