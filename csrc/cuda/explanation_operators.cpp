// The operators that start from gradients and inputs: statistics, and the fused loss.
#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cuda/explanations.h"
#include "cuda/register.h"
#include "cuda/row_operators.h"

namespace introkernels::cuda {

namespace {

void append(Dims* dims, int64_t size, int64_t stride) {
  if (size == 1) return;
  if (dims->count > 0) {
    // Dimensions that follow each other without a gap are one.
    const int last = dims->count - 1;
    if (dims->strides[last] == size * stride) {
      dims->sizes[last] *= size;
      dims->strides[last] = stride;
      return;
    }
  }
  if (dims->count == Dims::kMost) {
    throw std::invalid_argument(
        "introkernels: gradients and inputs must have strides that join all but 12 of their "
        "dimensions; call .contiguous() on them first");
  }
  dims->sizes[dims->count] = size;
  dims->strides[dims->count] = stride;
  ++dims->count;
}

void finish(Dims* dims, int64_t num_dims) {
  if (dims->count > 0) return;
  *dims = {1, {num_dims}, {1}};
}

// Gradients [B, K, *S] and inputs [B, *S].
Explanations explanations_of(const Tensor& gradients, const Tensor& inputs, bool center) {
  Explanations e{};
  e.gradients = gradients.const_data_ptr();
  e.inputs = inputs.const_data_ptr();
  e.gradient_type = type_of(gradients);
  e.input_type = type_of(inputs);
  e.num_rows = gradients.size(0);
  e.num_explained = gradients.size(1);
  e.num_dims = 1;
  e.row_stride = gradients.stride(0);
  e.class_stride = gradients.stride(1);
  e.input_row_stride = inputs.stride(0);
  e.center = center;
  std::vector<int64_t> order(static_cast<size_t>(gradients.dim() - 2));
  std::iota(order.begin(), order.end(), 2);
  // Inner products don't care about the order of the dimensions as long as both tensors share it.
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return gradients.stride(a) > gradients.stride(b); });
  for (const int64_t dim : order) {
    e.num_dims *= gradients.size(dim);
    append(&e.gradient_dims, gradients.size(dim), gradients.stride(dim));
    append(&e.input_dims, gradients.size(dim), inputs.stride(dim - 1));
  }
  finish(&e.gradient_dims, e.num_dims);
  finish(&e.input_dims, e.num_dims);
  return e;
}

std::tuple<Tensor, Tensor> explanation_stats(const Tensor& gradients, const Tensor& inputs,
                                             const Tensor& target,
                                             const std::optional<Tensor>& class_index, bool center,
                                             int64_t ignore_index) {
  const OnDeviceOf device(gradients);
  // With class_index nobody says how many classes there are.
  const int64_t num_classes =
      class_index.has_value() ? std::numeric_limits<int64_t>::max() : gradients.size(1);
  check_indices(target, class_index, num_classes, ignore_index, device.stream());
  const Explanations explanations = explanations_of(gradients, inputs, center);
  const StatisticsPlan plan = plan_statistics(explanations);
  const ScalarType dtype = wide_dtype(gradients);
  Tensor dots = new_empty(gradients, {gradients.size(0), gradients.size(1)}, dtype);
  Tensor sq_norms = new_empty(gradients, {gradients.size(0), gradients.size(1)}, dtype);
  const StatisticsScratch bytes = statistics_scratch(explanations, plan);
  const Tensor zeros = new_zeros(gradients, bytes.zeros, device.stream());
  const Tensor scratch = new_memory(gradients, bytes.any);
  launch_statistics(explanations, plan, indices_of(target),
                    class_index.has_value() ? indices_of(*class_index) : IndexMatrix{},
                    ignore_index, {data_of(dots), data_of(sq_norms), dtype == ScalarType::Double},
                    data_of(zeros), data_of(scratch), device.stream());
  return {dots, sq_norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> introspective_forward(
    const Tensor& logits, const Tensor& target, const Tensor& gradients, const Tensor& inputs,
    const std::optional<Tensor>& class_index, bool center, const std::optional<Tensor>& weight,
    double temperature, double ce_weight, double kl_weight, int64_t ignore_index,
    double label_smoothing, int64_t reduction, double similarity_temperature, int64_t similarity,
    int64_t label_mode, double non_target_mass) {
  const OnDeviceOf device(logits);
  check_indices(target, class_index, logits.size(1), ignore_index, device.stream());
  const Explanations explanations = explanations_of(gradients, inputs, center);
  // In float64, so that the backward makes exactly the same soft labels.
  Tensor dots = new_empty(gradients, {gradients.size(0), gradients.size(1)}, ScalarType::Double);
  Tensor sq_norms =
      new_empty(gradients, {gradients.size(0), gradients.size(1)}, ScalarType::Double);
  Rows rows = rows_of(
      logits, target, weight,
      options_of(temperature, ce_weight, kl_weight, ignore_index, label_smoothing, reduction), 0.0);
  rows.statistics = statistics_of(
      dots, sq_norms, class_index,
      labels_of(temperature, similarity_temperature, similarity, label_mode, non_target_mass));
  LossTensors losses = new_losses(logits, rows.numbers.options.reduction);
  if (rows.num_rows == 0) {
    // Without rows there is no last block to write the sums.
    losses = forward(logits, rows, device.stream());
    return std::tuple_cat(losses, std::make_tuple(dots, sq_norms));
  }
  const StatisticsPlan plan = plan_statistics(explanations);
  const StatisticsScratch bytes = statistics_scratch(explanations, plan);
  const RowScratch of_losses = forward_scratch(RowPlan{0, 1, 0}, rows.num_rows);
  const Tensor teacher = new_empty(logits, {rows.num_rows, rows.num_classes}, wide_dtype(logits));
  rows.teacher = matrix_of(teacher);
  const Tensor zeros = new_zeros(logits, bytes.zeros + of_losses.zeros, device.stream());
  const Tensor scratch = new_memory(logits, bytes.any);
  const Tensor loss_scratch = new_memory(logits, of_losses.any);
  launch_introspective(explanations, plan, rows, {data_of(dots), data_of(sq_norms), true},
                       outputs_of(losses), data_of(zeros), data_of(scratch), data_of(loss_scratch),
                       device.stream());
  return std::tuple_cat(losses, std::make_tuple(dots, sq_norms));
}

INTROKERNELS_IMPLEMENT(library) {
  library.impl("explanation_stats", TORCH_BOX(&explanation_stats));
  library.impl("introspective_forward", TORCH_BOX(&introspective_forward));
}

}  // namespace

}  // namespace introkernels::cuda
