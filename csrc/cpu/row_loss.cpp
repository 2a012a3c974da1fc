#include "cpu/row_loss.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace introkernels::cpu {

namespace {

constexpr int64_t kRowState = sizeof(RowSums) / sizeof(double);
static_assert(kRowState == 9, "introkernels/ops/schema.py allocates ROW_STATE numbers a row");

// Classes of a part: enough to be worth a thread's while.
constexpr int64_t kPart = 16384;

// work(i, part) for each part of a row.
template <typename T, typename Work>
void for_each_part(const Row<T>& row, Spread spread, const Work& work) {
  const int64_t num_parts = (row.num_classes + kPart - 1) / kPart;
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      work(i, row.part(i * kPart, std::min(kPart, row.num_classes - i * kPart)));
    }
  };
  if (spread == Spread::kAllThreads) {
    torch::stable::parallel_for(0, num_parts, 1, run);
  } else {
    run(0, num_parts);
  }
}

}  // namespace

LossScales::LossScales(const std::optional<Tensor>& grad_loss, const Tensor& state,
                       const Options& options)
    : per_row_(options.reduction == Reduction::kNone),
      ce_(options.ce_weight),
      kl_(options.kl_weight) {
  if (grad_loss) grad_loss_.emplace(*grad_loss);
  if (options.reduction == Reduction::kMean) {
    const double* const totals =
        static_cast<const double*>(state.const_data_ptr()) + (state.size(0) - 1) * kRowState;
    ce_ /= totals[0];
    kl_ /= totals[1];
  }
}

template <typename T>
RowTerms RowLoss<T>::forward(int64_t row, const T* z, const T* t, Spread spread,
                             RowSums* sums) const {
  const int64_t y = target_(row);
  const Buffer<RowSums> parts((num_classes_ + kPart - 1) / kPart);
  for_each_part(
      Row<T>{z, t, class_weight_.data(), num_classes_, y}, spread,
      [&](int64_t i, const Row<T>& part) { parts.get()[i] = kernels_.row_sums(part, options_); });
  *sums = parts.get()[0];
  for (int64_t i = 1; i * kPart < num_classes_; ++i) {
    *sums = merge(*sums, parts.get()[i], options_.temperature);
  }
  return terms_of(*sums, double(z[y]), weight(row), options_);
}

template <typename T>
void RowLoss<T>::backward(int64_t row, const T* z, const T* t, const RowSums& sums,
                          const LossScales& scales, Spread spread, T* grad) const {
  const GradientFactors factors =
      gradient_factors(sums, weight(row), scales.ce(row), scales.kl(row), options_);
  for_each_part(Row<T>{z, t, class_weight_.data(), num_classes_, target_(row)}, spread,
                [&](int64_t i, const Row<T>& part) {
                  kernels_.row_backward(part, options_, sums, factors, grad + i * kPart);
                });
}

template <typename T>
LossCollector<T>::LossCollector(const RowLoss<T>& loss)
    : loss_(loss),
      state_(new_empty({loss.num_rows() + 1, kRowState}, ScalarType::Double)),
      sums_(static_cast<RowSums*>(state_.mutable_data_ptr())),
      totals_(reinterpret_cast<double*>(sums_ + loss.num_rows())),
      terms_(loss.num_rows()) {
  std::fill(totals_, totals_ + kRowState, 0.0);
  for (int64_t row = 0; row < loss.num_rows(); ++row) {
    if (loss.ignores(row)) {
      terms_.get()[row] = {};
      sums_[row] = {};
    } else {
      totals_[0] += loss.weight(row);
      totals_[1] += 1;
    }
  }
  totals_[0] = total_weight(totals_[0]);
}

template <typename T>
LossOutputs LossCollector<T>::finish() const {
  const Options& options = loss_.options();
  const bool per_row = options.reduction == Reduction::kNone;
  Tensor outputs[3];
  T* data[3];
  for (int i = 0; i < 3; ++i) {
    outputs[i] =
        per_row ? new_empty({loss_.num_rows()}, dtype_of<T>()) : new_empty({}, dtype_of<T>());
    data[i] = static_cast<T*>(outputs[i].mutable_data_ptr());
  }
  const auto write = [&](int64_t row, const RowTerms& terms) {
    data[0][row] = static_cast<T>(combine(terms, options));
    data[1][row] = static_cast<T>(terms.ce);
    data[2][row] = static_cast<T>(terms.kl);
  };
  RowTerms sum{0.0, 0.0};
  for (int64_t row = 0; row < loss_.num_rows(); ++row) {
    const RowTerms& terms = terms_.get()[row];
    sum.ce += terms.ce;
    sum.kl += terms.kl;
    if (per_row) write(row, terms);
  }
  if (options.reduction == Reduction::kMean) {
    sum.ce /= totals_[0];
    sum.kl /= totals_[1];
  }
  if (!per_row) write(0, sum);
  return {outputs[0], outputs[1], outputs[2], state_};
}

template class RowLoss<float>;
template class RowLoss<double>;
template class LossCollector<float>;
template class LossCollector<double>;

}  // namespace introkernels::cpu
