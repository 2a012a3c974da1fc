// The fused loss: one pass over the gradients makes the statistics of a row, its soft labels and
// its loss. Statistics go out in float64, so that the backward makes exactly the same soft labels.
#include "cpu/row_loop.h"
#include "cpu/similarity.h"
#include "cpu/statistics.h"
#include "cpu/validate.h"

namespace introkernels::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> introspective_forward(
    const Tensor& logits, const Tensor& target, const Tensor& gradients, const Tensor& inputs,
    const std::optional<Tensor>& class_index, bool center, const std::optional<Tensor>& weight,
    double temperature, double ce_weight, double kl_weight, int64_t ignore_index,
    double label_smoothing, int64_t reduction, double similarity_temperature, int64_t similarity,
    int64_t label_mode, double non_target_mass) {
  const LossOptions options{temperature,  ce_weight,       kl_weight,
                            ignore_index, label_smoothing, Reduction(reduction)};
  const LabelOptions labels{temperature, similarity_temperature, Similarity(similarity),
                            LabelMode(label_mode), non_target_mass};
  const Input z(logits);
  const Explanations explanations(gradients, inputs);
  const Indices y(target);
  const int64_t num_rows = z.size(0), num_classes = z.size(1);
  const int64_t num_explained = explanations.num_explained();
  check_targets(y, num_classes, ignore_index);
  const auto index = checked_class_index(class_index, y, num_classes, ignore_index);
  Workspace workspace(Workspace::bytes_of<int64_t>(num_rows));
  int64_t* const positions = workspace.take<int64_t>(num_rows);
  find_targets(y, index, ignore_index, positions);
  Tensor dots = new_empty({num_rows, num_explained}, ScalarType::Double);
  Tensor sq_norms = new_empty({num_rows, num_explained}, ScalarType::Double);
  Statistics statistics(explanations, positions, center,
                        static_cast<double*>(dots.mutable_data_ptr()),
                        static_cast<double*>(sq_norms.mutable_data_ptr()));
  LossCollector collector(num_rows, wide_dtype(logits), options);

  in_precision_of(logits, [&]<typename T>(T) {
    const OptionalValues<T> class_weight(weight);
    const RowLoss<T> loss(options, class_weight.data(), num_classes);
    const Input d(dots), n(sq_norms);
    const TeacherOfStats<T> teacher(d, n, index, num_classes, labels);
    statistics.compute([&](int64_t row) {
      const int64_t row_target = y(row);
      if (loss.ignores(row_target)) {
        collector.ignore(row);
        return;
      }
      Workspace row_workspace(Workspace::bytes_of<T>(num_classes) + teacher.bytes());
      const T* const row_logits = z.row(row, row_workspace.take<T>(num_classes));
      const T* const row_teacher = teacher.rows(&row_workspace)(row, row_logits, row_target);
      collector.set(row,
                    loss.forward(row_logits, row_teacher, row_target, Spread::kOneThread,
                                 &collector.state(row)),
                    loss.weight(row_target));
    });
  });
  return std::tuple_cat(collector.finish(), std::make_tuple(dots, sq_norms));
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("introspective_forward", TORCH_BOX(&introspective_forward));
}

}  // namespace introkernels::cpu
