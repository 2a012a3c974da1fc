// The losses on teacher logits and on explanation statistics, forward.
//
// Reads B * C logits and as many teacher logits (or two statistics), writes 72 + 32 bytes a row and
// reads 32 of them again. Floor: these bytes over the bandwidth of memory, which is for
// (8192, 32000) bfloat16 1.05 GB, 0.31 ms at 3.35 TB/s. In the compiled loop for sm_90a a class
// takes 45 instructions (bfloat16) or 57 (float32), three of them exponentials: an H100 has time
// for 34 beside half types and for 68 beside float32.
//
// Mapping: short rows have 4 to 32 lanes of a warp, long ones all 256 threads of a block, 16 bytes
// of each tensor a thread at a time; the next ones are on their way meanwhile.
// Long rows that would leave multiprocessors idle are cut into parts, one block each; the last one
// of a row to finish puts them together. One thread finishes a row, the first warp all rows of a
// block side by side.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/row_forward.h"

namespace introkernels::cuda {

namespace {

struct ForwardCall {
  Rows rows;
  RowPlan plan;
  LossOutputs outputs;
  Terms terms;
  PartSums* parts;    // [B, num_parts], where there are several
  int* row_counters;  // [B], where there are several
  int* counter;
};

struct Shared {
  alignas(16) unsigned char exchange[kExchangeBytes];
  PartSums parts[kThreads / 4];
  int flag;
};

// Z: storage type of the logits; U: of the teacher logits, or of the statistics that make them.
template <typename Z, typename U, typename T, int N, bool kStatistics, bool kExact, bool kWeighted>
__global__ __launch_bounds__(kThreads,
                             (sizeof(T) == 8 ? 1 : 2)) void row_forward(ForwardCall call) {
  using Teacher =
      std::conditional_t<kStatistics, StatisticsTeacher<U, T, N>, GivenTeacher<U, T, N>>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Rows& rows = call.rows;
  const int num_parts = call.plan.num_parts, part = int(blockIdx.y);
  const int rows_of_block = kThreads >> call.plan.group_shift;
  Group group(1 << call.plan.group_shift, shared.exchange);
  const int64_t first_row = int64_t(blockIdx.x) * rows_of_block;
  const int of_block = int(threadIdx.x) >> call.plan.group_shift;
  const int64_t row = first_row + of_block;

  const Target target = target_of(rows, row);
  if (target.is_known) {
    const RowWalk<Z, T, N, Teacher> walk(
        Row<Z, T, N>(rows.logits, row), teacher_of<Teacher>(rows, row, target.y), rows.num_classes);
    const int vectors_of_part = int(call.plan.classes_of_part / N);
    const int end = part + 1 == num_parts ? walk.num_vectors() : (part + 1) * vectors_of_part;
    const PartSums sums = sum_vectors<kExact, kWeighted>(&group, walk, part * vectors_of_part, end,
                                                         target.y, rows.numbers);
    if (group.rank() == 0) {
      (num_parts > 1 ? call.parts[row * num_parts + part] : shared.parts[of_block]) = sums;
    }
  }
  __syncthreads();
  if (num_parts > 1 && !is_last_to_arrive(call.row_counters + row, num_parts, &shared.flag)) return;

  // One row for each of the first threads.
  const int64_t own_row = first_row + threadIdx.x;
  if (int(threadIdx.x) < rows_of_block && own_row < rows.num_rows) {
    Target own = target_of(rows, own_row);
    double target_logit = 0;
    if (own.is_known) {
      target_logit = double(Row<Z, T, N>(rows.logits, own_row).value(own.y));
      if constexpr (!kStatistics) {
        if (rows.teacher_is_made) {
          const T of_target = Row<U, T, N>(rows.teacher, own_row).value(own.y);
          own.is_known = of_target == of_target;
        }
      }
    }
    const PartSums* const parts =
        num_parts > 1 ? call.parts + own_row * num_parts : shared.parts + threadIdx.x;
    finish_row_of<T>(rows, own_row, own, parts, num_parts, target_logit, call.outputs, call.terms);
  }
  const int64_t blocks = num_parts > 1 ? rows.num_rows : int64_t(gridDim.x);
  finish_losses(call.terms, call.outputs, sizeof(T) == 8, rows.numbers.options, call.counter,
                blocks, &shared.flag, shared.exchange);
}

// Teacher logits that can't be made class by class: reads B * K pairs of statistics and class
// indices, up to three times, and B * K logits of split labels twice; writes B * C numbers. A block
// has a row, a thread every 256th of its classes.
template <typename Z, typename T>
__global__ __launch_bounds__(kThreads) void make_teachers(Rows rows, T* teachers) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  Group group(kThreads, shared.exchange);
  const int64_t row = blockIdx.x;
  const Target target = target_of(rows, row);
  if (!target.is_live) return;
  T* const teacher = teachers + row * rows.num_classes;
  const int64_t position =
      !target.is_known
          ? -1
          : position_of_target(&group, rows.statistics.class_index, row,
                               rows.statistics.num_explained, target.y, rows.num_classes);
  if (position < 0) {
    for (int64_t c = group.rank(); c < rows.num_classes; c += kThreads) teacher[c] = kNaN<T>;
    return;
  }
  make_teacher(&group, Row<Z, T, 1>(rows.logits, row), rows.statistics, row, target.y, position,
               rows.num_classes, teacher);
}

dim3 blocks_of(const RowPlan& plan, int64_t num_rows) {
  const int64_t rows_of_block = kThreads >> plan.group_shift;
  // A launch without blocks would leave the sums of no rows unwritten.
  const int64_t blocks = std::max<int64_t>(1, (num_rows + rows_of_block - 1) / rows_of_block);
  return grid_of(blocks, plan.num_parts);
}

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

RowPlan plan_rows(int64_t num_rows, int64_t num_classes) {
  // Up to 64 classes a lane: what a group does together costs about as much as 16 of them.
  if (num_classes <= 64 * kWarp) {
    int shift = 2;
    while ((1 << shift) < kWarp && (16 << shift) < num_classes) ++shift;
    return {shift, 1, 0};
  }
  // A part has 64 classes a thread at least, and two blocks a multiprocessor are enough.
  const int64_t wanted = 2 * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most = std::max<int64_t>(1, num_classes / (64 * kThreads));
  const int64_t parts =
      std::clamp<int64_t>(wanted / std::max<int64_t>(1, num_rows), 1, std::min<int64_t>(most, 64));
  return {kThreadsShift, int(parts), num_classes / parts / 16 * 16};
}

RowScratch forward_scratch(const RowPlan& plan, int64_t num_rows) {
  const bool has_parts = plan.num_parts > 1;
  const int64_t parts = has_parts ? num_rows * plan.num_parts * int64_t(sizeof(PartSums)) : 0;
  const int64_t counters = has_parts ? num_rows : 0;
  return {(counters + 1) * int64_t(sizeof(int)), aligned(4 * num_rows * 8) + parts};
}

void launch_forward(const Rows& rows, const RowPlan& plan, const LossOutputs& outputs, void* zeros,
                    void* scratch, cudaStream_t stream) {
  ForwardCall call;
  call.rows = rows;
  call.plan = plan;
  call.outputs = outputs;
  call.terms = {static_cast<double*>(scratch), rows.num_rows};
  call.parts =
      reinterpret_cast<PartSums*>(static_cast<char*>(scratch) + aligned(4 * rows.num_rows * 8));
  call.counter = static_cast<int*>(zeros);
  call.row_counters = call.counter + 1;
  const dim3 blocks = blocks_of(plan, rows.num_rows);
  const auto start = [&](const char* name, void (*kernel)(ForwardCall)) {
    launch({name}, kernel, blocks, sizeof(Shared), stream, call);
  };
  const NumberType z = rows.logits.type, u = rows.teacher.type;
  const bool is_weighted = rows.numbers.is_weighted;
  if (rows.teacher.data == nullptr) {
    if (z == NumberType::kFloat64) {
      start("row_forward<double, statistics>",
            row_forward<double, AnyNumber, double, 4, true, false, true>);
    } else if (rows.statistics.dots.type == NumberType::kFloat32 && !is_weighted) {
      start("row_forward<float, statistics of float>",
            row_forward<AnyNumber, float, float, 4, true, true, false>);
    } else {
      start("row_forward<float, statistics>",
            row_forward<AnyNumber, AnyNumber, float, 4, true, true, true>);
    }
  } else if (z == NumberType::kFloat64) {
    start("row_forward<double>", row_forward<double, AnyNumber, double, 4, false, false, true>);
  } else if (z == NumberType::kFloat32 && u == z && !is_weighted) {
    start("row_forward<float>", row_forward<float, float, float, 4, false, true, false>);
  } else if (z == NumberType::kBFloat16 && u == z && !is_weighted) {
    start("row_forward<bfloat16>", row_forward<BFloat16, BFloat16, float, 8, false, false, false>);
  } else if (z == NumberType::kFloat16 && u == z && !is_weighted) {
    start("row_forward<float16>", row_forward<Float16, Float16, float, 8, false, false, false>);
  } else {
    start("row_forward<mixed>", row_forward<AnyNumber, AnyNumber, float, 4, false, true, true>);
  }
}

bool needs_teacher(const Statistics& statistics) {
  return statistics.class_index.data != nullptr ||
         statistics.labels.label_mode == LabelMode::kSplit;
}

void launch_teacher(const Rows& rows, void* teacher, cudaStream_t stream) {
  if (rows.num_rows == 0) return;
  if (rows.logits.type == NumberType::kFloat64) {
    launch({"make_teachers<double>"}, make_teachers<double, double>, grid_of(rows.num_rows),
           sizeof(Shared), stream, rows, static_cast<double*>(teacher));
  } else {
    launch({"make_teachers<float>"}, make_teachers<AnyNumber, float>, grid_of(rows.num_rows),
           sizeof(Shared), stream, rows, static_cast<float*>(teacher));
  }
}

}  // namespace introkernels::cuda
