#include "cpu/row_loss.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "cpu/workspace.h"

namespace introkernels::cpu {

namespace {

// Classes of a part: its logits, teacher logits and their exponentials, 256 KiB as float, stay in
// the L2 cache over the passes.
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

template <typename T>
RowTerms RowLoss<T>::forward(const T* z, const T* t, int64_t target, Spread spread,
                             RowState* state) const {
  const Row<T> row{z, t, class_weight_, num_classes_, target};
  const int64_t num_parts = (num_classes_ + kPart - 1) / kPart;
  struct Part {
    Maxima<T> maxima;
    RowSums sums;
    DivergenceSums divergence;
  };
  Workspace workspace(Workspace::bytes_of<Part>(num_parts) +
                      2 * Workspace::bytes_of<T>(num_classes_));
  Part* const parts = workspace.take<Part>(num_parts);
  T* const exps_of_logits = workspace.take<T>(num_classes_);
  T* const exps_of_teacher = workspace.take<T>(num_classes_);
  const auto exps_of = [&](int64_t i) {
    return Exponentials<T>{exps_of_logits + i * kPart, exps_of_teacher + i * kPart};
  };

  for_each_part(row, spread, [&](int64_t i, const Row<T>& part) {
    parts[i].maxima = kernels_.row_maxima(part);
  });
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  Maxima<T> maxima = parts[0].maxima;
  for (int64_t i = 1; i < num_parts; ++i) {
    maxima.logit = std::max(maxima.logit, parts[i].maxima.logit);
    maxima.teacher = std::max(maxima.teacher, parts[i].maxima.teacher);
  }
  if (maxima.logit == kNever) maxima.logit = T(0);
  if (maxima.teacher == kNever) maxima.teacher = T(0);
  state->max = double(maxima.logit);
  state->teacher_max = double(maxima.teacher);

  for_each_part(row, spread, [&](int64_t i, const Row<T>& part) {
    parts[i].sums = kernels_.row_sums(part, maxima, options_, exps_of(i));
  });
  RowSums sums = parts[0].sums;
  for (int64_t i = 1; i < num_parts; ++i) sums.add(parts[i].sums);
  RowTerms terms;
  terms.ce = finish_row(sums, double(z[target]), weight(target), options_, state);
  if (state->teacher_norm_t == 0) {
    terms.kl = state->norm == 0 ? 0.0 : kl_without_labels_;
    return terms;
  }

  for_each_part(row, spread, [&](int64_t i, const Row<T>& part) {
    parts[i].divergence = kernels_.row_divergence(part, *state, options_.temperature, exps_of(i));
  });
  DivergenceSums divergence = parts[0].divergence;
  for (int64_t i = 1; i < num_parts; ++i) divergence.add(parts[i].divergence);
  terms.kl = finish_divergence(divergence, state);
  return terms;
}

template <typename T>
void RowLoss<T>::backward(const T* z, const T* t, int64_t target, const RowState& state,
                          double ce_scale, double kl_scale, Spread spread, T* grad) const {
  RowScales scales;
  scales.ce = ce_scale;
  scales.ce_target = ce_scale * (1 - options_.label_smoothing) * weight(target);
  scales.kl = state.teacher_norm_t == 0 ? kl_without_labels_ : kl_scale * options_.temperature;
  for_each_part(Row<T>{z, t, class_weight_, num_classes_, target}, spread,
                [&](int64_t i, const Row<T>& part) {
                  kernels_.row_backward(part, options_, state, scales, grad + i * kPart);
                });
}

template class RowLoss<float>;
template class RowLoss<double>;

}  // namespace introkernels::cpu
