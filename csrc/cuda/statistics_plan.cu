// How the statistics of a batch are shared out, and by which kernels.
//
// INTROKERNELS_CUDA_STATISTICS, which is read once, chooses: "portable" kernels that load; "bulk"
// copies and clusters (statistics_bulk.cu) wherever gradients lie in vectors and are not centred,
// which takes a GPU of compute capability 9.0 or later; "auto", which is usual. That is "portable"
// until somebody has measured both. By Little's law, 3.35 TB/s and some 800 ns of latency ask for
// 2.7 MB on the way, 20 KiB a multiprocessor of an H100. Two blocks of eight warps, 4 KiB of loads
// each, have 64 KiB whenever no warp computes, and 20 KiB still with a third of them waiting; their
// arithmetic takes a third of the time that memory does. The 192 KiB of the rings would be needed
// only where latency is far longer than that.
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/statistics_row.h"

namespace introkernels::cuda {

namespace {

enum class Kernels { kAuto, kPortable, kBulk };

constexpr const char* kChoice = "INTROKERNELS_CUDA_STATISTICS";

Kernels read_choice() {
  const char* const value = std::getenv(kChoice);
  const std::string text = value == nullptr ? "auto" : value;
  if (text == "auto") return Kernels::kAuto;
  if (text == "portable") return Kernels::kPortable;
  if (text == "bulk") return Kernels::kBulk;
  throw std::invalid_argument(std::string("introkernels: ") + kChoice +
                              " must be auto, portable or bulk, got '" + text + "'");
}

// Throws std::invalid_argument where the current device has no such kernels.
bool bulk_is_chosen() {
  static const Kernels choice = read_choice();
  if (choice != Kernels::kBulk) return false;
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major < 9) {
    throw std::invalid_argument(
        std::string("introkernels: ") + kChoice +
        "=bulk needs a GPU of compute capability 9.0 or later, this one has " +
        std::to_string(major) + "." +
        std::to_string(device_attribute(cudaDevAttrComputeCapabilityMinor)));
  }
  return true;
}

int64_t dims_of_slice(const Explanations& explanations, bool in_vectors) {
  const int64_t of_lane = in_vectors ? 32 / size_of(explanations.gradient_type) : 4;
  return kWarp * of_lane;
}

int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// For the kernels that load.
StatisticsPlan portable_plan(const Explanations& e) {
  const int64_t size = size_of(e.gradient_type);
  StatisticsPlan plan{};
  plan.blocks_of_cluster = 1;
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

// Stages of each warp's ring, 0 where there is no room for any.
int stages_for(const StatisticsPlan& plan) {
  // 192 KiB of a block, ten times what has to be on the way.
  constexpr int64_t kMostStages = 6;
  const auto stages_in = [&](int64_t bytes) {
    return std::max<int64_t>(
        0, (bytes - kStatisticsSharedBytes - bytes_of_sums(plan)) / kBytesOfStages);
  };
  // What the system keeps of each block's share is 1 KiB on all of these GPUs.
  const int64_t of_two =
      stages_in(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - 1024);
  const int64_t of_one = stages_in(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  return int(std::min(kMostStages, of_two >= 3 ? of_two : of_one));
}

// Every GPU that has clusters takes as many blocks in one.
constexpr int kMostBlocksOfCluster = 8;

// The same for the kernels that copy in bulk: segments fill clusters of a power of two.
StatisticsPlan bulk_plan(const Explanations& e, StatisticsPlan plan) {
  plan.num_stages = stages_for(plan);
  if (!plan.is_bulk()) return plan;
  plan.blocks_of_cluster =
      int(std::bit_floor(unsigned(std::min(plan.num_segments, kMostBlocksOfCluster))));
  plan.num_segments = plan.num_segments / plan.blocks_of_cluster * plan.blocks_of_cluster;
  plan.slices_of_segment = ceil_of(ceil_of(e.num_dims, dims_of_slice(e, true)), plan.num_segments);
  return plan;
}

}  // namespace

StatisticsPlan plan_statistics(const Explanations& e) {
  const bool is_bulk = bulk_is_chosen();
  const StatisticsPlan plan = portable_plan(e);
  return is_bulk && plan.in_vectors && !e.center ? bulk_plan(e, plan) : plan;
}

StatisticsScratch statistics_scratch(const Explanations& e, const StatisticsPlan& plan) {
  const bool has_partial = plan.num_partials() > 1 || !sums_are_shared(plan);
  return {plan.blocks_of_row() > 1 ? e.num_rows * int64_t(sizeof(int)) : 0,
          has_partial
              ? e.num_rows * plan.num_partials() * 2 * e.num_explained * int64_t(sizeof(double))
              : 0};
}

}  // namespace introkernels::cuda
