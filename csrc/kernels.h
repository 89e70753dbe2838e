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
    int64_t batch_stride;
    int64_t row_stride;
    int64_t length;
};

struct Attention {
    Rows query, key, value, more_key, more_value;
    // contiguous [batch, query.length, heads * width]
    void* out;
    int64_t batch, heads, width;
    bool bf16;

    int64_t chunks() const { return (query.length + QUERY_CHUNK - 1) / QUERY_CHUNK; }
    int64_t items() const { return batch * heads * chunks(); }
};

// A run of rows of the exchange. Of [2, M, channels], branch 1 is `branch_stride` elements after
// branch 0; what lives only between two products is contiguous, `count` rows.
struct Exchange {
    const void *input, *residual;
    void* out;
    int64_t branch_stride;
    // [count, channels]: the difference of the normalised branches, and its product with M
    void* difference;
    const void* projected;
    const float* gate_bias;
    // [count, 2, 2]: mean and reciprocal deviation of each branch's row
    float* moments;
    // [2, count, channels]: the gated mix, and its product with V
    void* mixed;
    const void* product;
    int64_t count, channels;
    float eps;
    bool bf16;
};

struct GroupNorm {
    const void* input;
    void* out;
    const float *weight, *bias;
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

    // one block of positions: its sums and sums of squares [2, channels]; then its output
    void (*block_moments)(const GroupNorm&, int64_t row, int64_t block, float* sums);
    void (*scale_shift_silu)(const GroupNorm&, int64_t row, int64_t block, const float* scale,
                             const float* shift);

    // one row each
    void (*normalise_difference)(const Exchange&, int64_t row);
    void (*mix)(const Exchange&, int64_t row);
    void (*add)(const Exchange&, int64_t row);
};

namespace portable { extern const Level level; }
#if defined(__x86_64__)
namespace avx2 { extern const Level level; }
namespace avx512 { extern const Level level; }
namespace avx512_bf16 { extern const Level level; }
#endif

}  // namespace dualdiff
