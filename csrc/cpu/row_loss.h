// The loss of a batch, row by row, from logits and teacher logits.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "common/row_loss.h"
#include "cpu/tensors.h"

namespace introkernels::cpu {

// Whether the parts of one row are shared out among threads: only where the call has fewer rows
// than there are threads. The parts are the same either way, and so are the bits.
enum class Spread { kOneThread, kAllThreads };

// What each row's terms are multiplied by on the way back.
class LossScales {
 public:
  // grad_loss: a scalar or [B], 1 without it. state: what the forward returned.
  LossScales(const std::optional<Tensor>& grad_loss, const Tensor& state, const Options& options);

  double ce(int64_t row) const { return grad(row) * ce_; }
  double kl(int64_t row) const { return grad(row) * kl_; }

 private:
  double grad(int64_t row) const { return grad_loss_ ? grad_loss_->value(per_row_ ? row : 0) : 1; }

  std::optional<Input> grad_loss_;
  bool per_row_;
  double ce_;
  double kl_;
};

// The loss of one row and its gradient, in parts that threads may share.
template <typename T>
class RowLoss {
 public:
  // class_weight [num_classes], ones without it; target has to outlive this object.
  RowLoss(const Options& options, const std::optional<Tensor>& class_weight, const Indices& target,
          int64_t num_classes)
      : options_(options),
        class_weight_(class_weight),
        target_(target),
        num_classes_(num_classes),
        kernels_(kernels().of<T>()) {}

  RowTerms forward(int64_t row, const T* z, const T* t, Spread spread, RowSums* sums) const;
  // The gradient [num_classes] in the logits z. It may take their place.
  void backward(int64_t row, const T* z, const T* t, const RowSums& sums, const LossScales& scales,
                Spread spread, T* grad) const;

  const Options& options() const { return options_; }
  int64_t num_rows() const { return target_.size(0); }
  int64_t num_classes() const { return num_classes_; }
  bool ignores(int64_t row) const { return target_(row) == options_.ignore_index; }
  // That of the row's target.
  double weight(int64_t row) const {
    return class_weight_.data() ? double(class_weight_.data()[target_(row)]) : 1.0;
  }

 private:
  Options options_;
  OptionalValues<T> class_weight_;
  const Indices& target_;
  int64_t num_classes_;
  const KernelsOf<T>& kernels_;
};

// loss, ce, kl ([B] or scalars) and state [B + 1, ROW_STATE], as introkernels/ops/schema.py says.
using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The sums of each row in a state.
inline const RowSums* sums_of(const Tensor& state) {
  return static_cast<const RowSums*>(state.const_data_ptr());
}

// The losses of all rows while a forward computes them, in whatever order.
template <typename T>
class LossCollector {
 public:
  explicit LossCollector(const RowLoss<T>& loss);

  // To be called for each row that is not ignored.
  void forward(int64_t row, const T* z, const T* t, Spread spread) {
    terms_.get()[row] = loss_.forward(row, z, t, spread, &sums_[row]);
  }

  // Sums of a row are there after its forward, totals from the start.
  const Tensor& state() const { return state_; }
  // Adds the rows up in their order, whatever order they were computed in.
  LossOutputs finish() const;

 private:
  const RowLoss<T>& loss_;
  Tensor state_;
  RowSums* sums_;
  double* totals_;
  Buffer<RowTerms> terms_;
};

}  // namespace introkernels::cpu
