// The gradient of the losses on teacher logits and on explanation statistics.
//
// Reads B * C logits and as many teacher logits (or two statistics) and 72 bytes a row, writes
// B * C numbers. Floor: these bytes over the bandwidth of memory, which is for (8192, 32000)
// bfloat16 1.57 GB, 0.47 ms at 3.35 TB/s. In the compiled loop for sm_90a a class takes 49
// instructions (bfloat16) or 59 (float32), three of them exponentials: an H100 has time for 51
// beside half types and for 102 beside float32.
//
// Mapping: short rows have 4 to 32 lanes of a warp; long ones are cut into parts of four vectors a
// thread, a block each. No thread waits for another.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/row_forward.h"

namespace introkernels::cuda {

namespace {

// Vectors that a thread of a long row has, unless it is too long for a grid.
constexpr int64_t kVectorsOfThread = 4;
constexpr int64_t kMostParts = 65535;

struct BackwardCall {
  Rows rows;
  Matrix grad_loss;  // [B], as a row
  const double* row_state;
  const double* totals;
  void* grad_logits;
  int group_shift;
  int vectors_of_part;
};

// What a row's gradient is made of, in T.
template <typename T>
struct Scales {
  T ce;         // of CE
  T ce_target;  // of p - [c = y]: as ce, with the target's weight, less what smoothing takes
  T ce_share;   // of weight_sum p - weight, which smoothing brings
  T kl;         // of p - q
};

template <typename T>
__device__ __forceinline__ Scales<T> scales_of(const BackwardCall& call, int64_t row,
                                               int64_t target, const RowState& state) {
  const LossOptions& options = call.rows.numbers.options;
  const double grad = Row<AnyNumber, double, 1>(call.grad_loss, 0).value(row);
  double ce = grad * options.ce_weight, kl = grad * options.kl_weight * options.temperature;
  if (options.reduction == Reduction::kMean) {
    ce /= call.totals[0];
    kl /= call.totals[1];
  }
  // A term of weight 0 is left out, whatever the incoming gradient is.
  if (options.ce_weight == 0) ce = 0;
  if (options.kl_weight == 0) kl = 0;
  if (state.teacher_norm_t == 0) kl = call.rows.numbers.kl_without_labels;
  const double of_target =
      ce * (1 - options.label_smoothing) * weight_of(call.rows.numbers, target);
  return {T(ce), T(of_target), T(ce * state.smoothing_share), T(kl)};
}

template <typename Z, typename U, typename T, int N, bool kStatistics, bool kExact, bool kWeighted>
__global__ __launch_bounds__(kThreads,
                             (sizeof(T) == 8 ? 1 : 2)) void row_backward(BackwardCall call) {
  using Teacher =
      std::conditional_t<kStatistics, StatisticsTeacher<U, T, N>, GivenTeacher<U, T, N>>;
  const Rows& rows = call.rows;
  const int64_t row = (int64_t(blockIdx.x) << (kThreadsShift - call.group_shift)) +
                      (int(threadIdx.x) >> call.group_shift);
  if (row >= rows.num_rows) return;
  const int size = 1 << call.group_shift, rank = int(threadIdx.x) & (size - 1);
  Target target = target_of(rows, row);
  if constexpr (!kStatistics) {
    if (target.is_known && rows.teacher_is_made) {
      const T of_target = Row<U, T, N>(rows.teacher, row).value(target.y);
      target.is_known = of_target == of_target;
    }
  }
  const OutputRow<Z, T, N> output(call.grad_logits, rows.logits.type, row, rows.num_classes);
  const int num_vectors = int((rows.num_classes + N - 1) / N);
  const int begin = int(blockIdx.y) * call.vectors_of_part;
  const int end =
      gridDim.y == 1 ? num_vectors : std::min(num_vectors, begin + call.vectors_of_part);

  if (!target.is_known) {
    T nothing[N];
#pragma unroll
    for (int i = 0; i < N; ++i) nothing[i] = target.is_live ? kNaN<T> : T(0);
    for (int v = begin + rank; v < end; v += size) {
      output.store(int64_t(v) * N, rows.num_classes, nothing);
    }
    return;
  }

  const RowState state = reinterpret_cast<const RowState*>(call.row_state)[row];
  const Scales<T> scales = scales_of<T>(call, row, target.y, state);
  const Temperatures<T> temperatures(rows.numbers.inverse_temperature);
  References<T> from{};
  from.z = T(0.25 * state.max);
  from.t = T(0.25 * state.teacher_max);
  from.difference = from.t - from.z;
  from.difference_lost = lost(from.t, from.z, from.difference);
  from.shift = T(state.ratio_shift);
  const T norm = T(state.norm == 0 ? 0 : 1 / state.norm);
  const T norm_p = T(state.norm_t == 0 ? 0 : 1 / state.norm_t);
  const T norm_q = T(state.teacher_norm_t == 0 ? 0 : 1 / state.teacher_norm_t);
  // p_y - 1 from the loss itself: the difference would cancel where p_y is almost 1.
  const T target_grad = T(expm1(-state.nll));

  const RowWalk<Z, T, N, Teacher> walk(Row<Z, T, N>(rows.logits, row),
                                       teacher_of<Teacher>(rows, row, target.y), rows.num_classes);
  for (int v = begin + rank; v < end; v += size) {
    typename RowWalk<Z, T, N, Teacher>::Fetched fetched;
    T z[N], t[N], grad[N];
    walk.fetch(v, &fetched);
    walk.convert(fetched, v, z, t);
    const int64_t first = walk.first_class(v);
    const int64_t at = target.y - first;
    const int place = at >= 0 && at < N ? int(at) : -1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool exists = z[i] != kNever<T>;
      const T teacher = exists ? t[i] : kNever<T>;
      const T z_from = z[i] - from.z, t_from = teacher - from.t;
      const T d = log_ratio_of<kExact>(z[i], teacher, from, z_from, t_from, temperatures.ratio);
      const T p_t = exp2_of(z_from * temperatures.exponent_t) * norm_p;
      const T q_t = exp2_of(t_from * temperatures.exponent_t) * norm_q;
      const T distance = abs_of(d) < T(1) ? -p_t * (d + exp_rest(d)) : p_t - q_t;
      const T p = exp2_of(z_from * temperatures.exponent) * norm;
      T of_ce = scales.ce_target * (i == place ? target_grad : p);
      if constexpr (kWeighted) {
        const T weight = exists ? T(weight_of(rows.numbers, first + i)) : T(0);
        of_ce += scales.ce_share * (T(state.weight_sum) * p - weight);
      }
      // A factor of exactly 0 leaves its term out, whatever it is.
      const T of_kl = scales.kl == 0 ? T(0) : scales.kl * distance;
      const T sum = (scales.ce == 0 ? T(0) : of_ce) + of_kl;
      grad[i] = exists ? sum : T(0);
    }
    output.store(first, rows.num_classes, grad);
  }
}

}  // namespace

void launch_backward(const Rows& rows, const Matrix& grad_loss, const double* row_state,
                     const double* totals, void* grad_logits, cudaStream_t stream) {
  if (rows.num_rows == 0) return;
  BackwardCall call{rows, grad_loss, row_state, totals, grad_logits, kThreadsShift, 0};
  const auto start = [&](const char* name, int vector, void (*kernel)(BackwardCall)) {
    const int64_t num_vectors = (rows.num_classes + vector - 1) / vector;
    const int64_t of_thread = std::max(kVectorsOfThread, num_vectors / (kThreads * kMostParts) + 1);
    call.vectors_of_part = int(of_thread * kThreads);
    int64_t blocks = rows.num_rows;
    int64_t parts = (num_vectors + call.vectors_of_part - 1) / call.vectors_of_part;
    if (rows.num_classes <= 64 * kWarp) {
      parts = 1;
      call.group_shift = 2;
      while ((1 << call.group_shift) < kWarp && (16 << call.group_shift) < rows.num_classes) {
        ++call.group_shift;
      }
      const int64_t rows_of_block = kThreads >> call.group_shift;
      blocks = (rows.num_rows + rows_of_block - 1) / rows_of_block;
    }
    launch({name}, kernel, grid_of(blocks, parts), 0, stream, call);
  };
  const NumberType z = rows.logits.type, u = rows.teacher.type;
  const bool is_weighted = rows.numbers.is_weighted;
  if (rows.teacher.data == nullptr) {
    if (z == NumberType::kFloat64) {
      start("row_backward<double, statistics>", 4,
            row_backward<double, AnyNumber, double, 4, true, false, true>);
    } else if (rows.statistics.dots.type == NumberType::kFloat32 && !is_weighted) {
      start("row_backward<float, statistics of float>", 4,
            row_backward<AnyNumber, float, float, 4, true, true, false>);
    } else {
      start("row_backward<float, statistics>", 4,
            row_backward<AnyNumber, AnyNumber, float, 4, true, true, true>);
    }
  } else if (z == NumberType::kFloat64) {
    start("row_backward<double>", 4,
          row_backward<double, AnyNumber, double, 4, false, false, true>);
  } else if (z == NumberType::kFloat32 && u == z && !is_weighted) {
    start("row_backward<float>", 4, row_backward<float, float, float, 4, false, true, false>);
  } else if (z == NumberType::kBFloat16 && u == z && !is_weighted) {
    start("row_backward<bfloat16>", 8,
          row_backward<BFloat16, BFloat16, float, 8, false, false, false>);
  } else if (z == NumberType::kFloat16 && u == z && !is_weighted) {
    start("row_backward<float16>", 8,
          row_backward<Float16, Float16, float, 8, false, false, false>);
  } else {
    start("row_backward<mixed>", 4,
          row_backward<AnyNumber, AnyNumber, float, 4, false, true, true>);
  }
}

}  // namespace introkernels::cuda
