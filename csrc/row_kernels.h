// The passes between matrix products: each reads its operands once and writes its result once.
// Rows are channels; sums, statistics and gates are in fp32.
#pragma once

#include "vector.h"

namespace dualdiff::DUALDIFF_LEVEL {

// sums [2, channels]: sums and sums of squares over the positions of a block.
template <class Element>
void block_moments_of(const GroupNorm& g, int64_t row, int64_t block, float* sums) {
    int64_t first = block * POSITION_BLOCK, last = least(first + POSITION_BLOCK, g.positions);
    const Element* input = static_cast<const Element*>(g.input);
    const Element* from = input + (row * g.positions + first) * g.channels;
    memset(sums, 0, 2 * g.channels * sizeof(float));
    // four positions per visit of the sums, which are in memory
    for (int64_t remaining = last - first; remaining > 0; remaining -= 4, from += 4 * g.channels) {
        for_vectors(g.channels, [&](int64_t channel, auto lanes) {
            Floats sum = load(sums + channel, lanes);
            Floats square = load(sums + g.channels + channel, lanes);
            for (int64_t i = 0; i < 4 && i < remaining; ++i) {
                Floats x = load(from + i * g.channels + channel, lanes);
                sum += x;
                square = multiply_add(x, x, square);
            }
            store(sums + channel, sum, lanes);
            store(sums + g.channels + channel, square, lanes);
        });
    }
}

// out = silu(input * scale + shift) at the positions of a block; scale and shift [channels].
template <class Element>
void scale_shift_silu_of(const GroupNorm& g, int64_t row, int64_t block, const float* scale,
                         const float* shift) {
    int64_t first = block * POSITION_BLOCK, last = least(first + POSITION_BLOCK, g.positions);
    for (int64_t position = first; position < last; ++position) {
        int64_t offset = (row * g.positions + position) * g.channels;
        const Element* from = static_cast<const Element*>(g.input) + offset;
        Element* to = static_cast<Element*>(g.out) + offset;
        for_vectors(g.channels, [&](int64_t channel, auto lanes) {
            Floats y = multiply_add(load(from + channel, lanes), load(scale + channel, lanes),
                                    load(shift + channel, lanes));
            store(to + channel, y * sigmoid<EXP2_DEGREE<Element>>(y), lanes);
        });
    }
}

struct Moments {
    // the second is the reciprocal of the standard deviation
    float mean, rstd;
};

// from [channels]
template <class Element>
Moments moments_of(const Element* from, int64_t channels, float eps) {
    Floats sum{}, square{};
    for_vectors(channels, [&](int64_t channel, auto lanes) { sum += load(from + channel, lanes); });
    float mean = sum_of_lanes(sum) / channels;
    for_vectors(channels, [&](int64_t channel, auto lanes) {
        Floats centred = load(from + channel, lanes) - splat(mean);
        // what a part leaves out loads as zero, not as the mean
        square = multiply_add(centred, zero_outside(centred, lanes), square);
    });
    return {mean, 1.0f / __builtin_sqrtf(sum_of_lanes(square) / channels + eps)};
}

// One row of both branches, normalised on the fly.
template <class Element>
struct NormedPair {
    const Element* input[2];  // [channels] each
    Moments moments[2];

    NormedPair(const Exchange& e, int64_t row) {
        for (int branch = 0; branch < 2; ++branch)
            input[branch] =
                static_cast<const Element*>(e.input) + branch * e.branch_stride + row * e.channels;
    }

    template <class Lanes>
    Floats at(int branch, int64_t channel, Lanes lanes) const {
        Moments m = moments[branch];
        return (load(input[branch] + channel, lanes) - m.mean) * m.rstd;
    }
};

template <class Element>
void normalise_difference_of(const Exchange& e, int64_t row) {
    NormedPair<Element> pair(e, row);
    for (int branch = 0; branch < 2; ++branch)
        pair.moments[branch] = moments_of(pair.input[branch], e.channels, e.eps);
    memcpy(e.moments + 4 * row, pair.moments, sizeof pair.moments);
    Element* difference = static_cast<Element*>(e.difference) + row * e.channels;
    for_vectors(e.channels, [&](int64_t channel, auto lanes) {
        store(difference + channel, pair.at(0, channel, lanes) - pair.at(1, channel, lanes), lanes);
    });
}

template <class Element>
void mix_of(const Exchange& e, int64_t row) {
    NormedPair<Element> pair(e, row);
    memcpy(pair.moments, e.moments + 4 * row, sizeof pair.moments);
    const Element* projected = static_cast<const Element*>(e.projected) + row * e.channels;

    Floats scores[2] = {};
    for_vectors(e.channels, [&](int64_t channel, auto lanes) {
        Floats own = pair.at(0, channel, lanes), other = pair.at(1, channel, lanes);
        // lanes left out have no weight and no bias
        Floats weight = load(projected + channel, lanes);
        // m·d, the same for both branches
        Floats offset = (own - other) * load(e.gate_bias + channel, lanes);
        scores[0] += multiply_add(own, weight, offset);
        scores[1] += multiply_add(other, weight, offset);
    });
    Floats gates[2];
    for (int branch = 0; branch < 2; ++branch)
        gates[branch] = sigmoid<6>(splat(sum_of_lanes(scores[branch])));

    Element* mixed = static_cast<Element*>(e.mixed) + row * e.channels;
    for_vectors(e.channels, [&](int64_t channel, auto lanes) {
        Floats other = pair.at(1, channel, lanes);
        Floats difference = pair.at(0, channel, lanes) - other;
        for (int branch = 0; branch < 2; ++branch)
            store(mixed + branch * e.count * e.channels + channel,
                  multiply_add(gates[branch], difference, other), lanes);
    });
}

template <class Element>
void add_of(const Exchange& e, int64_t row) {
    for (int branch = 0; branch < 2; ++branch) {
        int64_t outer = branch * e.branch_stride + row * e.channels;
        const Element* input = static_cast<const Element*>(e.input) + outer;
        const Element* residual = static_cast<const Element*>(e.residual) + outer;
        const Element* product =
            static_cast<const Element*>(e.product) + (branch * e.count + row) * e.channels;
        Element* out = static_cast<Element*>(e.out) + outer;
        for_vectors(e.channels, [&](int64_t channel, auto lanes) {
            Floats sum = load(product + channel, lanes) + load(residual + channel, lanes);
            store(out + channel, sum + load(input + channel, lanes), lanes);
        });
    }
}

// The product is of x̂_0 - x̂_1: branch 0 moves against it.
template <class Element>
void add_merged_of(const Exchange& e, int64_t row) {
    for (int branch = 0; branch < 2; ++branch) {
        int64_t outer = branch * e.branch_stride + row * e.channels;
        const Element* input = static_cast<const Element*>(e.input) + outer;
        const Element* residual = static_cast<const Element*>(e.residual) + outer;
        const Element* product =
            static_cast<const Element*>(e.product) + (2 * row + branch) * e.channels;
        Element* out = static_cast<Element*>(e.out) + outer;
        Floats sign = splat(branch ? 1.0f : -1.0f);
        for_vectors(e.channels, [&](int64_t channel, auto lanes) {
            Floats sum = multiply_add(sign, load(product + channel, lanes),
                                      load(residual + channel, lanes));
            store(out + channel, sum + load(input + channel, lanes), lanes);
        });
    }
}

// scores = queries times the mean key of their row, at the positions of a block
template <class Element>
void mean_scores_of(const Alignment& a, int64_t block) {
    constexpr int64_t AT_ONCE = 4;
    int64_t of_row = a.pairs * a.positions, first = block * POSITION_BLOCK;
    int64_t last = least(first + POSITION_BLOCK, a.all_positions());
    for (int64_t at = first; at < last; at += AT_ONCE) {
        const Element *query[AT_ONCE], *key[AT_ONCE];
        for (int64_t i = 0; i < AT_ONCE; ++i) {
            // those beyond the end are computed again and not kept
            int64_t position = least(at + i, last - 1);
            query[i] = static_cast<const Element*>(a.query) + position * a.channels;
            key[i] = static_cast<const Element*>(a.mean_key) + position / of_row * a.channels;
        }
        Floats sums[AT_ONCE] = {};
        for_vectors(a.channels, [&](int64_t channel, auto lanes) {
            for (int64_t i = 0; i < AT_ONCE; ++i)
                sums[i] = multiply_add(load(query[i] + channel, lanes),
                                       load(key[i] + channel, lanes), sums[i]);
        });
        for (int64_t i = 0; i < AT_ONCE && at + i < last; ++i)
            a.scores[at + i] = sum_of_lanes(sums[i]) * float(a.score_scale);
    }
}

inline void block_moments(const GroupNorm& g, int64_t row, int64_t block, float* sums) {
    (g.bf16 ? block_moments_of<Bf16> : block_moments_of<float>)(g, row, block, sums);
}

inline void scale_shift_silu(const GroupNorm& g, int64_t row, int64_t block, const float* scale,
                             const float* shift) {
    (g.bf16 ? scale_shift_silu_of<Bf16> : scale_shift_silu_of<float>)(g, row, block, scale, shift);
}

inline void normalise_difference(const Exchange& e, int64_t row) {
    (e.bf16 ? normalise_difference_of<Bf16> : normalise_difference_of<float>)(e, row);
}

inline void mix(const Exchange& e, int64_t row) { (e.bf16 ? mix_of<Bf16> : mix_of<float>)(e, row); }

inline void add(const Exchange& e, int64_t row) { (e.bf16 ? add_of<Bf16> : add_of<float>)(e, row); }

inline void add_merged(const Exchange& e, int64_t row) {
    (e.bf16 ? add_merged_of<Bf16> : add_merged_of<float>)(e, row);
}

inline void mean_scores(const Alignment& a, int64_t block) {
    (a.bf16 ? mean_scores_of<Bf16> : mean_scores_of<float>)(a, block);
}

}  // namespace dualdiff::DUALDIFF_LEVEL
