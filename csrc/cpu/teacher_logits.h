// Teacher logits of a row's explanations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/explanations.h"

namespace introkernels::cpu {

// Teacher logits [num_classes] of a row whose statistics are dots and sq_norms: -inf for classes
// that are not explained, zeros in an ignored row.
template <typename S, typename T>
void teacher_logits_of_row(const S* dots, const S* sq_norms, int64_t count,
                           const ExplainedClasses& classes, int64_t row, const Options& options,
                           int64_t num_classes, T* out) {
  const int64_t position = classes.target_position(row);
  TeacherLogitsKernel<S, T>* kernel;
  if constexpr (std::is_same_v<S, T>) {
    kernel = kernels().of<T>().teacher_logits;
  } else {
    kernel = kernels().of<T>().teacher_logits_of_doubles;
  }
  if (position < 0) {
    std::fill(out, out + num_classes, T(0));
  } else if (classes.are_all()) {
    kernel(dots, sq_norms, count, position, options, out);
  } else {
    const Buffer<T> explained(count);
    kernel(dots, sq_norms, count, position, options, explained.get());
    std::fill(out, out + num_classes, -std::numeric_limits<T>::infinity());
    for (int64_t k = 0; k < count; ++k) out[classes(row, k)] = explained.get()[k];
  }
}

}  // namespace introkernels::cpu
