// Python binding. Addresses come as integers and are checked by dualdiff_engine/ops/native.py:
// nothing here knows what they point to.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "parallel.h"

namespace py = pybind11;

namespace dualdiff {

namespace {

using Address = uintptr_t;
using PyRows = std::tuple<Address, int64_t, int64_t, int64_t>;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

const Level* current = available_levels().front();

template <class Element = void>
Element* pointer(Address address) {
    return reinterpret_cast<Element*>(address);
}

Rows rows(const PyRows& given) {
    auto [address, batch_stride, row_stride, length] = given;
    return {pointer(address), batch_stride, row_stride, length};
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Level* level : available_levels()) names.push_back(level->name);
    return names;
}

void use_level(const std::string& name) {
    for (const Level* level : available_levels()) {
        if (name == level->name) {
            current = level;
            return;
        }
    }
    throw py::value_error("this processor has no level " + name);
}

void bind_attention(const PyRows& query, const PyRows& key, const PyRows& value,
                    const PyRows& more_key, const PyRows& more_value, Address out, int64_t batch,
                    int64_t heads, int64_t width, int64_t source_batch, bool bf16, Address bias,
                    Address tokens, int threads) {
    attention(*current,
              {rows(query), rows(key), rows(value), rows(more_key), rows(more_value), pointer(out),
               batch, heads, width, source_batch, bf16, pointer<float>(bias), pointer<float>(tokens)},
              threads);
}

void bind_group_norm_silu(Address input, Address out, Address weight, Address bias, int64_t batch,
                          int64_t positions, int64_t channels, int64_t groups, double eps,
                          bool bf16, int threads) {
    group_norm_silu(*current,
                    {pointer(input), pointer(out), pointer<float>(weight), pointer<float>(bias),
                     batch, positions, channels, groups, eps, bf16},
                    threads);
}

// The three passes of the exchange see the same rows.
Exchange rows_of_exchange(Address input, int64_t branch_stride, int64_t count, int64_t channels,
                          bool bf16) {
    Exchange e{};
    e.input = pointer(input);
    e.branch_stride = branch_stride;
    e.count = count;
    e.channels = channels;
    e.bf16 = bf16;
    return e;
}

void bind_normalise_difference(Address input, int64_t branch_stride, int64_t count,
                               int64_t channels, bool bf16, int threads, Address difference,
                               Address moments, float eps) {
    Exchange e = rows_of_exchange(input, branch_stride, count, channels, bf16);
    e.difference = pointer(difference);
    e.moments = pointer<float>(moments);
    e.eps = eps;
    normalise_difference(*current, e, threads);
}

void bind_mix(Address input, int64_t branch_stride, int64_t count, int64_t channels, bool bf16,
              int threads, Address projected, Address gate_bias, Address moments, Address mixed) {
    Exchange e = rows_of_exchange(input, branch_stride, count, channels, bf16);
    e.projected = pointer(projected);
    e.gate_bias = pointer<float>(gate_bias);
    e.moments = pointer<float>(moments);
    e.mixed = pointer(mixed);
    mix(*current, e, threads);
}

void bind_add(Address input, int64_t branch_stride, int64_t count, int64_t channels, bool bf16,
              int threads, Address product, Address residual, Address out) {
    Exchange e = rows_of_exchange(input, branch_stride, count, channels, bf16);
    e.product = pointer(product);
    e.residual = pointer(residual);
    e.out = pointer(out);
    add(*current, e, threads);
}

void bind_add_merged(Address input, int64_t branch_stride, int64_t count, int64_t channels,
                     bool bf16, int threads, Address product, Address residual, Address out) {
    Exchange e = rows_of_exchange(input, branch_stride, count, channels, bf16);
    e.product = pointer(product);
    e.residual = pointer(residual);
    e.out = pointer(out);
    add_merged(*current, e, threads);
}

void bind_alignment_bias(Address query, Address mean_key, Address graphic, Address scores,
                         Address bias, const std::tuple<int64_t, int64_t, int64_t, int64_t>& shape,
                         int64_t graphic_pairs, double score_scale, double scale, double strength,
                         double flat, bool bf16, int threads) {
    auto [rows, pairs, positions, channels] = shape;
    alignment_bias(*current,
                   {pointer(query), pointer(mean_key), pointer<float>(graphic),
                    pointer<float>(scores), pointer<float>(bias), rows, pairs, positions, channels,
                    graphic_pairs, score_scale, scale, strength, flat, bf16},
                   threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels of dualdiff_engine.ops.native; see csrc/kernels.h";
    m.def("levels", level_names, "Sets of instructions this processor has, best first.");
    m.def("use_level", use_level, "Use another level than the best one, for tests.");
    m.def("attention", bind_attention, WithoutGil());
    m.def("group_norm_silu", bind_group_norm_silu, WithoutGil());
    m.def("normalise_difference", bind_normalise_difference, WithoutGil());
    m.def("mix", bind_mix, WithoutGil());
    m.def("add", bind_add, WithoutGil());
    m.def("add_merged", bind_add_merged, WithoutGil());
    m.def("alignment_bias", bind_alignment_bias, WithoutGil());
}

}  // namespace dualdiff
