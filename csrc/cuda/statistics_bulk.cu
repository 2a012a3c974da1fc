// Explanation statistics by bulk copies and clusters, for GPUs of compute capability 9.0 and later.
//
// Reads and writes what statistics.cu says and has its floor, but for the doubles of segments: up
// to eight segments of a row add up theirs over distributed shared memory, in their order, and only
// rows of more hand in one for each eight. B * D inputs and the target's gradients are read by
// loads, as there; all other gradients arrive by bulk copies of a slice of a class, 1 KiB.
//
// Mapping: as in statistics.cu; see statistics_bulk.h for the ring of a warp, and
// statistics_plan.cu for how many stages it has. With three and two blocks a multiprocessor, 192
// KiB are on the way.

// The emulation knows neither bulk copies nor clusters, and its device has none.
#if !defined(INTROKERNELS_EMULATION)

#include "cuda/statistics_bulk.h"
#include "cuda/statistics_kernels.h"

namespace introkernels::cuda {

namespace {

template <typename S>
__global__ __launch_bounds__(kThreads, (sizeof(S) == 8 ? 1 : 2)) void explanation_stats_bulk(
    const __grid_constant__ StatisticsCall call) {
#if __CUDA_ARCH__ >= 900
  find_statistics<ByBulkCopies<S>, false>(call);
#endif
}

}  // namespace

void launch_statistics_bulk(const StatisticsCall& call, cudaStream_t stream) {
  with_gradient_type(call.explanations, [&]<typename S>() {
    launch_clusters({"explanation_stats_bulk"}, explanation_stats_bulk<S>,
                    grid_of(call.explanations.num_rows * call.plan.blocks_of_row()),
                    call.plan.blocks_of_cluster, ByBulkCopies<S>::shared_bytes(call.plan), stream,
                    call);
  });
}

}  // namespace introkernels::cuda

#endif
