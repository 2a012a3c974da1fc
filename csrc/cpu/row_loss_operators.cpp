// The row loss on logits and teacher logits, and its gradient.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/row_loss.h"

namespace introkernels::cpu {

namespace {

// work(first, last, spread) for ranges of rows, in all threads; with fewer rows than threads, in
// this one, which leaves it to the rows to occupy them.
template <typename Work>
void for_row_ranges(int64_t num_rows, int64_t elements_per_row, const Work& work) {
  if (num_rows < static_cast<int64_t>(torch::stable::get_num_threads())) {
    work(0, num_rows, Spread::kAllThreads);
    return;
  }
  torch::stable::parallel_for(
      0, num_rows, row_grain(elements_per_row),
      [&](int64_t first, int64_t last) { work(first, last, Spread::kOneThread); });
}

}  // namespace

LossOutputs row_loss_forward(const Tensor& logits, const Tensor& teacher_logits,
                             const Tensor& target, const std::optional<Tensor>& weight,
                             const std::vector<double>& floats, const std::vector<int64_t>& ints) {
  const Options options(floats, ints);
  const Input z(logits), t(teacher_logits);
  const Indices y(target);
  const int64_t num_classes = z.size(1);
  check_targets(y, num_classes, options.ignore_index);
  return in_precision_of(logits, [&]<typename T>(T) {
    const RowLoss<T> loss(options, weight, y, num_classes);
    LossCollector<T> collector(loss);
    for_row_ranges(z.size(0), num_classes, [&](int64_t first, int64_t last, Spread spread) {
      const Buffer<T> z_scratch(num_classes), t_scratch(num_classes);
      for (int64_t row = first; row < last; ++row) {
        if (loss.ignores(row)) continue;
        collector.forward(row, z.row(row, z_scratch.get()), t.row(row, t_scratch.get()), spread);
      }
    });
    return collector.finish();
  });
}

Tensor row_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                         const Tensor& teacher_logits, const Tensor& target,
                         const std::optional<Tensor>& weight, const Tensor& state,
                         const std::vector<double>& floats, const std::vector<int64_t>& ints) {
  const Options options(floats, ints);
  const Input z(logits), t(teacher_logits);
  const Indices y(target);
  const int64_t num_classes = z.size(1);
  check_targets(y, num_classes, options.ignore_index);
  Tensor grad_logits = new_empty({z.size(0), num_classes}, logits.scalar_type());
  const Output out(grad_logits);
  const LossScales scales(grad_loss, state, options);
  const RowSums* const sums = sums_of(state);
  in_precision_of(logits, [&]<typename T>(T) {
    const RowLoss<T> loss(options, weight, y, num_classes);
    for_row_ranges(z.size(0), num_classes, [&](int64_t first, int64_t last, Spread spread) {
      const Buffer<T> z_scratch(num_classes), t_scratch(num_classes), grad_scratch(num_classes);
      for (int64_t row = first; row < last; ++row) {
        T* const grad = out.row(row, grad_scratch.get());
        if (loss.ignores(row)) {
          std::fill(grad, grad + num_classes, T(0));
        } else {
          loss.backward(row, z.row(row, z_scratch.get()), t.row(row, t_scratch.get()), sums[row],
                        scales, spread, grad);
        }
        out.finish(row, grad);
      }
    });
  });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("row_loss_forward", TORCH_BOX(&row_loss_forward));
  library.impl("row_loss_backward", TORCH_BOX(&row_loss_backward));
}

}  // namespace introkernels::cpu
