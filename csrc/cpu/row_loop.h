// The loop over rows that all losses share: who makes a row's teacher logits is all they differ in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "cpu/row_loss.h"
#include "cpu/tensors.h"

namespace introkernels::cpu {

// loss, ce, kl ([B] or scalars), row_state [B, 9] and totals [2], as introkernels/ops/schema.py
// says.
using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kRowState = sizeof(RowState) / sizeof(double);
static_assert(kRowState == 9, "introkernels/ops/schema.py allocates ROW_STATE numbers a row");

// The terms of all rows while a forward collects them, in whatever order.
class LossCollector {
 public:
  LossCollector(int64_t num_rows, ScalarType dtype, const LossOptions& options);

  RowState& state(int64_t row) const { return states_[row]; }
  void set(int64_t row, const RowTerms& terms, double target_weight) {
    results_[row] = {terms, target_weight, 1.0};
  }
  void ignore(int64_t row);

  // Adds the rows up in their order, whatever order they were computed in.
  LossOutputs finish() const;

 private:
  struct RowResult {
    RowTerms terms;
    double target_weight;
    double is_live;
  };

  int64_t num_rows_;
  ScalarType dtype_;
  LossOptions options_;
  Tensor row_state_;
  RowState* states_;
  Workspace workspace_;
  RowResult* results_;
};

// What each row's terms are multiplied by on the way back.
class LossScales {
 public:
  LossScales(const Tensor& grad_loss, const Tensor& totals, const LossOptions& options);

  double ce(int64_t row) const { return grad(row) * ce_; }
  double kl(int64_t row) const { return grad(row) * kl_; }

 private:
  double grad(int64_t row) const { return grad_loss_.value(per_row_ ? row : 0); }

  Input grad_loss_;
  bool per_row_;
  double ce_;
  double kl_;
};

// The states that a forward wrote.
inline const RowState* states_of(const Tensor& row_state) {
  return static_cast<const RowState*>(row_state.const_data_ptr());
}

// work(first, last, spread) for ranges of rows, in all threads; with fewer rows than threads, in
// this one, which leaves it to the rows to occupy them.
template <typename Work>
void for_row_ranges(int64_t num_rows, int64_t elements_per_row, const Work& work) {
  if (num_rows < static_cast<int64_t>(torch::stable::get_num_threads())) {
    work(0, num_rows, Spread::kAllThreads);
    return;
  }
  torch::stable::parallel_for(
      0, num_rows, row_grain(elements_per_row),
      [&](int64_t first, int64_t last) { work(first, last, Spread::kOneThread); });
}

// Forward of all rows. teacher.rows(&workspace) makes what a thread needs to tell the teacher
// logits of a row from its number, its logits and its target, in teacher.bytes() of a workspace.
template <typename T, typename Teacher>
void forward_rows(const Input& logits, const Indices& target, const RowLoss<T>& loss,
                  const Teacher& teacher, LossCollector* collector) {
  const int64_t num_classes = logits.size(1);
  for_row_ranges(logits.size(0), num_classes, [&](int64_t first, int64_t last, Spread spread) {
    Workspace workspace(Workspace::bytes_of<T>(num_classes) + teacher.bytes());
    T* const scratch = workspace.take<T>(num_classes);
    auto teacher_rows = teacher.rows(&workspace);
    for (int64_t row = first; row < last; ++row) {
      const int64_t y = target(row);
      if (loss.ignores(y)) {
        collector->ignore(row);
        continue;
      }
      const T* const z = logits.row(row, scratch);
      const T* const t = teacher_rows(row, z, y);
      collector->set(row, loss.forward(z, t, y, spread, &collector->state(row)), loss.weight(y));
    }
  });
}

// Backward of all rows into grad_logits [B, C].
template <typename T, typename Teacher>
void backward_rows(const Input& logits, const Indices& target, const RowLoss<T>& loss,
                   const RowState* states, const LossScales& scales, const Teacher& teacher,
                   const Output& grad_logits) {
  const int64_t num_classes = logits.size(1);
  for_row_ranges(logits.size(0), num_classes, [&](int64_t first, int64_t last, Spread spread) {
    Workspace workspace(2 * Workspace::bytes_of<T>(num_classes) + teacher.bytes());
    T* const scratch = workspace.take<T>(num_classes);
    T* const grad_scratch = workspace.take<T>(num_classes);
    auto teacher_rows = teacher.rows(&workspace);
    for (int64_t row = first; row < last; ++row) {
      const int64_t y = target(row);
      T* const grad = grad_logits.row(row, grad_scratch);
      if (loss.ignores(y)) {
        std::fill(grad, grad + num_classes, T(0));
      } else {
        const T* const z = logits.row(row, scratch);
        const T* const t = teacher_rows(row, z, y);
        loss.backward(z, t, y, states[row], scales.ce(row), scales.kl(row), spread, grad);
      }
      grad_logits.finish(row, grad);
    }
  });
}

}  // namespace introkernels::cpu
