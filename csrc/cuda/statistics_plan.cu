// How the statistics of a batch are shared out.
#include <algorithm>

#include "cuda/statistics_row.h"

namespace introkernels::cuda {

namespace {

int64_t dims_of_slice(const Explanations& explanations, bool in_vectors) {
  const int64_t of_lane = in_vectors ? 32 / size_of(explanations.gradient_type) : 4;
  return kWarp * of_lane;
}

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

StatisticsPlan plan_statistics(const Explanations& e) {
  const int64_t size = size_of(e.gradient_type);
  StatisticsPlan plan{};
  plan.in_vectors = e.gradient_dims.is_contiguous() && e.num_dims * size % 16 == 0 &&
                    e.row_stride * size % 16 == 0 && e.class_stride * size % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(e.gradients) % 16 == 0;
  const int64_t num_slices = ceil_of(e.num_dims, dims_of_slice(e, plan.in_vectors));
  // Four rounds of two blocks a multiprocessor, so that the last round costs little.
  const int64_t wanted = ceil_of(8 * device_attribute(cudaDevAttrMultiProcessorCount),
                                 std::max<int64_t>(1, e.num_rows));
  // 32 KiB of gradients a block at least, so that starting it pays.
  const int64_t fewest_slices = std::max<int64_t>(1, 32 / std::max<int64_t>(1, e.num_explained));
  const int64_t most_segments =
      std::min<int64_t>(65535, std::max<int64_t>(1, num_slices / fewest_slices));
  plan.slices_of_segment = ceil_of(num_slices, std::min(wanted, most_segments));
  plan.num_segments =
      int(std::max<int64_t>(1, ceil_of(num_slices, std::max<int64_t>(1, plan.slices_of_segment))));
  plan.classes_of_group = e.num_explained;
  if (!e.center) {
    // Whole turns of the warps.
    constexpr int64_t kTurn = kWarps * kClassesAtATime;
    const int64_t groups =
        std::max<int64_t>(1, std::min(wanted / plan.num_segments, e.num_explained / kTurn));
    plan.classes_of_group = std::min({kMostClassesShared, e.num_explained,
                                      ceil_of(ceil_of(e.num_explained, groups), kTurn) * kTurn});
  }
  plan.num_groups = int(ceil_of(e.num_explained, std::max<int64_t>(1, plan.classes_of_group)));
  return plan;
}

Scratch statistics_scratch(const Explanations& e, const StatisticsPlan& plan) {
  const bool has_partial = plan.num_segments > 1 || !sums_are_shared(plan);
  return {plan.blocks_of_row() > 1 ? e.num_rows * int64_t(sizeof(int)) : 0,
          has_partial
              ? e.num_rows * plan.num_segments * 2 * e.num_explained * int64_t(sizeof(double))
              : 0};
}

}  // namespace introkernels::cuda
