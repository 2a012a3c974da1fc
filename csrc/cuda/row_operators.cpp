// The operators of the losses on teacher logits and on explanation statistics.
#include "cuda/row_operators.h"

#include "cuda/register.h"

namespace introkernels::cuda {

namespace {

// A teacher that excludes every class is no distribution: as torch's softmax, NaN.
constexpr double kGivenWithoutLabels = std::numeric_limits<double>::quiet_NaN();

// Makes the teachers of rows whose classes can't be read one by one; the tensor holds them.
std::optional<Tensor> make_teacher(const Tensor& logits, Rows* rows, cudaStream_t stream) {
  if (!needs_teacher(rows->statistics)) return std::nullopt;
  Tensor teacher = new_empty(logits, {rows->num_rows, rows->num_classes}, wide_dtype(logits));
  launch_teacher(*rows, data_of(teacher), stream);
  rows->teacher = matrix_of(teacher);
  rows->teacher_is_made = true;
  return teacher;
}

}  // namespace

LossOptions options_of(double temperature, double ce_weight, double kl_weight, int64_t ignore_index,
                       double label_smoothing, int64_t reduction) {
  return {temperature, ce_weight, kl_weight, ignore_index, label_smoothing, Reduction(reduction)};
}

LabelOptions labels_of(double temperature, double similarity_temperature, int64_t similarity,
                       int64_t label_mode, double non_target_mass) {
  return {temperature, similarity_temperature, Similarity(similarity), LabelMode(label_mode),
          non_target_mass};
}

Rows rows_of(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
             const LossOptions& options, double kl_without_labels) {
  Rows rows{};
  rows.logits = matrix_of(logits);
  rows.target = indices_of(target);
  rows.num_rows = logits.size(0);
  rows.num_classes = logits.size(1);
  rows.numbers.options = options;
  if (weight.has_value()) rows.numbers.weight = matrix_of(*weight);
  rows.numbers.is_weighted = weight.has_value() || options.label_smoothing > 0;
  rows.numbers.kl_without_labels = kl_without_labels;
  rows.numbers.inverse_temperature = 1 / options.temperature;
  return rows;
}

Statistics statistics_of(const Tensor& dots, const Tensor& sq_norms,
                         const std::optional<Tensor>& class_index, const LabelOptions& labels) {
  Statistics statistics{};
  statistics.dots = matrix_of(dots);
  statistics.sq_norms = matrix_of(sq_norms);
  if (class_index.has_value()) statistics.class_index = indices_of(*class_index);
  statistics.num_explained = dots.size(1);
  statistics.labels = labels;
  return statistics;
}

LossTensors new_losses(const Tensor& logits, Reduction reduction) {
  const int64_t num_rows = logits.size(0);
  const ScalarType dtype = wide_dtype(logits);
  const auto new_loss = [&] {
    return reduction == Reduction::kNone ? new_empty(logits, {num_rows}, dtype)
                                         : new_empty(logits, {}, dtype);
  };
  return {new_loss(), new_loss(), new_loss(), new_empty(logits, {num_rows, 9}, ScalarType::Double),
          new_empty(logits, {2}, ScalarType::Double)};
}

LossOutputs outputs_of(const LossTensors& tensors) {
  return {data_of(std::get<0>(tensors)), data_of(std::get<1>(tensors)),
          data_of(std::get<2>(tensors)), data_of<double>(std::get<3>(tensors)),
          data_of<double>(std::get<4>(tensors))};
}

LossTensors forward(const Tensor& logits, const Rows& rows, cudaStream_t stream) {
  LossTensors losses = new_losses(logits, rows.numbers.options.reduction);
  const RowPlan plan = plan_rows(rows.num_rows, rows.num_classes);
  const RowScratch bytes = forward_scratch(plan, rows.num_rows);
  const Tensor zeros = new_zeros(logits, bytes.zeros, stream);
  const Tensor scratch = new_memory(logits, bytes.any);
  launch_forward(rows, plan, outputs_of(losses), data_of(zeros), data_of(scratch), stream);
  return losses;
}

namespace {

Tensor backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& row_state,
                const Tensor& totals, const Rows& rows, cudaStream_t stream) {
  Tensor grad_logits = new_empty(logits, {rows.num_rows, rows.num_classes}, logits.scalar_type());
  Matrix grad = matrix_of(grad_loss);
  if (grad_loss.dim() > 0 && rows.num_rows > 1) grad.column_stride = grad_loss.stride(0);
  launch_backward(rows, grad, static_cast<const double*>(row_state.const_data_ptr()),
                  static_cast<const double*>(totals.const_data_ptr()), data_of(grad_logits),
                  stream);
  return grad_logits;
}

LossTensors distillation_forward(const Tensor& logits, const Tensor& teacher_logits,
                                 const Tensor& target, const std::optional<Tensor>& weight,
                                 double temperature, double ce_weight, double kl_weight,
                                 int64_t ignore_index, double label_smoothing, int64_t reduction) {
  const OnDeviceOf device(logits);
  check_indices(target, std::nullopt, logits.size(1), ignore_index, device.stream());
  Rows rows = rows_of(
      logits, target, weight,
      options_of(temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction),
      kGivenWithoutLabels);
  rows.teacher = matrix_of(teacher_logits);
  return forward(logits, rows, device.stream());
}

Tensor distillation_backward(const Tensor& grad_loss, const Tensor& logits,
                             const Tensor& teacher_logits, const Tensor& target,
                             const Tensor& row_state, const Tensor& totals,
                             const std::optional<Tensor>& weight, double temperature,
                             double ce_weight, double kl_weight, int64_t ignore_index,
                             double label_smoothing, int64_t reduction) {
  const OnDeviceOf device(logits);
  Rows rows = rows_of(
      logits, target, weight,
      options_of(temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction),
      kGivenWithoutLabels);
  rows.teacher = matrix_of(teacher_logits);
  return backward(grad_loss, logits, row_state, totals, rows, device.stream());
}

LossTensors similarity_forward(const Tensor& logits, const Tensor& target, const Tensor& dots,
                               const Tensor& sq_norms, const std::optional<Tensor>& class_index,
                               const std::optional<Tensor>& weight, double temperature,
                               double ce_weight, double kl_weight, int64_t ignore_index,
                               double label_smoothing, int64_t reduction,
                               double similarity_temperature, int64_t similarity,
                               int64_t label_mode, double non_target_mass) {
  const OnDeviceOf device(logits);
  check_indices(target, class_index, logits.size(1), ignore_index, device.stream());
  Rows rows = rows_of(
      logits, target, weight,
      options_of(temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction), 0.0);
  rows.statistics = statistics_of(
      dots, sq_norms, class_index,
      labels_of(temperature, similarity_temperature, similarity, label_mode, non_target_mass));
  const std::optional<Tensor> teacher = make_teacher(logits, &rows, device.stream());
  return forward(logits, rows, device.stream());
}

Tensor similarity_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                           const Tensor& dots, const Tensor& sq_norms,
                           const std::optional<Tensor>& class_index, const Tensor& row_state,
                           const Tensor& totals, const std::optional<Tensor>& weight,
                           double temperature, double ce_weight, double kl_weight,
                           int64_t ignore_index, double label_smoothing, int64_t reduction,
                           double similarity_temperature, int64_t similarity, int64_t label_mode,
                           double non_target_mass) {
  const OnDeviceOf device(logits);
  Rows rows = rows_of(
      logits, target, weight,
      options_of(temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction), 0.0);
  rows.statistics = statistics_of(
      dots, sq_norms, class_index,
      labels_of(temperature, similarity_temperature, similarity, label_mode, non_target_mass));
  const std::optional<Tensor> teacher = make_teacher(logits, &rows, device.stream());
  return backward(grad_loss, logits, row_state, totals, rows, device.stream());
}

INTROKERNELS_IMPLEMENT(library) {
  library.impl("distillation_forward", TORCH_BOX(&distillation_forward));
  library.impl("distillation_backward", TORCH_BOX(&distillation_backward));
  library.impl("similarity_forward", TORCH_BOX(&similarity_forward));
  library.impl("similarity_backward", TORCH_BOX(&similarity_backward));
}

}  // namespace

}  // namespace introkernels::cuda
