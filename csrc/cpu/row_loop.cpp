#include "cpu/row_loop.h"

#include <cstring>

namespace introkernels::cpu {

LossCollector::LossCollector(const Tensor& like, int64_t num_rows, ScalarType dtype,
                             const LossOptions& options)
    : like_(like),
      dtype_(dtype),
      options_(options),
      row_state_(new_empty(like, {num_rows, kRowState}, ScalarType::Double)),
      states_(static_cast<RowState*>(row_state_.mutable_data_ptr())),
      terms_(static_cast<size_t>(num_rows)),
      target_weights_(static_cast<size_t>(num_rows)),
      live_(static_cast<size_t>(num_rows)) {}

void LossCollector::set(int64_t row, const RowTerms& terms, double target_weight) {
  const size_t i = static_cast<size_t>(row);
  terms_[i] = terms;
  target_weights_[i] = target_weight;
  live_[i] = 1;
}

void LossCollector::ignore(int64_t row) {
  const size_t i = static_cast<size_t>(row);
  terms_[i] = {0.0, 0.0};
  target_weights_[i] = 0.0;
  live_[i] = 0;
  std::memset(&states_[row], 0, sizeof(RowState));
}

LossOutputs LossCollector::finish() const {
  const int64_t num_rows = static_cast<int64_t>(terms_.size());
  const bool per_row = options_.reduction == Reduction::kNone;
  const auto combine = [&](const RowTerms& terms) {
    // A term that is switched off can't spoil a row: 0 * inf would be NaN.
    const double kl_factor = options_.kl_weight * options_.temperature * options_.temperature;
    const double kl = options_.kl_weight > 0 ? kl_factor * terms.kl : 0.0;
    const double ce = options_.ce_weight > 0 ? options_.ce_weight * terms.ce : 0.0;
    return kl + ce;
  };

  double weight_sum = 0.0, num_live = 0.0;
  RowTerms sum{0.0, 0.0};
  for (size_t i = 0; i < terms_.size(); ++i) {
    weight_sum += target_weights_[i];
    num_live += live_[i];
    sum.ce += terms_[i].ce;
    sum.kl += terms_[i].kl;
  }
  if (options_.reduction == Reduction::kMean) {
    sum.ce /= weight_sum;
    sum.kl /= num_live;
  }

  Tensor outputs[3];
  for (Tensor& output : outputs) {
    output = per_row ? new_empty(like_, {num_rows}, dtype_) : new_empty(like_, {}, dtype_);
  }
  const Output loss(outputs[0]), ce(outputs[1]), kl(outputs[2]);
  const auto write = [&](int64_t row, const RowTerms& terms) {
    const double combined = combine(terms);
    loss.write(row, &combined);
    ce.write(row, &terms.ce);
    kl.write(row, &terms.kl);
  };
  if (per_row) {
    for (int64_t row = 0; row < num_rows; ++row) write(row, terms_[static_cast<size_t>(row)]);
  } else {
    write(0, sum);
  }

  Tensor totals = new_empty(like_, {2}, ScalarType::Double);
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
    const Input total(totals);
    ce_ /= total.read(0);
    kl_ /= total.read(1);
  }
}

}  // namespace introkernels::cpu
