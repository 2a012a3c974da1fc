// Atomic operations of threads that run by turns: each answers with what was there before.
#pragma once

namespace emulation {

template <typename T>
T replaced(T* address, T value) {
  const T before = *address;
  *address = value;
  return before;
}

}  // namespace emulation

inline int atomicAdd(int* address, int value) {
  // Wraps around, as on a GPU.
  return emulation::replaced(address, int(unsigned(*address) + unsigned(value)));
}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return emulation::replaced(address, *address + value);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return emulation::replaced(address, *address + value);
}
inline float atomicAdd(float* address, float value) {
  return emulation::replaced(address, *address + value);
}
inline double atomicAdd(double* address, double value) {
  return emulation::replaced(address, *address + value);
}

#define INTROKERNELS_EMULATION_ATOMICS(T)                                                  \
  inline T atomicMax(T* address, T value) {                                                \
    return emulation::replaced(address, *address < value ? value : *address);              \
  }                                                                                        \
  inline T atomicMin(T* address, T value) {                                                \
    return emulation::replaced(address, value < *address ? value : *address);              \
  }                                                                                        \
  inline T atomicExch(T* address, T value) { return emulation::replaced(address, value); } \
  inline T atomicCAS(T* address, T compare, T value) {                                     \
    return emulation::replaced(address, *address == compare ? value : *address);           \
  }

INTROKERNELS_EMULATION_ATOMICS(int)
INTROKERNELS_EMULATION_ATOMICS(unsigned)
INTROKERNELS_EMULATION_ATOMICS(unsigned long long)

#undef INTROKERNELS_EMULATION_ATOMICS

// Counts up to the limit and starts again at 0: a ticket that resets itself.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulation::replaced(address, *address >= limit ? 0 : *address + 1);
}

// What a thread wrote is in memory at once.
inline void __threadfence() {}
inline void __threadfence_block() {}
