// Teacher logits of explanation statistics as an operator of their own.
#include "cpu/teacher_logits.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

namespace introkernels::cpu {

Tensor teacher_logits(const Tensor& dots, const Tensor& sq_norms, const Tensor& target,
                      const std::optional<Tensor>& class_index, int64_t num_classes,
                      const std::vector<double>& floats, const std::vector<int64_t>& ints) {
  const Options options(floats, ints);
  const Input all_dots(dots), all_sq_norms(sq_norms);
  const Indices y(target);
  const int64_t num_explained = all_dots.size(1);
  const ExplainedClasses classes(y, class_index, num_classes, options.ignore_index);
  require_kernels();
  Tensor out = new_empty({all_dots.size(0), num_classes}, wide_dtype(dots));
  in_precision_of(dots, [&]<typename T>(T) {
    T* const teacher_logits = static_cast<T*>(out.mutable_data_ptr());
    const auto make = [&](int64_t first, int64_t last) {
      const Buffer<T> dots_scratch(num_explained), sq_norms_scratch(num_explained);
      for (int64_t row = first; row < last; ++row) {
        teacher_logits_of_row(all_dots.row(row, dots_scratch.get()),
                              all_sq_norms.row(row, sq_norms_scratch.get()), num_explained, classes,
                              row, options, num_classes, teacher_logits + row * num_classes);
      }
    };
    torch::stable::parallel_for(0, all_dots.size(0), row_grain(num_classes), make);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(introkernels, CPU, library) {
  library.impl("teacher_logits", TORCH_BOX(&teacher_logits));
}

}  // namespace introkernels::cpu
