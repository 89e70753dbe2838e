// The kernels of the level being compiled, and its table.
#pragma once

#include "attention_kernel.h"
#include "row_kernels.h"

namespace dualdiff::DUALDIFF_LEVEL {

bool available();

#define DUALDIFF_TEXT(name) DUALDIFF_TEXT_OF(name)
#define DUALDIFF_TEXT_OF(name) #name

const Level level = {
    DUALDIFF_TEXT(DUALDIFF_LEVEL),
    available,
    attention_scratch,
    attention,
    block_moments,
    scale_shift_silu,
    normalise_difference,
    mix,
    add,
    add_merged,
    mean_scores,
};

}  // namespace dualdiff::DUALDIFF_LEVEL
