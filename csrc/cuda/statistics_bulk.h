// The statistics that a block finds of gradients which arrive by bulk copies.
//
// Each warp has a ring of its own in shared memory, for classes that are its own: a stage holds a
// slice of kClassesAtATime classes. One lane asks for copies, as many stages ahead as there are;
// all lanes wait for a stage, take it into registers, and let it be filled again. So no warp waits
// for another one, and copies are on their way while warps compute.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/bulk_copy.h"
#include "cuda/cluster.h"
#include "cuda/statistics_row.h"

namespace introkernels::cuda {

template <typename S>
class BulkStatistics {
  using Statistics = SliceStatistics<S, true, false>;
  using Shape = SliceShape<S, true>;
  static_assert(Shape::kDims * int64_t(sizeof(S)) == kSliceBytes);
  // Classes of all warps.
  static constexpr int kTurn = kWarps * kClassesAtATime;

 public:
  // sums: as SliceStatistics has them. memory: num_stages * kBytesOfStages bytes of shared
  // memory, at a multiple of 16.
  __device__ __forceinline__ BulkStatistics(const Explanations& explanations,
                                            const BlockShare& share, int num_stages, double* sums,
                                            unsigned char* memory)
      : explanations_(explanations),
        share_(share),
        statistics_(explanations, share, sums, nullptr),
        num_stages_(num_stages),
        ring_(memory + Statistics::warp() * num_stages * kStageBytes),
        barriers_(reinterpret_cast<CopyBarrier*>(memory + kWarps * num_stages * kStageBytes) +
                  Statistics::warp() * num_stages),
        next_slice_(first_class() < int(share.num_classes) ? share.first_slice : share.end_slice),
        next_class_(first_class()) {}

  __device__ __forceinline__ void run() {
    if (Statistics::lane() == 0) {
#pragma unroll 1
      for (int stage = 0; stage < num_stages_; ++stage) barriers_[stage].start();
    }
    fence_before_copies();
    __syncwarp();
#pragma unroll 1
    for (int stage = 0; stage < num_stages_; ++stage) ask_for_next(stage);
    for (int64_t slice = share_.first_slice; slice < share_.end_slice; ++slice) {
      statistics_.prepare(slice * Shape::kDims);
      for (int first = first_class(); first < int(share_.num_classes); first += kTurn) {
        typename Statistics::Fetched classes[kClassesAtATime];
        take(first, &classes);
        statistics_.add_products(first, classes);
      }
    }
  }

 private:
  // Of this warp among those of the block's group.
  __device__ __forceinline__ static int first_class() {
    return Statistics::warp() * kClassesAtATime;
  }

  // Has the stage filled with what this warp takes num_stages turns after what the stage held. All
  // lanes are done with that.
  __device__ __forceinline__ void ask_for_next(int stage) {
    if (next_slice_ >= share_.end_slice) return;
    if (Statistics::lane() == 0) {
      const int64_t begin = next_slice_ * Shape::kDims;
      const int64_t dims_left = explanations_.num_dims - begin;
      const int classes_left = int(share_.num_classes) - next_class_;
      const uint32_t bytes =
          uint32_t(dims_left < Shape::kDims ? dims_left : Shape::kDims) * uint32_t(sizeof(S));
      const int count = classes_left < kClassesAtATime ? classes_left : kClassesAtATime;
      barriers_[stage].expect(uint32_t(count) * bytes);
      const S* gradient = statistics_.gradient_of(share_.first_class + next_class_) + begin;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        barriers_[stage].copy(ring_ + stage * kStageBytes + i * kSliceBytes, gradient, bytes);
        gradient += explanations_.class_stride;
      }
    }
    next_class_ += kTurn;
    if (next_class_ >= int(share_.num_classes)) {
      next_class_ = first_class();
      ++next_slice_;
    }
  }

  // The classes from `first` on; those beyond the last one are copies of it.
  __device__ __forceinline__ void take(int first,
                                       typename Statistics::Fetched (*classes)[kClassesAtATime]) {
    barriers_[stage_].wait(parity_);
    const unsigned char* const slices = ring_ + stage_ * kStageBytes;
    const int last = int(share_.num_classes) - 1 - first;
#pragma unroll
    for (int i = 0; i < kClassesAtATime; ++i) {
      statistics_.read(slices + (i < last ? i : last) * kSliceBytes, &(*classes)[i]);
    }
    fence_before_copies();
    __syncwarp();
    ask_for_next(stage_);
    if (++stage_ == num_stages_) {
      stage_ = 0;
      parity_ ^= 1U;
    }
  }

  const Explanations& explanations_;
  const BlockShare& share_;
  Statistics statistics_;
  int num_stages_;
  unsigned char* ring_;
  CopyBarrier* barriers_;
  // What to ask for next.
  int64_t next_slice_;
  int next_class_;
  // What to take next, and the parity of the stage's use.
  int stage_ = 0;
  uint32_t parity_ = 0;
};

// The way of a block that has its share copied in bulk, and of a cluster that hands in its sums as
// one; see ByLoads.
template <typename S>
struct ByBulkCopies {
  using Shape = SliceShape<S, true>;

  static size_t shared_bytes(const StatisticsPlan& plan) {
    return size_t(kStatisticsSharedBytes + bytes_of_sums(plan) + plan.num_stages * kBytesOfStages);
  }

  __device__ __forceinline__ static int64_t partial_of(const StatisticsPlan& plan,
                                                       int64_t segment) {
    return segment / plan.blocks_of_cluster;
  }
  __device__ __forceinline__ static int num_partials(const StatisticsPlan& plan) {
    return plan.num_segments / plan.blocks_of_cluster;
  }
  __device__ __forceinline__ static bool has_sums() { return rank_in_cluster() == 0; }

  // All blocks of a cluster call this: they have the same row.
  __device__ __forceinline__ static void find_sums(const StatisticsCall& call,
                                                   const BlockShare& share, double* sums,
                                                   unsigned char* memory) {
    BulkStatistics<S>(call.explanations, share, call.plan.num_stages, sums, memory).run();
    add_up_cluster(sums, 2 * share.num_classes, call.plan.blocks_of_cluster);
  }
};

}  // namespace introkernels::cuda
