// softmax(q kᵀ / sqrt(width)) v for one head and a chunk of queries, online over blocks of keys.
//
// Lanes are queries. So the scores are [key][query]: the softmax reduces over vectors, never
// within one, its weights are already laid out for the product with the values, and neither the
// number of keys nor the width is padded to a vector. Only queries and outputs are transposed,
// once per chunk.
//
// Operands are arrays of 32-bit words along the summed dimension: one fp32 value, or, where the
// processor multiplies bf16, a pair of bf16 values.
#pragma once

#include "vector.h"

namespace dualdiff::DUALDIFF_LEVEL {

constexpr int64_t LANES = WIDTH * COLUMNS;
constexpr int64_t KEY_BLOCK = 128;
static_assert(QUERY_CHUNK % LANES == 0 && KEY_BLOCK % 2 == 0);

// Words of one fp32 value; bf16 sources are widened.
struct Single {
    static constexpr int VALUES = 1;

    static Floats multiply_add(Ints a, Ints b, Floats sum) {
        return DUALDIFF_LEVEL::multiply_add(Floats(a), Floats(b), sum);
    }

    static void pack_row(const float* from, int64_t width, uint32_t* to) {
        memcpy(to, from, width * sizeof(float));
    }
    static void pack_row(const Bf16* from, int64_t width, uint32_t* to) {
        for (int64_t i = 0; i < width; ++i) to[i] = uint32_t(from[i].bits) << 16;
    }

    static Ints join(Floats even, Floats) { return Ints(even); }

    static uint32_t bias_word(float bias) { return bits_of(bias); }
    static uint32_t token_word(float token) { return bits_of(token); }
};

#if DUALDIFF_HAS_BF16_PRODUCT
// Words of two bf16 values, the earlier one in the low half.
struct Pair {
    static constexpr int VALUES = 2;

    static Floats multiply_add(Ints a, Ints b, Floats sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }

    static void pack_row(const Bf16* from, int64_t width, uint32_t* to) {
        to[(width - 1) / 2] = 0;
        memcpy(to, from, width * sizeof(Bf16));
    }

    static Ints join(Floats even, Floats odd) {
        const Halves32 interleave = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        return Ints(
            _mm512_permutexvar_epi16((__m512i)interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
    }

    // in two halves: what the first is rounded by is in the second
    static uint32_t bias_word(float bias) {
        uint16_t high = nearest(bias);
        uint32_t widened = uint32_t(high) << 16;
        float kept;
        memcpy(&kept, &widened, sizeof kept);
        return high | uint32_t(nearest(bias - kept)) << 16;
    }
    static uint32_t token_word(float token) {
        return nearest(token) | uint32_t(nearest(token)) << 16;
    }

  private:
    static uint16_t nearest(float value) { return to_bf16(splat(value))[0]; }

    typedef uint16_t Halves32 __attribute__((vector_size(64)));
};
#endif

// tile[row][lane] = sum over steps of rows[row, step] * lanes[step][lane]
template <class Product, int HEIGHT>
inline void multiply(const uint32_t* rows, int64_t row_stride, int64_t step_stride,
                     const uint32_t* lanes, int64_t steps, Floats (&tile)[HEIGHT][COLUMNS]) {
    for (int row = 0; row < HEIGHT; ++row)
        for (int column = 0; column < COLUMNS; ++column) tile[row][column] = Floats{};
    for (int64_t step = 0; step < steps; ++step, rows += step_stride, lanes += LANES) {
        Ints columns[COLUMNS];
        for (int column = 0; column < COLUMNS; ++column)
            memcpy(&columns[column], lanes + column * WIDTH, sizeof(Ints));
        for (int row = 0; row < HEIGHT; ++row) {
            Ints value = splat(int32_t(rows[row * row_stride]));
            for (int column = 0; column < COLUMNS; ++column)
                tile[row][column] =
                    Product::multiply_add(value, columns[column], tile[row][column]);
        }
    }
}

// Calls act.template operator()<HEIGHT>(first) on tiles of TILE_ROWS and a last smaller one.
template <int HEIGHT = TILE_ROWS, class Act>
inline void for_tiles(int64_t first, int64_t count, const Act& act) {
    if constexpr (HEIGHT > 0) {
        for (; first + HEIGHT <= count; first += HEIGHT) act.template run<HEIGHT>(first);
        for_tiles<HEIGHT - 1>(first, count, act);
    }
}

// scores[key][lane], and the maximum of the block so far
template <class Product>
struct ScoreTiles {
    const uint32_t* keys;     // [KEY_BLOCK][words]
    const uint32_t* queries;  // [words][LANES]
    int64_t words;
    float* scores;     // [KEY_BLOCK][LANES]
    float* block_max;  // [LANES]

    template <int HEIGHT>
    void run(int64_t first) const {
        Floats tile[HEIGHT][COLUMNS];
        multiply<Product>(keys + first * words, words, 1, queries, words, tile);
        for (int column = 0; column < COLUMNS; ++column) {
            Floats largest = load(block_max + column * WIDTH);
            for (int row = 0; row < HEIGHT; ++row) {
                largest = maximum(largest, tile[row][column]);
                store(scores + (first + row) * LANES + column * WIDTH, tile[row][column]);
            }
            store(block_max + column * WIDTH, largest);
        }
    }
};

// accumulator[channel][lane] = alpha * accumulator + sum over keys of value * weight
template <class Product>
struct ValueTiles {
    const uint32_t* values;   // [steps][width]
    const uint32_t* weights;  // [steps][LANES]
    int64_t steps, width;
    const float* alpha;  // [LANES]
    float* accumulator;  // [width][LANES]

    template <int HEIGHT>
    void run(int64_t first) const {
        Floats tile[HEIGHT][COLUMNS];
        multiply<Product>(values + first, 1, width, weights, steps, tile);
        for (int column = 0; column < COLUMNS; ++column) {
            Floats fade = load(alpha + column * WIDTH);
            for (int row = 0; row < HEIGHT; ++row) {
                float* place = accumulator + (first + row) * LANES + column * WIDTH;
                store(place, multiply_add(load(place), fade, tile[row][column]));
            }
        }
    }
};

// One thread's memory, laid out for a shape.
struct AttentionScratch {
    int64_t words;         // of a row of queries or keys, the last of them of a bias
    int64_t padded_words;  // the same, whole transposed blocks

    uint32_t* queries;   // [blocks][padded_words][LANES]
    uint32_t* keys;      // [KEY_BLOCK][words]
    uint32_t* values;    // [KEY_BLOCK][width]
    uint32_t* weights;   // [KEY_BLOCK][LANES]; the scores before
    uint32_t* staging;   // [WIDTH][padded_words]
    float* accumulator;  // [blocks][width][LANES]
    float* running_max;  // [blocks][LANES], in base two
    float* running_sum;  // [blocks][LANES]
    float* block_max;    // [LANES], of scores as they are
    float* alpha;        // [LANES], what earlier sums are multiplied by

    uintptr_t end;

    AttentionScratch(const Attention& a, int values_per_word, uintptr_t start)
        : words((a.width + values_per_word - 1) / values_per_word + (a.bias ? 1 : 0)),
          padded_words(round_up(words, WIDTH)),
          end(start) {
        int64_t lanes = round_up(least(a.query.length, QUERY_CHUNK), LANES);
        take(queries, padded_words * lanes);
        take(keys, KEY_BLOCK * words);
        take(values, KEY_BLOCK * a.width);
        take(weights, KEY_BLOCK * LANES);
        take(staging, WIDTH * padded_words);
        take(accumulator, a.width * lanes);
        take(running_max, lanes);
        take(running_sum, lanes);
        take(block_max, LANES);
        take(alpha, LANES);
    }

  private:
    template <class Element>
    void take(Element*& place, int64_t count) {
        place = reinterpret_cast<Element*>(end);
        // arrays start on lines of their own
        end += round_up(count * sizeof(Element), 64);
    }
};

template <class Product, class Element>
class AttentionItem {
  public:
    AttentionItem(const Attention& attention, int64_t item, void* memory)
        : a(attention),
          s(attention, Product::VALUES, reinterpret_cast<uintptr_t>(memory)),
          row(item / a.chunks() / a.heads),
          source_row(row % a.source_batch),
          offset(item / a.chunks() % a.heads * a.width),
          first_query(item % a.chunks() * QUERY_CHUNK),
          queries(least(QUERY_CHUNK, a.query.length - first_query)),
          blocks((queries + LANES - 1) / LANES),
          // the softmax is taken in base two
          scale(LOG2_E / __builtin_sqrtf(float(a.width))) {}

    void run() {
        for (int64_t block = 0; block < blocks; ++block) pack_queries(block);
        memset(s.accumulator, 0, blocks * a.width * LANES * sizeof(float));
        for (int64_t lane = 0; lane < blocks * LANES; ++lane) {
            s.running_max[lane] = -__builtin_inff();
            s.running_sum[lane] = 0;
        }
        int64_t length = a.key.length + a.more_key.length;
        for (int64_t first = 0; first < length; first += KEY_BLOCK) {
            int64_t count = least(KEY_BLOCK, length - first);
            pack_keys(first, count);
            pack_values(first, count);
            for (int64_t block = 0; block < blocks; ++block) attend(block, count);
        }
        for (int64_t block = 0; block < blocks; ++block) write(block);
    }

  private:
    const Attention& a;
    AttentionScratch s;
    int64_t row, source_row, offset, first_query, queries, blocks;
    float scale;

    const Element* at(const Rows& rows, int64_t n, int64_t position) const {
        return static_cast<const Element*>(rows.data) + n * rows.batch_stride +
               position * rows.row_stride + offset;
    }

    // position in the first source, or, after its end, in the second
    const Element* joined(const Rows& one, const Rows& two, int64_t position) const {
        return position < one.length ? at(one, source_row, position)
                                     : at(two, source_row, position - one.length);
    }

    // A bias of some keys is one more channel: 1 in those keys, the bias in the queries.
    void pack_query(int64_t query, uint32_t* to) {
        Product::pack_row(at(a.query, row, query), a.width, to);
        if (a.bias) to[s.words - 1] = Product::bias_word(a.bias[row * a.query.length + query]);
    }

    void pack_queries(int64_t block) {
        uint32_t* to = s.queries + block * s.padded_words * LANES;
        for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
            memset(s.staging, 0, WIDTH * s.padded_words * sizeof(uint32_t));
            for (int64_t i = 0; i < WIDTH; ++i) {
                int64_t query = block * LANES + lane + i;
                if (query < queries)
                    pack_query(first_query + query, s.staging + i * s.padded_words);
            }
            for (int64_t word = 0; word < s.padded_words; word += WIDTH) {
                Floats square[WIDTH];
                for (int i = 0; i < WIDTH; ++i)
                    memcpy(&square[i], s.staging + i * s.padded_words + word, sizeof(Floats));
                transpose(square);
                for (int i = 0; i < WIDTH; ++i)
                    memcpy(to + (word + i) * LANES + lane, &square[i], sizeof(Floats));
            }
        }
    }

    void pack_keys(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; ++key) {
            uint32_t* to = s.keys + key * s.words;
            Product::pack_row(joined(a.key, a.more_key, first + key), a.width, to);
            if (a.bias) to[s.words - 1] = Product::token_word(a.tokens[first + key]);
        }
    }

    void pack_values(int64_t first, int64_t count) {
        for (int64_t key = 0; key < count; key += Product::VALUES) {
            const Element* even = joined(a.value, a.more_value, first + key);
            uint32_t* to = s.values + key / Product::VALUES * a.width;
            if constexpr (Product::VALUES == 1) {
                Product::pack_row(even, a.width, to);
            } else if (key + 1 < count) {
                const Element* odd = joined(a.value, a.more_value, first + key + 1);
                for (int64_t i = 0; i < a.width; ++i)
                    to[i] = even[i].bits | uint32_t(odd[i].bits) << 16;
            } else {
                for (int64_t i = 0; i < a.width; ++i) to[i] = even[i].bits;
            }
        }
    }

    void attend(int64_t block, int64_t count) {
        const uint32_t* packed = s.queries + block * s.padded_words * LANES;
        for (int64_t lane = 0; lane < LANES; ++lane) s.block_max[lane] = -__builtin_inff();
        float* scores = reinterpret_cast<float*>(s.weights);
        for_tiles(0, count, ScoreTiles<Product>{s.keys, packed, s.words, scores, s.block_max});
        online_softmax_update(block, count);
        int64_t steps = (count + Product::VALUES - 1) / Product::VALUES;
        float* accumulator = s.accumulator + block * a.width * LANES;
        for_tiles(0, a.width,
                  ValueTiles<Product>{s.values, s.weights, steps, a.width, s.alpha, accumulator});
    }

    // Takes a block of scores into running_max and running_sum, and sets alpha. In place, scores
    // become weights, exp2(scale * score - running_max).
    void online_softmax_update(int64_t block, int64_t count) {
        float* running_max = s.running_max + block * LANES;
        float* running_sum = s.running_sum + block * LANES;
        Floats new_max[COLUMNS], sum[COLUMNS];
        for (int column = 0; column < COLUMNS; ++column) {
            int64_t lane = column * WIDTH;
            Floats old_max = load(running_max + lane);
            new_max[column] = maximum(old_max, load(s.block_max + lane) * scale);
            store(running_max + lane, new_max[column]);
            store(s.alpha + lane, exp2<6>(old_max - new_max[column]));
            sum[column] = Floats{};
        }
        for (int64_t key = 0; key < count; key += Product::VALUES) {
            for (int column = 0; column < COLUMNS; ++column) {
                uint32_t* place = s.weights + key * LANES + column * WIDTH;
                Floats weights[2] = {};
                for (int i = 0; i < Product::VALUES; ++i) {
                    if (key + i == count) break;
                    Floats score;
                    memcpy(&score, place + i * LANES, sizeof score);
                    weights[i] = exp2<EXP2_DEGREE<Element>>(
                        multiply_add(score, splat(scale), -new_max[column]));
                    sum[column] += weights[i];
                }
                Ints joined = Product::join(weights[0], weights[1]);
                memcpy(s.weights + key / Product::VALUES * LANES + column * WIDTH, &joined,
                       sizeof joined);
            }
        }
        for (int column = 0; column < COLUMNS; ++column) {
            int64_t lane = column * WIDTH;
            store(running_sum + lane,
                  multiply_add(load(running_sum + lane), load(s.alpha + lane), sum[column]));
        }
    }

    void write(int64_t block) {
        Element* out = static_cast<Element*>(a.out);
        const float* from = s.accumulator + block * a.width * LANES;
        for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
            int64_t query = block * LANES + lane;
            Floats normalizer = 1.0f / load(s.running_sum + query);
            for (int64_t channel = 0; channel < a.width; channel += WIDTH) {
                Floats square[WIDTH] = {};
                for (int i = 0; i < WIDTH; ++i)
                    if (channel + i < a.width)
                        square[i] = load(from + (channel + i) * LANES + lane) * normalizer;
                transpose(square);
                int64_t remaining = a.width - channel;
                for (int i = 0; i < WIDTH; ++i) {
                    if (query + i >= queries) break;
                    int64_t position = row * a.query.length + first_query + query + i;
                    Element* to = out + position * a.heads * a.width + offset + channel;
                    if (remaining < WIDTH)
                        store(to, square[i], Part{remaining});
                    else
                        store(to, square[i]);
                }
            }
        }
    }
};

template <class Product, class Element>
void run_attention(const Attention& a, int64_t item, void* scratch) {
    AttentionItem<Product, Element>(a, item, scratch).run();
}

#if DUALDIFF_HAS_BF16_PRODUCT
using Bf16Product = Pair;
#else
using Bf16Product = Single;
#endif

inline void attention(const Attention& a, int64_t item, void* scratch) {
    if (a.bf16)
        run_attention<Bf16Product, Bf16>(a, item, scratch);
    else
        run_attention<Single, float>(a, item, scratch);
}

inline int64_t attention_scratch(const Attention& a) {
    return AttentionScratch(a, a.bf16 ? Bf16Product::VALUES : Single::VALUES, 0).end;
}

}  // namespace dualdiff::DUALDIFF_LEVEL
