// Vectors of 64 bytes: 16 floats or 8 doubles, whatever registers the machine has.
//
// The number of lanes is the same for every instruction set, a product and a sum become one fused
// multiply-add only where multiply_add says so, and lanes are added up in one fixed order. So AVX2
// and AVX-512 give the same bits, and the baseline too where nothing is fused.
//
// This header is compiled once for each target_*.cpp. Every function is inlined, so that no code of
// one target can be called from another.
#pragma once

#include "common/inline.h"

namespace introkernels::cpu::INTROKERNELS_TARGET {

constexpr int kVectorBytes = 64;
constexpr int kParts = kVectorBytes / INTROKERNELS_REGISTER_BYTES;

template <typename T>
struct Vec {
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  static constexpr int kLanesOfPart = kLanes / kParts;
  typedef T Part __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES)));
  typedef T UnalignedPart
      __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES), aligned(1), may_alias));

  Part part[kParts];
};

using Float = Vec<float>;
using Double = Vec<double>;

// The integer as wide as T.
template <typename T>
struct IntOf {
  using type = std::conditional_t<sizeof(T) == sizeof(int32_t), int32_t, int64_t>;
};
template <typename T>
using Int = Vec<typename IntOf<T>::type>;

// make(i) for each part.
template <typename T, typename Make>
INTROKERNELS_INLINE Vec<T> from_parts(const Make& make) {
  Vec<T> result;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) result.part[i] = make(i);
  return result;
}

template <typename T>
INTROKERNELS_INLINE Vec<T> broadcast(T value) {
  return from_parts<T>([&](int) { return value - typename Vec<T>::Part{}; });
}

template <typename T>
INTROKERNELS_INLINE Vec<T> load(const T* source) {
  return from_parts<T>([&](int i) {
    return typename Vec<T>::Part(*reinterpret_cast<const typename Vec<T>::UnalignedPart*>(
        source + i * Vec<T>::kLanesOfPart));
  });
}

template <typename T>
INTROKERNELS_INLINE void store(T* destination, const Vec<T>& v) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    *reinterpret_cast<typename Vec<T>::UnalignedPart*>(destination + i * Vec<T>::kLanesOfPart) =
        v.part[i];
  }
}

// The first `count` lanes; the others are `fill`, and nothing is read for them.
template <typename T>
INTROKERNELS_INLINE Vec<T> load_first(const T* source, int64_t count, T fill) {
#if defined(INTROKERNELS_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __mmask16 lanes = __mmask16((1u << count) - 1);
    return {{__m512(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes, source))}};
  } else {
    const __mmask8 lanes = __mmask8((1u << count) - 1);
    return {{__m512d(_mm512_mask_loadu_pd(_mm512_set1_pd(fill), lanes, source))}};
  }
#else
  alignas(kVectorBytes) T lanes[Vec<T>::kLanes];
  store(lanes, broadcast(fill));
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load(lanes);
#endif
}

template <typename T>
INTROKERNELS_INLINE void store_first(T* destination, int64_t count, const Vec<T>& v) {
#if defined(INTROKERNELS_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(destination, __mmask16((1u << count) - 1), __m512(v.part[0]));
  } else {
    _mm512_mask_storeu_pd(destination, __mmask8((1u << count) - 1), __m512d(v.part[0]));
  }
#else
  alignas(kVectorBytes) T lanes[Vec<T>::kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) destination[i] = lanes[i];
#endif
}

#define INTROKERNELS_OPERATOR(op)                                            \
  template <typename T>                                                      \
  INTROKERNELS_INLINE Vec<T> operator op(const Vec<T>& a, const Vec<T>& b) { \
    return from_parts<T>([&](int i) { return a.part[i] op b.part[i]; });     \
  }
INTROKERNELS_OPERATOR(+)
INTROKERNELS_OPERATOR(-)
INTROKERNELS_OPERATOR(*)
#undef INTROKERNELS_OPERATOR

// a * b + c, rounded once where the target can.
template <typename T>
INTROKERNELS_INLINE typename Vec<T>::Part multiply_add_part(typename Vec<T>::Part a,
                                                            typename Vec<T>::Part b,
                                                            typename Vec<T>::Part c) {
#if defined(INTROKERNELS_AVX512)
  if constexpr (sizeof(T) == sizeof(float)) return _mm512_fmadd_ps(a, b, c);
  if constexpr (sizeof(T) == sizeof(double)) return _mm512_fmadd_pd(a, b, c);
#elif defined(INTROKERNELS_AVX2)
  if constexpr (sizeof(T) == sizeof(float)) return _mm256_fmadd_ps(a, b, c);
  if constexpr (sizeof(T) == sizeof(double)) return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

template <typename T>
INTROKERNELS_INLINE Vec<T> multiply_add(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c) {
  return from_parts<T>(
      [&](int i) { return multiply_add_part<T>(a.part[i], b.part[i], c.part[i]); });
}

template <typename T>
INTROKERNELS_INLINE Vec<T>& operator+=(Vec<T>& a, const Vec<T>& b) {
  a = a + b;
  return a;
}

// All bits of a lane where it holds, none where not; false where one side is NaN.
#define INTROKERNELS_COMPARISON(op)                                          \
  template <typename T>                                                      \
  INTROKERNELS_INLINE Int<T> operator op(const Vec<T>& a, const Vec<T>& b) { \
    using Mask = Int<T>;                                                     \
    return from_parts<typename IntOf<T>::type>(                              \
        [&](int i) { return typename Mask::Part(a.part[i] op b.part[i]); }); \
  }
INTROKERNELS_COMPARISON(<)
INTROKERNELS_COMPARISON(>)
INTROKERNELS_COMPARISON(==)
#undef INTROKERNELS_COMPARISON

template <typename T>
INTROKERNELS_INLINE Vec<T> select(const Int<T>& mask, const Vec<T>& yes, const Vec<T>& no) {
  return from_parts<T>([&](int i) { return mask.part[i] ? yes.part[i] : no.part[i]; });
}

// The second where one is NaN.
template <typename T>
INTROKERNELS_INLINE Vec<T> max(const Vec<T>& a, const Vec<T>& b) {
#if defined(INTROKERNELS_AVX512)
  if constexpr (std::is_same_v<T, float>) return {{_mm512_max_ps(a.part[0], b.part[0])}};
  if constexpr (std::is_same_v<T, double>) return {{_mm512_max_pd(a.part[0], b.part[0])}};
#elif defined(INTROKERNELS_AVX2)
  return from_parts<T>([&](int i) {
    if constexpr (std::is_same_v<T, float>) return _mm256_max_ps(a.part[i], b.part[i]);
    if constexpr (std::is_same_v<T, double>) return _mm256_max_pd(a.part[i], b.part[i]);
  });
#else
  return select(a > b, a, b);
#endif
}

// Lanes are added in pairs that lie half a vector apart, and so on.
template <typename T>
INTROKERNELS_INLINE T sum_of_lanes(const Vec<T>& v) {
#if defined(INTROKERNELS_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    const __m256 eight =
        _mm256_add_ps(_mm512_castps512_ps256(v.part[0]), _mm512_extractf32x8_ps(v.part[0], 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
#endif
  alignas(kVectorBytes) T lanes[Vec<T>::kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = Vec<T>::kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <typename T>
INTROKERNELS_INLINE T max_of_lanes(const Vec<T>& v) {
  alignas(kVectorBytes) T lanes[Vec<T>::kLanes];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = Vec<T>::kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// Lanes 0, 1, 2, ... as numbers.
template <typename T>
INTROKERNELS_INLINE Vec<T> iota() {
  alignas(kVectorBytes) T lanes[Vec<T>::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < Vec<T>::kLanes; ++i) lanes[i] = T(i);
  return load(lanes);
}

// The lower (kUpper = 0) or upper half of the lanes, in double.
template <int kUpper>
INTROKERNELS_INLINE Double half_in_double(const Float& v) {
#if defined(INTROKERNELS_AVX512)
  return {{_mm512_cvtps_pd(_mm512_extractf32x8_ps(v.part[0], kUpper))}};
#elif defined(INTROKERNELS_AVX2)
  return {{_mm256_cvtps_pd(_mm256_extractf128_ps(v.part[kUpper], 0)),
           _mm256_cvtps_pd(_mm256_extractf128_ps(v.part[kUpper], 1))}};
#else
  typedef float Narrow __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES / 2)));
  Narrow narrow[2 * kParts];
  __builtin_memcpy(narrow, &v, sizeof(v));
  return from_parts<double>(
      [&](int i) { return __builtin_convertvector(narrow[kUpper * kParts + i], Double::Part); });
#endif
}

INTROKERNELS_INLINE Float in_float(const Double& lower, const Double& upper) {
#if defined(INTROKERNELS_AVX512)
  return {{_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(lower.part[0])),
                              _mm512_cvtpd_ps(upper.part[0]), 1)}};
#elif defined(INTROKERNELS_AVX2)
  return {{_mm256_set_m128(_mm256_cvtpd_ps(lower.part[1]), _mm256_cvtpd_ps(lower.part[0])),
           _mm256_set_m128(_mm256_cvtpd_ps(upper.part[1]), _mm256_cvtpd_ps(upper.part[0]))}};
#else
  typedef float Narrow __attribute__((vector_size(INTROKERNELS_REGISTER_BYTES / 2)));
  Narrow narrow[2 * kParts];
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    narrow[i] = __builtin_convertvector(lower.part[i], Narrow);
    narrow[kParts + i] = __builtin_convertvector(upper.part[i], Narrow);
  }
  Float v;
  __builtin_memcpy(&v, narrow, sizeof(v));
  return v;
#endif
}

}  // namespace introkernels::cpu::INTROKERNELS_TARGET
