// A row's loss and gradient in vectors: three passes over a row that the first one brings into the
// cache. Numbers of a row are T (float, or double for float64 tensors); what is added up over many
// classes is double.
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

// Adds up vectors of float for a while, then in double: a float sum of many terms would drift.
template <typename T>
class Sum {
 public:
  INTROKERNELS_INLINE void add(const Vec<T>& v) { block_ += v; }
  INTROKERNELS_INLINE void end_block() {
    if constexpr (sizeof(T) == sizeof(float)) {
      total_ += half_in_double<0>(block_) + half_in_double<1>(block_);
    } else {
      total_ += block_;
    }
    block_ = Vec<T>{};
  }
  INTROKERNELS_INLINE double total() const { return sum_of_lanes(total_); }

 private:
  Vec<T> block_{};
  Double total_{};
};

constexpr int64_t kBlock = 1024;  // classes that a float sum runs over

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

// log q - log p. The ratio may be tiny against all that it is made of, so floats are not enough:
// its parts are added up in double, or in two floats each where the target multiplies and adds in
// one rounding, which is quicker than to turn floats into doubles and back.
class LogRatio {
 public:
  INTROKERNELS_INLINE LogRatio(const RowState& row, double temperature)
      : max_(broadcast(row.max)),
        teacher_max_(broadcast(row.teacher_max)),
        inverse_temperature_(broadcast(1 / temperature)),
        shift_(broadcast(row.ratio_shift)),
        factor_(1 / temperature),
        constant_((row.max - row.teacher_max) / temperature - row.ratio_shift),
        least_(abs(constant_.high()) * Float::of(0x1p-25)) {}

  INTROKERNELS_INLINE Double operator()(const Double& z, const Double& t) const {
    return ((t - teacher_max_) - (z - max_)) * inverse_temperature_ - shift_;
  }
  INTROKERNELS_INLINE Float operator()(const Float& z, const Float& t) const {
#if defined(INTROKERNELS_AVX512) || defined(INTROKERNELS_AVX2)
    const Float difference = t - z;
    // What rounding took from the difference (Knuth's TwoSum).
    const Float subtracted = t - difference;
    const Float rest = (t - (difference + subtracted)) + (subtracted - z);
    const Float low = multiply_add(rest, factor_.high(),
                                   multiply_add(difference, factor_.low(), constant_.low()));
    const Float ratio = multiply_add(difference, factor_.high(), constant_.high()) + low;
    // Two floats err by about 2^-49 of the constant. The doubles, which take off the largest logits
    // first, are for ratios that are small against it, as where both sides are sure of one class,
    // and for whatever is infinite or NaN.
    if (all(abs(ratio) > least_)) return ratio;
#endif
    return in_float((*this)(half_in_double<0>(z), half_in_double<0>(t)),
                    (*this)(half_in_double<1>(z), half_in_double<1>(t)));
  }

 private:
  // The sum of two floats, the same in all lanes.
  class TwoFloats {
   public:
    INTROKERNELS_INLINE explicit TwoFloats(double value)
        : high_(float(value)), low_(float(value - double(high_))) {}

    INTROKERNELS_INLINE Float high() const { return broadcast(high_); }
    INTROKERNELS_INLINE Float low() const { return broadcast(low_); }

   private:
    float high_;
    float low_;
  };

  Double max_;
  Double teacher_max_;
  Double inverse_temperature_;
  Double shift_;
  TwoFloats factor_;
  TwoFloats constant_;
  Float least_;
};

// Divides by the norms of the two softmaxes at T.
template <typename T>
class InverseNorms {
 public:
  INTROKERNELS_INLINE explicit InverseNorms(const RowState& row)
      : norm_(broadcast(T(1 / row.norm_t))),
        // Without any soft label there is no norm to divide by, and nothing to divide.
        teacher_norm_(broadcast(T(row.teacher_norm_t == 0 ? 1.0 : 1 / row.teacher_norm_t))) {}

  INTROKERNELS_INLINE Vec<T> of_larger(const Vec<T>& log_ratio) const {
    return select(log_ratio > Vec<T>{}, teacher_norm_, norm_);
  }

 private:
  Vec<T> norm_;
  Vec<T> teacher_norm_;
};

// exp(x) from exp(x / T), where T is a small power of two: cheaper than another exponential, and
// x/T is exact. The power multiplies the relative error by T, which bounds how large a T may be.
template <typename T>
class PowerOfExp {
 public:
  INTROKERNELS_INLINE explicit PowerOfExp(double temperature)
      : exponent_(temperature == 1 || temperature == 2 || temperature == 4 ? int(temperature) : 0) {
  }

  INTROKERNELS_INLINE bool applies() const { return exponent_ > 0; }
  INTROKERNELS_INLINE Vec<T> operator()(const Vec<T>& e) const {
    if (exponent_ == 1) return e;
    const Vec<T> square = e * e;
    return exponent_ == 2 ? square : square * square;
  }

 private:
  int exponent_;
};

template <typename T>
Maxima<T> row_maxima(const Row<T>& row) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const Vec<T> never = broadcast(kNever);
  Vec<T> max_logit = never, max_teacher = never;
  for_each_vector<T>(0, row.num_classes,
                     [&](int64_t, const auto& read, const auto&) __attribute__((always_inline)) {
                       const Vec<T> z = read(row.logits, kNever);
                       const Vec<T> t = read(row.teacher, kNever);
                       max_logit = max(z, max_logit);
                       max_teacher = select(z == never, max_teacher, max(t, max_teacher));
                     });
  return {max_of_lanes(max_logit), max_of_lanes(max_teacher)};
}

// kPlain: no class weights and no label smoothing.
template <typename T, bool kPlain>
INTROKERNELS_INLINE RowSums sums_of(const Row<T>& row, const Maxima<T>& maxima, double temperature,
                                    const Exponentials<T>& exps) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const Vec<T> never = broadcast(kNever);
  const Vec<T> max_logit = broadcast(maxima.logit), max_teacher = broadcast(maxima.teacher);
  const Vec<T> inverse_temperature = broadcast(T(1 / temperature));
  const PowerOfExp<T> power(temperature);
  Sum<T> others, sum_t, teacher_sum_t, num_existing, weight_sum;
  Double weighted_logits{};
  Vec<T> at_target{};

  for (int64_t begin = 0; begin < row.num_classes; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, row.num_classes);
    for_each_vector<T>(
        begin, end,
        [&](int64_t c, const auto& read, const auto& write) __attribute__((always_inline)) {
          const Vec<T> z = read(row.logits, kNever);
          const Vec<T> t = select(z == never, never, read(row.teacher, kNever));
          const Vec<T> shifted = z - max_logit;
          const Vec<T> e_t = exp(shifted * inverse_temperature);
          const Vec<T> e = power.applies() ? power(e_t) : exp(shifted);
          if (holds<T>(c, row.target)) {
            const Int<T> is_target = lane_of<T>(c, row.target);
            others.add(select(is_target, Vec<T>{}, e));
            at_target += select(is_target, e, Vec<T>{});
          } else {
            others.add(e);
          }
          const Vec<T> teacher_e_t = exp((t - max_teacher) * inverse_temperature);
          sum_t.add(e_t);
          teacher_sum_t.add(teacher_e_t);
          write(exps.logits, e_t);
          write(exps.teacher, teacher_e_t);
          if constexpr (!kPlain) {
            const Vec<T> w = row.class_weight ? read(row.class_weight, T(0)) : broadcast(T(1));
            num_existing.add(select(z == never, Vec<T>{}, broadcast(T(1))));
            weight_sum.add(select(z == never, Vec<T>{}, w));
            // A class that does not exist adds w * 0.
            const Vec<T> existing = select(z == never, max_logit, z);
            if constexpr (sizeof(T) == sizeof(float)) {
              const Double max_double = broadcast(double(maxima.logit));
              weighted_logits += half_in_double<0>(w) * (half_in_double<0>(existing) - max_double) +
                                 half_in_double<1>(w) * (half_in_double<1>(existing) - max_double);
            } else {
              weighted_logits += w * (existing - max_logit);
            }
          }
        });
    others.end_block();
    sum_t.end_block();
    teacher_sum_t.end_block();
    num_existing.end_block();
    weight_sum.end_block();
  }
  RowSums sums;
  sums.others = others.total();
  sums.at_target = double(sum_of_lanes(at_target));
  sums.sum_t = sum_t.total();
  sums.teacher_sum_t = teacher_sum_t.total();
  sums.num_existing = kPlain ? 0.0 : num_existing.total();
  sums.weight_sum = kPlain ? 0.0 : weight_sum.total();
  sums.weighted_logits = kPlain ? 0.0 : sum_of_lanes(weighted_logits);
  return sums;
}

template <typename T>
RowSums row_sums(const Row<T>& row, const Maxima<T>& maxima, const LossOptions& options,
                 const Exponentials<T>& exps) {
  if (row.class_weight == nullptr && options.label_smoothing == 0) {
    return sums_of<T, true>(row, maxima, options.temperature, exps);
  }
  return sums_of<T, false>(row, maxima, options.temperature, exps);
}

template <typename T>
DivergenceSums row_divergence(const Row<T>& row, const RowState& state, double temperature,
                              const Exponentials<T>& exps) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const LogRatio log_ratio(state, temperature);
  const InverseNorms<T> inverse_norms(state);
  Sum<T> divergence, excess;
  for (int64_t begin = 0; begin < row.num_classes; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, row.num_classes);
    for_each_vector<T>(
        begin, end, [&](int64_t, const auto& read, const auto&) __attribute__((always_inline)) {
          const Vec<T> z = read(row.logits, kNever);
          const Vec<T> ratio = log_ratio(read(row.logits, T(0)), read(row.teacher, T(0)));
          const Vec<T> e =
              select(ratio > Vec<T>{}, read(exps.teacher, T(0)), read(exps.logits, T(0)));
          const auto parts =
              SoftmaxPair<Vec<T>>{ratio, e * inverse_norms.of_larger(ratio)}.divergence();
          divergence.add(select(z == broadcast(kNever), Vec<T>{}, parts.divergence));
          excess.add(select(z == broadcast(kNever), Vec<T>{}, parts.excess));
        });
    divergence.end_block();
    excess.end_block();
  }
  return {divergence.total(), excess.total()};
}

template <typename T, bool kPlain>
INTROKERNELS_INLINE void gradient_of(const Row<T>& row, const LossOptions& options,
                                     const RowState& state, const RowScales& scales, T* grad) {
  constexpr T kNever = -std::numeric_limits<T>::infinity();
  const LogRatio log_ratio(state, options.temperature);
  const InverseNorms<T> inverse_norms(state);
  const Vec<T> inverse_temperature = broadcast(T(1 / options.temperature));
  const Vec<T> max_teacher = broadcast(T(state.teacher_max));
  const Vec<T> kl_scale = broadcast(T(scales.kl));
  const Vec<T> target_scale = broadcast(T(scales.ce_target));
  const Vec<T> share = broadcast(T(scales.ce * state.smoothing_share));
  const Vec<T> weight_sum = broadcast(T(state.weight_sum));
  const Vec<T> max_logit = broadcast(T(state.max)), inverse_norm = broadcast(T(1 / state.norm));
  // p_y - 1 from the loss itself: the difference would cancel where p_y is almost 1.
  const Vec<T> at_target = broadcast(T(std::expm1(-state.nll)));
  for_each_vector<T>(
      0, row.num_classes,
      [&](int64_t c, const auto& read, const auto& write) __attribute__((always_inline)) {
        // Nothing of what lies past the row's end is written.
        const Vec<T> z = read(row.logits, T(0));
        Vec<T> sum{};
        if (options.kl_weight > 0) {
          const Vec<T> t = read(row.teacher, T(0));
          const Vec<T> ratio = log_ratio(z, t);
          const Vec<T> scaled =
              select(ratio > Vec<T>{}, t - max_teacher, z - max_logit) * inverse_temperature;
          const Vec<T> larger = exp(scaled) * inverse_norms.of_larger(ratio);
          sum = kl_scale * SoftmaxPair<Vec<T>>{ratio, larger}.difference();
        }
        if (options.ce_weight > 0) {
          const Vec<T> p = exp(z - max_logit) * inverse_norm;
          sum += target_scale *
                 (holds<T>(c, row.target) ? select(lane_of<T>(c, row.target), at_target, p) : p);
          if constexpr (!kPlain) {
            const Vec<T> w = row.class_weight ? read(row.class_weight, T(0)) : broadcast(T(1));
            sum += share * (weight_sum * p - w);
          }
        }
        write(grad, select(z == broadcast(kNever), Vec<T>{}, sum));
      });
}

template <typename T>
void row_backward(const Row<T>& row, const LossOptions& options, const RowState& state,
                  const RowScales& scales, T* grad) {
  if (row.class_weight == nullptr && options.label_smoothing == 0) {
    gradient_of<T, true>(row, options, state, scales, grad);
  } else {
    gradient_of<T, false>(row, options, state, scales, grad);
  }
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
