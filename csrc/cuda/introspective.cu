// The fused loss: statistics, teacher logits and row loss in one launch that reads the gradients
// once.
//
// Reads and writes what statistics.cu says and, beside the gradients, B * (2 C + 4 K) numbers.
// Floor and mapping are those of the statistics. The last block of a row to finish its share goes
// on to the row's teacher logits and its loss, with all its threads on the row; the last of these
// adds up the batch.
#include "common/similarity.h"
#include "cuda/launch.h"
#include "cuda/reduction.h"
#include "cuda/row_loss.h"
#include "cuda/statistics_row.h"

namespace introkernels::cuda {

namespace {

struct IntrospectiveCall {
  StatisticsCall statistics;
  Rows rows;
  void* teacher;  // [B, C], contiguous, of the type computed in, as are the statistics
  LossOutputs outputs;
  Terms terms;
  int* counter;
};

// Makes the teacher logits [num_classes] of a row whose target stands at `position` among its
// explained classes. All threads of the group see them afterwards.
template <typename T>
__device__ __forceinline__ void make_teacher(const Group& group, const StatisticsCall& statistics,
                                             const StatisticsRow& of_row, const Rows& rows,
                                             T* teacher) {
  const int64_t num_explained = statistics.explanations.num_explained;
  const T* const dots = static_cast<const T*>(statistics.outputs.dots) + of_row.row * num_explained;
  const T* const sq_norms =
      static_cast<const T*>(statistics.outputs.sq_norms) + of_row.row * num_explained;
  const T inverse_temperature = T(1 / rows.options.similarity_temperature);
  const IndexMatrix& index = statistics.class_index;
  if (index.data != nullptr) {
    // Every class is without a label until an explanation names it.
    for (int64_t c = group.rank(); c < rows.num_classes; c += group.size()) teacher[c] = kNever<T>;
    group.synchronize();
  }
  for (int64_t k = group.rank(); k < num_explained; k += group.size()) {
    const int64_t c = index.data == nullptr
                          ? k
                          : index.data[of_row.row * index.row_stride + k * index.column_stride];
    const T s = k == of_row.position
                    ? T(1)
                    : similarity_to_target(dots[k], sq_norms[k], sq_norms[of_row.position],
                                           rows.options.similarity);
    teacher[c] = (s - T(1)) * inverse_temperature;
  }
  group.synchronize();
}

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
  T* const teacher = static_cast<T*>(call.teacher) + of_row.row * rows.num_classes;
  RowSums sums{};
  if (target.is_known) {
    make_teacher(group, call.statistics, of_row, rows, teacher);
    sums = sum_vectors<true>(&group, RowPair<AnyNumber, T, T, 4>(rows, of_row.row), 0,
                             num_vectors<4>(rows.num_classes), rows);
  } else {
    for (int64_t c = group.rank(); c < rows.num_classes; c += group.size()) {
      teacher[c] = target.is_live ? kNaN<T> : T(0);
    }
  }
  if (threadIdx.x == 0) finish_row(rows, of_row.row, target, sums, call.outputs, call.terms);
  finish_losses(rows, call.terms, call.outputs, call.counter, rows.num_rows, &shared.flag,
                shared.exchange);
}

template <typename S, bool kVectors, bool kCenter>
__global__ __launch_bounds__(kThreads, (sizeof(S) == 8 ? 1 : 2)) void introspective(
    const __grid_constant__ IntrospectiveCall call) {
  finish_row_with_loss<Computed<S>>(call,
                                    find_statistics<S, kVectors, kCenter, true>(call.statistics));
}

}  // namespace

void launch_introspective(const StatisticsCall& statistics, const Rows& rows, void* teacher,
                          const LossOutputs& outputs, double* terms, int* counter,
                          cudaStream_t stream) {
  const IntrospectiveCall call{statistics, rows, teacher, outputs, {terms, rows.num_rows}, counter};
  with_kernel(statistics, [&]<typename S, bool kVectors, bool kCenter>() {
    launch({"introspective"}, introspective<S, kVectors, kCenter>,
           grid_of(rows.num_rows * statistics.plan.blocks_of_row()),
           statistics_shared_bytes<S, kVectors, kCenter>(statistics.plan), stream, call);
  });
}

}  // namespace introkernels::cuda
