// The fused loss: one pass over the gradients makes the statistics of a row, its soft labels and
// its loss. Statistics go out in float64, so that the backward makes exactly the same soft labels.
#include <algorithm>

#include "common/similarity.h"
#include "cpu/row_loop.h"
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
  const Input z(logits), g(gradients), x(inputs);
  const Indices y(target);
  const int64_t num_rows = z.size(0), num_classes = z.size(1), num_explained = g.size(1);
  check_targets(y, num_classes, ignore_index);
  const auto index = checked_class_index(class_index, y, num_classes, ignore_index);
  const std::vector<double> class_weight = values_of(weight);
  const RowLoss<double> loss(options, weight ? class_weight.data() : nullptr, num_classes);
  Tensor dots = new_empty(logits, {num_rows, num_explained}, ScalarType::Double);
  Tensor sq_norms = new_empty(logits, {num_rows, num_explained}, ScalarType::Double);
  double* const all_dots = static_cast<double*>(dots.mutable_data_ptr());
  double* const all_sq_norms = static_cast<double*>(sq_norms.mutable_data_ptr());
  LossCollector collector(logits, num_rows, wide_dtype(logits), options);

  const int64_t grain = row_grain(num_explained * g.size(2) + num_classes);
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    RowStatistics statistics(g, x, center);
    std::vector<double> scratch(static_cast<size_t>(2 * num_classes));
    std::vector<int64_t> classes(index ? static_cast<size_t>(num_explained) : 0);
    double* row_logits = scratch.data();
    double* teacher = row_logits + num_classes;
    for (int64_t row = begin; row < end; ++row) {
      double* row_dots = all_dots + row * num_explained;
      double* row_sq_norms = all_sq_norms + row * num_explained;
      const int64_t row_target = y(row);
      if (loss.ignores(row_target)) {
        std::fill(row_dots, row_dots + num_explained, 0.0);
        std::fill(row_sq_norms, row_sq_norms + num_explained, 0.0);
        collector.ignore(row);
        continue;
      }
      if (index) index->read(row, classes.data());
      const int64_t* row_classes = index ? classes.data() : nullptr;
      statistics.compute(row, position_of(row_target, row_classes, num_explained), row_dots,
                         row_sq_norms);
      z.read(row, 0, num_classes, row_logits);
      teacher_logits_of_stats(row_dots, row_sq_norms, row_classes, num_explained, row_logits,
                              num_classes, row_target, labels, teacher);
      collector.set(row, loss.forward(row_logits, teacher, row_target, &collector.state(row)),
                    loss.weight(row_target));
    }
  });
  return std::tuple_cat(collector.finish(), std::make_tuple(dots, sq_norms));
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("introspective_forward", TORCH_BOX(&introspective_forward));
}

}  // namespace introkernels::cpu
