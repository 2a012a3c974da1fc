// The fused loss: statistics, soft labels and loss in one launch that reads the gradients once.
//
// Reads and writes what statistics.cu says and, beside the gradients, B * (C + 4 K) numbers. Floor
// and mapping are those of the statistics. The last block of a row to finish its share goes on to
// the row's teacher logits and its loss, with all its threads on the row; the last of these adds up
// the batch.
#include "cuda/launch.h"
#include "cuda/row_forward.h"
#include "cuda/statistics_row.h"

namespace introkernels::cuda {

namespace {

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

template <typename S, bool kVectors, bool kCenter>
__global__ __launch_bounds__(kThreads, (sizeof(S) == 8 ? 1 : 2)) void introspective(
    const __grid_constant__ IntrospectiveCall call) {
  finish_row_with_loss<Computed<S>>(call,
                                    find_statistics<S, kVectors, kCenter, true>(call.statistics));
}

}  // namespace

void launch_introspective(const Explanations& explanations, const StatisticsPlan& plan,
                          const Rows& rows, const StatisticsOutputs& statistics,
                          const LossOutputs& outputs, void* zeros, void* scratch,
                          void* loss_scratch, cudaStream_t stream) {
  int* const counter = static_cast<int*>(zeros);
  const IntrospectiveCall call{{explanations, plan, rows.target, rows.statistics.class_index,
                                rows.numbers.options.ignore_index, rows.num_classes, statistics,
                                counter + 1, static_cast<double*>(scratch)},
                               rows,
                               outputs,
                               {static_cast<double*>(loss_scratch), rows.num_rows},
                               counter};
  with_kernel(explanations, plan, [&]<typename S, bool kVectors, bool kCenter>() {
    launch({"introspective"}, introspective<S, kVectors, kCenter>,
           grid_of(rows.num_rows * plan.blocks_of_row()),
           statistics_shared_bytes<S, kVectors, kCenter>(plan), stream, call);
  });
}

}  // namespace introkernels::cuda
