// The ops, in parallel over independent items. Which thread takes an item changes no result.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dualdiff {

// The levels this processor has, best first.
std::vector<const Level*> available_levels();

void attention(const Level& level, const Attention& arguments, int threads);
void group_norm_silu(const Level& level, const GroupNorm& arguments, int threads);
void normalise_difference(const Level& level, const Exchange& arguments, int threads);
void mix(const Level& level, const Exchange& arguments, int threads);
void add(const Level& level, const Exchange& arguments, int threads);
void add_merged(const Level& level, const Exchange& arguments, int threads);
void alignment_bias(const Level& level, const Alignment& arguments, int threads);

}  // namespace dualdiff
