// The operators of introkernels/ops/schema.py, but for the head.
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/explanations.h"
#include "cuda/register.h"
#include "cuda/tensors.h"

namespace introkernels::cuda {

namespace {

using Floats = std::vector<double>;
using Ints = std::vector<int64_t>;

// loss, ce and kl ([B] or scalars), and state [B + 1, 9].
using LossTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

static_assert(sizeof(RowSums) == 9 * sizeof(double), "schema.py says how large a state is");

Rows rows_of(const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
             const Options& options) {
  return {matrix_of(logits),
          {},
          indices_of(target),
          weight.has_value() ? matrix_of(*weight) : Matrix{},
          logits.size(0),
          logits.size(1),
          options};
}

LossTensors new_losses(const Tensor& logits, const Options& options) {
  const int64_t num_rows = logits.size(0);
  const auto new_loss = [&] {
    return options.reduction == Reduction::kNone ? new_empty(logits, {num_rows}, wide_dtype(logits))
                                                 : new_empty(logits, {}, wide_dtype(logits));
  };
  return {new_loss(), new_loss(), new_loss(),
          new_empty(logits, {num_rows + 1, 9}, ScalarType::Double)};
}

LossOutputs outputs_of(const LossTensors& tensors) {
  return {data_of(std::get<0>(tensors)), data_of(std::get<1>(tensors)),
          data_of(std::get<2>(tensors)), data_of<RowSums>(std::get<3>(tensors))};
}

LossTensors forward(const Tensor& logits, const Rows& rows, cudaStream_t stream) {
  LossTensors losses = new_losses(logits, rows.options);
  const RowPlan plan = plan_rows(rows.num_rows, rows.num_classes);
  const Scratch bytes = forward_scratch(plan, rows.num_rows);
  const Tensor zeros = new_zeros(logits, bytes.zeros, stream);
  const Tensor scratch = new_memory(logits, bytes.any);
  launch_forward(rows, plan, outputs_of(losses), data_of(zeros), data_of(scratch), stream);
  return losses;
}

LossTensors row_loss_forward(const Tensor& logits, const Tensor& teacher_logits,
                             const Tensor& target, const std::optional<Tensor>& weight,
                             const Floats& floats, const Ints& ints) {
  const OnDeviceOf device(logits);
  const Options options(floats, ints);
  check_indices(target, std::nullopt, logits.size(1), options.ignore_index, device.stream());
  Rows rows = rows_of(logits, target, weight, options);
  rows.teacher = matrix_of(teacher_logits);
  return forward(logits, rows, device.stream());
}

Tensor row_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                         const Tensor& teacher_logits, const Tensor& target,
                         const std::optional<Tensor>& weight, const Tensor& state,
                         const Floats& floats, const Ints& ints) {
  const OnDeviceOf device(logits);
  Rows rows = rows_of(logits, target, weight, Options(floats, ints));
  rows.teacher = matrix_of(teacher_logits);
  Tensor grad_logits = new_empty(logits, {rows.num_rows, rows.num_classes}, logits.scalar_type());
  Matrix grad = matrix_of(grad_loss);
  if (grad_loss.dim() > 0 && rows.num_rows > 1) grad.column_stride = grad_loss.stride(0);
  launch_backward(rows, grad, static_cast<const RowSums*>(state.const_data_ptr()),
                  data_of(grad_logits), device.stream());
  return grad_logits;
}

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

// Statistics that wait for their launch, and the memory of it.
struct Statistics {
  StatisticsCall call;
  Tensor dots;
  Tensor sq_norms;
  Tensor counters;
  Tensor partial;
};

// first_counters: how many zeros are to stand before the counters.
Statistics statistics_of(const Explanations& explanations, const Tensor& gradients,
                         const Tensor& target, const std::optional<Tensor>& class_index,
                         int64_t ignore_index, int64_t num_classes, int64_t first_counters,
                         cudaStream_t stream) {
  const StatisticsPlan plan = plan_statistics(explanations);
  const Scratch bytes = statistics_scratch(explanations, plan);
  const ScalarType dtype = wide_dtype(gradients);
  const auto new_statistics = [&] {
    return new_empty(gradients, {explanations.num_rows, explanations.num_explained}, dtype);
  };
  Statistics statistics{
      {},
      new_statistics(),
      new_statistics(),
      new_zeros(gradients, first_counters * int64_t(sizeof(int)) + bytes.zeros, stream),
      new_memory(gradients, bytes.any)};
  statistics.call = {
      explanations,
      plan,
      indices_of(target),
      class_index.has_value() ? indices_of(*class_index) : IndexMatrix{},
      ignore_index,
      num_classes,
      {data_of(statistics.dots), data_of(statistics.sq_norms), dtype == ScalarType::Double},
      data_of<int>(statistics.counters) + first_counters,
      data_of<double>(statistics.partial)};
  return statistics;
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
  const Statistics statistics =
      statistics_of(explanations_of(gradients, inputs, center), gradients, target, class_index,
                    ignore_index, num_classes, 0, device.stream());
  launch_statistics(statistics.call, device.stream());
  return {statistics.dots, statistics.sq_norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> introspective_forward(
    const Tensor& logits, const Tensor& target, const Tensor& gradients, const Tensor& inputs,
    const std::optional<Tensor>& class_index, const std::optional<Tensor>& weight,
    const Floats& floats, const Ints& ints) {
  const OnDeviceOf device(logits);
  const Options options(floats, ints);
  check_indices(target, class_index, logits.size(1), options.ignore_index, device.stream());
  Rows rows = rows_of(logits, target, weight, options);
  const Tensor teacher = new_empty(logits, {rows.num_rows, rows.num_classes}, wide_dtype(logits));
  rows.teacher = matrix_of(teacher);
  if (rows.num_rows == 0) {
    // Without rows there is no last block to write the sums.
    return std::tuple_cat(forward(logits, rows, device.stream()), std::make_tuple(teacher));
  }
  const LossTensors losses = new_losses(logits, options);
  const Statistics statistics =
      statistics_of(explanations_of(gradients, inputs, options.center), gradients, target,
                    class_index, options.ignore_index, rows.num_classes, 1, device.stream());
  const Tensor terms = new_memory(logits, forward_scratch(RowPlan{0, 1, 0}, rows.num_rows).any);
  launch_introspective(statistics.call, rows, data_of(teacher), outputs_of(losses),
                       data_of<double>(terms), data_of<int>(statistics.counters), device.stream());
  return std::tuple_cat(losses, std::make_tuple(teacher));
}

INTROKERNELS_IMPLEMENT(library) {
  library.impl("row_loss_forward", TORCH_BOX(&row_loss_forward));
  library.impl("row_loss_backward", TORCH_BOX(&row_loss_backward));
  library.impl("explanation_stats", TORCH_BOX(&explanation_stats));
  library.impl("introspective_forward", TORCH_BOX(&introspective_forward));
}

}  // namespace

}  // namespace introkernels::cuda
