// The vectorised inner loops, compiled for several instruction sets from the same sources in
// cpu/simd, and the choice among them.
#pragma once

#include <cstdint>

#include "common/row_loss.h"
#include "cpu/product_kernels.h"

namespace introkernels::cpu {

// One row of a loss, or a part of one; T is float, or double for float64 tensors.
template <typename T>
struct Row {
  const T* logits;        // [num_classes]
  const T* teacher;       // [num_classes]; -inf where there is no soft label
  const T* class_weight;  // [num_classes], or null for ones
  int64_t num_classes;
  int64_t target;  // outside [0, num_classes) where it lies in another part

  Row part(int64_t begin, int64_t count) const {
    return {logits + begin, teacher + begin, class_weight ? class_weight + begin : nullptr, count,
            target - begin};
  }
};

// The dimensions of an explanation that a kernel adds up at a time.
template <typename T>
struct StatisticsSlice {
  const T* inputs;              // [padded(count)], 0 after count
  const T* target_explanation;  // [padded(count)], 0 after count
  const T* mean_high;           // [padded(count)], to be taken from each gradient; or null
  const T* mean_low;            // [padded(count)], what mean_high was too short for
  int64_t count;
  // Where the gradients of the next row begin, classes as far apart as in this; null where they are
  // not what is read after this slice.
  const void* after;
};

// (s - 1) / tau for the similarities s of explanations of statistics dots, sq_norms [count],
// computed in S, the statistics' type. The target's is the one at target_position, and 1 by
// definition.
template <typename S, typename T>
using TeacherLogitsKernel = void(const S* dots, const S* sq_norms, int64_t count,
                                 int64_t target_position, const Options& options, T* out);

enum class Number : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

template <typename T>
struct KernelsOf {
  RowSums (*row_sums)(const Row<T>&, const Options&);
  void (*row_backward)(const Row<T>&, const Options&, const RowSums&, const GradientFactors&,
                       T* grad);
  TeacherLogitsKernel<T, T>* teacher_logits;
  TeacherLogitsKernel<double, T>* teacher_logits_of_doubles;
  // The explanation [padded(count)] of a slice's gradient [count]; target_explanation is not read.
  void (*explain[4])(const void* gradient, const StatisticsSlice<T>& slice, T* out);
  // Adds the inner products of a slice to dots[k] and sq_norms[k], for classes k of gradients at
  // gradients + k * stride bytes.
  void (*inner_products[4])(const void* gradients, int64_t stride, int64_t num_classes,
                            const StatisticsSlice<T>& slice, double* dots, double* sq_norms);
  // Adds contiguous numbers to sums [count].
  void (*accumulate[4])(const void* source, int64_t count, double* sums);
  // Contiguous numbers of each type to T, and back.
  void (*load[4])(const void* source, int64_t count, T* out);
  void (*store[4])(const T* values, int64_t count, void* destination);
  ProductKernels<T> products;
};

struct Kernels {
  KernelsOf<float> in_float;
  KernelsOf<double> in_double;

  template <typename T>
  const KernelsOf<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return in_float;
    } else {
      return in_double;
    }
  }
};

// The kernels of the best instruction set this machine has, or of the one that the environment
// variable INTROKERNELS_CPU_CAPABILITY asks for: "avx512", "avx2" or "baseline". Throws
// std::invalid_argument (ValueError in Python) for another value or one the machine lacks.
const Kernels& kernels();

// Throws what kernels() would: to be called before threads start, which have nobody to throw to.
inline void require_kernels() { kernels(); }

template <typename T>
const ProductKernels<T>& product_kernels() {
  return kernels().of<T>().products;
}

namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace baseline {
extern const Kernels kKernels;
}

}  // namespace introkernels::cpu
