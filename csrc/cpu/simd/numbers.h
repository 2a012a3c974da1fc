// The number types of tensors, converted in registers: 16 of any type as a vector of float, and
// back with one rounding to nearest even.
#pragma once

#include "cpu/simd/vec.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

// 16-bit numbers as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

using Bits = Vec<uint32_t>;

INTROKERNELS_INLINE Bits load_bits(const void* source) {
#if defined(INTROKERNELS_AVX512)
  return {
      {Bits::Part(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(source))))}};
#elif defined(INTROKERNELS_AVX2)
  const auto* const halves = static_cast<const __m128i*>(source);
  return {{Bits::Part(_mm256_cvtepu16_epi32(_mm_loadu_si128(halves))),
           Bits::Part(_mm256_cvtepu16_epi32(_mm_loadu_si128(halves + 1)))}};
#else
  typedef uint16_t Narrow __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES / 2)));
  Narrow narrow[kParts];
  __builtin_memcpy(narrow, source, sizeof(narrow));
  return from_parts<uint32_t>(
      [&](int i) { return __builtin_convertvector(narrow[i], Bits::Part); });
#endif
}

INTROKERNELS_INLINE void store_bits(const Bits& bits, void* destination) {
#if defined(INTROKERNELS_AVX512)
  _mm256_storeu_si256(static_cast<__m256i*>(destination),
                      _mm512_cvtepi32_epi16(__m512i(bits.part[0])));
#else
  typedef uint16_t Narrow __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES / 2)));
  Narrow narrow[kParts];
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) narrow[i] = __builtin_convertvector(bits.part[i], Narrow);
  __builtin_memcpy(destination, narrow, sizeof(narrow));
#endif
}

INTROKERNELS_INLINE Float as_float(const Bits& bits) {
  return from_parts<float>([&](int i) { return Float::Part(bits.part[i]); });
}

INTROKERNELS_INLINE Bits as_bits(const Float& v) {
  return from_parts<uint32_t>([&](int i) { return Bits::Part(v.part[i]); });
}

template <typename Make>
INTROKERNELS_INLINE Bits bits_from(const Bits& bits, const Make& make) {
  return from_parts<uint32_t>([&](int i) { return make(bits.part[i]); });
}

INTROKERNELS_INLINE Float load_floats(const float* source) { return load(source); }

INTROKERNELS_INLINE Float load_floats(const BFloat16* source) {
  return as_float(bits_from(load_bits(source), [](auto b) { return b << 16; }));
}

INTROKERNELS_INLINE Float load_floats(const Float16* source) {
#if defined(INTROKERNELS_AVX512)
  return {{_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))}};
#elif defined(INTROKERNELS_AVX2)
  return from_parts<float>([&](int i) {
    return Float::Part(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source) + i)));
  });
#else
  const Bits half = load_bits(source);
  // As if the exponent were float's: too small by 2^112, exactly, also for subnormal numbers.
  const Bits magnitude = bits_from(half, [](auto b) { return (b & 0x7fffU) << 13; });
  const Float finite = as_float(magnitude) * broadcast(0x1p112F);
  return from_parts<float>([&](int i) {
    const auto sign = (half.part[i] & 0x8000U) << 16;
    const auto is_special = magnitude.part[i] >= (0x7c00U << 13);
    const auto special = magnitude.part[i] | 0x7f800000U;
    const auto value = is_special ? special : Bits::Part(finite.part[i]);
    return Float::Part(value | sign);
  });
#endif
}

INTROKERNELS_INLINE Float load_floats(const double* source) {
  return in_float(load(source), load(source + Double::kLanes));
}

INTROKERNELS_INLINE void store_floats(const Float& v, float* destination) { store(destination, v); }

INTROKERNELS_INLINE void store_floats(const Float& v, BFloat16* destination) {
  store_bits(bits_from(as_bits(v),
                       [](auto b) {
                         const auto rounded = (b + 0x7fffU + ((b >> 16) & 1U)) >> 16;
                         const auto is_nan = (b & 0x7fffffffU) > 0x7f800000U;
                         return is_nan ? (b >> 16) | 0x0040U : rounded;
                       }),
             destination);
}

INTROKERNELS_INLINE void store_floats(const Float& v, Float16* destination) {
#if defined(INTROKERNELS_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination),
                      _mm512_cvtps_ph(v.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(INTROKERNELS_AVX2)
#pragma GCC unroll 2
  for (int i = 0; i < kParts; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(destination) + i,
                     _mm256_cvtps_ph(v.part[i], _MM_FROUND_TO_NEAREST_INT));
  }
#else
  const Bits magnitude = bits_from(as_bits(v), [](auto b) { return b & 0x7fffffffU; });
  // Adding 1/2 rounds a number below 2^-14 to a multiple of 2^-24, the step of subnormal numbers.
  const Bits subnormal = as_bits(as_float(magnitude) + broadcast(0.5F));
  store_bits(from_parts<uint32_t>([&](int i) {
               const auto m = magnitude.part[i];
               const auto sign = (as_bits(v).part[i] >> 16) & 0x8000U;
               const auto normal = (m - (112U << 23) + 0xfffU + ((m >> 13) & 1U)) >> 13;
               const auto small = m < 0x38800000U ? subnormal.part[i] - 0x3f000000U : normal;
               const auto finite = m > 0x47800000U ? Bits::Part{} + 0x7c00U : small;
               return (m > 0x7f800000U ? Bits::Part{} + 0x7e00U : finite) | sign;
             }),
             destination);
#endif
}

// The first `count` numbers, the others 0.
template <typename Number>
INTROKERNELS_INLINE Float load_first_floats(const Number* source, int64_t count) {
  if constexpr (std::is_same_v<Number, float>) {
    return load_first(source, count, 0.0F);
  } else {
    alignas(kVectorBytes) Number padded[Float::kLanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = source[i];
    return load_floats(padded);
  }
}

template <typename Number>
INTROKERNELS_INLINE void store_first_floats(const Float& v, int64_t count, Number* destination) {
  alignas(kVectorBytes) Number all[Float::kLanes];
  store_floats(v, all);
  for (int64_t i = 0; i < count; ++i) destination[i] = all[i];
}

// The first `count` numbers of any type as a vector of T, the others 0.
template <typename T, typename Number>
INTROKERNELS_INLINE Vec<T> load_first_as(const Number* source, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return load_first_floats(source, count);
  } else if constexpr (std::is_same_v<Number, double>) {
    return load_first(source, count, 0.0);
  } else {
    return half_in_double<0>(load_first_floats(source, count));
  }
}

// A vector of T from any type.
template <typename T, typename Number>
INTROKERNELS_INLINE Vec<T> load_as(const Number* source) {
  if constexpr (std::is_same_v<T, float>) {
    return load_floats(source);
  } else if constexpr (std::is_same_v<Number, double>) {
    return load(source);
  } else {
    return load_first_as<T>(source, Vec<T>::kLanes);
  }
}

// visit(d, rest, v) for `count` numbers of any type in double; `rest` of them are left from d on.
template <typename Number, typename Visit>
INTROKERNELS_INLINE void for_each_double(const Number* source, int64_t count, const Visit& visit) {
  constexpr int64_t kLanes = Double::kLanes;
  if constexpr (std::is_same_v<Number, double>) {
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) visit(d, kLanes, load(source + d));
    if (d < count) visit(d, count - d, load_first(source + d, count - d, 0.0));
  } else {
    for (int64_t d = 0; d < count; d += Float::kLanes) {
      const int64_t rest = count - d;
      const Float v =
          rest >= Float::kLanes ? load_floats(source + d) : load_first_floats(source + d, rest);
      visit(d, rest, half_in_double<0>(v));
      if (rest > kLanes) visit(d + kLanes, rest - kLanes, half_in_double<1>(v));
    }
  }
}

template <typename T, typename Number>
void load_row(const void* source, int64_t count, T* out) {
  const Number* const numbers = static_cast<const Number*>(source);
  if constexpr (std::is_same_v<T, double>) {
    for_each_double(numbers, count,
                    [&](int64_t d, int64_t rest, const Double& v) __attribute__((always_inline)) {
                      if (rest >= Double::kLanes) {
                        store(out + d, v);
                      } else {
                        store_first(out + d, rest, v);
                      }
                    });
  } else {
    int64_t d = 0;
    for (; d + Float::kLanes <= count; d += Float::kLanes) store(out + d, load_floats(numbers + d));
    if (d < count) store_first(out + d, count - d, load_first_floats(numbers + d, count - d));
  }
}

template <typename Number>
void store_row(const float* values, int64_t count, void* destination) {
  Number* const out = static_cast<Number*>(destination);
  int64_t d = 0;
  for (; d + Float::kLanes <= count; d += Float::kLanes) store_floats(load(values + d), out + d);
  if (d < count) store_first_floats(load_first(values + d, count - d, 0.0F), count - d, out + d);
}

template <typename Number>
void store_row(const double* values, int64_t count, void* destination) {
  if constexpr (std::is_same_v<Number, double>) {
    __builtin_memcpy(destination, values, size_t(count) * sizeof(double));
  } else {
    Number* const out = static_cast<Number*>(destination);
    int64_t d = 0;
    for (; d + Float::kLanes <= count; d += Float::kLanes) {
      store_floats(load_floats(values + d), out + d);
    }
    if (d < count) {
      store_first_floats(load_first_floats(values + d, count - d), count - d, out + d);
    }
  }
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
