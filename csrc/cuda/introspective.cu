// The fused loss: statistics, soft labels and loss in one launch that reads the gradients once.
//
// Reads and writes what statistics.cu says and, beside the gradients, B * (C + 4 K) numbers. Floor
// and mapping are those of the statistics. The last block of a row to finish its share goes on to
// the row's teacher logits and its loss, with all its threads on the row; the last of these adds up
// the batch.
#include "cuda/introspective_row.h"
#include "cuda/statistics_kernels.h"

namespace introkernels::cuda {

namespace {

template <typename S, bool kVectors, bool kCenter>
__global__ __launch_bounds__(kThreads, (sizeof(S) == 8 ? 1 : 2)) void introspective(
    const __grid_constant__ IntrospectiveCall call) {
  finish_row_with_loss<Computed<S>>(
      call, find_statistics<ByLoads<S, kVectors, kCenter>, true>(call.statistics));
}

}  // namespace

void launch_introspective(const Explanations& explanations, const StatisticsPlan& plan,
                          const Rows& rows, const StatisticsOutputs& statistics,
                          const LossOutputs& outputs, void* zeros, void* scratch,
                          void* loss_scratch, cudaStream_t stream) {
  int* const counter = static_cast<int*>(zeros);
  const IntrospectiveCall call{{explanations, plan, rows.target, rows.statistics.class_index,
                                rows.numbers.options.ignore_index, rows.num_classes, statistics,
                                counter + 1, static_cast<double*>(scratch)},
                               rows,
                               outputs,
                               {static_cast<double*>(loss_scratch), rows.num_rows},
                               counter};
#if !defined(INTROKERNELS_EMULATION)
  if (plan.is_bulk()) return launch_introspective_bulk(call, stream);
#endif
  with_kernel(explanations, plan, [&]<typename S, bool kVectors, bool kCenter>() {
    launch({"introspective"}, introspective<S, kVectors, kCenter>,
           grid_of(rows.num_rows * plan.blocks_of_row()),
           ByLoads<S, kVectors, kCenter>::shared_bytes(plan), stream, call);
  });
}

}  // namespace introkernels::cuda
