// Inner products of explanations over a slice of their dimensions, each gradient read once.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/numbers.h"
#include "cpu/simd/vec.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

// Dimensions that a sum in T runs over; what it comes to is added up in double.
constexpr int64_t kDimsOfSum = 2048;

// Classes whose gradients are read side by side: they share what is read of the inputs, and several
// streams from memory at once are faster than one. More than five were slower again on a Zen 4;
// with half as many registers, of half the size, the sums of more than two would not stay in them.
#if defined(INTROKERNELS_AVX512)
constexpr int kMostAtOnce = 5;
#else
constexpr int kMostAtOnce = 2;
#endif

// Up to so many dimensions a stream ends before a machine's prefetchers have found it.
constexpr int64_t kShortStream = 4096;

// visit(d, read) for each vector of dimensions; read(gradient) loads it from a class's gradient,
// the last one filled up with 0.
template <typename T, typename Number, typename Visit>
INTROKERNELS_INLINE void for_each_dims(int64_t begin, int64_t end, const Visit& visit) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  int64_t d = begin;
  for (; d + kLanes <= end; d += kLanes) {
    visit(d, [d](const Number* gradient)
                 __attribute__((always_inline)) { return load_as<T>(gradient + d); });
  }
  if (d < end) {
    const int64_t rest = end - d;
    visit(d, [d, rest](const Number* gradient)
                 __attribute__((always_inline)) { return load_first_as<T>(gradient + d, rest); });
  }
}

template <typename T, typename Number, bool kCenter, int kClasses>
INTROKERNELS_INLINE void add_inner_products(const char* gradients, const char* next, int64_t stride,
                                            const StatisticsSlice<T>& slice, double* dots,
                                            double* sq_norms) {
  for (int64_t begin = 0; begin < slice.count; begin += kDimsOfSum) {
    Vec<T> dot_sums[kClasses] = {}, sq_norm_sums[kClasses] = {};
    for_each_dims<T, Number>(
        begin, std::min(begin + kDimsOfSum, slice.count),
        [&](int64_t d, const auto& read) __attribute__((always_inline)) {
          const Vec<T> x = load(slice.inputs + d), e_y = load(slice.target_explanation + d);
#pragma GCC unroll 8
          for (int k = 0; k < kClasses; ++k) {
            // Into L2: a whole group ahead is more than L1 holds beside what is read now.
            __builtin_prefetch(next + k * stride + d * int64_t(sizeof(Number)), 0, 2);
            Vec<T> g = read(reinterpret_cast<const Number*>(gradients + k * stride));
            if constexpr (kCenter) {
              g = (g - load(slice.mean_high + d)) - load(slice.mean_low + d);
            }
            const Vec<T> e = g * x;
            dot_sums[k] += e * e_y;
            sq_norm_sums[k] += e * e;
          }
        });
#pragma GCC unroll 8
    for (int k = 0; k < kClasses; ++k) {
      dots[k] += double(sum_of_lanes(dot_sums[k]));
      sq_norms[k] += double(sum_of_lanes(sq_norm_sums[k]));
    }
  }
}

// The same for a number of classes that is not known before, up to kMost.
template <typename T, typename Number, bool kCenter, int kMost>
INTROKERNELS_INLINE void add_inner_products_of(int num_classes, const char* gradients,
                                               const char* next, int64_t stride,
                                               const StatisticsSlice<T>& slice, double* dots,
                                               double* sq_norms) {
  if (num_classes == kMost) {
    add_inner_products<T, Number, kCenter, kMost>(gradients, next, stride, slice, dots, sq_norms);
  } else if constexpr (kMost > 1) {
    add_inner_products_of<T, Number, kCenter, kMost - 1>(num_classes, gradients, next, stride,
                                                         slice, dots, sq_norms);
  }
}

template <typename T, typename Number, bool kCenter>
INTROKERNELS_INLINE void add_all_inner_products(const char* gradients, int64_t stride,
                                                int64_t num_classes,
                                                const StatisticsSlice<T>& slice, double* dots,
                                                double* sq_norms) {
  // Groups of as many classes each, or one less.
  int64_t groups = (num_classes + kMostAtOnce - 1) / kMostAtOnce;
  for (int64_t k = 0; groups > 0; --groups) {
    const int64_t count = (num_classes - k + groups - 1) / groups;
    const char* const here = gradients + k * stride;
    // What is prefetched: the same place of the next classes. Where that is no use, what is read.
    const char* next = here;
    if (slice.count <= kShortStream) {
      if (groups > 1) {
        // The next group may be one class smaller: as many that end where it does.
        next = here + (num_classes - k - count + groups - 2) / (groups - 1) * stride;
      } else if (slice.after != nullptr) {
        next = static_cast<const char*>(slice.after);
      }
    }
    add_inner_products_of<T, Number, kCenter, kMostAtOnce>(int(count), here, next, stride, slice,
                                                           dots + k, sq_norms + k);
    k += count;
  }
}

template <typename T, typename Number>
void inner_products(const void* gradients, int64_t stride, int64_t num_classes,
                    const StatisticsSlice<T>& slice, double* dots, double* sq_norms) {
  const char* const bytes = static_cast<const char*>(gradients);
  if (slice.mean_high != nullptr) {
    add_all_inner_products<T, Number, true>(bytes, stride, num_classes, slice, dots, sq_norms);
  } else {
    add_all_inner_products<T, Number, false>(bytes, stride, num_classes, slice, dots, sq_norms);
  }
}

// E_y of a slice, filled up with 0 to a whole vector.
template <typename T, typename Number>
void explain(const void* gradient, const StatisticsSlice<T>& slice, T* out) {
  for_each_dims<T, Number>(0, slice.count,
                           [&](int64_t d, const auto& read) __attribute__((always_inline)) {
                             Vec<T> g = read(static_cast<const Number*>(gradient));
                             if (slice.mean_high != nullptr) {
                               g = (g - load(slice.mean_high + d)) - load(slice.mean_low + d);
                             }
                             store(out + d, g * load(slice.inputs + d));
                           });
}

template <typename Number>
void accumulate(const void* source, int64_t count, double* sums) {
  for_each_double(static_cast<const Number*>(source), count,
                  [&](int64_t d, int64_t rest, const Double& v) __attribute__((always_inline)) {
                    if (rest >= Double::kLanes) {
                      store(sums + d, load(sums + d) + v);
                    } else {
                      store_first(sums + d, rest, load_first(sums + d, rest, 0.0) + v);
                    }
                  });
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
