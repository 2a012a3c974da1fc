#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace introkernels::cpu {

namespace {

struct Capability {
  const char* name;
  bool (*is_supported)();
  const Kernels* kernels;
};

// The best one first.
constexpr Capability kCapabilities[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     &avx512::kKernels},
    // Every processor with AVX2 converts half precision too; only this builtin can't ask for it.
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     &avx2::kKernels},
#endif
    {"baseline", [] { return true; }, &baseline::kKernels},
};

const Capability& choose() {
  const char* const asked = std::getenv("INTROKERNELS_CPU_CAPABILITY");
  std::string allowed;
  for (const Capability& capability : kCapabilities) {
    if (!capability.is_supported()) continue;
    if (asked == nullptr || *asked == '\0' || std::string(asked) == capability.name) {
      return capability;
    }
    allowed += (allowed.empty() ? "'" : ", '") + std::string(capability.name) + "'";
  }
  throw std::invalid_argument("INTROKERNELS_CPU_CAPABILITY is '" + std::string(asked) +
                              "'; this machine allows " + allowed);
}

const Capability& chosen() {
  static const Capability& capability = choose();
  return capability;
}

}  // namespace

const Kernels& kernels() { return *chosen().kernels; }

}  // namespace introkernels::cpu

#define INTROKERNELS_EXPORT __attribute__((visibility("default")))

// The name of the instruction set in force; null where the environment asks for an impossible one,
// and then the reason.
extern "C" INTROKERNELS_EXPORT const char* introkernels_cpu_capability(char* reason, size_t size) {
  try {
    return introkernels::cpu::chosen().name;
  } catch (const std::invalid_argument& failure) {
    std::strncpy(reason, failure.what(), size - 1);
    reason[size - 1] = '\0';
    return nullptr;
  }
}
