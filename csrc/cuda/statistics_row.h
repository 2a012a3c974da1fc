// From the shares of blocks to the statistics of a row, and what kernels that read gradients by
// loads have for it.
#pragma once

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/reduction.h"
#include "cuda/statistics_slice.h"
#include "cuda/teacher.h"

namespace introkernels::cuda {

struct StatisticsCall {
  Explanations explanations;
  StatisticsPlan plan;
  IndexMatrix target;
  IndexMatrix class_index;
  int64_t ignore_index;
  // Of the class index; the largest number where nobody says how many there are.
  int64_t num_classes;
  StatisticsOutputs outputs;
  int* counters;    // [B]
  double* partial;  // [B, num_partials, 2, K], unless a block keeps its sums in shared memory and
                    // has all dimensions of its classes
};

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

// The way of a block that reads its share by loads, and has no other block beside it.
template <typename S, bool kVectors, bool kCenter>
struct ByLoads {
  using Shape = SliceShape<S, kVectors>;

  static size_t shared_bytes(const StatisticsPlan& plan) {
    const int64_t means =
        kCenter ? kWarps * Shape::kDims * int64_t(sizeof(Computed<S>)) : int64_t(0);
    return size_t(kStatisticsSharedBytes + bytes_of_sums(plan) + means);
  }

  // Number of the sums of a block among those of its row and group.
  __device__ __forceinline__ static int64_t partial_of(const StatisticsPlan&, int64_t segment) {
    return segment;
  }
  __device__ __forceinline__ static int num_partials(const StatisticsPlan& plan) {
    return plan.num_segments;
  }
  // Whether this block has sums to hand in.
  __device__ __forceinline__ static bool has_sums() { return true; }

  // memory: what is behind the sums in shared memory. All threads see the sums afterwards.
  __device__ __forceinline__ static void find_sums(const StatisticsCall& call,
                                                   const BlockShare& share, double* sums,
                                                   unsigned char* memory) {
    SliceStatistics<S, kVectors, kCenter>(call.explanations, share, sums,
                                          reinterpret_cast<Computed<S>*>(memory))
        .run();
    __syncthreads();
  }
};

__device__ __forceinline__ void store_statistics(const StatisticsCall& call, int64_t row, int64_t k,
                                                 double dot, double sq_norm, int64_t position) {
  const int64_t place = row * call.explanations.num_explained + k;
  store_number(call.outputs.dots, call.outputs.is_double, place, position < 0 ? kNaN<double> : dot);
  store_number(call.outputs.sq_norms, call.outputs.is_double, place, sq_norm);
}

// A row and what stands there for its target.
struct StatisticsRow {
  int64_t row;
  int64_t target;
  int64_t position;
  // In one block of each row: its statistics are complete, and all threads see them.
  bool is_complete;
};

// This block's share of the statistics, and those of its row if it is the last one of the row.
// Way: how shares are found, as ByLoads. kTicket: whether a single block has to be the last even
// where each writes its own results.
template <typename Way, bool kTicket>
__device__ __forceinline__ StatisticsRow find_statistics(const StatisticsCall& call) {
  unsigned char* const memory = dynamic_shared();
  StatisticsShared& shared = *reinterpret_cast<StatisticsShared*>(memory);
  const StatisticsPlan& plan = call.plan;
  const int64_t num_explained = call.explanations.num_explained;
  const unsigned blocks_of_row = unsigned(plan.num_segments * plan.num_groups);
  const unsigned of_row = blockIdx.x % blocks_of_row;
  // The segments of a group follow each other, as blocks of a cluster do.
  const int64_t segment = of_row % unsigned(plan.num_segments);
  const int64_t group_number = of_row / unsigned(plan.num_segments);
  const int num_partials = Way::num_partials(plan);

  StatisticsRow result;
  result.row = blockIdx.x / blocks_of_row;
  result.target = call.target.data[result.row * call.target.row_stride];
  result.position = -1;
  const bool is_ignored = result.target == call.ignore_index;
  if (!is_ignored) {
    Group group(kThreads, shared.exchange);
    result.position = position_of_target(&group, call.class_index, result.row, num_explained,
                                         result.target, call.num_classes);
    BlockShare share;
    share.row = result.row;
    share.position = result.position;
    share.first_class = group_number * plan.classes_of_group;
    share.num_classes = std::min<int64_t>(plan.classes_of_group, num_explained - share.first_class);
    const int64_t num_slices =
        (call.explanations.num_dims + Way::Shape::kDims - 1) / Way::Shape::kDims;
    share.first_slice = segment * plan.slices_of_segment;
    share.end_slice = std::min<int64_t>(num_slices, share.first_slice + plan.slices_of_segment);

    double* const partial =
        call.partial +
        (result.row * num_partials + Way::partial_of(plan, segment)) * 2 * num_explained;
    const bool is_shared = sums_are_shared(plan);
    double* const sums =
        is_shared ? reinterpret_cast<double*>(memory + kStatisticsSharedBytes) : partial;
    for (int64_t i = threadIdx.x; i < 2 * share.num_classes; i += kThreads) sums[i] = 0;
    __syncthreads();
    Way::find_sums(call, share, sums, memory + kStatisticsSharedBytes + bytes_of_sums(plan));
    if (Way::has_sums()) {
      for (int64_t k = threadIdx.x; k < share.num_classes; k += kThreads) {
        const double dot = sums[k], sq_norm = sums[share.num_classes + k];
        if (num_partials == 1) {
          store_statistics(call, result.row, share.first_class + k, dot, sq_norm, result.position);
        } else if (is_shared) {
          partial[share.first_class + k] = dot;
          partial[num_explained + share.first_class + k] = sq_norm;
        }
      }
    }
  }
  result.is_complete = Way::has_sums();
  if (!result.is_complete) return result;
  const int arrivals = num_partials * plan.num_groups;
  if ((kTicket || num_partials > 1) && arrivals > 1) {
    result.is_complete = is_last_to_arrive(call.counters + result.row, arrivals, &shared.flag);
  }
  if (!result.is_complete) return result;
  if (is_ignored) {
    // Without segments, each block of the row is here with its group of classes, or one with all.
    for (int64_t k = threadIdx.x; k < num_explained; k += kThreads) {
      store_statistics(call, result.row, k, 0, 0, 0);
    }
  } else if (num_partials > 1) {
    const double* const first = call.partial + result.row * num_partials * 2 * num_explained;
    for (int64_t k = threadIdx.x; k < num_explained; k += kThreads) {
      double dot = 0, sq_norm = 0;
      for (int i = 0; i < num_partials; ++i) {
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

#if !defined(INTROKERNELS_EMULATION)
// By the kernels of statistics_bulk.cu.
void launch_statistics_bulk(const StatisticsCall& call, cudaStream_t stream);
#endif

}  // namespace introkernels::cuda
