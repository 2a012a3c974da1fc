// The sums of a row, by a group of threads.
//
// Each thread adds up its own classes, a vector at a time, relative to the largest logits that it
// has seen so far, and rescales its sums where a larger one comes. At the end all threads move to
// the largest logits of the group, and their sums are added. Parts of a row that several blocks
// have are merged as csrc/common/row_loss.h says.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/row_loss.h"
#include "cuda/group.h"
#include "cuda/number.h"
#include "cuda/vectors.h"

namespace introkernels::cuda {

// Distances between logits are kept as this part of themselves, which is exact, so that none of
// them overflows, nor a row's sum of them.
template <typename T>
constexpr T kUnit = T(0x1p-64);

// The power of 2 by which a row's sums of the teacher's exponentials are larger than they are: a
// soft label below the smallest number matters where the distance that it multiplies is near the
// largest one.
constexpr int kBias = 32;

// (x - reference) kUnit, rounded once. from: -kUnit reference.
template <typename T>
__device__ __forceinline__ T distance(T x, T from) {
  return fma_of(x, kUnit<T>, from);
}

// What distances are multiplied by to be exponents of 2.
template <typename T>
struct Exponents {
  T of_1;  // of exp(distance)
  T of_t;  // of exp(distance / T)

  __device__ __forceinline__ explicit Exponents(double temperature)
      : of_1(T(kLog2E / kUnit<double>)), of_t(T(kLog2E / kUnit<double> / temperature)) {}
};

// The logits and the teacher logits of a row as threads walk them, N classes at a time.
template <typename Z, typename U, typename T, int N>
class RowPair {
  using LogitsRow = Row<Z, T, N>;
  using TeacherRow = Row<U, T, N>;

 public:
  __device__ __forceinline__ RowPair(const Rows& rows, int64_t row)
      : logits_(rows.logits, row), teacher_(rows.teacher, row), num_classes_(rows.num_classes) {}

  // Whether for_whole may be used: both rows are read as whole words.
  __device__ __forceinline__ bool is_whole() const {
    return kTypesAreKnown && logits_.is_whole() && teacher_.is_whole();
  }

  // work(first, z, t) for vectors v, v + size … below end that lie within rows that are whole, from
  // addresses that are one addition away from the last. Returns the first of the others. The next
  // vector is on its way while one is worked on.
  template <typename Work>
  __device__ __forceinline__ int for_whole(int v, int size, int end, const Work& work) const {
    if constexpr (kTypesAreKnown) {
      const int whole = std::min(end, int(num_classes_ / N));
      if (v >= whole) return v;
      auto z_at = logits_.at(v);
      auto t_at = teacher_.at(v);
      typename LogitsRow::Fetched fetched_z;
      typename TeacherRow::Fetched fetched_t;
      LogitsRow::fetch_whole(z_at, &fetched_z);
      TeacherRow::fetch_whole(t_at, &fetched_t);
#pragma unroll 1
      for (; v < whole; v += size) {
        T z[N], t[N];
        LogitsRow::convert(fetched_z, z);
        TeacherRow::convert(fetched_t, t);
        if (v + size < whole) {
          z_at += size;
          t_at += size;
          LogitsRow::fetch_whole(z_at, &fetched_z);
          TeacherRow::fetch_whole(t_at, &fetched_t);
        }
        work(int64_t(v) * N, z, t);
      }
    }
    return v;
  }

  // The same for all vectors of any rows. Where for_whole takes most of them none is on its way:
  // the registers for it would cost warps.
  template <typename Work>
  __device__ __forceinline__ void for_each(int v, int size, int end, const Work& work) const {
    typename LogitsRow::Fetched fetched_z;
    typename TeacherRow::Fetched fetched_t;
    const auto fetch = [&](int at) {
      logits_.fetch(int64_t(at) * N, num_classes_, &fetched_z);
      teacher_.fetch(int64_t(at) * N, num_classes_, &fetched_t);
    };
    // One step before the first, so that there is one place that fetches.
    const int begin = v;
#pragma unroll 1
    for (v = kTypesAreKnown ? v : v - size; v < end; v += size) {
      if constexpr (kTypesAreKnown) fetch(v);
      T z[N], t[N];
      const bool has_work = kTypesAreKnown || v >= begin;
      if (has_work) {
        LogitsRow::convert(fetched_z, z);
        TeacherRow::convert(fetched_t, t);
      }
      if constexpr (!kTypesAreKnown) {
        if (v + size < end) fetch(v + size);
      }
      if (has_work) work(int64_t(v) * N, z, t);
    }
  }

 private:
  static constexpr bool kTypesAreKnown =
      !std::is_same_v<Z, AnyNumber> && !std::is_same_v<U, AnyNumber>;

  Row<Z, T, N> logits_;
  Row<U, T, N> teacher_;
  int64_t num_classes_;
};

// RowSums of a thread, in T; cross and weighted_logits are sums of distances, cross and teacher_sum
// 2^kBias times as large.
template <typename T>
struct ThreadSums {
  // The lowest numbers rather than -inf, whose distance from itself is none.
  T z_max = std::numeric_limits<T>::lowest();
  T t_max = std::numeric_limits<T>::lowest();
  T sum = 0;
  T sum_t = 0;
  T teacher_sum = 0;
  T cross = 0;
  T num_existing = 0;
  T weight_sum = 0;
  T weighted_logits = 0;

  // The same classes, relative to larger references.
  __device__ __forceinline__ void move_to(T new_z_max, T new_t_max, const Exponents<T>& exponents) {
    const T z_step = distance(z_max, -kUnit<T> * new_z_max);
    const T t_step = distance(t_max, -kUnit<T> * new_t_max);
    z_max = new_z_max;
    t_max = new_t_max;
    sum *= exp2_of(z_step * exponents.of_1);
    sum_t *= exp2_of(z_step * exponents.of_t);
    // In two steps, because one may be below the smallest number.
    const T root = exp2_of(T(0.5) * (t_step * exponents.of_t));
    cross = root * (root * fma_of(teacher_sum, t_step - z_step, cross));
    teacher_sum = root * (root * teacher_sum);
    weighted_logits = fma_of(weight_sum, z_step, weighted_logits);
  }

  // N more classes, from class `first` on. Unless kMasked, a class that does not exist may leave
  // an infinite `cross`.
  template <bool kMasked, bool kWeighted, int N>
  __device__ __forceinline__ void add(int64_t first, const T (&z)[N], T (&t)[N], const Rows& rows,
                                      const Exponents<T>& exponents) {
    T z_top = z_max, t_top = t_max;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // A class that does not exist has no soft label.
      if constexpr (kMasked) t[i] = z[i] == kNever<T> ? kNever<T> : t[i];
      z_top = max_of(z_top, z[i]);
      t_top = max_of(t_top, t[i]);
    }
    if (z_top > z_max || t_top > t_max) move_to(z_top, t_top, exponents);
    const T z_from = -kUnit<T> * z_max, t_from = -kUnit<T> * t_max;
    // Summed up on their own: a long row would drift by as many roundings as it has classes.
    T of_1, of_t, of_teacher, of_cross = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T d = distance(z[i], z_from), e = distance(t[i], t_from);
      const T p_1 = exp2_of(d * exponents.of_1), p = exp2_of(d * exponents.of_t);
      const T q = exp2_of(fma_of(e, exponents.of_t, T(kBias)));
      of_1 = i == 0 ? p_1 : of_1 + p_1;
      of_t = i == 0 ? p : of_t + p;
      of_teacher = i == 0 ? q : of_teacher + q;
      // 0 times the infinite distance of a class without a soft label would be NaN.
      of_cross = q > 0 ? fma_of(q, e - d, of_cross) : of_cross;
      if constexpr (kWeighted) {
        if (z[i] != kNever<T>) {
          const T weight = T(weight_of(rows, first + i));
          num_existing += T(1);
          weight_sum += weight;
          weighted_logits = fma_of(weight, d, weighted_logits);
        }
      }
    }
    sum += of_1;
    sum_t += of_t;
    teacher_sum += of_teacher;
    cross += of_cross;
  }
};

// Vectors [begin, end) of a row. All threads of the group get the result.
template <bool kWeighted, typename Z, typename U, typename T, int N>
__device__ __forceinline__ RowSums sum_vectors(Group* group, const RowPair<Z, U, T, N>& pair,
                                               int begin, int end, const Rows& rows) {
  const Exponents<T> exponents(rows.options.temperature);
  ThreadSums<T> own;
  T sums[kWeighted ? 7 : 4];
#pragma unroll 1
  for (bool is_fast = !kWeighted && pair.is_whole();; is_fast = false) {
    own = {};
    int v = begin + group->rank();
    if (is_fast) {
      v = pair.for_whole(v, group->size(), end, [&](int64_t first, const T(&z)[N], T(&t)[N]) {
        own.template add<false, false>(first, z, t, rows, exponents);
      });
    }
    pair.for_each(v, group->size(), end, [&](int64_t first, const T(&z)[N], T(&t)[N]) {
      own.template add<true, kWeighted>(first, z, t, rows, exponents);
    });
    T largest[] = {own.z_max, own.t_max};
    group->reduce(largest, Largest{});
    own.move_to(largest[0], largest[1], exponents);
    sums[0] = own.sum;
    sums[1] = own.sum_t;
    sums[2] = own.teacher_sum;
    sums[3] = own.cross;
    if constexpr (kWeighted) {
      sums[4] = own.num_existing;
      sums[5] = own.weight_sum;
      sums[6] = own.weighted_logits;
    }
    group->reduce(sums, Sum{});
    // A class that does not exist was at an infinite distance from its soft label: once more, with
    // an eye on such classes, which takes two more instructions of twenty.
    if (!is_fast || sums[3] - sums[3] == T(0)) break;
  }
  RowSums result = RowSums::none();
  if (sums[0] != T(0)) result.z_max = double(own.z_max);
  if (sums[2] != T(0)) result.t_max = double(own.t_max);
  result.sum = double(sums[0]);
  result.sum_t = double(sums[1]);
  constexpr double kTeacherUnit = double(int64_t(1) << kBias);
  result.teacher_sum = double(sums[2]) / kTeacherUnit;
  result.cross = double(sums[3]) / kTeacherUnit / (kUnit<double> * rows.options.temperature);
  if constexpr (kWeighted) {
    result.num_existing = double(sums[4]);
    result.weight_sum = double(sums[5]);
    result.weighted_logits = double(sums[6]) / kUnit<double>;
  }
  return result;
}

}  // namespace introkernels::cuda
