// From rows to the loss: the last block of a launch adds up what all of them found.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/row_loss.h"
#include "cuda/calls.h"
#include "cuda/group.h"

namespace introkernels::cuda {

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

__device__ __forceinline__ void store_number(void* data, bool is_double, int64_t index,
                                             double value) {
  if (is_double) {
    static_cast<double*>(data)[index] = value;
  } else {
    static_cast<float*>(data)[index] = float(value);
  }
}

__device__ __forceinline__ void store_loss(const LossOutputs& outputs, bool is_double,
                                           int64_t index, const RowTerms& terms,
                                           const LossOptions& options) {
  store_number(outputs.loss, is_double, index, combine(terms, options));
  store_number(outputs.ce, is_double, index, terms.ce);
  store_number(outputs.kl, is_double, index, terms.kl);
}

// Called by all threads of each of `blocks` blocks once, after their rows are in `terms`. The last
// block reads 32 bytes a row, in an order that only the number of rows decides.
__device__ inline void finish_losses(const Terms& terms, const LossOutputs& outputs, bool is_double,
                                     const LossOptions& options, int* counter, int64_t blocks,
                                     int* flag, unsigned char* exchange) {
  if (!is_last_to_arrive(counter, int(blocks), flag)) return;
  Group group(kThreads, exchange);
  double sums[4] = {0, 0, 0, 0};
  for (int64_t row = threadIdx.x; row < terms.num_rows; row += kThreads) {
#pragma unroll
    // Written by other multiprocessors: not from a cache that missed it.
    for (int i = 0; i < 4; ++i) sums[i] += __ldcg(terms.data + i * terms.num_rows + row);
  }
  group.reduce(sums, Sum{});
  if (threadIdx.x != 0) return;
  sums[2] = total_weight(sums[2]);
  outputs.totals[0] = sums[2];
  outputs.totals[1] = sums[3];
  if (options.reduction == Reduction::kNone) return;
  RowTerms total{sums[0], sums[1]};
  if (options.reduction == Reduction::kMean) {
    total.ce /= sums[2];
    total.kl /= sums[3];
  }
  store_loss(outputs, is_double, 0, total, options);
}

}  // namespace introkernels::cuda
