// What operators ask of kernels: plain arguments, and the functions that launch. Pointers are those
// of the device, strides count elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/options.h"
#include "common/row_loss.h"

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

// The rows of a loss.
struct Rows {
  Matrix logits;
  // Teacher logits [B, C].
  Matrix teacher;
  IndexMatrix target;
  // Class weights [C]; null data for ones.
  Matrix weight;
  int64_t num_rows;
  int64_t num_classes;
  Options options;
};

// What a forward writes. Losses are float64 for float64 logits, else float32.
struct LossOutputs {
  void* loss;
  void* ce;
  void* kl;
  RowSums* state;  // [B + 1], the last one for the totals
};

// How rows are shared out among blocks, a plan that depends on shape and device alone.
struct RowPlan {
  int group_shift;          // 2^group_shift threads of a block have a row, up to a warp or all
  int num_parts;            // blocks of a row, where a row has all threads of its blocks
  int64_t classes_of_part;  // what each of them begins after the one before, a multiple of 16
};

RowPlan plan_rows(int64_t num_rows, int64_t num_classes);

// Memory that a launch needs besides: of bytes that start as zeros, and of any bytes.
struct Scratch {
  int64_t zeros;
  int64_t any;
};

Scratch forward_scratch(const RowPlan& plan, int64_t num_rows);

// Loss, ce, kl and state of all rows in one launch.
void launch_forward(const Rows& rows, const RowPlan& plan, const LossOutputs& outputs, void* zeros,
                    void* scratch, cudaStream_t stream);

// grad_logits [B, C], contiguous, of the type of the logits. grad_loss: [B] or a scalar (stride 0).
void launch_backward(const Rows& rows, const Matrix& grad_loss, const RowSums* state,
                     void* grad_logits, cudaStream_t stream);

}  // namespace introkernels::cuda
