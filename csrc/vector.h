// Vectors of fp32 for the level being compiled, on GCC's vector types.
//
// A level defines DUALDIFF_LEVEL, its namespace, so that no code compiled for one processor can be
// linked into another's path; for the same reason nothing here comes from the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace dualdiff::DUALDIFF_LEVEL {

// COLUMNS vectors by TILE_ROWS rows of accumulators fill the registers of the level
#if DUALDIFF_BITS == 512
constexpr int WIDTH = 16, COLUMNS = 4, TILE_ROWS = 6;
#elif DUALDIFF_BITS == 256
constexpr int WIDTH = 8, COLUMNS = 2, TILE_ROWS = 6;
#else
constexpr int WIDTH = 4, COLUMNS = 2, TILE_ROWS = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

inline Floats splat(float value) { return value - Floats{}; }
inline Ints splat(int32_t value) { return value - Ints{}; }

inline Floats load(const float* from) {
    Floats out;
    memcpy(&out, from, sizeof out);
    return out;
}

inline Floats load(const Bf16* from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return Floats(__builtin_convertvector(halves, Ints) << 16);
}

inline void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }

// rounded to nearest even; NaN stays NaN
inline Halves to_bf16(Floats value) {
#if DUALDIFF_HAS_BF16_PRODUCT
    return Halves(_mm512_cvtneps_pbh(value));
#else
    Ints bits = Ints(value);
    Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Ints kept = value == value ? rounded : splat(int32_t(0x7fc0));
    return __builtin_convertvector(kept, Halves);
#endif
}

inline void store(Bf16* to, Floats value) {
    Halves halves = to_bf16(value);
    memcpy(to, &halves, sizeof halves);
}

// How many lanes of memory an access touches: all, or the first `count`; the others load as zero.
struct Whole {};
struct Part {
    int64_t count;
};

template <class Element>
inline Floats load(const Element* from, Whole) {
    return load(from);
}

template <class Element>
inline Floats load(const Element* from, Part part) {
    Element lanes[WIDTH] = {};
    for (int64_t lane = 0; lane < part.count; ++lane) lanes[lane] = from[lane];
    return load(lanes);
}

template <class Element>
inline void store(Element* to, Floats value, Whole) {
    store(to, value);
}

template <class Element>
inline void store(Element* to, Floats value, Part part) {
    Element lanes[WIDTH];
    store(lanes, value);
    for (int64_t lane = 0; lane < part.count; ++lane) to[lane] = lanes[lane];
}

inline Floats zero_outside(Floats value, Whole) { return value; }
inline Floats zero_outside(Floats value, Part part) {
    for (int64_t lane = part.count; lane < WIDTH; ++lane) value[lane] = 0;
    return value;
}

// Calls act(first, lanes) for every vector of an array, the last one perhaps a part.
template <class Act>
inline void for_vectors(int64_t count, const Act& act) {
    int64_t first = 0;
    for (; first + WIDTH <= count; first += WIDTH) act(first, Whole{});
    if (first < count) act(first, Part{count - first});
}

// contracted to one instruction where the level has it
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// when either is NaN, b: a bound goes first, so that a NaN passes it
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

inline float sum_of_lanes(Floats value) {
    float lanes[WIDTH];
    store(lanes, value);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

constexpr float LOG2_E = 1.44269504088896341f;

// Minimax polynomials of 2^x on [-1/2, 1/2], constant first, with their relative errors.
template <int DEGREE>
struct Exp2;

// 1.9e-9, for fp32
template <>
struct Exp2<6> {
    static constexpr float coefficients[] = {1.0f,           0.693147182f,   0.240226462f,
                                             0.0555032864f,  0.00961848907f, 0.00133999309f,
                                             0.000153458212f};
};

// 2.6e-6, for what is rounded to bf16 (half a unit in its last place is 2e-3)
template <>
struct Exp2<4> {
    static constexpr float coefficients[] = {0.999999285f, 0.693121791f, 0.240247443f,
                                             0.0559178591f, 0.00957010221f};
};

template <class Element>
constexpr int EXP2_DEGREE = 6;
template <>
constexpr int EXP2_DEGREE<Bf16> = 4;

template <int DEGREE>
inline Floats exp2_of_fraction(Floats x) {
    Floats power = splat(Exp2<DEGREE>::coefficients[DEGREE]);
    for (int term = DEGREE - 1; term >= 0; --term)
        power = multiply_add(power, x, splat(Exp2<DEGREE>::coefficients[term]));
    return power;
}

// 2^x. NaN stays. Without the instructions, x is brought into [-125, 126] first.
template <int DEGREE>
inline Floats exp2(Floats x) {
#if DUALDIFF_BITS == 512
    Floats fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_of_fraction<DEGREE>(fraction), x - fraction);
#else
    x = minimum(splat(126.0f), maximum(splat(-125.0f), x));
    // adding 1.5 * 2^23 leaves round(x) in the low bits: they move to the exponent
    Floats shifted = x + 12582912.0f;
    Floats fraction = x - (shifted - 12582912.0f);
    return Floats(Ints(exp2_of_fraction<DEGREE>(fraction)) + (Ints(shifted) << 23));
#endif
}

template <int DEGREE>
inline Floats sigmoid(Floats x) {
    return 1.0f / (1.0f + exp2<DEGREE>(x * -LOG2_E));
}

// Exchange rows and columns of a square block.
inline void transpose(Floats (&block)[WIDTH]) {
    for (int half = 1; half < WIDTH; half *= 2) {
        Ints low, high;
        for (int lane = 0; lane < WIDTH; ++lane) {
            low[lane] = lane & half ? lane - half + WIDTH : lane;
            high[lane] = lane & half ? lane + WIDTH : lane + half;
        }
        for (int row = 0; row < WIDTH; ++row) {
            if (row & half) continue;
            Floats a = block[row], b = block[row + half];
            block[row] = __builtin_shuffle(a, b, low);
            block[row + half] = __builtin_shuffle(a, b, high);
        }
    }
}

}  // namespace dualdiff::DUALDIFF_LEVEL
