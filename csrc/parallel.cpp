#include "parallel.h"

#include <omp.h>

#include <cmath>
#include <new>

namespace dualdiff {

namespace {

// Memory for every thread, lines apart; taken before the parallel region, where nothing may throw.
class Scratch {
  public:
    Scratch(int64_t bytes, int threads)
        : stride((bytes + LINE - 1) / LINE * LINE),
          memory(static_cast<char*>(operator new(stride * threads, std::align_val_t(LINE)))) {}
    ~Scratch() { operator delete(memory, std::align_val_t(LINE)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    char* of_thread() const { return memory + stride * omp_get_thread_num(); }

  private:
    static constexpr int64_t LINE = 64;
    int64_t stride;
    char* memory;
};

}  // namespace

std::vector<const Level*> available_levels() {
    std::vector<const Level*> found;
#if defined(__x86_64__)
    for (const Level* level : {&avx512_bf16::level, &avx512::level, &avx2::level})
        if (level->available()) found.push_back(level);
#endif
    found.push_back(&portable::level);
    return found;
}

void attention(const Level& level, const Attention& arguments, int threads) {
    Scratch scratch(level.attention_scratch(arguments), threads);
    int64_t items = arguments.items();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < items; ++item)
        level.attention(arguments, item, scratch.of_thread());
}

// scale_shift [batch, 2, channels] of one group from sums [batch, blocks, 2, channels]
static void finish_moments(const GroupNorm& g, int64_t row, int64_t group, const float* sums,
                           float* scale_shift) {
    int64_t width = g.channels / g.groups, first = group * width;
    double sum = 0, square = 0;
    for (int64_t block = 0; block < g.blocks(); ++block) {
        const float* of_block = sums + (row * g.blocks() + block) * 2 * g.channels;
        for (int64_t channel = first; channel < first + width; ++channel) {
            sum += of_block[channel];
            square += of_block[g.channels + channel];
        }
    }
    double count = double(g.positions) * double(width), mean = sum / count;
    double variance = std::fmax(square / count - mean * mean, 0.0);
    double rstd = 1 / std::sqrt(variance + g.eps);
    float* scale = scale_shift + row * 2 * g.channels;
    for (int64_t channel = first; channel < first + width; ++channel) {
        double factor = g.weight[channel] * rstd;
        scale[channel] = float(factor);
        scale[g.channels + channel] = float(g.bias[channel] - mean * factor);
    }
}

void group_norm_silu(const Level& level, const GroupNorm& g, int threads) {
    std::vector<float> sums(g.batch * g.blocks() * 2 * g.channels);
    std::vector<float> scale_shift(g.batch * 2 * g.channels);
    int64_t blocks = g.blocks();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < g.batch; ++row)
            for (int64_t block = 0; block < blocks; ++block)
                level.block_moments(g, row, block, &sums[(row * blocks + block) * 2 * g.channels]);
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < g.batch; ++row)
            for (int64_t group = 0; group < g.groups; ++group)
                finish_moments(g, row, group, sums.data(), scale_shift.data());
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < g.batch; ++row)
            for (int64_t block = 0; block < blocks; ++block) {
                const float* scale = &scale_shift[row * 2 * g.channels];
                level.scale_shift_silu(g, row, block, scale, scale + g.channels);
            }
    }
}

void normalise_difference(const Level& level, const Exchange& e, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < e.count; ++row) level.normalise_difference(e, row);
}

void mix(const Level& level, const Exchange& e, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < e.count; ++row) level.mix(e, row);
}

void add(const Level& level, const Exchange& e, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < e.count; ++row) level.add(e, row);
}

void add_merged(const Level& level, const Exchange& e, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < e.count; ++row) level.add_merged(e, row);
}

// The bias of one map [positions] from the scores of the other branch's.
static void finish_bias(const Alignment& a, int64_t map) {
    int64_t of_branch = a.rows * a.pairs;
    const float* scores = a.scores + (map + of_branch) % (2 * of_branch) * a.positions;
    float* bias = a.bias + map * a.positions;
    double sum = 0, square = 0;
    for (int64_t i = 0; i < a.positions; ++i) sum += scores[i];
    double mean = sum / double(a.positions);
    for (int64_t i = 0; i < a.positions; ++i) square += (scores[i] - mean) * (scores[i] - mean);
    double deviation = std::sqrt(square / double(a.positions));
    double scale = deviation < a.flat * (1 + std::fabs(mean)) ? 0 : a.scale / deviation;
    for (int64_t i = 0; i < a.positions; ++i) bias[i] = float((scores[i] - mean) * scale);
    if (!a.graphic) return;
    const float* graphic = a.graphic + map % a.pairs % a.graphic_pairs * a.positions;
    for (int64_t i = 0; i < a.positions; ++i) bias[i] += float(a.strength * (2 * graphic[i] - 1));
}

void alignment_bias(const Level& level, const Alignment& a, int threads) {
    int64_t blocks = a.blocks(), maps = 2 * a.rows * a.pairs;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) level.mean_scores(a, block);
#pragma omp for schedule(static)
        for (int64_t map = 0; map < maps; ++map) finish_bias(a, map);
    }
}

}  // namespace dualdiff
