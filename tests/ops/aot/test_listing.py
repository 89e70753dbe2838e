"""What is listed for compilation: types follow from names, candidates from tuning."""

from __future__ import annotations

import importlib

import pytest
import torch

from dualdiff_engine.ops.triton import MODULES, listing
from dualdiff_engine.ops.triton.guided_step import _guided_step_kernel
from dualdiff_engine.ops.triton.tuning import Config


@pytest.mark.parametrize("module", sorted(MODULES))
def test_candidates_are_listed_once_with_every_default(module: str) -> None:
    op = importlib.import_module(f"dualdiff_engine.ops.triton.{module}")

    def names(every_candidate: bool) -> list[tuple[str, str]]:
        return [(x.name, str(x.config)) for x in op.compilations(every_candidate)]

    defaults, every = names(False), names(True)
    assert len(set(every)) == len(every)
    assert set(defaults) <= set(every)
    assert {name for name, _ in every} == {name for name, _ in defaults}
    # a kernel's arguments, in its order, each with a type or a value
    for x in op.compilations(True):
        assert list(x.signature) == x.kernel.arg_names
        assert {name for name, kind in x.signature.items() if kind == "constexpr"} == set(
            x.constants
        )


def test_types_follow_from_names() -> None:
    config = Config({"BLOCK": 64}, num_warps=4, num_stages=1)
    x = listing.compilation(
        "guided_step", "size=64", _guided_step_kernel, torch.bfloat16, config, {},
        types={"out_ptr": "*fp32"},
    )  # fmt: skip
    assert x.name == "guided_step bf16 size=64"
    assert dict(x.signature) == {
        "noise_ptr": "*bf16",
        "out_ptr": "*fp32",
        "size": "i32",
        "guidance": "fp32",
        "BLOCK": "constexpr",
    }
    assert str(x.config) == "BLOCK=64,num_stages=1,num_warps=4"
