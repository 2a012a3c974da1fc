// From the statistics of a row to its loss, in the same block.
#pragma once

#include "cuda/launch.h"
#include "cuda/row_forward.h"
#include "cuda/statistics_row.h"

namespace introkernels::cuda {

// What kernels of the fused loss are told.
struct IntrospectiveCall {
  StatisticsCall statistics;
  Rows rows;
  LossOutputs outputs;
  Terms terms;
  int* counter;
};

// The loss of a row whose statistics are complete, and the batch's after the last of all rows. All
// threads of the block that find_statistics left with the row call this.
template <typename T>
__device__ __forceinline__ void finish_row_with_loss(const IntrospectiveCall& call,
                                                     const StatisticsRow& of_row) {
  if (!of_row.is_complete) return;
  StatisticsShared& shared = *reinterpret_cast<StatisticsShared*>(dynamic_shared());
  const Rows& rows = call.rows;
  Group group(kThreads, shared.exchange);
  Target target = target_of(rows, of_row.row);
  target.is_known = target.is_known && of_row.position >= 0;
  PartSums part{};
  double target_logit = 0;
  if (target.is_known) {
    const Row<AnyNumber, T, 4> logits(rows.logits, of_row.row);
    T* const teacher_row =
        static_cast<T*>(const_cast<void*>(rows.teacher.data)) + of_row.row * rows.num_classes;
    make_teacher(&group, logits, rows.statistics, of_row.row, target.y, of_row.position,
                 rows.num_classes, teacher_row);
    using Teacher = GivenTeacher<T, T, 4>;
    const RowWalk<AnyNumber, T, 4, Teacher> walk(logits, Teacher(rows.teacher, of_row.row),
                                                 rows.num_classes);
    part = sum_vectors<sizeof(T) == 4, true>(&group, walk, 0, walk.num_vectors(), target.y,
                                             rows.numbers);
    target_logit = double(logits.value(target.y));
  }
  if (threadIdx.x == 0) {
    finish_row_of<T>(rows, of_row.row, target, &part, 1, target_logit, call.outputs, call.terms);
  }
  finish_losses(call.terms, call.outputs, sizeof(T) == 8, rows.numbers.options, call.counter,
                rows.num_rows, &shared.flag, shared.exchange);
}

#if !defined(INTROKERNELS_EMULATION)
// By the kernels of introspective_bulk.cu.
void launch_introspective_bulk(const IntrospectiveCall& call, cudaStream_t stream);
#endif

}  // namespace introkernels::cuda
