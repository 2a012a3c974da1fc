// Inner products of explanations over a slice of their dimensions, each gradient read once.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/numbers.h"
#include "cpu/simd/vec.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

// visit(d, read) for each vector of dimensions; read(gradient) loads it from a class's gradient,
// the last one filled up with 0.
template <typename T, typename Number, typename Visit>
INTROKERNELS_INLINE void for_each_dims(int64_t count, const Visit& visit) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) {
    visit(d, [d](const Number* gradient)
                 __attribute__((always_inline)) { return load_as<T>(gradient + d); });
  }
  if (d < count) {
    const int64_t rest = count - d;
    visit(d, [d, rest](const Number* gradient)
                 __attribute__((always_inline)) { return load_first_as<T>(gradient + d, rest); });
  }
}

// kClasses classes at once share what they read of the inputs.
template <typename T, typename Number, bool kCenter, int kClasses>
INTROKERNELS_INLINE void add_inner_products(const char* gradients, const char* next, int64_t stride,
                                            const StatisticsSlice<T>& slice, double* dots,
                                            double* sq_norms) {
  Vec<T> dot_sums[kClasses] = {}, sq_norm_sums[kClasses] = {};
  for_each_dims<T, Number>(
      slice.count, [&](int64_t d, const auto& read) __attribute__((always_inline)) {
        const Vec<T> x = load(slice.inputs + d), e_y = load(slice.target_explanation + d);
#pragma GCC unroll 4
        for (int k = 0; k < kClasses; ++k) {
          // The same place of the next classes, which lies in another page, where no prefetcher of
          // the machine looks by itself. Behind the last classes, of the first ones of what
          // follows.
          __builtin_prefetch(next + k * stride + d * int64_t(sizeof(Number)));
          Vec<T> g = read(reinterpret_cast<const Number*>(gradients + k * stride));
          if constexpr (kCenter) {
            g = (g - load(slice.mean_high + d)) - load(slice.mean_low + d);
          }
          const Vec<T> e = g * x;
          dot_sums[k] += e * e_y;
          sq_norm_sums[k] += e * e;
        }
      });
#pragma GCC unroll 4
  for (int k = 0; k < kClasses; ++k) {
    dots[k] += double(sum_of_lanes(dot_sums[k]));
    sq_norms[k] += double(sum_of_lanes(sq_norm_sums[k]));
  }
}

template <typename T, typename Number, bool kCenter>
INTROKERNELS_INLINE void add_all_inner_products(const char* gradients, int64_t stride,
                                                int64_t num_classes,
                                                const StatisticsSlice<T>& slice, double* dots,
                                                double* sq_norms) {
  constexpr int kAtOnce = 2;
  int64_t k = 0;
  for (; k + kAtOnce <= num_classes; k += kAtOnce) {
    const char* const here = gradients + k * stride;
    const char* next = here;
    if (k + 2 * kAtOnce <= num_classes) {
      next = here + kAtOnce * stride;
    } else if (slice.after != nullptr && k + kAtOnce == num_classes) {
      next = static_cast<const char*>(slice.after);
    }
    add_inner_products<T, Number, kCenter, kAtOnce>(here, next, stride, slice, dots + k,
                                                    sq_norms + k);
  }
  for (; k < num_classes; ++k) {
    add_inner_products<T, Number, kCenter, 1>(gradients + k * stride, gradients + k * stride,
                                              stride, slice, dots + k, sq_norms + k);
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

// E_y of a slice, filled up with 0 to a whole vector. out may be the gradient itself.
template <typename T>
void explain(const T* gradient, const StatisticsSlice<T>& slice, T* out) {
  for_each_dims<T, T>(slice.count, [&](int64_t d, const auto& read) __attribute__((always_inline)) {
    Vec<T> g = read(gradient);
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
