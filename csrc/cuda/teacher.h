// Teacher logits from explanation statistics: t_c = (s_c - 1) / tau for similarities s, see
// csrc/common/similarity.h and csrc/cpu/similarity.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/similarity.h"
#include "cuda/group.h"
#include "cuda/number.h"
#include "cuda/vectors.h"

namespace introkernels::cuda {

// (s - 1) / tau of explanations in one row, in double, because small angles show in the last
// digits.
class SimilarityLogits {
 public:
  __device__ __forceinline__ SimilarityLogits(double sq_norm_target, const LabelOptions& labels)
      : kind_(labels.similarity),
        inverse_temperature_(1 / labels.similarity_temperature),
        sq_norm_target_(sq_norm_target) {
    is_fast_ = kind_ == Similarity::kCosine && is_float(sq_norm_target);
    inverse_norm_target_ = is_fast_ ? inverse_root(sq_norm_target) : 0.0;
  }

  __device__ __forceinline__ double operator()(double dot, double sq_norm) const {
    double s;
    if (is_fast_ && is_float(sq_norm)) {
      s = dot * (inverse_root(sq_norm) * inverse_norm_target_);
      // In this order NaN passes.
      s = s < -1 ? -1 : s;
      s = s > 1 ? 1 : s;
    } else {
      s = similarity_to_target(Double{dot}, Double{sq_norm}, Double{sq_norm_target_}, kind_).v;
    }
    return (s - 1) * inverse_temperature_;
  }

 private:
  // A number whose root is one of float.
  __device__ __forceinline__ static bool is_float(double x) { return x > 1e-30 && x < 1e30; }
  __device__ __forceinline__ static double inverse_root(double x) {
    return refined_inverse_root(Double{x}, Double{double(rsqrtf(float(x)))}).v;
  }

  Similarity kind_;
  double inverse_temperature_;
  double sq_norm_target_;
  double inverse_norm_target_;
  bool is_fast_;
};

// The teacher of a row whose classes are all explained, with the labels of a softmax.
template <typename S, typename T, int N>
class StatisticsTeacher {
  using Numbers = Row<S, double, N>;

 public:
  struct Fetched {
    typename Numbers::Fetched dots;
    typename Numbers::Fetched sq_norms;
  };
  // Which is so of a cosine; a projection may be more than 1. See GivenTeacher.
  static constexpr bool kTargetIsLargest = true;

  __device__ __forceinline__ StatisticsTeacher(const Statistics& statistics, int64_t row,
                                               int64_t target)
      : dots_(statistics.dots, row),
        sq_norms_(statistics.sq_norms, row),
        logits_(sq_norms_.value(target), statistics.labels),
        target_(target) {}

  __device__ __forceinline__ void fetch(int64_t first, int64_t num_classes, Fetched* out) const {
    dots_.fetch(first, num_classes, &out->dots);
    sq_norms_.fetch(first, num_classes, &out->sq_norms);
  }

  __device__ __forceinline__ void convert(const Fetched& fetched, int64_t first, T (&t)[N]) const {
    double dots[N], sq_norms[N];
    Numbers::convert(fetched.dots, dots);
    Numbers::convert(fetched.sq_norms, sq_norms);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      t[i] = first + i == target_ ? T(0) : T(logits_(dots[i], sq_norms[i]));
    }
  }

 private:
  Numbers dots_;
  Numbers sq_norms_;
  SimilarityLogits logits_;
  int64_t target_;
};

// Where a row's target stands among its explained classes, -1 where it does not or where one of
// these is not among num_classes. All threads of the group get the answer.
__device__ inline int64_t position_of_target(Group* group, const IndexMatrix& class_index,
                                             int64_t row, int64_t num_explained, int64_t target,
                                             int64_t num_classes) {
  if (class_index.data == nullptr) return target < 0 || target >= num_explained ? -1 : target;
  const int64_t* const classes = class_index.data + row * class_index.row_stride;
  double found[2] = {-1, -1};
  for (int64_t k = group->rank(); k < num_explained; k += group->size()) {
    const int64_t c = classes[k * class_index.column_stride];
    if (c == target) found[0] = double(k);
    if (c < 0 || c >= num_classes) found[1] = double(k);
  }
  group->reduce(found, Largest{});
  return found[1] >= 0 ? -1 : int64_t(found[0]);
}

// Makes the teacher logits [num_classes] of a row whose target stands at `position` among its
// explained classes. All threads of the group see them afterwards.
template <typename T, typename Logits>
__device__ inline void make_teacher(Group* group, const Logits& logits,
                                    const Statistics& statistics, int64_t row, int64_t target,
                                    int64_t position, int64_t num_classes, T* teacher) {
  const Row<AnyNumber, double, 1> dots(statistics.dots, row), sq_norms(statistics.sq_norms, row);
  const SimilarityLogits logit_of(sq_norms.value(position), statistics.labels);
  const IndexMatrix& index = statistics.class_index;
  const auto class_at = [&](int64_t k) {
    return index.data == nullptr ? k : index.data[row * index.row_stride + k * index.column_stride];
  };
  const auto for_each_explained = [&](const auto& work) {
    for (int64_t k = group->rank(); k < statistics.num_explained; k += group->size()) {
      work(class_at(k), logit_of(dots.value(k), sq_norms.value(k)));
    }
  };

  double taken = 0;
  SplitLogits split{0, 0};
  if (statistics.labels.label_mode == LabelMode::kSplit) {
    double top[1] = {kNever<double>};
    for_each_explained([&](int64_t c, double t) {
      if (c != target && logits.value(c) != kNever<T>) top[0] = max_of(top[0], t);
    });
    group->reduce(top, Largest{});
    // Of others whose similarities are all NaN, any number will do: their sum is NaN.
    taken = top[0] == kNever<double> ? 0 : top[0];
    double others[2] = {0, 0};
    for_each_explained([&](int64_t c, double t) {
      if (c == target || logits.value(c) == kNever<T>) return;
      others[0] += exp((t - taken) / statistics.labels.temperature);
      others[1] += 1;
    });
    group->reduce(others, Sum{});
    const bool has_target = logits.value(target) != kNever<T>;
    split = split_logits(others[1] > 0, others[0], has_target, statistics.labels);
  }
  if (index.data != nullptr) {
    // Every class is without a label until an explanation names it.
    for (int64_t c = group->rank(); c < num_classes; c += group->size()) teacher[c] = kNever<T>;
    group->synchronize();
  }
  for_each_explained([&](int64_t c, double t) {
    teacher[c] = T(c == target ? split.of_target : (t - taken) + split.shift_of_others);
  });
  group->synchronize();
}

}  // namespace introkernels::cuda
