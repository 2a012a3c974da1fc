// What operators ask of kernels: plain arguments, and the functions that launch. Pointers are those
// of the device, strides count elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/options.h"

namespace introkernels::cuda {

// The dtype of a tensor, where a kernel learns it at run time.
enum class NumberType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// A matrix of floating numbers, or a vector as its only row.
struct Matrix {
  const void* data;
  int64_t row_stride;
  int64_t column_stride;
  NumberType type;
};

// int64 [rows, columns], or [rows].
struct IndexMatrix {
  const int64_t* data;
  int64_t row_stride;
  int64_t column_stride;
};

// The options of a loss as its kernels use them.
struct LossNumbers {
  LossOptions options;
  // Of class weights [C]; null data for ones.
  Matrix weight;
  // Class weights or label smoothing ask for three more sums.
  bool is_weighted;
  // The KL of a row in which no class has a soft label, 0 or NaN.
  double kl_without_labels;
  double inverse_temperature;
};

// Explanation statistics [B, K] as a teacher.
struct Statistics {
  Matrix dots;
  Matrix sq_norms;
  // [B, K]; null data where the explained classes are all classes in order.
  IndexMatrix class_index;
  int64_t num_explained;
  LabelOptions labels;
};

// The rows of a loss.
struct Rows {
  Matrix logits;
  IndexMatrix target;
  int64_t num_rows;
  int64_t num_classes;
  LossNumbers numbers;
  // Teacher logits [B, C]; null data where each is made of statistics as it is read.
  Matrix teacher;
  // Where launch_teacher made them from statistics: a row without a teacher has NaN at its target.
  bool teacher_is_made;
  Statistics statistics;
};

// What a forward writes. Losses are float64 for float64 logits, else float32.
struct LossOutputs {
  void* loss;
  void* ce;
  void* kl;
  double* row_state;  // [B, 9]
  double* totals;     // [2]
};

// How rows are shared out among blocks, a plan that depends on shape and device alone.
struct RowPlan {
  int group_shift;          // 2^group_shift threads of a block have a row, up to a warp or all
  int num_parts;            // blocks of a row, where a row has all threads of its blocks
  int64_t classes_of_part;  // what each of them begins after the one before, a multiple of 16
};

RowPlan plan_rows(int64_t num_rows, int64_t num_classes);

// Memory that a forward needs besides: of bytes that start as zeros, and of any bytes.
struct RowScratch {
  int64_t zeros;
  int64_t any;
};

RowScratch forward_scratch(const RowPlan& plan, int64_t num_rows);

// Loss, ce, kl, row_state and totals of all rows in one launch.
void launch_forward(const Rows& rows, const RowPlan& plan, const LossOutputs& outputs, void* zeros,
                    void* scratch, cudaStream_t stream);

// grad_logits [B, C], contiguous, of the type of the logits. grad_loss: [B] or a scalar (stride 0).
void launch_backward(const Rows& rows, const Matrix& grad_loss, const double* row_state,
                     const double* totals, void* grad_logits, cudaStream_t stream);

// Whether teachers of such statistics are read from memory, where launch_teacher puts them.
bool needs_teacher(const Statistics& statistics);

// The teacher logits [B, C] of statistics, contiguous: float64 for float64 logits, else float32.
// Where a row has no teacher, because its target or its classes are not among the classes, it gets
// NaN, and its loss with it.
void launch_teacher(const Rows& rows, void* teacher, cudaStream_t stream);

}  // namespace introkernels::cuda
