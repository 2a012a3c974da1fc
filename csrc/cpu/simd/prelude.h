// What the kernels use of the standard library. A target file includes this before it switches its
// instruction set on, so that no function of the library is compiled with instructions that other
// callers of it may lack.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
