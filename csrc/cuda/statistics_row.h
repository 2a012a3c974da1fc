// From the shares of blocks to the statistics of a row.
#pragma once

#include <algorithm>

#include "cuda/explanations.h"
#include "cuda/group.h"
#include "cuda/launch.h"
#include "cuda/number.h"
#include "cuda/statistics_slice.h"

namespace introkernels::cuda {

struct StatisticsShared {
  alignas(16) unsigned char exchange[kExchangeBytes];
  int flag;
};

// Where the rest of the shared memory begins: sums of a block, then what centring exchanges.
constexpr int64_t kStatisticsSharedBytes = (sizeof(StatisticsShared) + 15) / 16 * 16;

__host__ __device__ inline bool sums_are_shared(const StatisticsPlan& plan) {
  return plan.classes_of_group <= kMostClassesShared;
}

__host__ __device__ inline int64_t bytes_of_sums(const StatisticsPlan& plan) {
  return sums_are_shared(plan) ? 2 * plan.classes_of_group * int64_t(sizeof(double)) : 0;
}

template <typename S, bool kVectors, bool kCenter>
size_t statistics_shared_bytes(const StatisticsPlan& plan) {
  const int64_t means =
      kCenter ? kWarps * SliceShape<S, kVectors>::kDims * int64_t(sizeof(Computed<S>)) : int64_t(0);
  return size_t(kStatisticsSharedBytes + bytes_of_sums(plan) + means);
}

__device__ __forceinline__ void store_statistics(const StatisticsCall& call, int64_t row, int64_t k,
                                                 double dot, double sq_norm, int64_t position) {
  const int64_t place = row * call.explanations.num_explained + k;
  store_number(call.outputs.dots, call.outputs.is_double, place, position < 0 ? kNaN<double> : dot);
  store_number(call.outputs.sq_norms, call.outputs.is_double, place, sq_norm);
}

// Where a row's target stands among its explained classes, -1 where it does not or where one of
// these is not among num_classes. All threads of the group get the answer.
__device__ inline int64_t position_of_target(Group* group, const IndexMatrix& class_index,
                                             int64_t row, int64_t num_explained, int64_t target,
                                             int64_t num_classes) {
  if (class_index.data == nullptr) return target < 0 || target >= num_explained ? -1 : target;
  const int64_t* const classes = class_index.data + row * class_index.row_stride;
  double found[2] = {-1, -1};
  for (int64_t k = group->rank(); k < num_explained; k += group->size()) {
    const int64_t c = classes[k * class_index.column_stride];
    if (c == target) found[0] = double(k);
    if (c < 0 || c >= num_classes) found[1] = double(k);
  }
  group->reduce(found, Largest{});
  return found[1] >= 0 ? -1 : int64_t(found[0]);
}

// A row, and the place of its target among its explained classes.
struct StatisticsRow {
  int64_t row;
  int64_t position;
  // In one block of each row: its statistics are complete, and all threads see them.
  bool is_complete;
};

// This block's share of the statistics, and those of its row if it is the last one of the row.
// kTicket: whether a single block has to be the last even where each writes its own results.
template <typename S, bool kVectors, bool kCenter, bool kTicket>
__device__ __forceinline__ StatisticsRow find_statistics(const StatisticsCall& call) {
  unsigned char* const memory = dynamic_shared();
  StatisticsShared& shared = *reinterpret_cast<StatisticsShared*>(memory);
  const StatisticsPlan& plan = call.plan;
  const int64_t num_explained = call.explanations.num_explained;
  const unsigned blocks_of_row = unsigned(plan.num_segments * plan.num_groups);
  const unsigned of_row = blockIdx.x % blocks_of_row;
  const int64_t segment = of_row % unsigned(plan.num_segments);
  const int64_t group_number = of_row / unsigned(plan.num_segments);

  StatisticsRow result;
  result.row = blockIdx.x / blocks_of_row;
  result.position = -1;
  const int64_t target = call.target.data[result.row * call.target.row_stride];
  const bool is_ignored = target == call.ignore_index;
  if (!is_ignored) {
    Group group(kThreads, shared.exchange);
    result.position = position_of_target(&group, call.class_index, result.row, num_explained,
                                         target, call.num_classes);
    BlockShare share;
    share.row = result.row;
    share.position = result.position;
    share.first_class = group_number * plan.classes_of_group;
    share.num_classes = std::min<int64_t>(plan.classes_of_group, num_explained - share.first_class);
    constexpr int64_t kDims = SliceShape<S, kVectors>::kDims;
    const int64_t num_slices = (call.explanations.num_dims + kDims - 1) / kDims;
    share.first_slice = segment * plan.slices_of_segment;
    share.end_slice = std::min<int64_t>(num_slices, share.first_slice + plan.slices_of_segment);

    double* const partial =
        call.partial + (result.row * plan.num_segments + segment) * 2 * num_explained;
    const bool is_shared = sums_are_shared(plan);
    double* const sums =
        is_shared ? reinterpret_cast<double*>(memory + kStatisticsSharedBytes) : partial;
    for (int64_t i = threadIdx.x; i < 2 * share.num_classes; i += kThreads) sums[i] = 0;
    __syncthreads();
    auto* const means =
        reinterpret_cast<Computed<S>*>(memory + kStatisticsSharedBytes + bytes_of_sums(plan));
    SliceStatistics<S, kVectors, kCenter>(call.explanations, share, sums, means).run();
    __syncthreads();
    for (int64_t k = threadIdx.x; k < share.num_classes; k += kThreads) {
      const double dot = sums[k], sq_norm = sums[share.num_classes + k];
      if (plan.num_segments == 1) {
        store_statistics(call, result.row, share.first_class + k, dot, sq_norm, result.position);
      } else if (is_shared) {
        partial[share.first_class + k] = dot;
        partial[num_explained + share.first_class + k] = sq_norm;
      }
    }
  }
  result.is_complete = true;
  if ((kTicket || plan.num_segments > 1) && blocks_of_row > 1) {
    result.is_complete =
        is_last_to_arrive(call.counters + result.row, int(blocks_of_row), &shared.flag);
  }
  if (!result.is_complete) return result;
  if (is_ignored) {
    // Without segments, each block of the row is here with its group of classes, or one with all.
    for (int64_t k = threadIdx.x; k < num_explained; k += kThreads) {
      store_statistics(call, result.row, k, 0, 0, 0);
    }
  } else if (plan.num_segments > 1) {
    const double* const first = call.partial + result.row * plan.num_segments * 2 * num_explained;
    for (int64_t k = threadIdx.x; k < num_explained; k += kThreads) {
      double dot = 0, sq_norm = 0;
      for (int i = 0; i < plan.num_segments; ++i) {
        const double* const partial = first + int64_t(i) * 2 * num_explained;
        // Written by other multiprocessors: not from a cache that missed it.
        dot += __ldcg(partial + k);
        sq_norm += __ldcg(partial + num_explained + k);
      }
      store_statistics(call, result.row, k, dot, sq_norm, result.position);
    }
  }
  __syncthreads();
  return result;
}

// Calls start.operator()<S, kVectors, kCenter>() for the type of the gradients and how to read
// them.
template <typename Start>
void with_kernel(const StatisticsCall& call, const Start& start) {
  const auto with_center = [&]<typename S, bool kVectors>() {
    if (call.explanations.center) {
      start.template operator()<S, kVectors, true>();
    } else {
      start.template operator()<S, kVectors, false>();
    }
  };
  const auto with_type = [&]<typename S>() {
    if (call.plan.in_vectors) {
      with_center.template operator()<S, true>();
    } else {
      with_center.template operator()<S, false>();
    }
  };
  switch (call.explanations.gradient_type) {
    case NumberType::kFloat64:
      return with_type.template operator()<double>();
    case NumberType::kFloat32:
      return with_type.template operator()<float>();
    case NumberType::kBFloat16:
      return with_type.template operator()<BFloat16>();
    case NumberType::kFloat16:
      return with_type.template operator()<Float16>();
  }
}

}  // namespace introkernels::cuda
