#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/similarity.h"

namespace introkernels::cpu {

namespace {

// Turns the teacher logits of the classes other than the target into T log q_c of split labels, and
// the target's too, less the largest of them all.
template <typename T>
void split(const T* logits, int64_t num_classes, int64_t target, const LabelOptions& options,
           T* teacher) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  T top = kNever;
  bool has_others = false;
  for (int64_t c = 0; c < num_classes; ++c) {
    if (logits[c] == kNever) teacher[c] = kNever;
    if (c == target || teacher[c] == kNever) continue;
    has_others = true;
    if (teacher[c] > top) top = teacher[c];
  }
  const bool has_target = teacher[target] != kNever;
  const double sum = kernels().of<T>().sum_exp_without(teacher, num_classes, target, double(top),
                                                       options.temperature);
  const SplitLogits split = split_logits(has_others, sum, has_target, options);
  for (int64_t c = 0; c < num_classes; ++c) {
    if (c != target && teacher[c] != kNever)
      teacher[c] = T(double(teacher[c] - top) + split.shift_of_others);
  }
  if (has_target) teacher[target] = T(split.of_target);
}

template <typename S, typename T>
TeacherLogitsKernel<S, T>* kernel() {
  if constexpr (sizeof(S) == sizeof(float)) {
    return kernels().of<T>().teacher_logits_of_floats;
  } else {
    return kernels().of<T>().teacher_logits_of_doubles;
  }
}

}  // namespace

template <typename S, typename T>
void teacher_logits_of_stats(const S* dots, const S* sq_norms, const int64_t* class_index,
                             int64_t num_explained, const T* logits, int64_t num_classes,
                             int64_t target, const LabelOptions& options, T* teacher) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const auto logits_of_stats = kernel<S, T>();
  const double tau = options.similarity_temperature;
  if (class_index == nullptr) {
    logits_of_stats(dots, sq_norms, num_classes, sq_norms[target], options.similarity, tau,
                    teacher);
  } else {
    const int64_t position =
        std::find(class_index, class_index + num_explained, target) - class_index;
    std::fill(teacher, teacher + num_classes, kNever);
    constexpr int64_t kAtOnce = 64;
    T some[kAtOnce];
    for (int64_t begin = 0; begin < num_explained; begin += kAtOnce) {
      const int64_t count = std::min(kAtOnce, num_explained - begin);
      logits_of_stats(dots + begin, sq_norms + begin, count, sq_norms[position], options.similarity,
                      tau, some);
      for (int64_t k = 0; k < count; ++k) teacher[class_index[begin + k]] = some[k];
    }
  }
  teacher[target] = T(0);  // similarity 1
  if (options.label_mode == LabelMode::kSplit) {
    split(logits, num_classes, target, options, teacher);
  }
}

template void teacher_logits_of_stats(const float*, const float*, const int64_t*, int64_t,
                                      const float*, int64_t, int64_t, const LabelOptions&, float*);
template void teacher_logits_of_stats(const float*, const float*, const int64_t*, int64_t,
                                      const double*, int64_t, int64_t, const LabelOptions&,
                                      double*);
template void teacher_logits_of_stats(const double*, const double*, const int64_t*, int64_t,
                                      const float*, int64_t, int64_t, const LabelOptions&, float*);
template void teacher_logits_of_stats(const double*, const double*, const int64_t*, int64_t,
                                      const double*, int64_t, int64_t, const LabelOptions&,
                                      double*);

}  // namespace introkernels::cpu
