#if defined(__x86_64__)

#include <immintrin.h>

namespace dualdiff::avx512 {
// runs on any processor: before the target is set
bool available() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace dualdiff::avx512

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define DUALDIFF_LEVEL avx512
#define DUALDIFF_BITS 512
#include "level.h"

#endif
