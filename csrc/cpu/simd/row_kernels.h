// A row's loss and gradient in vectors. Numbers of a row are T (float, or double for float64
// tensors): a block of classes is read twice, for its maxima and, out of the nearest cache, for its
// sums; blocks merge in double.
#pragma once

#include "common/row_loss.h"
#include "cpu/kernels.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

// visit(c, read, write) for each vector of classes from c on. read(row, fill) loads the vector of a
// row, write(row, v) stores it; past the row's end there is `fill`, and nothing is written.
template <typename T, typename Visit>
INTROKERNELS_INLINE void for_each_vector(int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    visit(
        c, [c](const T* row, T) __attribute__((always_inline)) { return load(row + c); },
        [c](T* row, const Vec<T>& v) __attribute__((always_inline)) { store(row + c, v); });
  }
  if (c < end) {
    const int64_t rest = end - c;
    visit(
        c,
        [c, rest](const T* row, T fill)
            __attribute__((always_inline)) { return load_first(row + c, rest, fill); },
        [c, rest](T* row, const Vec<T>& v)
            __attribute__((always_inline)) { store_first(row + c, rest, v); });
  }
}

// Classes that a sum in T runs over: a float sum of many more would drift.
constexpr int64_t kBlock = 1024;

// Whether the target is in the vector of classes from c on.
template <typename T>
INTROKERNELS_INLINE bool holds(int64_t c, int64_t target) {
  return uint64_t(target - c) < uint64_t(Vec<T>::kLanes);
}

// The target's lane of such a vector.
template <typename T>
INTROKERNELS_INLINE Int<T> lane_of(int64_t c, int64_t target) {
  using Index = typename IntOf<T>::type;
  return iota<Index>() == broadcast(Index(target - c));
}

// Distances of a row's logits from their maxima, and exponentials of them.
template <typename T>
class Distances {
 public:
  // Distances are kept as this part of themselves, which is exact, so that none of them overflows,
  // nor the sum of a block's.
  static constexpr T kUnit = T(1) / (2 * kBlock);

  INTROKERNELS_INLINE Distances(double z_max, double t_max, double temperature)
      : z_max_(broadcast(reference(z_max))),
        t_max_(broadcast(reference(t_max))),
        factor_t_(broadcast(T(1 / (kUnit * temperature)))),
        power_(temperature == 1 || temperature == 2 || temperature == 4 ? int(temperature) : 0) {}

  INTROKERNELS_INLINE Vec<T> of_logits(const Vec<T>& z) const {
    return multiply_add(z, broadcast(kUnit), z_max_);
  }
  INTROKERNELS_INLINE Vec<T> of_teacher(const Vec<T>& t) const {
    return multiply_add(t, broadcast(kUnit), t_max_);
  }
  // exp(distance / T)
  INTROKERNELS_INLINE Vec<T> exp_t(const Vec<T>& distance) const {
    return exp(distance * factor_t_);
  }
  // exp(distance), from exp(distance / T) where T is a small power of two: cheaper than another
  // exponential. The power multiplies the relative error by T, which bounds how large a T may be.
  INTROKERNELS_INLINE Vec<T> exp_1(const Vec<T>& distance, const Vec<T>& e_t) const {
    if (power_ == 0) return exp(distance * broadcast(1 / kUnit));
    if (power_ == 1) return e_t;
    const Vec<T> square = e_t * e_t;
    return power_ == 2 ? square : square * square;
  }

 private:
  // Of no class there is no maximum, and any number serves.
  static INTROKERNELS_INLINE T reference(double max) {
    return max == -std::numeric_limits<double>::infinity() ? T(0) : T(-max) * kUnit;
  }

  Vec<T> z_max_;
  Vec<T> t_max_;
  Vec<T> factor_t_;
  int power_;
};

// kPlain: no class weights and no label smoothing.
template <typename T, bool kPlain>
INTROKERNELS_INLINE RowSums sums_of(const Row<T>& row, double temperature) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  constexpr double kUnit = Distances<T>::kUnit;
  const Vec<T> never = broadcast(kNever), zero{}, one = broadcast(T(1));
  RowSums sums = RowSums::none();
  for (int64_t begin = 0; begin < row.num_classes; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, row.num_classes);
    Vec<T> z_max = never, t_max = never;
    for_each_vector<T>(begin, end,
                       [&](int64_t, const auto& read, const auto&) __attribute__((always_inline)) {
                         const Vec<T> z = read(row.logits, kNever);
                         const Vec<T> t = read(row.teacher, kNever);
                         z_max = max(z, z_max);
                         t_max = select(z == never, t_max, max(t, t_max));
                       });
    // Relative to the largest logits so far, so that most blocks leave the sums as they are.
    RowSums block{};
    block.z_max = std::max(sums.z_max, double(max_of_lanes(z_max)));
    block.t_max = std::max(sums.t_max, double(max_of_lanes(t_max)));
    const Distances<T> distances(block.z_max, block.t_max, temperature);
    Vec<T> sum{}, sum_t{}, teacher_sum{}, cross{};
    Vec<T> num_existing{}, weight_sum{}, weighted_logits{};
    for_each_vector<T>(
        begin, end, [&](int64_t, const auto& read, const auto&) __attribute__((always_inline)) {
          const Vec<T> z = read(row.logits, kNever);
          const Int<T> is_missing = z == never;
          const Vec<T> t = select(is_missing, never, read(row.teacher, kNever));
          const Vec<T> of_z = distances.of_logits(z), of_t = distances.of_teacher(t);
          const Vec<T> e_t = distances.exp_t(of_z), teacher_e_t = distances.exp_t(of_t);
          sum += distances.exp_1(of_z, e_t);
          sum_t += e_t;
          teacher_sum += teacher_e_t;
          // 0 times the infinite distance of a class without a soft label would be NaN.
          cross += select(teacher_e_t == zero, zero, teacher_e_t * (of_t - of_z));
          if constexpr (!kPlain) {
            const Vec<T> w = row.class_weight ? read(row.class_weight, T(0)) : one;
            num_existing += select(is_missing, zero, one);
            weight_sum += select(is_missing, zero, w);
            weighted_logits += select(is_missing, zero, w * of_z);
          }
        });
    block.sum = double(sum_of_lanes(sum));
    block.sum_t = double(sum_of_lanes(sum_t));
    block.teacher_sum = double(sum_of_lanes(teacher_sum));
    block.cross = double(sum_of_lanes(cross)) / (kUnit * temperature);
    if constexpr (!kPlain) {
      block.num_existing = double(sum_of_lanes(num_existing));
      block.weight_sum = double(sum_of_lanes(weight_sum));
      block.weighted_logits = double(sum_of_lanes(weighted_logits)) / kUnit;
    }
    sums = merge(sums, block, temperature);
  }
  return sums;
}

template <typename T>
INTROKERNELS_INLINE bool is_plain(const Row<T>& row, const Options& options) {
  return row.class_weight == nullptr && options.label_smoothing == 0;
}

template <typename T>
RowSums row_sums(const Row<T>& row, const Options& options) {
  return is_plain(row, options) ? sums_of<T, true>(row, options.temperature)
                                : sums_of<T, false>(row, options.temperature);
}

template <typename T, bool kPlain>
INTROKERNELS_INLINE void gradient_of(const Row<T>& row, const Options& options, const RowSums& sums,
                                     const GradientFactors& factors, T* grad) {
  const Distances<T> distances(sums.z_max, sums.t_max, options.temperature);
  const Vec<T> never = broadcast(-std::numeric_limits<T>::infinity());
  const Vec<T> of_exp = broadcast(T(factors.of_exp)), of_exp_t = broadcast(T(factors.of_exp_t));
  const Vec<T> of_teacher = broadcast(T(factors.of_teacher));
  const Vec<T> of_target = broadcast(T(factors.of_target));
  const Vec<T> of_weight = broadcast(T(factors.of_weight));
  for_each_vector<T>(
      0, row.num_classes,
      [&](int64_t c, const auto& read, const auto& write) __attribute__((always_inline)) {
        // Nothing of what lies past the row's end is written.
        const Vec<T> z = read(row.logits, T(0));
        const Vec<T> of_z = distances.of_logits(z), e_t = distances.exp_t(of_z);
        Vec<T> sum{};
        if (options.kl_weight > 0) {
          const Vec<T> of_t = distances.of_teacher(read(row.teacher, T(0)));
          sum = of_exp_t * e_t - of_teacher * distances.exp_t(of_t);
        }
        if (options.ce_weight > 0) {
          sum = multiply_add(of_exp, distances.exp_1(of_z, e_t), sum);
          if (holds<T>(c, row.target)) {
            sum = select(lane_of<T>(c, row.target), sum - of_target, sum);
          }
          if constexpr (!kPlain) {
            sum = sum -
                  of_weight * (row.class_weight ? read(row.class_weight, T(0)) : broadcast(T(1)));
          }
        }
        write(grad, select(z == never, Vec<T>{}, sum));
      });
}

template <typename T>
void row_backward(const Row<T>& row, const Options& options, const RowSums& sums,
                  const GradientFactors& factors, T* grad) {
  if (is_plain(row, options)) {
    gradient_of<T, true>(row, options, sums, factors, grad);
  } else {
    gradient_of<T, false>(row, options, sums, factors, grad);
  }
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
