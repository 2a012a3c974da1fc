// Explanation statistics.
//
// Reads B * K * D gradients once (twice to centre: the second time a slice of all classes, which is
// K KiB, comes from the level 2 cache), B * D inputs once for each group of classes; writes
// 2 * B * K numbers, and reads and writes as many doubles for each segment where there are several.
// Floor: the gradients over the bandwidth of memory, which is for (256, 100, 3072) bfloat16 157 MB,
// 47 us at 3.35 TB/s. Some five instructions a gradient; an H100 has time for 17 beside bfloat16.
//
// Mapping: a block has all warps on one slice of a row after the other, each with classes of its
// own; see statistics_slice.h, and statistics_plan.cu for what a block gets. A warp has 4 KiB of
// loads on the way, a multiprocessor 64 KiB.
#include "cuda/statistics_row.h"

namespace introkernels::cuda {

namespace {

template <typename S, bool kVectors, bool kCenter>
__global__ __launch_bounds__(kThreads, (sizeof(S) == 8 ? 1 : 2)) void explanation_stats(
    const __grid_constant__ StatisticsCall call) {
  find_statistics<S, kVectors, kCenter, false>(call);
}

}  // namespace

void launch_statistics(const StatisticsCall& call, cudaStream_t stream) {
  const Explanations& explanations = call.explanations;
  if (explanations.num_rows == 0 || explanations.num_explained == 0) return;
  with_kernel(call, [&]<typename S, bool kVectors, bool kCenter>() {
    launch({"explanation_stats"}, explanation_stats<S, kVectors, kCenter>,
           grid_of(explanations.num_rows * call.plan.blocks_of_row()),
           statistics_shared_bytes<S, kVectors, kCenter>(call.plan), stream, call);
  });
}

}  // namespace introkernels::cuda
