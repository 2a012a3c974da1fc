// From the sums of rows to their terms, and from these to the loss: the last block of a launch adds
// up what all of them found.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/row_loss.h"
#include "cuda/calls.h"
#include "cuda/group.h"
#include "cuda/number.h"
#include "cuda/vectors.h"

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
  target.is_live = target.y != rows.options.ignore_index;
  target.is_known = target.is_live && target.y >= 0 && target.y < rows.num_classes;
  return target;
}

// What each row hands in, [4, B] in memory.
struct Terms {
  double* data;
  int64_t num_rows;

  __device__ __forceinline__ void set(int64_t row, const RowTerms& terms, double target_weight,
                                      bool is_live) const {
    data[row] = terms.ce;
    data[num_rows + row] = terms.kl;
    data[2 * num_rows + row] = target_weight;
    data[3 * num_rows + row] = is_live ? 1.0 : 0.0;
  }
};

__device__ __forceinline__ void store_loss(const LossOutputs& outputs, int64_t index,
                                           const RowTerms& terms, const Rows& rows) {
  const bool is_double = rows.logits.type == NumberType::kFloat64;
  store_number(outputs.loss, is_double, index, combine(terms, rows.options));
  store_number(outputs.ce, is_double, index, terms.ce);
  store_number(outputs.kl, is_double, index, terms.kl);
}

// What one thread does with a row whose sums are there: state, terms and, without a reduction, the
// losses.
__device__ inline void finish_row(const Rows& rows, int64_t row, const Target& target,
                                  const RowSums& sums, const LossOutputs& outputs,
                                  const Terms& terms) {
  RowTerms of_row{0, 0};
  double target_weight = 0;
  if (target.is_known) {
    outputs.state[row] = sums;
    target_weight = weight_of(rows, target.y);
    const double target_logit = Row<AnyNumber, double, 1>(rows.logits, row).value(target.y);
    of_row = terms_of(sums, target_logit, target_weight, rows.options);
  } else {
    const double sum = target.is_live ? kNaN<double> : 0.0;
    outputs.state[row] = {0, 0, sum, sum, sum, 0, 0, 0, 0};
    of_row = {sum, sum};
  }
  terms.set(row, of_row, target_weight, target.is_live);
  if (rows.options.reduction == Reduction::kNone) store_loss(outputs, row, of_row, rows);
}

// Called by all threads of each of `blocks` blocks once, after their rows are in `terms`. The last
// block reads 32 bytes a row, in an order that only the number of rows decides.
__device__ inline void finish_losses(const Rows& rows, const Terms& terms,
                                     const LossOutputs& outputs, int* counter, int64_t blocks,
                                     int* flag, unsigned char* exchange) {
  if (!is_last_to_arrive(counter, int(blocks), flag)) return;
  Group group(kThreads, exchange);
  double sums[4] = {0, 0, 0, 0};
  for (int64_t row = threadIdx.x; row < rows.num_rows; row += kThreads) {
#pragma unroll
    // Written by other multiprocessors: not from a cache that missed it.
    for (int i = 0; i < 4; ++i) sums[i] += __ldcg(terms.data + i * rows.num_rows + row);
  }
  group.reduce(sums, Sum{});
  if (threadIdx.x != 0) return;
  sums[2] = total_weight(sums[2]);
  // In the first two numbers of a row of its own.
  outputs.state[rows.num_rows] = {sums[2], sums[3], 0, 0, 0, 0, 0, 0, 0};
  if (rows.options.reduction == Reduction::kNone) return;
  RowTerms total{sums[0], sums[1]};
  if (rows.options.reduction == Reduction::kMean) {
    total.ce /= sums[2];
    total.kl /= sums[3];
  }
  store_loss(outputs, 0, total, rows);
}

}  // namespace introkernels::cuda
