// The loop over rows that all losses share: who makes a row's teacher logits is all they differ in.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/row_loss.h"
#include "cpu/tensors.h"

namespace introkernels::cpu {

// loss, ce, kl ([B] or scalars), row_state [B, 8] and totals [2], as introkernels/ops/schema.py
// says.
using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kRowState = sizeof(RowState) / sizeof(double);
static_assert(kRowState == 8, "introkernels/ops/schema.py allocates ROW_STATE numbers a row");

// The terms of all rows while a forward collects them; kernels that run over chunks of rows fill it
// piece by piece.
class LossCollector {
 public:
  LossCollector(const Tensor& like, int64_t num_rows, ScalarType dtype, const LossOptions& options);

  RowState& state(int64_t row) const { return states_[row]; }
  void set(int64_t row, const RowTerms& terms, double target_weight);
  void ignore(int64_t row);

  // Adds the rows up in their order, whatever order they were computed in.
  LossOutputs finish() const;

 private:
  Tensor like_;
  ScalarType dtype_;
  LossOptions options_;
  Tensor row_state_;
  RowState* states_;
  std::vector<RowTerms> terms_;
  std::vector<double> target_weights_;
  std::vector<char> live_;
};

// What each row's terms are multiplied by on the way back.
class LossScales {
 public:
  LossScales(const Tensor& grad_loss, const Tensor& totals, const LossOptions& options);

  double ce(int64_t row) const { return grad(row) * ce_; }
  double kl(int64_t row) const { return grad(row) * kl_; }

 private:
  double grad(int64_t row) const { return grad_loss_.read(per_row_ ? row : 0); }

  Input grad_loss_;
  bool per_row_;
  double ce_;
  double kl_;
};

// Forward of rows [0, B). new_teacher() gives each thread a function of its own, teacher(row, z,
// target, t), which fills the teacher logits t [C] of a row whose logits are z [C].
template <typename NewTeacher>
void forward_rows(const Input& logits, const Indices& target, const RowLoss<double>& loss,
                  const NewTeacher& new_teacher, LossCollector* collector) {
  const int64_t num_rows = logits.size(0), num_classes = logits.size(1);
  torch::stable::parallel_for(0, num_rows, row_grain(num_classes), [&](int64_t begin, int64_t end) {
    auto teacher = new_teacher();
    std::vector<double> scratch(static_cast<size_t>(2 * num_classes));
    double* z = scratch.data();
    double* t = z + num_classes;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = target(row);
      if (loss.ignores(y)) {
        collector->ignore(row);
        continue;
      }
      logits.read(row, 0, num_classes, z);
      teacher(row, z, y, t);
      collector->set(row, loss.forward(z, t, y, &collector->state(row)), loss.weight(y));
    }
  });
}

// Backward of rows [0, B) into grad_logits [B, C].
template <typename NewTeacher>
void backward_rows(const Input& logits, const Indices& target, const RowLoss<double>& loss,
                   const RowState* states, const LossScales& scales, const NewTeacher& new_teacher,
                   const Output& grad_logits) {
  const int64_t num_rows = logits.size(0), num_classes = logits.size(1);
  torch::stable::parallel_for(0, num_rows, row_grain(num_classes), [&](int64_t begin, int64_t end) {
    auto teacher = new_teacher();
    std::vector<double> scratch(static_cast<size_t>(3 * num_classes));
    double* z = scratch.data();
    double* t = z + num_classes;
    double* grad = t + num_classes;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = target(row);
      if (loss.ignores(y)) {
        std::fill(grad, grad + num_classes, 0.0);
      } else {
        logits.read(row, 0, num_classes, z);
        teacher(row, z, y, t);
        loss.backward(z, t, y, states[row], scales.ce(row), scales.kl(row), grad);
      }
      grad_logits.write(row, grad);
    }
  });
}

// The states that a forward wrote.
inline const RowState* states_of(const Tensor& row_state) {
  return static_cast<const RowState*>(row_state.const_data_ptr());
}

}  // namespace introkernels::cpu
