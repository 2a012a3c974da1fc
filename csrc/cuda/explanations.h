// Explanations as kernels walk them: gradients [B, K, *S] of any strides, never copied, and inputs
// [B, *S].
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/calls.h"

namespace introkernels::cuda {

// Dimensions that are walked as one, the innermost last.
struct Dims {
  // Of tensors that have more which no stride joins, inputs and gradients are copied.
  static constexpr int kMost = 12;

  int count;
  int64_t sizes[kMost];
  int64_t strides[kMost];

  // D numbers side by side.
  bool is_contiguous() const { return count == 1 && strides[0] == 1; }
};

struct Explanations {
  const void* gradients;
  const void* inputs;
  NumberType gradient_type;
  NumberType input_type;
  int64_t num_rows;       // B
  int64_t num_explained;  // K
  int64_t num_dims;       // D
  int64_t row_stride;
  int64_t class_stride;
  int64_t input_row_stride;
  // Both walk the same D dimensions, in the order in which the gradients lie.
  Dims gradient_dims;
  Dims input_dims;
  bool center;
};

// How the statistics of a batch are shared out among blocks: by rows, segments of the dimensions
// and, without centring, groups of classes. A plan depends on shape, strides and device alone.
struct StatisticsPlan {
  bool in_vectors;   // gradients are loaded by 16 bytes
  int num_segments;  // of a row
  int64_t slices_of_segment;
  int num_groups;  // of a row's classes
  int64_t classes_of_group;

  int64_t blocks_of_row() const { return int64_t(num_segments) * num_groups; }
};

StatisticsPlan plan_statistics(const Explanations& explanations);

// What the statistics need besides: counters, and sums of segments.
Scratch statistics_scratch(const Explanations& explanations, const StatisticsPlan& plan);

// dots and sq_norms [B, K], contiguous: float64 for `is_double`, else float32. Zeros in ignored
// rows; where the target is none of the row's classes, dots are NaN.
struct StatisticsOutputs {
  void* dots;
  void* sq_norms;
  bool is_double;
};

struct StatisticsCall {
  Explanations explanations;
  StatisticsPlan plan;
  IndexMatrix target;
  // [B, K]; null data where the explained classes are all classes in order.
  IndexMatrix class_index;
  int64_t ignore_index;
  // Of the class index; the largest number where nobody says how many there are.
  int64_t num_classes;
  StatisticsOutputs outputs;
  int* counters;    // [B]
  double* partial;  // [B, num_segments, 2, K], unless a block keeps its sums in shared memory and
                    // has all dimensions of its classes
};

void launch_statistics(const StatisticsCall& call, cudaStream_t stream);

// The fused loss in one launch: the last block of a row to finish its statistics, which are of the
// type computed in, goes on to the row's teacher logits and its loss, the last of these to that of
// the batch. rows.teacher: those teacher logits, which are written to `teacher` [B, C]. terms:
// [4, B]; counter starts at 0.
void launch_introspective(const StatisticsCall& statistics, const Rows& rows, void* teacher,
                          const LossOutputs& outputs, double* terms, int* counter,
                          cudaStream_t stream);

}  // namespace introkernels::cuda
