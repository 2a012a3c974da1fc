#include "cpu/row_loop.h"

namespace introkernels::cpu {

LossCollector::LossCollector(int64_t num_rows, ScalarType dtype, const LossOptions& options)
    : num_rows_(num_rows),
      dtype_(dtype),
      options_(options),
      row_state_(new_empty({num_rows, kRowState}, ScalarType::Double)),
      states_(static_cast<RowState*>(row_state_.mutable_data_ptr())),
      workspace_(Workspace::bytes_of<RowResult>(num_rows)),
      results_(workspace_.take<RowResult>(num_rows)) {
  require_kernels();
}

void LossCollector::ignore(int64_t row) {
  results_[row] = {{0.0, 0.0}, 0.0, 0.0};
  states_[row] = {};
}

LossOutputs LossCollector::finish() const {
  const bool per_row = options_.reduction == Reduction::kNone;
  Tensor outputs[3];
  for (Tensor& output : outputs) {
    output = per_row ? new_empty({num_rows_}, dtype_) : new_empty({}, dtype_);
  }
  const auto write = [&](int64_t row, const RowTerms& terms) {
    const double values[] = {combine(terms, options_), terms.ce, terms.kl};
    for (int i = 0; i < 3; ++i) {
      void* const data = outputs[i].mutable_data_ptr();
      if (dtype_ == ScalarType::Double) {
        static_cast<double*>(data)[row] = values[i];
      } else {
        static_cast<float*>(data)[row] = static_cast<float>(values[i]);
      }
    }
  };
  double weight_sum = 0.0, num_live = 0.0;
  RowTerms sum{0.0, 0.0};
  for (int64_t row = 0; row < num_rows_; ++row) {
    const RowResult& result = results_[row];
    weight_sum += result.target_weight;
    num_live += result.is_live;
    sum.ce += result.terms.ce;
    sum.kl += result.terms.kl;
    if (per_row) write(row, result.terms);
  }
  weight_sum = total_weight(weight_sum);
  if (!per_row) {
    if (options_.reduction == Reduction::kMean) {
      sum.ce /= weight_sum;
      sum.kl /= num_live;
    }
    write(0, sum);
  }

  Tensor totals = new_empty({2}, ScalarType::Double);
  double* totals_data = static_cast<double*>(totals.mutable_data_ptr());
  totals_data[0] = weight_sum;
  totals_data[1] = num_live;
  return {outputs[0], outputs[1], outputs[2], row_state_, totals};
}

LossScales::LossScales(const Tensor& grad_loss, const Tensor& totals, const LossOptions& options)
    : grad_loss_(grad_loss),
      per_row_(options.reduction == Reduction::kNone),
      ce_(options.ce_weight),
      kl_(options.kl_weight) {
  if (options.reduction == Reduction::kMean) {
    const double* const sums = static_cast<const double*>(totals.const_data_ptr());
    ce_ /= sums[0];
    kl_ /= sums[1];
  }
}

}  // namespace introkernels::cpu
