#if defined(__x86_64__)

#include <immintrin.h>

namespace dualdiff::avx512 { bool available(); }

namespace dualdiff::avx512_bf16 {
// runs on any processor: before the target is set
bool available() { return avx512::available() && __builtin_cpu_supports("avx512bf16"); }
}  // namespace dualdiff::avx512_bf16

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#define DUALDIFF_LEVEL avx512_bf16
#define DUALDIFF_BITS 512
#define DUALDIFF_HAS_BF16_PRODUCT 1
#include "level.h"

#endif
