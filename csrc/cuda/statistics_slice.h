// The statistics that a block finds: those of a segment of a row's dimensions, slice by slice, for
// a group of its classes.
//
// All warps of a block share a slice. A lane keeps the input and the target's explanation at the
// dimensions that it has of it in registers, while its warp walks classes of its own, a few at a
// time; so the sums of a class never leave its warp, and a slice costs one tree of shuffles for a
// few classes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/explanations.h"
#include "cuda/group.h"
#include "cuda/number.h"
#include "cuda/vectors.h"

namespace introkernels::cuda {

// How gradients of S are read: kVectors by 16 bytes, otherwise one by one, wherever they lie.
template <typename S, bool kVectors>
struct SliceShape {
  // Of a lane, in a slice, for a class.
  static constexpr int kLoads = kVectors ? 2 : 4;
  // Numbers that a load brings.
  static constexpr int kWidth = kVectors ? int(16 / sizeof(S)) : 1;
  static constexpr int kOfLane = kLoads * kWidth;
  static constexpr int64_t kDims = int64_t(kWarp) * kOfLane;
};

// Classes that a warp works on at a time, so that as many loads are on their way.
constexpr int kClassesAtATime = 4;

// A group has as many sums in shared memory at most; blocks that centre more classes keep them in
// global memory.
constexpr int64_t kMostClassesShared = 1024;

// Where dimension i of an explanation lies.
__device__ __forceinline__ int64_t offset_of(const Dims& dims, int64_t i) {
  int64_t offset = 0;
#pragma unroll 1
  for (int dim = dims.count - 1; dim > 0; --dim) {
    const int64_t outer = i / dims.sizes[dim];
    offset += (i - outer * dims.sizes[dim]) * dims.strides[dim];
    i = outer;
  }
  return offset + i * dims.strides[0];
}

// values[0..8) of all lanes of a warp added up; lane l gets the sum of values[l / 4].
template <typename T>
__device__ __forceinline__ T sum_of_eight(const T (&values)[8]) {
  const int lane = int(threadIdx.x) & (kWarp - 1);
  T four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const T sent = lane & 16 ? values[i] : values[i + 4];
    four[i] = (lane & 16 ? values[i + 4] : values[i]) + __shfl_xor_sync(~0U, sent, 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T sent = lane & 8 ? four[i] : four[i + 2];
    two[i] = (lane & 8 ? four[i + 2] : four[i]) + __shfl_xor_sync(~0U, sent, 8);
  }
  const T sent = lane & 4 ? two[0] : two[1];
  T one = (lane & 4 ? two[1] : two[0]) + __shfl_xor_sync(~0U, sent, 4);
  one += __shfl_xor_sync(~0U, one, 2);
  return one + __shfl_xor_sync(~0U, one, 1);
}

// The share of a block in the statistics of a row.
struct BlockShare {
  int64_t row;
  int64_t position;  // of the target among the row's classes, or -1
  int64_t first_class;
  int64_t num_classes;
  int64_t first_slice;
  int64_t end_slice;
};

template <typename S, bool kVectors, bool kCenter>
class SliceStatistics {
  using T = Computed<S>;
  using Shape = SliceShape<S, kVectors>;
  static constexpr int kLoads = Shape::kLoads, kWidth = Shape::kWidth, kOfLane = Shape::kOfLane;

 public:
  // sums: [2, share.num_classes], dots then squared norms, which start as zeros and get what this
  // block finds. means: kWarps * Shape::kDims numbers of shared memory where kCenter.
  __device__ __forceinline__ SliceStatistics(const Explanations& explanations,
                                             const BlockShare& share, double* sums, T* means)
      : explanations_(explanations),
        share_(share),
        gradients_(static_cast<const S*>(explanations.gradients) +
                   share.row * explanations.row_stride),
        sums_(sums),
        means_(means) {}

  __device__ __forceinline__ void run() {
    for (int64_t slice = share_.first_slice; slice < share_.end_slice; ++slice) {
      prepare(slice * Shape::kDims);
      if constexpr (kCenter) find_means();
      for_classes([&](int64_t first, const Fetched(&classes)[kClassesAtATime]) {
        add_products(first, classes);
      });
    }
  }

 private:
  // This lane's gradients of a class.
  union Fetched {
    uint4 words[kVectors ? kLoads : 1];
    S values[kOfLane];
  };

  __device__ __forceinline__ static int lane() { return int(threadIdx.x) & (kWarp - 1); }
  __device__ __forceinline__ static int warp() { return int(threadIdx.x) / kWarp; }

  // Where this lane reads in the slice that begins at dimension `begin`, and what of it all classes
  // share.
  __device__ __forceinline__ void prepare(int64_t begin) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int64_t i = begin + place_of(load * kWidth);
      is_inside_[load] = i < explanations_.num_dims;
      if constexpr (kVectors) {
        offsets_[load] = i;
      } else {
        offsets_[load] = is_inside_[load] ? offset_of(explanations_.gradient_dims, i) : 0;
      }
    }
    Fetched of_target;
    fetch(share_.position < 0 ? 0 : share_.position, &of_target);
    const Dims& dims = explanations_.input_dims;
    const int64_t input_row = share_.row * explanations_.input_row_stride;
    with_storage(explanations_.input_type, [&](auto storage) {
      using Input = decltype(storage);
      const Input* const inputs = static_cast<const Input*>(explanations_.inputs) + input_row;
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        const int64_t dim = begin + place_of(i);
        const bool is_inside = is_inside_[i / kWidth];
        x_[i] = is_inside ? T(widened(inputs[offset_of(dims, dim)])) : T(0);
      }
    });
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const T g = widened(of_target.values[i]);
      if constexpr (kCenter) {
        g_target_[i] = g;
      } else {
        // The product of gradient and input is formed first: it may be moderate where they aren't.
        of_target_[i] = g * x_[i];
      }
    }
  }

  // Adds what kClassesAtATime classes from `first` on have in this slice; all lanes take part.
  __device__ __forceinline__ void add_products(int64_t first,
                                               const Fetched (&classes)[kClassesAtATime]) const {
    T products[2 * kClassesAtATime] = {};
#pragma unroll
    for (int c = 0; c < kClassesAtATime; ++c) {
#pragma unroll
      for (int i = 0; i < kOfLane; ++i) {
        T explained, of_target;
        if constexpr (kCenter) {
          const T mean = of_target_[i];
          explained = (widened(classes[c].values[i]) - g_target_[i] - mean) * x_[i];
          of_target = -mean * x_[i];
        } else {
          explained = widened(classes[c].values[i]) * x_[i];
          of_target = of_target_[i];
        }
        products[c] = fma_of(explained, of_target, products[c]);
        products[kClassesAtATime + c] = fma_of(explained, explained, products[kClassesAtATime + c]);
      }
    }
    const T sum = sum_of_eight(products);
    const int number = lane() / 4;
    const int64_t k = first + number % kClassesAtATime;
    if (lane() % 4 == 0 && k < share_.num_classes) {
      sums_[(number / kClassesAtATime) * share_.num_classes + k] += double(sum);
    }
  }

  // Which dimension of the slice number i of this lane is.
  __device__ __forceinline__ static int64_t place_of(int i) {
    return int64_t(i / kWidth * kWarp + lane()) * kWidth + i % kWidth;
  }

  // This lane's gradients of a class; zeros beyond the last dimension.
  __device__ __forceinline__ void fetch(int64_t k, Fetched* out) const {
    const S* const gradient = gradients_ + k * explanations_.class_stride;
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      if constexpr (kVectors) {
        out->words[load] = is_inside_[load]
                               ? __ldcs(reinterpret_cast<const uint4*>(gradient + offsets_[load]))
                               : make_uint4(0, 0, 0, 0);
      } else {
        out->values[load] = is_inside_[load] ? gradient[offsets_[load]] : S{};
      }
    }
  }

  // work(first, classes) for this warp's classes, kClassesAtATime of them from `first` on; classes
  // beyond the last one are copies of it.
  template <typename Work>
  __device__ __forceinline__ void for_classes(const Work& work) const {
    for (int64_t first = int64_t(warp()) * kClassesAtATime; first < share_.num_classes;
         first += kWarps * kClassesAtATime) {
      Fetched classes[kClassesAtATime];
#pragma unroll
      for (int i = 0; i < kClassesAtATime; ++i) {
        const int64_t k = first + i < share_.num_classes ? first + i : share_.num_classes - 1;
        fetch(share_.first_class + k, &classes[i]);
      }
      work(first, classes);
    }
  }

  // The mean over the classes of g_c - g_y, for every dimension of the slice. Counted from the
  // target's gradient, what all classes have in common is gone before anything is rounded.
  __device__ __forceinline__ void find_means() {
    T totals[kOfLane] = {};
    for_classes([&](int64_t first, const Fetched(&classes)[kClassesAtATime]) {
#pragma unroll
      for (int c = 0; c < kClassesAtATime; ++c) {
        if (first + c >= share_.num_classes) continue;
#pragma unroll
        for (int i = 0; i < kOfLane; ++i) totals[i] += widened(classes[c].values[i]) - g_target_[i];
      }
    });
    // Not before all have read those of the slice before.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) means_[warp() * Shape::kDims + place_of(i)] = totals[i];
    __syncthreads();
    const T share_of_mean = T(1) / T(share_.num_classes);
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      T total = means_[place_of(i)];
#pragma unroll 1
      for (int w = 1; w < kWarps; ++w) total += means_[w * Shape::kDims + place_of(i)];
      of_target_[i] = total * share_of_mean;
    }
  }

  const Explanations& explanations_;
  const BlockShare& share_;
  const S* gradients_;
  double* sums_;
  T* means_;
  int64_t offsets_[kLoads];
  bool is_inside_[kLoads];
  T x_[kOfLane];
  // The target's explanation; with kCenter the mean over the classes, counted from g_target_.
  T of_target_[kOfLane];
  T g_target_[kCenter ? kOfLane : 1];
};

}  // namespace introkernels::cuda
