// Numbers of 16 bits, with the bits that a GPU gives them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace emulation {

// How a sign, an exponent and kFraction bits lie in 16 bits.
struct Binary16 {
  static constexpr int kFraction = 10;
  static constexpr int kMinExponent = -14;
  static constexpr uint16_t kInfinity = 0x7C00;
};

struct BrainFloat16 {
  static constexpr int kFraction = 7;
  static constexpr int kMinExponent = -126;
  static constexpr uint16_t kInfinity = 0x7F80;
};

// A float16 as a float.
inline float widened(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7FFF;
  if (magnitude > Binary16::kInfinity) return std::bit_cast<float>(0x7FFFFFFFU);
  if (magnitude == Binary16::kInfinity) return std::bit_cast<float>(sign | 0x7F800000U);
  // As a float it has the same fraction and, subnormal or not, an exponent 112 too small.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112F;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

// The nearest number of the format, the even one of two; any NaN becomes the same.
template <typename Format>
uint16_t narrowed(double x) {
  constexpr uint16_t kNaN = 0x7FFF;
  const auto bits = std::bit_cast<uint64_t>(x);
  const auto sign = uint16_t(bits >> 48 & 0x8000);
  const int biased = int(bits >> 52 & 0x7FF);
  if (biased == 0x7FF) return x != x ? kNaN : uint16_t(sign | Format::kInfinity);
  const int exponent = std::max(biased - 1023, Format::kMinExponent);
  // Counted in units of the last place that the result has.
  const auto scale = std::bit_cast<double>(uint64_t(1023 + Format::kFraction - exponent) << 52);
  const double count = std::bit_cast<double>(bits & ~(uint64_t(1) << 63)) * scale;
  // Added to this, a number is rounded to an integer, which fills the last bits.
  const auto rounded = std::bit_cast<uint64_t>(count + 0x1p52) & 0xFFFFF;
  // A count of a whole binade carries into the exponent.
  const uint64_t magnitude =
      (uint64_t(exponent - Format::kMinExponent) << Format::kFraction) + rounded;
  return uint16_t(sign | std::min<uint64_t>(magnitude, Format::kInfinity));
}

}  // namespace emulation
