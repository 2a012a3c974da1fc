// The statistics of explanations as an operator of their own.
#include <limits>

#include "cpu/statistics.h"
#include "cpu/validate.h"

namespace introkernels::cpu {

std::tuple<Tensor, Tensor> explanation_stats(const Tensor& gradients, const Tensor& inputs,
                                             const Tensor& target,
                                             const std::optional<Tensor>& class_index, bool center,
                                             int64_t ignore_index) {
  const Explanations explanations(gradients, inputs);
  const Indices y(target);
  const int64_t num_rows = explanations.num_rows(), num_explained = explanations.num_explained();
  // With class_index nobody says how many classes there are.
  const int64_t num_classes =
      class_index.has_value() ? std::numeric_limits<int64_t>::max() : num_explained;
  check_targets(y, num_classes, ignore_index);
  const auto index = checked_class_index(class_index, y, num_classes, ignore_index);

  Workspace workspace(Workspace::bytes_of<int64_t>(num_rows) +
                      2 * Workspace::bytes_of<double>(num_rows * num_explained));
  int64_t* const positions = workspace.take<int64_t>(num_rows);
  double* const dots = workspace.take<double>(num_rows * num_explained);
  double* const sq_norms = workspace.take<double>(num_rows * num_explained);
  find_targets(y, index, ignore_index, positions);
  const ScalarType dtype = wide_dtype(gradients);
  Tensor dots_out = new_empty({num_rows, num_explained}, dtype);
  Tensor sq_norms_out = new_empty({num_rows, num_explained}, dtype);
  const Output dots_rows(dots_out), sq_norms_rows(sq_norms_out);
  Statistics(explanations, positions, center, dots, sq_norms).compute([&](int64_t row) {
    dots_rows.write(row, dots + row * num_explained);
    sq_norms_rows.write(row, sq_norms + row * num_explained);
  });
  return {dots_out, sq_norms_out};
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("explanation_stats", TORCH_BOX(&explanation_stats));
}

}  // namespace introkernels::cpu
