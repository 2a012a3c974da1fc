// Teacher logits from stored explanation statistics, for the row loops.
#pragma once

#include <optional>
#include <vector>

#include "common/similarity.h"
#include "cpu/tensors.h"

namespace introkernels::cpu {

class TeacherOfStats {
 public:
  // dots, sq_norms [B, K]; class_index [B, K] or none for all classes in order.
  TeacherOfStats(const Input& dots, const Input& sq_norms,
                 const std::optional<Indices>& class_index, int64_t num_classes,
                 const LabelOptions& options)
      : dots_(dots),
        sq_norms_(sq_norms),
        class_index_(class_index),
        num_classes_(num_classes),
        options_(options),
        stats_(static_cast<size_t>(2 * dots.size(1))),
        classes_(class_index ? static_cast<size_t>(dots.size(1)) : 0) {}

  void operator()(int64_t row, const double* z, int64_t target, double* t) {
    const int64_t num_explained = dots_.size(1);
    double* dots = stats_.data();
    double* sq_norms = dots + num_explained;
    dots_.read(row, 0, num_explained, dots);
    sq_norms_.read(row, 0, num_explained, sq_norms);
    if (class_index_) class_index_->read(row, classes_.data());
    teacher_logits_of_stats(dots, sq_norms, class_index_ ? classes_.data() : nullptr, num_explained,
                            z, num_classes_, target, options_, t);
  }

 private:
  const Input& dots_;
  const Input& sq_norms_;
  const std::optional<Indices>& class_index_;
  int64_t num_classes_;
  LabelOptions options_;
  std::vector<double> stats_;
  std::vector<int64_t> classes_;
};

}  // namespace introkernels::cpu
