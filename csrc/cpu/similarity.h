// Teacher logits from explanation statistics: t_c = (s_c - 1) / tau, whose softmax at T are the
// soft labels of label_mode="softmax". Those of label_mode="split" are given as T log q_c but for a
// shift common to all, so that the same softmax makes them and one row loss serves both.
#pragma once

#include <optional>

#include "common/similarity.h"
#include "cpu/tensors.h"

namespace introkernels::cpu {

// Teacher logits [num_classes] of one row: -inf where a class was not explained or has no soft
// label; anything where it does not exist (logits[c] is -inf).
//
// dots, sq_norms: [num_explained], float or double; class_index: [num_explained] or null for all
// classes in order.
template <typename S, typename T>
void teacher_logits_of_stats(const S* dots, const S* sq_norms, const int64_t* class_index,
                             int64_t num_explained, const T* logits, int64_t num_classes,
                             int64_t target, const LabelOptions& options, T* teacher);

// The teacher of rows whose statistics lie in tensors.
template <typename T>
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
        in_float_(dots.fits_float() && sq_norms.fits_float()),
        options_(options) {}

  size_t bytes() const {
    const int64_t num_explained = dots_.size(1);
    return Workspace::bytes_of<T>(num_classes_) +
           2 * (in_float_ ? Workspace::bytes_of<float>(num_explained)
                          : Workspace::bytes_of<double>(num_explained)) +
           Workspace::bytes_of<int64_t>(num_explained);
  }

  auto rows(Workspace* workspace) const {
    const int64_t num_explained = dots_.size(1);
    T* const teacher = workspace->take<T>(num_classes_);
    const Scratch<float> floats(in_float_ ? workspace : nullptr, num_explained);
    const Scratch<double> doubles(in_float_ ? nullptr : workspace, num_explained);
    int64_t* const classes = workspace->take<int64_t>(num_explained);
    return [=, this](int64_t row, const T* z, int64_t target) {
      if (class_index_) class_index_->read(row, classes);
      const auto make = [&](const auto& scratch) {
        teacher_logits_of_stats(dots_.row(row, scratch.dots), sq_norms_.row(row, scratch.sq_norms),
                                class_index_ ? classes : nullptr, num_explained, z, num_classes_,
                                target, options_, teacher);
      };
      if (in_float_) {
        make(floats);
      } else {
        make(doubles);
      }
      return static_cast<const T*>(teacher);
    };
  }

 private:
  // Where statistics go that do not lie in a row as S; nowhere without a workspace.
  template <typename S>
  struct Scratch {
    Scratch(Workspace* workspace, int64_t count)
        : dots(workspace == nullptr ? nullptr : workspace->take<S>(count)),
          sq_norms(workspace == nullptr ? nullptr : workspace->take<S>(count)) {}
    S* dots;
    S* sq_norms;
  };

  const Input& dots_;
  const Input& sq_norms_;
  const std::optional<Indices>& class_index_;
  int64_t num_classes_;
  bool in_float_;  // or in double
  LabelOptions options_;
};

}  // namespace introkernels::cpu
