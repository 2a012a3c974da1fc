// The fused loss: one pass over the gradients makes the statistics of a row, its teacher logits and
// its loss.
#include <vector>

#include "cpu/row_loss.h"
#include "cpu/statistics.h"
#include "cpu/teacher_logits.h"

namespace introkernels::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> introspective_forward(
    const Tensor& logits, const Tensor& target, const Tensor& gradients, const Tensor& inputs,
    const std::optional<Tensor>& class_index, const std::optional<Tensor>& weight,
    const std::vector<double>& floats, const std::vector<int64_t>& ints) {
  const Options options(floats, ints);
  const Input z(logits);
  const Explanations explanations(gradients, inputs);
  const Indices y(target);
  const int64_t num_classes = z.size(1), num_explained = explanations.num_explained();
  const ExplainedClasses classes(y, class_index, num_classes, options.ignore_index);
  Tensor teacher_logits = new_empty({z.size(0), num_classes}, wide_dtype(logits));
  const LossOutputs outputs = in_precision_of(logits, [&]<typename T>(T) {
    const RowLoss<T> loss(options, weight, y, num_classes);
    LossCollector<T> collector(loss);
    T* const all_teacher_logits = static_cast<T*>(teacher_logits.mutable_data_ptr());
    const auto finish_row = [&](int64_t row, const double* dots, const double* sq_norms) {
      T* const t = all_teacher_logits + row * num_classes;
      teacher_logits_of_row(dots, sq_norms, num_explained, classes, row, options, num_classes, t);
      if (loss.ignores(row)) return;
      const Buffer<T> scratch(num_classes);
      collector.forward(row, z.row(row, scratch.get()), t, Spread::kOneThread);
    };
    Statistics(explanations, classes, options.center).compute(finish_row);
    return collector.finish();
  });
  return std::tuple_cat(outputs, std::make_tuple(teacher_logits));
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("introspective_forward", TORCH_BOX(&introspective_forward));
}

}  // namespace introkernels::cpu
