// The row loss on explanation statistics.
#include "cpu/similarity.h"

#include "cpu/row_loop.h"
#include "cpu/validate.h"

namespace introkernels::cpu {

LossOutputs similarity_forward(const Tensor& logits, const Tensor& target, const Tensor& dots,
                               const Tensor& sq_norms, const std::optional<Tensor>& class_index,
                               const std::optional<Tensor>& weight, double temperature,
                               double ce_weight, double kl_weight, int64_t ignore_index,
                               double label_smoothing, int64_t reduction,
                               double similarity_temperature, int64_t similarity,
                               int64_t label_mode, double non_target_mass) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const LabelOptions labels{temperature, similarity_temperature, Similarity(similarity),
                            LabelMode(label_mode), non_target_mass};
  const Input z(logits), d(dots), n(sq_norms);
  const Indices y(target);
  check_targets(y, z.size(1), ignore_index);
  const auto index = checked_class_index(class_index, y, z.size(1), ignore_index);
  LossCollector collector(z.size(0), wide_dtype(logits), options);
  in_precision_of(logits, [&]<typename T>(T) {
    const OptionalValues<T> class_weight(weight);
    const RowLoss<T> loss(options, class_weight.data(), z.size(1));
    forward_rows(z, y, loss, TeacherOfStats<T>(d, n, index, z.size(1), labels), &collector);
  });
  return collector.finish();
}

Tensor similarity_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                           const Tensor& dots, const Tensor& sq_norms,
                           const std::optional<Tensor>& class_index, const Tensor& row_state,
                           const Tensor& totals, const std::optional<Tensor>& weight,
                           double temperature, double ce_weight, double kl_weight,
                           int64_t ignore_index, double label_smoothing, int64_t reduction,
                           double similarity_temperature, int64_t similarity, int64_t label_mode,
                           double non_target_mass) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const LabelOptions labels{temperature, similarity_temperature, Similarity(similarity),
                            LabelMode(label_mode), non_target_mass};
  const Input z(logits), d(dots), n(sq_norms);
  const Indices y(target);
  check_targets(y, z.size(1), ignore_index);
  const auto index = checked_class_index(class_index, y, z.size(1), ignore_index);
  Tensor grad_logits = new_empty({z.size(0), z.size(1)}, logits.scalar_type());
  in_precision_of(logits, [&]<typename T>(T) {
    const OptionalValues<T> class_weight(weight);
    const RowLoss<T> loss(options, class_weight.data(), z.size(1));
    backward_rows(z, y, loss, states_of(row_state), LossScales(grad_loss, totals, options),
                  TeacherOfStats<T>(d, n, index, z.size(1), labels), Output(grad_logits));
  });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("similarity_forward", TORCH_BOX(&similarity_forward));
  library.impl("similarity_backward", TORCH_BOX(&similarity_backward));
}

}  // namespace introkernels::cpu
