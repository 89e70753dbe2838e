#if defined(__x86_64__)

#include <immintrin.h>

namespace dualdiff::avx2 {
// runs on any processor: before the target is set
bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace dualdiff::avx2

#pragma GCC target("avx2,fma")
#define DUALDIFF_LEVEL avx2
#define DUALDIFF_BITS 256
#include "level.h"

#endif
