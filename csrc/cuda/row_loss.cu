// The row loss on logits and teacher logits, forward and backward.
//
// Forward: reads B * C logits and as many teacher logits, writes 72 + 32 bytes a row and reads 32
// of them again. Backward: reads the same and 72 bytes a row, writes B * C numbers. Floor: these
// bytes over the bandwidth of memory, which is for (8192, 32000) bfloat16 1.05 GB and 1.57 GB, 0.31
// and 0.47 ms at 3.35 TB/s. In the compiled loops for sm_90a a class takes 21 and 22 instructions
// (bfloat16) or 22 and 25 (float32), three of them exponentials, in 64 registers. What a launch is
// predicted to reach of a copy, with all that surrounds these loops, is in
// benchmarks/predicted.toml.
//
// Mapping: short rows have 4 to 32 lanes of a warp, long ones all 256 threads of a block, 16 bytes
// of each tensor a thread at a time; the next ones are on their way meanwhile. Forward, long rows
// that would leave multiprocessors idle are cut into parts, one block each, and the last one of a
// row to finish merges them. One thread finishes a row, the first warp all rows of a block side by
// side. Backward, long rows are cut into parts of sixteen vectors a thread, a block each, as a
// thread's numbers of a row take some 270 instructions; no thread waits for another.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/reduction.h"
#include "cuda/row_loss.h"

namespace introkernels::cuda {

namespace {

// Vectors that a thread of a long row has on the way back, unless it is too long for a grid.
constexpr int64_t kVectorsOfThread = 16;
constexpr int64_t kMostParts = 65535;

struct ForwardCall {
  Rows rows;
  RowPlan plan;
  LossOutputs outputs;
  Terms terms;
  RowSums* parts;     // [B, num_parts], where there are several
  int* row_counters;  // [B], where there are several
  int* counter;
};

// Rows of a block, and parts of a row.
constexpr int kMostOfBlock = kThreads / 4;

struct Shared {
  alignas(16) unsigned char exchange[kExchangeBytes];
  RowSums sums[kMostOfBlock];
  int flag;
};

// All parts of a row as one, in shared->sums[0]. A thread each moves them to the largest
// references, which takes three exponentials of a double; one adds them up.
__device__ __forceinline__ void merge(const RowSums* parts, int num_parts, double temperature,
                                      Shared* shared) {
  const int part = int(threadIdx.x);
  const RowSums own = part < num_parts ? parts[part] : RowSums::none();
  double largest[] = {own.z_max, own.t_max};
  Group(kThreads, shared->exchange).reduce(largest, Largest{});
  if (part < num_parts) {
    shared->sums[part] = own.relative_to(largest[0], largest[1], temperature);
  }
  __syncthreads();
  if (part == 0) {
#pragma unroll 1
    for (int i = 1; i < num_parts; ++i) shared->sums[0].add(shared->sums[i]);
  }
}

// Z: storage type of the logits; U: of the teacher logits. kWeighted: with class weights or label
// smoothing.
template <typename Z, typename U, typename T, int N, bool kWeighted>
__global__ __launch_bounds__(kThreads,
                             (sizeof(T) == 8 ? 1 : 4)) void row_loss_forward(ForwardCall call) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Rows& rows = call.rows;
  const int num_parts = call.plan.num_parts, part = int(blockIdx.y);
  const int rows_of_block = kThreads >> call.plan.group_shift;
  Group group(1 << call.plan.group_shift, shared.exchange);
  const int64_t first_row = int64_t(blockIdx.x) * rows_of_block;
  const int of_block = int(threadIdx.x) >> call.plan.group_shift;
  const int64_t row = first_row + of_block;

  if (target_of(rows, row).is_known) {
    const int vectors_of_part = int(call.plan.classes_of_part / N);
    const int end =
        part + 1 == num_parts ? num_vectors<N>(rows.num_classes) : (part + 1) * vectors_of_part;
    const RowSums sums = sum_vectors<kWeighted>(&group, RowPair<Z, U, T, N>(rows, row),
                                                part * vectors_of_part, end, rows);
    if (group.rank() == 0) {
      (num_parts > 1 ? call.parts[row * num_parts + part] : shared.sums[of_block]) = sums;
    }
  }
  __syncthreads();
  if (num_parts > 1) {
    if (!is_last_to_arrive(call.row_counters + row, num_parts, &shared.flag)) return;
    merge(call.parts + row * num_parts, num_parts, rows.options.temperature, &shared);
  }

  // One row for each of the first threads.
  const int64_t own_row = first_row + threadIdx.x;
  if (int(threadIdx.x) < rows_of_block && own_row < rows.num_rows) {
    finish_row(rows, own_row, target_of(rows, own_row), shared.sums[threadIdx.x], call.outputs,
               call.terms);
  }
  const int64_t blocks = num_parts > 1 ? rows.num_rows : int64_t(gridDim.x);
  finish_losses(rows, call.terms, call.outputs, call.counter, blocks, &shared.flag,
                shared.exchange);
}

struct BackwardCall {
  Rows rows;
  Matrix grad_loss;  // [B], as a row
  const RowSums* state;
  void* grad_logits;
  int group_shift;
  int vectors_of_part;
};

__device__ __forceinline__ GradientFactors factors_of(const BackwardCall& call, int64_t row,
                                                      int64_t target) {
  const Rows& rows = call.rows;
  const Options& options = rows.options;
  const double grad = Row<AnyNumber, double, 1>(call.grad_loss, 0).value(row);
  double ce = grad * options.ce_weight, kl = grad * options.kl_weight;
  if (options.reduction == Reduction::kMean) {
    const double* const totals = reinterpret_cast<const double*>(call.state + rows.num_rows);
    ce /= totals[0];
    kl /= totals[1];
  }
  // A term of weight 0 is left out, whatever the incoming gradient is.
  return gradient_factors(call.state[row], weight_of(rows, target),
                          options.ce_weight > 0 ? ce : 0.0, options.kl_weight > 0 ? kl : 0.0,
                          options);
}

template <typename Z, typename U, typename T, int N, bool kWeighted>
__global__ __launch_bounds__(kThreads,
                             (sizeof(T) == 8 ? 1 : 4)) void row_loss_backward(BackwardCall call) {
  const Rows& rows = call.rows;
  const int64_t row = (int64_t(blockIdx.x) << (kThreadsShift - call.group_shift)) +
                      (int(threadIdx.x) >> call.group_shift);
  if (row >= rows.num_rows) return;
  const int size = 1 << call.group_shift, rank = int(threadIdx.x) & (size - 1);
  const Target target = target_of(rows, row);
  const OutputRow<Z, T, N> output(call.grad_logits, rows.logits.type, row, rows.num_classes);
  const int begin = int(blockIdx.y) * call.vectors_of_part;
  int end = num_vectors<N>(rows.num_classes);
  if (gridDim.y > 1) end = std::min(end, begin + call.vectors_of_part);

  if (!target.is_known) {
    T nothing[N];
#pragma unroll
    for (int i = 0; i < N; ++i) nothing[i] = target.is_live ? kNaN<T> : T(0);
    for (int v = begin + rank; v < end; v += size) {
      output.store(int64_t(v) * N, rows.num_classes, nothing);
    }
    return;
  }

  const GradientFactors factors = factors_of(call, row, target.y);
  const T of_exp = T(factors.of_exp), of_target = T(factors.of_target),
          of_weight = T(factors.of_weight), of_exp_t = T(factors.of_exp_t),
          of_teacher = T(factors.of_teacher);
  const Exponents<T> exponents(rows.options.temperature);
  const T z_from = -kUnit<T> * T(call.state[row].z_max);
  // Without a divergence the teacher's place is taken by the logits, whatever a teacher may hold.
  const T t_from = rows.options.kl_weight > 0 ? -kUnit<T> * T(call.state[row].t_max) : z_from;
  const auto work = [&](int64_t first, const T(&z)[N], const T(&t)[N]) {
    T grad[N];
    bool all_exist = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T d = distance(z[i], z_from), e = distance(t[i], t_from);
      const T of_p = product_of(of_exp_t, exp2_of(d * exponents.of_t));
      const T of_q = product_of(of_teacher, exp2_of(e * exponents.of_t));
      grad[i] = fma_of(of_exp, exp2_of(d * exponents.of_1), of_p - of_q);
      all_exist = all_exist && z[i] != kNever<T>;
    }
    const int64_t place = target.y - first;
    if (kWeighted || !all_exist || (place >= 0 && place < N)) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool exists = z[i] != kNever<T>;
        if (i == place) grad[i] -= of_target;
        if constexpr (kWeighted) {
          // Past the last class there is no weight to read.
          if (exists) grad[i] -= of_weight * T(weight_of(rows, first + i));
        }
        if (!exists) grad[i] = T(0);
      }
    }
    output.store(first, rows.num_classes, grad);
  };
  const RowPair<Z, U, T, N> pair(rows, row);
  int v = begin + rank;
  if (pair.is_whole()) v = pair.for_whole(v, size, end, work);
  pair.for_each(v, size, end, work);
}

// Threads of a row whose classes are few: up to 64 classes a lane, because what a group does
// together costs about as much as 16 of them.
int group_shift_of(int64_t num_classes) {
  if (num_classes > 64 * kWarp) return kThreadsShift;
  int shift = 2;
  while ((1 << shift) < kWarp && (16 << shift) < num_classes) ++shift;
  return shift;
}

// Calls start.operator()<Z, U, T, N, kWeighted>() for the types of the rows.
template <typename Start>
void with_types(const Rows& rows, const Start& start) {
  const NumberType z = rows.logits.type;
  const bool is_weighted = rows.weight.data != nullptr || rows.options.label_smoothing > 0;
  if (z == NumberType::kFloat64) {
    start.template operator()<double, AnyNumber, double, 4, true>();
  } else if (is_weighted || rows.teacher.type != z) {
    start.template operator()<AnyNumber, AnyNumber, float, 4, true>();
  } else if (z == NumberType::kFloat32) {
    start.template operator()<float, float, float, 4, false>();
  } else if (z == NumberType::kBFloat16) {
    start.template operator()<BFloat16, BFloat16, float, 8, false>();
  } else {
    start.template operator()<Float16, Float16, float, 8, false>();
  }
}

int64_t bytes_of_terms(int64_t num_rows) { return (4 * num_rows * 8 + 15) / 16 * 16; }

}  // namespace

RowPlan plan_rows(int64_t num_rows, int64_t num_classes) {
  const int shift = group_shift_of(num_classes);
  if (shift < kThreadsShift) return {shift, 1, 0};
  // A part has 64 classes a thread at least, and two blocks a multiprocessor are enough.
  const int64_t wanted = 2 * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most = std::max<int64_t>(1, num_classes / (64 * kThreads));
  const int64_t parts = std::clamp<int64_t>(wanted / std::max<int64_t>(1, num_rows), 1,
                                            std::min<int64_t>(most, kMostOfBlock));
  return {shift, int(parts), num_classes / parts / 16 * 16};
}

Scratch forward_scratch(const RowPlan& plan, int64_t num_rows) {
  const int64_t rows_in_parts = plan.num_parts > 1 ? num_rows : 0;
  return {(rows_in_parts + 1) * int64_t(sizeof(int)),
          bytes_of_terms(num_rows) + rows_in_parts * plan.num_parts * int64_t(sizeof(RowSums))};
}

void launch_forward(const Rows& rows, const RowPlan& plan, const LossOutputs& outputs, void* zeros,
                    void* scratch, cudaStream_t stream) {
  char* const parts = static_cast<char*>(scratch) + bytes_of_terms(rows.num_rows);
  int* const counter = static_cast<int*>(zeros);
  const ForwardCall call{rows,
                         plan,
                         outputs,
                         {static_cast<double*>(scratch), rows.num_rows},
                         reinterpret_cast<RowSums*>(parts),
                         counter + 1,
                         counter};
  const int64_t rows_of_block = kThreads >> plan.group_shift;
  // A launch without blocks would leave the sums of no rows unwritten.
  const int64_t blocks = std::max<int64_t>(1, (rows.num_rows + rows_of_block - 1) / rows_of_block);
  with_types(rows, [&]<typename Z, typename U, typename T, int N, bool kWeighted>() {
    launch({"row_loss_forward"}, row_loss_forward<Z, U, T, N, kWeighted>,
           grid_of(blocks, plan.num_parts), sizeof(Shared), stream, call);
  });
}

void launch_backward(const Rows& rows, const Matrix& grad_loss, const RowSums* state,
                     void* grad_logits, cudaStream_t stream) {
  if (rows.num_rows == 0) return;
  const int shift = group_shift_of(rows.num_classes);
  const int64_t rows_of_block = kThreads >> shift;
  const int64_t blocks = (rows.num_rows + rows_of_block - 1) / rows_of_block;
  Rows read = rows;
  // Without a divergence nobody reads the teacher: its factors are 0.
  if (rows.options.kl_weight == 0) read.teacher = rows.logits;
  with_types(read, [&]<typename Z, typename U, typename T, int N, bool kWeighted>() {
    const int64_t vectors = num_vectors<N>(rows.num_classes);
    const int64_t of_thread = std::max(kVectorsOfThread, vectors / (kThreads * kMostParts) + 1);
    const int64_t of_part = of_thread * kThreads;
    const int64_t parts = shift < kThreadsShift ? 1 : (vectors + of_part - 1) / of_part;
    const BackwardCall call{read, grad_loss, state, grad_logits, shift, int(of_part)};
    launch({"row_loss_backward"}, row_loss_backward<Z, U, T, N, kWeighted>, grid_of(blocks, parts),
           0, stream, call);
  });
}

}  // namespace introkernels::cuda
