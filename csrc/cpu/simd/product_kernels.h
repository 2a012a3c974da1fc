// The inner loops of matrix products; see cpu/product_kernels.h. Included once for each instruction
// set, which INTROKERNELS_TARGET names and whose registers hold INTROKERNELS_REGISTER_BYTES.
#pragma once

#include "common/inline.h"
#include "cpu/product_kernels.h"
#include "cpu/simd/vec.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

template <typename T>
struct Registers {
  typedef T Value __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES)));
  typedef T Unaligned
      __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int kLanes = INTROKERNELS_REGISTER_BYTES / int(sizeof(T));
};

template <typename T>
using Register = typename Registers<T>::Value;

template <typename T>
INTROKERNELS_INLINE Register<T> load_register(const T* source) {
  return *reinterpret_cast<const typename Registers<T>::Unaligned*>(source);
}

template <typename T>
INTROKERNELS_INLINE void store_register(T* destination, Register<T> value) {
  *reinterpret_cast<typename Registers<T>::Unaligned*>(destination) = value;
}

// A tile is two registers wide. With 32 registers it may be 14 rows tall, with 16 six: its sums,
// two registers of the panel and one number of a.
#if defined(INTROKERNELS_AVX512)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif

template <typename T>
constexpr int kTileColumns = 2 * Registers<T>::kLanes;

template <typename T, int kRows>
void multiply(const T* a, const T* panel, int64_t depth, T* out, int64_t out_stride,
              bool accumulate) {
  constexpr int kLanes = Registers<T>::kLanes;
  Register<T> sums[kRows][2] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    __builtin_prefetch(out + i * out_stride, 1);
    __builtin_prefetch(out + i * out_stride + kLanes, 1);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Register<T> left = load_register(panel + k * kTileColumns<T>);
    const Register<T> right = load_register(panel + k * kTileColumns<T> + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Register<T> factor = a[i * kRowStride + k] - Register<T>{};
      sums[i][0] = multiply_add_part<T>(factor, left, sums[i][0]);
      sums[i][1] = multiply_add_part<T>(factor, right, sums[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      T* const destination = out + i * out_stride + j * kLanes;
      const Register<T> before = accumulate ? load_register(destination) : Register<T>{};
      store_register(destination, before + sums[i][j]);
    }
  }
}

// The numbers of two registers in turn, from their lower (kUpper = 0) or upper halves.
template <typename T, int kUpper>
INTROKERNELS_INLINE Register<T> interleave(Register<T> a, Register<T> b) {
  constexpr int kLanes = Registers<T>::kLanes;
  using Index = std::conditional_t<sizeof(T) == sizeof(float), int32_t, int64_t>;
  // Constant once unrolled: a single shuffle.
  Register<Index> source;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    source[i] = kUpper * (kLanes / 2) + i / 2 + (i % 2) * kLanes;
  }
#if defined(__clang__)
  Register<T> result;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) result[i] = i % 2 == 0 ? a[source[i]] : b[source[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, source);
#endif
}

// Interleaving rows i and i + n/2 of a square of n x n numbers rotates the bits of the position
// (row, column) by one; after log2(n) times rows and columns have changed places.
template <typename T>
INTROKERNELS_INLINE void transpose_square(Register<T>* rows) {
  constexpr int kLanes = Registers<T>::kLanes;
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {
    Register<T> next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<T, 0>(rows[i], rows[i + kLanes / 2]);
      next[2 * i + 1] = interleave<T, 1>(rows[i], rows[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

template <typename T>
void transpose(const T* const* rows, int64_t depth, T* out, int64_t out_stride) {
  constexpr int kLanes = Registers<T>::kLanes;
  for (int n = 0; n < kTileColumns<T>; n += kLanes) {
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      Register<T> square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load_register(rows[n + i] + k);
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_register(out + (k + i) * out_stride + n, square[i]);
    }
    for (; k < depth; ++k) {
      for (int i = 0; i < kLanes; ++i) out[k * out_stride + n + i] = rows[n + i][k];
    }
  }
}

template <typename T>
void copy_to_panels(const T* row, int64_t width, T* panels) {
  constexpr int kLanes = Registers<T>::kLanes;
  int64_t n = 0;
  for (; n + kTileColumns<T> <= width; n += kTileColumns<T>, panels += kDepth * kTileColumns<T>) {
    store_register(panels, load_register(row + n));
    store_register(panels + kLanes, load_register(row + n + kLanes));
  }
  for (int64_t rest = 0; n < width && rest < kTileColumns<T>; ++rest) {
    panels[rest] = n + rest < width ? row[n + rest] : T(0);
  }
}

template <typename T>
void square(const T* values, int64_t count, const T scale[2], T* squares) {
  const T first = scale[0], second = scale[1];
  for (int64_t i = 0; i < count; ++i) {
    const T scaled = values[i] * first * second;
    squares[i] = scaled * scaled;
  }
}

template <typename T>
void square_and_weigh(const T* values, const T* factors, int64_t count, const T scale[2],
                      T factor_scale, T* __restrict squares, T* __restrict weighted) {
  const T first = scale[0], second = scale[1];
  for (int64_t i = 0; i < count; ++i) {
    const T scaled = values[i] * first * second;
    squares[i] = scaled * scaled;
    weighted[i] = scaled * scaled * (factors[i] * factor_scale);
  }
}

// Without functions of the standard library, which the linker would share with other targets.
template <typename T>
T largest(const T* values, int64_t count) {
  constexpr int kLanes = 4 * Registers<T>::kLanes;
  T lanes[kLanes] = {};
  const auto take = [&](T value, int lane) {
    const T size = value < T(0) ? -value : value;
    lanes[lane] = size > lanes[lane] ? size : lanes[lane];
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) take(values[i + lane], lane);
  }
  for (; i < count; ++i) take(values[i], 0);
  for (int lane = 1; lane < kLanes; ++lane) take(lanes[lane], 0);
  return lanes[0];
}

template <typename T, int... kRows>
constexpr ProductKernels<T> product_table(std::integer_sequence<int, kRows...>) {
  return {kTileRows,           kTileColumns<T>,   {nullptr, multiply<T, kRows + 1>...},
          transpose<T>,        copy_to_panels<T>, square<T>,
          square_and_weigh<T>, largest<T>};
}

template <typename T>
constexpr ProductKernels<T> product_table() {
  return product_table<T>(std::make_integer_sequence<int, kTileRows>());
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
