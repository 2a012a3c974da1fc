// The fused loss by bulk copies and clusters, for GPUs of compute capability 9.0 and later: what
// introspective.cu does, with statistics found as in statistics_bulk.cu. The first block of a row's
// cluster, or the last such block of a row to finish, goes on to the loss of the row.

// The emulation knows neither bulk copies nor clusters, and its device has none.
#if !defined(INTROKERNELS_EMULATION)

#include "cuda/introspective_row.h"
#include "cuda/statistics_bulk.h"
#include "cuda/statistics_kernels.h"

namespace introkernels::cuda {

namespace {

template <typename S>
__global__ __launch_bounds__(kThreads, (sizeof(S) == 8 ? 1 : 2)) void introspective_bulk(
    const __grid_constant__ IntrospectiveCall call) {
#if __CUDA_ARCH__ >= 900
  finish_row_with_loss<Computed<S>>(call, find_statistics<ByBulkCopies<S>, true>(call.statistics));
#endif
}

}  // namespace

void launch_introspective_bulk(const IntrospectiveCall& call, cudaStream_t stream) {
  const StatisticsPlan& plan = call.statistics.plan;
  with_gradient_type(call.statistics.explanations, [&]<typename S>() {
    launch_clusters({"introspective_bulk"}, introspective_bulk<S>,
                    grid_of(call.rows.num_rows * plan.blocks_of_row()), plan.blocks_of_cluster,
                    ByBulkCopies<S>::shared_bytes(plan), stream, call);
  });
}

}  // namespace introkernels::cuda

#endif
