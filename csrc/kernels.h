// What the drivers ask of a level of instructions. Free of Python and of PyTorch.
//
// Every kernel exists once per level (`portable`, `avx2`, `avx512`, `avx512_bf16`), compiled from
// the same headers; the best level that the processor has is chosen when the module is loaded.
#pragma once

#include <cstdint>

namespace dualdiff {

struct Bf16 {
    uint16_t bits;
};

// Queries of one work item: a multiple of every level's block of queries. Keys and values are
// packed once per item, so more queries amortise the packing and fewer balance the load.
constexpr int64_t QUERY_CHUNK = 512;

// Positions whose moments are summed in fp32 before they join a total in fp64.
constexpr int64_t POSITION_BLOCK = 64;

// [batch, length, heads * width]: strides in elements, heads next to each other in a row.
struct Rows {
    const void* data;
    int64_t batch_stride, row_stride;
    int64_t length;
};

struct Attention {
    Rows query, key, value, more_key, more_value;
    void* out;  // contiguous [batch, query.length, heads * width]
    int64_t batch, heads, width;
    int64_t source_batch;  // of keys and values: row n of the queries reads their row n % it
    bool bf16;
    // or null: what is added to the scores of some keys, [batch, query.length] before their scale,
    // and those keys, [key.length], 1 or 0
    const float *bias, *tokens;

    int64_t chunks() const { return (query.length + QUERY_CHUNK - 1) / QUERY_CHUNK; }
    int64_t items() const { return batch * heads * chunks(); }
};

// `count` consecutive rows of the exchange. Of [2, M, channels], branch 1 is `branch_stride`
// elements after branch 0; tensors that live only between two products are contiguous.
struct Exchange {
    const void* input;     // [2, M, channels]
    const void* residual;  // [2, M, channels]
    void* out;             // [2, M, channels]
    int64_t branch_stride;
    void* difference;        // [count, channels], of the normalised branches
    const void* projected;   // [count, channels], difference times M
    const float* gate_bias;  // [channels]
    float* moments;          // [count, 2, 2], mean and reciprocal deviation of each branch's row
    void* mixed;             // [2, count, channels], the gated mix
    const void* product;     // [2, count, channels], mixed times V; of a merge [count, 2, channels]
    int64_t count, channels;
    float eps;
    bool bf16;
};

// What the branches tell each other of where a word belongs, as a bias of their text attention.
struct Alignment {
    const void* query;     // [2, rows, pairs, positions, channels]
    const void* mean_key;  // [2, rows, channels]
    const float* graphic;  // [graphic_pairs, positions], or null
    float* scores;         // [2, rows, pairs, positions], of the mean key
    float* bias;           // [2, rows, pairs, positions]
    int64_t rows, pairs, positions, channels, graphic_pairs;
    // of scores; of the other branch's standardised ones and of the graphic, in the bias; the
    // deviation of a flat map over 1 + its mean
    double score_scale, scale, strength, flat;
    bool bf16;

    int64_t all_positions() const { return 2 * rows * pairs * positions; }
    int64_t blocks() const { return (all_positions() + POSITION_BLOCK - 1) / POSITION_BLOCK; }
};

struct GroupNorm {
    const void* input;    // [batch, positions, channels]
    void* out;            // [batch, positions, channels]
    const float* weight;  // [channels]
    const float* bias;    // [channels]
    int64_t batch, positions, channels, groups;
    double eps;
    bool bf16;

    int64_t blocks() const { return (positions + POSITION_BLOCK - 1) / POSITION_BLOCK; }
};

struct Level {
    const char* name;
    bool (*available)();

    // bytes that one thread needs, and one item: (row of the batch, head, chunk of queries)
    int64_t (*attention_scratch)(const Attention&);
    void (*attention)(const Attention&, int64_t item, void* scratch);

    // one block of positions: its sums and sums of squares [2, channels]; then its output, for
    // scale and shift [channels]
    void (*block_moments)(const GroupNorm&, int64_t row, int64_t block, float* sums);
    void (*scale_shift_silu)(const GroupNorm&, int64_t row, int64_t block, const float* scale,
                             const float* shift);

    // one row each
    void (*normalise_difference)(const Exchange&, int64_t row);
    void (*mix)(const Exchange&, int64_t row);
    void (*add)(const Exchange&, int64_t row);
    void (*add_merged)(const Exchange&, int64_t row);

    // one block of positions
    void (*mean_scores)(const Alignment&, int64_t block);
};

namespace portable { extern const Level level; }
#if defined(__x86_64__)
namespace avx2 { extern const Level level; }
namespace avx512 { extern const Level level; }
namespace avx512_bf16 { extern const Level level; }
#endif

}  // namespace dualdiff
