// The forward of rows, from their parts to what they hand in.
#pragma once

#include <type_traits>

#include "cuda/reduction.h"
#include "cuda/row_loss.h"
#include "cuda/teacher.h"

namespace introkernels::cuda {

// A row's target, and what it makes of the row.
struct Target {
  int64_t y;
  bool is_live;   // there is such a row, and it is not ignored
  bool is_known;  // and its target is a class: otherwise nothing of the row is read
};

__device__ __forceinline__ Target target_of(const Rows& rows, int64_t row) {
  Target target{};
  if (row >= rows.num_rows) return target;
  target.y = rows.target.data[row * rows.target.row_stride];
  target.is_live = target.y != rows.numbers.options.ignore_index;
  target.is_known = target.is_live && target.y >= 0 && target.y < rows.num_classes;
  return target;
}

// The teacher of a row: given logits, or those that statistics stand for.
template <typename Teacher>
__device__ __forceinline__ Teacher teacher_of(const Rows& rows, int64_t row, int64_t target) {
  if constexpr (std::is_constructible_v<Teacher, Statistics, int64_t, int64_t>) {
    return Teacher(rows.statistics, row, target);
  } else {
    return Teacher(rows.teacher, row);
  }
}

// What one thread does with a row whose parts are there: state, terms and, without a reduction, the
// losses.
template <typename T>
__device__ inline void finish_row_of(const Rows& rows, int64_t row, const Target& target,
                                     const PartSums* parts, int num_parts, double target_logit,
                                     const LossOutputs& outputs, const Terms& terms) {
  constexpr bool kIsDouble = sizeof(T) == 8;
  RowState state{};
  RowTerms of_row{0, 0};
  double target_weight = 0;
  if (target.is_known) {
    target_weight = weight_of(rows.numbers, target.y);
    of_row = finish_parts(parts, num_parts, target_logit, target_weight, rows.numbers, &state);
  } else if (target.is_live) {
    of_row = {kNaN<double>, kNaN<double>};
  }
  reinterpret_cast<RowState*>(outputs.row_state)[row] = state;
  terms.set(row, of_row, target_weight, target.is_live);
  if (rows.numbers.options.reduction == Reduction::kNone) {
    store_loss(outputs, kIsDouble, row, of_row, rows.numbers.options);
  }
}

}  // namespace introkernels::cuda
