// The statistics of explanations as an operator of their own.
#include <limits>

#include "cpu/statistics.h"

namespace introkernels::cpu {

std::tuple<Tensor, Tensor> explanation_stats(const Tensor& gradients, const Tensor& inputs,
                                             const Tensor& target,
                                             const std::optional<Tensor>& class_index, bool center,
                                             int64_t ignore_index) {
  const Explanations explanations(gradients, inputs);
  const Indices y(target);
  // With class_index nobody says how many classes there are.
  const int64_t num_classes =
      class_index ? std::numeric_limits<int64_t>::max() : explanations.num_explained();
  const ExplainedClasses classes(y, class_index, num_classes, ignore_index);
  const ScalarType dtype = wide_dtype(gradients);
  Tensor dots = new_empty({explanations.num_rows(), explanations.num_explained()}, dtype);
  Tensor sq_norms = new_empty({explanations.num_rows(), explanations.num_explained()}, dtype);
  const Output dots_rows(dots), sq_norms_rows(sq_norms);
  Statistics(explanations, classes, center)
      .compute([&](int64_t row, const double* row_dots, const double* row_sq_norms) {
        dots_rows.write(row, row_dots);
        sq_norms_rows.write(row, row_sq_norms);
      });
  return {dots, sq_norms};
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("explanation_stats", TORCH_BOX(&explanation_stats));
}

}  // namespace introkernels::cpu
