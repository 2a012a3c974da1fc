// The loss of one row and its gradient, by a group of threads.
//
// A row is read once. Its first vectors, one for each thread, give the group references: the
// largest logits seen, and a shift s that brings log q - log p to about the right level,
//   d_c = ((t_c - t_ref) - (z_c - z_ref)) / T - s.
// Every thread then adds up its own classes relative to these, with no word to the others until
// the end. What the references were off by is taken back exactly: with
//   Q = sum exp((t - t_ref) / T),  P = exp(s) sum exp((z - z_ref) / T),  E = Q - P,
//   D = sum of q~ d - (q~ - p~), where q~ and p~ are the terms of Q and P,
// the divergence is (D / P + e) / (1 + e) - log(1 + e) for e = E / P, in which nothing cancels as
// long as e^2 is not large beside D / P. E is the sum of q~ - p~ from d itself, so that its digits
// outlast Q and P. Where the first vectors misled, because the classes that matter come later, or
// the references are too far away to tell q and p of a class that has almost all of both, the row
// is read again with the maxima and the norms of all of it; results tell, for all threads alike,
// and a row of no more vectors than threads is never read again.
//
// Logits are held as quarters of themselves, so that no difference of two of them overflows.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "common/row_loss.h"
#include "cuda/group.h"
#include "cuda/number.h"
#include "cuda/vectors.h"

namespace introkernels::cuda {

// 4 / T and what exponentials multiply quarters of logits by.
template <typename T>
struct Temperatures {
  T ratio;       // 4 / T
  T exponent_t;  // 4 log2(e) / T
  T exponent;    // 4 log2(e)

  __device__ __forceinline__ explicit Temperatures(double inverse_temperature)
      : ratio(T(4 * inverse_temperature)),
        exponent_t(T(4 * kLog2E * inverse_temperature)),
        exponent(T(4 * kLog2E)) {}
};

// What classes are counted from.
template <typename T>
struct References {
  T z;                // a quarter of the largest logit seen
  T t;                // a quarter of the largest teacher logit seen
  T difference;       // t - z
  T difference_lost;  // what rounding took from it
  T shift;            // s
  T shift_log2;       // s log2(e)
  bool has_logits;    // false where no class exists
  bool has_teacher;   // false where none has a soft label
};

// What rounding took from difference = a - b (D. Knuth's two-sum).
template <typename T>
__device__ __forceinline__ T lost(T a, T b, T difference) {
  const T minus_b = difference - a;
  return (a - (difference - minus_b)) - (b + minus_b);
}

// d of a class: a finite number, also where one of the logits is -inf. NaN comes out as the lowest
// number, beside a p or q that is NaN. kExact keeps what rounding of t - z loses, for types whose
// differences float does not hold.
template <bool kExact, typename T>
__device__ __forceinline__ T log_ratio_of(T z, T t, const References<T>& from, T z_from, T t_from,
                                          T ratio) {
  T total;
  if constexpr (kExact) {
    const T difference = t - z;
    total = difference - from.difference;
    const T rounded = lost(t, z, difference) - from.difference_lost;
    // An infinite t leaves nothing to keep.
    total += abs_of(total) < std::numeric_limits<T>::infinity() ? rounded : T(0);
  } else {
    total = t_from - z_from;
  }
  return min_of(max_of(fma_of(total, ratio, -from.shift), -kVeryFar<T>), kVeryFar<T>);
}

// The sums of a thread, then of a group.
template <typename T>
struct RowParts {
  T others;      // sum of exp(z - z_ref) over all classes but the target
  T norm_q;      // Q
  T norm_p;      // P
  T divergence;  // D
  T excess;      // E
  T count;       // classes that exist; this and the next two for class weights and smoothing only
  T weight_sum;  // their weights
  T below;       // sum of weight (z_ref - z)
};

__device__ __forceinline__ double weight_of(const LossNumbers& numbers, int64_t c) {
  if (numbers.weight.data == nullptr) return 1.0;
  return Row<AnyNumber, double, 1>(numbers.weight, 0).value(c);
}

// The terms of a class in P and Q, and what becomes of them.
template <typename T>
struct ClassTerms {
  T p, q;
  T d;
  T rest;        // e^d - 1 - d where is_near
  T excess;      // q - p
  bool is_near;  // q and p are close: what is made of both comes from p and d alone
};

template <bool kExact, typename T>
__device__ __forceinline__ ClassTerms<T> terms_of(T z, T t, T z_from, T t_from,
                                                  const References<T>& from,
                                                  const Temperatures<T>& temperatures) {
  ClassTerms<T> terms;
  terms.p = exp2_of(fma_of(z_from, temperatures.exponent_t, from.shift_log2));
  terms.q = exp2_of(t_from * temperatures.exponent_t);
  terms.d = log_ratio_of<kExact>(z, t, from, z_from, t_from, temperatures.ratio);
  terms.is_near = abs_of(terms.d) < T(1);
  terms.rest = exp_rest(terms.d);
  terms.excess = terms.is_near ? terms.p * (terms.d + terms.rest) : terms.q - terms.p;
  return terms;
}

// Adds N classes to the sums of a thread. target: which of them is the row's, any other number for
// none. first: the number of the first, by which kWeighted finds their weights.
template <bool kExact, bool kWeighted, typename T, int N>
__device__ __forceinline__ void add_classes(const T (&z)[N], const T (&t)[N], int target,
                                            int64_t first, const LossNumbers& numbers,
                                            const Temperatures<T>& temperatures,
                                            const References<T>& from, RowParts<T>* parts) {
  T all = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool exists = z[i] != kNever<T>;
    const T teacher = exists ? t[i] : kNever<T>;
    const T z_from = z[i] - from.z, t_from = teacher - from.t;
    all += exp2_of(z_from * temperatures.exponent);
    const ClassTerms<T> terms = terms_of<kExact>(z[i], teacher, z_from, t_from, from, temperatures);
    const T p = terms.p, q = terms.q, d = terms.d, rest = terms.rest;
    parts->norm_p += p;
    parts->norm_q += q;
    parts->divergence += terms.is_near ? p * fma_of(d, d + rest, -rest) : fma_of(q, d - T(1), p);
    parts->excess += terms.excess;
    if constexpr (kWeighted) {
      if (exists) {
        const T weight = T(weight_of(numbers, first + i));
        parts->count += T(1);
        parts->weight_sum += weight;
        parts->below -= T(4) * weight * z_from;
      }
    }
  }
  if (target >= 0 && target < N) {
    // Added up without the target, rather than taken away again, which would cancel.
    all = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i != target) all += exp2_of((z[i] - from.z) * temperatures.exponent);
    }
  }
  parts->others += all;
}

// The sums of some vectors of a row, by a group of threads, and what they are relative to.
struct PartSums {
  double z_ref;  // a quarter of the largest logit seen; -inf where no class exists
  double t_ref;  // a quarter of the largest teacher logit seen; -inf where there is none
  double shift;
  RowParts<double> sums;
};

// The teacher of a row whose logits are given.
template <typename U, typename T, int N>
class GivenTeacher {
 public:
  using Fetched = typename Row<U, T, N>::Fetched;
  // Whether the target's logit, which is 0, is taken for the largest: see sum_vectors.
  static constexpr bool kTargetIsLargest = false;

  __device__ __forceinline__ GivenTeacher(const Matrix& logits, int64_t row)
      : logits_(logits, row) {}

  __device__ __forceinline__ void fetch(int64_t first, int64_t num_classes, Fetched* out) const {
    logits_.fetch(first, num_classes, out);
  }
  __device__ __forceinline__ void convert(const Fetched& fetched, int64_t, T (&t)[N]) const {
    Row<U, T, N>::convert(fetched, t);
  }

 private:
  Row<U, T, N> logits_;
};

// A row of logits and its teacher as the threads of a group walk them. Teacher offers fetch and
// convert as Row does; what it converts may depend on the number of the first class.
template <typename Z, typename T, int N, typename Teacher>
class RowWalk {
 public:
  struct Fetched {
    typename Row<Z, T, N>::Fetched z;
    typename Teacher::Fetched t;
  };

  __device__ __forceinline__ RowWalk(const Row<Z, T, N>& logits, const Teacher& teacher,
                                     int64_t num_classes)
      : logits_(logits), teacher_(teacher), num_classes_(num_classes) {}

  __device__ __forceinline__ int64_t first_class(int vector) const { return int64_t(vector) * N; }
  // 32 bits count the vectors of a row of more than 8 billion classes, and save registers.
  __device__ __forceinline__ int num_vectors() const { return int((num_classes_ + N - 1) / N); }
  __device__ __forceinline__ int64_t num_classes() const { return num_classes_; }
  __device__ __forceinline__ const Row<Z, T, N>& logits() const { return logits_; }

  __device__ __forceinline__ void fetch(int vector, Fetched* out) const {
    logits_.fetch(first_class(vector), num_classes_, &out->z);
    teacher_.fetch(first_class(vector), num_classes_, &out->t);
  }

  // Quarters of the logits and of the teacher logits of a vector.
  __device__ __forceinline__ void convert(const Fetched& fetched, int vector, T (&z)[N],
                                          T (&t)[N]) const {
    Row<Z, T, N>::convert(fetched.z, z);
    teacher_.convert(fetched.t, first_class(vector), t);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z[i] *= T(0.25);
      t[i] *= T(0.25);
    }
  }

  // work(vector, z, t) for this thread's share of vectors [begin, end). The next vector is on its
  // way while one is worked on.
  template <typename Work>
  __device__ __forceinline__ void for_each(const Group& group, int begin, int end,
                                           const Work& work) const {
    Fetched fetched;
    T z[N], t[N];
    // One step before the first: written like this there is one place that fetches.
#pragma unroll 1
    for (int v = begin + group.rank() - group.size(); v < end; v += group.size()) {
      const bool has_work = v >= begin;
      if (has_work) convert(fetched, v, z, t);
      if (v + group.size() < end) fetch(v + group.size(), &fetched);
      if (has_work) work(v, z, t);
    }
  }

 private:
  Row<Z, T, N> logits_;
  Teacher teacher_;
  int64_t num_classes_;
};

// Whether rounding leaves the gradient of a row its digits. log q - log p of a class is made of its
// logits and of the level log(Q / P) of the row, and errs by a few units in the last place of what
// the level is made of; q - p by that times p. No gradient is smaller than the difference of the
// largest p and the largest q; one whose p and q are largest at the same class, and almost equal
// there, is of order sqrt(KL (1 - p)): little where both are sure of that class.
template <typename T>
__device__ __forceinline__ bool keeps_gradient(double level, double kl, double largest_p,
                                               double largest_q) {
  // How many times a gradient a level may be: a few 1e-16 or 6e-8 of it are to be a small part of
  // the 1e-12 or 2e-6 that the gradient may be off by.
  constexpr double kLevels = sizeof(T) == 8 ? 1000 : 4;
  // As far as the sums of T tell it. A bound may have twice the level that an estimate may.
  constexpr double kNoise = sizeof(T) == 8 ? 1e-13 : 1e-5;
  const double difference = 2 * max_of(abs_of(largest_q - largest_p) - kNoise, 0.0);
  const double gradient_2 = max_of(kl * (1 - largest_p), difference * difference);
  return level * level <= kLevels * kLevels * gradient_2;
}

// The same for gradients that are rounded to a half type, and of order KL at least: no pass over a
// row has to look for its likeliest classes.
__device__ __forceinline__ bool keeps_half_gradient(double level, double kl) {
  return level <= 2048 * kl;
}

// Vectors [begin, end) of a row. target: its class.
template <bool kExact, bool kWeighted, typename Z, typename T, int N, typename Teacher>
__device__ __forceinline__ PartSums sum_vectors(Group* group, const RowWalk<Z, T, N, Teacher>& walk,
                                                int begin, int end, int64_t target,
                                                const LossNumbers& numbers) {
  // Beyond these, sums of another row of vectors may not be finite, or not what they should be.
  constexpr double kMost = sizeof(T) == 8 ? 1e290 : 1e30;
  constexpr bool kSeeksTops = !is_half_type<Z>;
  enum Pass { kMaxima, kNorms, kSums };

  const Temperatures<T> temperatures(numbers.inverse_temperature);
  PartSums result;
  bool all = end - begin <= group->size();
  for (;;) {
    const int end_of_references = all ? end : begin + group->size();
    T tops[2] = {kNever<T>, kNever<T>};
    T norms[3] = {0, 0, 0};
    T seen[2] = {kNever<T>, kNever<T>};
    References<T> from{};
    RowParts<T> parts{};
    // One loop for three passes, so that the code of a step is there once.
#pragma unroll 1
    for (int pass = kMaxima; pass <= kSums; ++pass) {
      walk.for_each(*group, begin, pass == kSums ? end : end_of_references,
                    [&](int v, const T(&z)[N], const T(&t)[N]) {
                      if (pass == kSums) {
                        const int64_t first = walk.first_class(v);
                        const int64_t at = target - first;
                        add_classes<kExact, kWeighted>(z, t, at >= 0 && at < N ? int(at) : -1,
                                                       first, numbers, temperatures, from, &parts);
                        if constexpr (kSeeksTops) {
#pragma unroll
                          for (int i = 0; i < N; ++i) {
                            seen[0] = max_of(seen[0], z[i]);
                            if constexpr (!Teacher::kTargetIsLargest) {
                              seen[1] = max_of(seen[1], z[i] == kNever<T> ? kNever<T> : t[i]);
                            }
                          }
                        }
                        return;
                      }
#pragma unroll
                      for (int i = 0; i < N; ++i) {
                        const T teacher = z[i] == kNever<T> ? kNever<T> : t[i];
                        if (pass == kMaxima) {
                          tops[0] = max_of(tops[0], z[i]);
                          tops[1] = max_of(tops[1], teacher);
                        } else {
                          const ClassTerms<T> terms = terms_of<kExact>(
                              z[i], teacher, z[i] - from.z, teacher - from.t, from, temperatures);
                          norms[0] += terms.q;
                          norms[1] += terms.p;
                          norms[2] += terms.excess;
                        }
                      }
                    });
      if (pass == kMaxima) {
        group->reduce(tops, Largest{});
        from.has_logits = tops[0] != kNever<T>;
        from.has_teacher = tops[1] != kNever<T>;
        from.z = from.has_logits ? tops[0] : T(0);
        from.t = from.has_teacher ? tops[1] : T(0);
        from.difference = from.t - from.z;
        from.difference_lost = lost(from.t, from.z, from.difference);
      } else if (pass == kNorms) {
        group->reduce(norms, Sum{});
        // Exactly 0 for equal distributions, and where a side has no class. Of sums that are close,
        // the quotient has fewer digits than their difference.
        if (norms[0] > T(0) && norms[1] > T(0)) {
          const double excess = double(norms[2]) / double(norms[1]);
          from.shift =
              T(abs_of(excess) < 0.5 ? log1p(excess) : log(double(norms[0]) / double(norms[1])));
          from.shift_log2 = from.shift * T(kLog2E);
        }
      }
    }
    double sums[kExchanged] = {parts.others, parts.norm_q, parts.norm_p,     parts.divergence,
                               parts.excess, parts.count,  parts.weight_sum, parts.below};
    group->reduce(sums, Sum{});
    result.z_ref = from.has_logits ? double(from.z) : kNever<double>;
    result.t_ref = from.has_teacher ? double(from.t) : kNever<double>;
    result.shift = double(from.shift);
    result.sums = {sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]};
    if (all) return result;
    const double target_from = double(walk.logits().value(target)) - 4 * double(from.z);
    // The divergence is the difference of these two, of which at least half has to be left.
    const double excess = sums[4] / sums[2], error = -shift_correction(excess);
    const double divergence = sums[3] / sums[2] / (1 + excess);
    // Where anything is NaN, one of these is false.
    const bool is_right = from.has_logits && from.has_teacher && sums[0] < kMost &&
                          sums[1] < kMost && sums[2] < kMost && target_from < 80 &&
                          2 * error <= divergence;
    const double change = log1p(excess), kl = divergence - error;
    const double level = abs_of(result.shift) + abs_of(change);
    bool keeps_digits;
    if constexpr (kSeeksTops) {
      group->reduce(seen, Largest{});
      if constexpr (Teacher::kTargetIsLargest) {
        // Only how often rows are read again depends on whether this is so.
        const bool has_target = target >= walk.first_class(begin) && target < walk.first_class(end);
        seen[1] = has_target ? max_of(from.t, T(0)) : from.t;
      }
      const double ratio = 4 * numbers.inverse_temperature;
      const double z_top = ratio * (double(seen[0]) - double(from.z));
      const double t_top = ratio * (double(seen[1]) - double(from.t));
      // In T, because an exponential of doubles takes registers that not all kernels have.
      const double top_q = double(exp2_of(T(t_top * kLog2E))) / sums[1];
      // What the level would be if the row were read again: there has to be something to gain.
      const double next = result.shift + change + (z_top - t_top);
      const double top_p = exp(z_top + result.shift) / sums[2];
      keeps_digits = keeps_gradient<T>(level, kl, top_p, top_q) || 2 * abs_of(next) > level;
    } else {
      keeps_digits = keeps_half_gradient(level, kl);
    }
    if (is_right && keeps_digits) return result;
    all = true;
  }
}

// The terms of a row from those of its parts, added in their order, and what its backward needs.
//
// The divergence of a row is that of its parts, by the chain rule
//   KL(q || p) = sum_k f_k KL(q_k || p_k) + KL(f || g),
// f_k and g_k being the shares of part k in q and in p.
__device__ inline RowTerms finish_parts(const PartSums* parts, int num_parts, double target_logit,
                                        double target_weight, const LossNumbers& numbers,
                                        RowState* state) {
  const double ratio = 4 * numbers.inverse_temperature;
  double z_top = kNever<double>, t_top = kNever<double>;
#pragma unroll 1
  for (int k = 0; k < num_parts; ++k) {
    z_top = max_of(z_top, parts[k].z_ref);
    t_top = max_of(t_top, parts[k].t_ref);
  }
  if (z_top == kNever<double>) z_top = 0;
  if (t_top == kNever<double>) t_top = 0;

  // log(Q / P) of a part under the references of the row, to all digits that its excess has.
  const auto level = [&](const PartSums& part) {
    return part.shift + log1p(part.sums.excess / part.sums.norm_p) +
           ((part.t_ref - t_top) - (part.z_ref - z_top)) * ratio;
  };
  const auto norm_p_of = [&](const PartSums& part) {
    return part.sums.norm_p * exp((part.z_ref - z_top) * ratio - part.shift);
  };
  const auto norm_q_of = [&](const PartSums& part) {
    return part.sums.norm_q * exp((part.t_ref - t_top) * ratio);
  };
  RowSums sums{};
  double base = 0, largest_norm_p = -1;
#pragma unroll 1
  for (int k = 0; k < num_parts; ++k) {
    const PartSums& part = parts[k];
    if (part.z_ref == kNever<double>) continue;
    const double z_from = part.z_ref - z_top;
    const double norm_p = norm_p_of(part);
    sums.others += part.sums.others * exp(4 * z_from);
    sums.sum_t += norm_p;
    sums.num_existing += part.sums.count;
    sums.weight_sum += part.sums.weight_sum;
    sums.weighted_logits -= part.sums.below - 4 * z_from * part.sums.weight_sum;
    if (part.t_ref == kNever<double>) continue;
    sums.teacher_sum_t += norm_q_of(part);
    if (norm_p > largest_norm_p) {
      base = level(part);
      largest_norm_p = norm_p;
    }
  }
  const bool has_target = target_logit != kNever<double>;
  sums.at_target = has_target ? exp(target_logit - 4 * z_top) : 0.0;
  state->max = 4 * z_top;
  state->teacher_max = 4 * t_top;
  RowTerms terms;
  terms.ce = finish_row(sums, target_logit, target_weight, numbers.options, state);
  if (state->teacher_norm_t == 0) {
    terms.kl = state->norm == 0 ? 0.0 : numbers.kl_without_labels;
    return terms;
  }

  // The level of the row, from that of the part which has most of p: where all parts are near it,
  // to the digits of their levels. Elsewhere q and p are far apart, and the quotient of the sums,
  // which finish_row took, is good enough.
  double growth = 0;
#pragma unroll 1
  for (int k = 0; k < num_parts; ++k) {
    const PartSums& part = parts[k];
    if (part.z_ref == kNever<double>) continue;
    growth += norm_p_of(part) * (part.t_ref == kNever<double> ? -1.0 : expm1(level(part) - base)) /
              sums.sum_t;
  }
  if (abs_of(growth) < 0.5) state->ratio_shift = base + log1p(growth);

  terms.kl = 0;
#pragma unroll 1
  for (int k = 0; k < num_parts; ++k) {
    const PartSums& part = parts[k];
    if (part.z_ref == kNever<double>) continue;
    const double share_p = norm_p_of(part) / sums.sum_t;
    if (part.t_ref == kNever<double>) {
      terms.kl += share_p;
      continue;
    }
    const double d = level(part) - state->ratio_shift;
    const bool is_near = abs_of(d) < 1;
    // Far from p, a share of it may be too small for a number.
    const double share_q = is_near ? share_p * exp(d) : norm_q_of(part) / sums.teacher_sum_t;
    RowState ignored{};
    const DivergenceSums of_part{part.sums.divergence / part.sums.norm_p,
                                 part.sums.excess / part.sums.norm_p};
    terms.kl += share_q * finish_divergence(of_part, &ignored);
    const double rest = is_near ? exp_rest(d) : 0.0;
    terms.kl += is_near ? share_p * (d * (d + rest) - rest) : share_q * (d - 1) + share_p;
  }
  return terms;
}

}  // namespace introkernels::cuda
