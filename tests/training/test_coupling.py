"""Other couplings than DualAnoDiff's: trained unfolded, run folded, kept in the file.

The unfolded network, written as the formulas are, is the golden of the engine: every site's output
is compared, for the default cycle and each of its kinds alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dualdiff_engine import Engine, adapters
from dualdiff_engine.adapters import files
from dualdiff_engine.errors import AdapterError, SettingsError
from dualdiff_engine.model.coupling import CYCLE, Block, Coupling
from dualdiff_engine.settings import Prompts
from dualdiff_engine.training import train_adapter
from dualdiff_engine.training.network import TrainableNetwork
from support import relative
from training_cases import base_of, inputs_of, network_of, options_of, write_data

# two computations of one function in fp32
AGREE = 2e-6
PROMPTS = ["a vfx with sks", "sks"]
KINDS = {
    "default": None,
    "connect": "connect/none/plain/none",
    "merge": "separate/merge/plain/merge",
    "align": "separate/none/align/none",
    "all": "connect/interaction/align/merge,separate/merge/align/interaction",
}


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    """Unlike elsewhere, gradients are wanted."""


def coupled(background: bool = False, **changes: Any) -> TrainableNetwork:
    return network_of(background=background, **{"system": "dh-diff", **changes})


def written(network: TrainableNetwork, path: Path) -> Path:
    files.write(path, network.tensors(), files.Origin(coupling=network.coupling))
    return path


@pytest.mark.parametrize("background", [False, True], ids=["plain", "background"])
@pytest.mark.parametrize("cycle", KINDS)
def test_engine_runs_what_was_trained(cycle: str, background: bool, tmp_path: Path) -> None:
    network = coupled(background, cycle=KINDS[cycle])
    path = written(network, tmp_path / "adapter.safetensors")
    latents, times, _, surroundings = inputs_of(background)
    assert latents is not None
    assert times is not None
    places = network.places(PROMPTS)
    with torch.no_grad():
        context = network.encode(PROMPTS).unflatten(0, (2, 1))
        flags = None if places is None else places.unflatten(0, (2, 1))
        noise = network(latents, times, context, surroundings, flags)
    with Engine.from_pretrained(base_of(background), adapter=path) as engine:
        expected = [
            engine.predict_noise(
                latents[:, None, n : n + 1],
                float(times[n]),
                context,
                None if surroundings is None else surroundings[n : n + 1],
                flags,
            )[:, 0, 0]
            for n in range(2)
        ]
    assert relative(noise, torch.stack(expected, dim=1)) <= AGREE


def test_every_site_agrees(tmp_path: Path) -> None:
    """Not the whole network alone, in which a site's fault may drown."""
    network = coupled(cycle=KINDS["all"])
    path = written(network, tmp_path / "adapter.safetensors")
    latents, times, _, _ = inputs_of(False, batch=1)
    assert latents is not None
    assert times is not None
    flags = network.places(PROMPTS)
    assert flags is not None
    seen: dict[str, Tensor] = {}
    mine: dict[str, Tensor] = {}

    def keep(kept: dict[str, Tensor], name: str) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            # ours holds the residual as well: the block's sum is compared
            kept[name] = out.detach().flatten(0, -2)

        return hook

    for name, module in network.unet.named_modules():
        if name.endswith(".transformer_blocks.0"):
            module.register_forward_hook(keep(seen, name))
    with Engine.from_pretrained(base_of(False), adapter=path, max_batch=1) as engine:
        for name, module in engine.unet.named_modules():
            if name.endswith(".transformer_blocks.0"):
                module.register_forward_hook(keep(mine, adapters.fold.diffusers_name(name)))
        with torch.no_grad():
            context = network.encode(PROMPTS).unflatten(0, (2, 1))
            network(latents, times, context, None, flags.unflatten(0, (2, 1)))
        engine.predict_noise(
            latents[:, None], float(times[0]), context, None, flags.unflatten(0, (2, 1))
        )
    assert len(seen) == len(mine) == len(network.coupling.blocks if network.coupling else ())
    for name, out in seen.items():
        assert relative(out, mine[name]) <= AGREE, name


def test_the_first_step_equals_uncoupled_branches() -> None:
    """Scales and merging start at zero, and what connects shares one source from the first."""
    plain = "separate/none/plain/none"
    start = network_of(disturbed=False, system="dh-diff", cycle="separate/merge/align/merge")
    alone = network_of(disturbed=False, system="dh-diff", cycle=plain)
    latents, times, context, _ = inputs_of(False)
    flags = start.places(PROMPTS)
    assert flags is not None
    with torch.no_grad():
        first = start(latents, times, context, None, flags.unflatten(0, (2, 1)))
        uncoupled = alone(latents, times, context)
    assert relative(first, uncoupled) <= AGREE


def test_gradients_reach_scales_and_merging() -> None:
    network = coupled()
    latents, times, context, _ = inputs_of(False)
    flags = network.places(PROMPTS)
    assert flags is not None
    out = network(latents, times, context, None, flags.unflatten(0, (2, 1)))
    out.float().square().sum().backward()
    found = [n for n in network.parameters if "merge" in n or "align" in n]
    assert any("merge.weight" in n for n in found)
    assert any("align.scale" in n for n in found)
    for name in found:
        gradient = network.parameters[name].grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def test_a_pair_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    path = written(coupled(), tmp_path / "adapter.safetensors")
    with Engine.from_pretrained(base_of(False), adapter=path, max_batch=3) as engine:
        together = engine.generate([3, 4, 5], steps=3, output_type="pt")
        alone = engine.generate([4], steps=3, output_type="pt")
    assert relative(alone[0].image, together[1].image) <= 1e-5


def test_adapters_of_other_couplings_are_switched(tmp_path: Path) -> None:
    ours = written(coupled(), tmp_path / "dh.safetensors")
    released = written(network_of(), tmp_path / "dual.safetensors")

    def drawn(engine: Engine) -> Tensor:
        (pair,) = engine.generate([7], steps=2, output_type="pt")
        return pair.image

    with Engine.from_pretrained(base_of(False), adapter=ours) as engine:
        first = drawn(engine)
        engine.load_adapter(released)
        second = drawn(engine)
        engine.set_adapter("dh")
        again = drawn(engine)
        engine.set_adapter("dual")
        assert torch.equal(drawn(engine), second)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_bf16_is_close(tmp_path: Path) -> None:
    network = coupled()
    path = written(network, tmp_path / "adapter.safetensors")
    latents, _, context, _ = inputs_of(False, batch=1)
    assert latents is not None
    assert context is not None
    found = []
    for dtype in ("float32", "bfloat16"):
        with Engine.from_pretrained(base_of(False), adapter=path, dtype=dtype) as engine:
            found.append(engine.predict_noise(latents[:, None], 500.0, context).float())
    # eight bits through twenty layers; the released coupling loses as much
    assert relative(found[1], found[0]) <= 3e-2


def test_the_mask_is_the_second_branch_s_own_picture(tmp_path: Path) -> None:
    path = written(coupled(annotation="mask"), tmp_path / "adapter.safetensors")
    with Engine.from_pretrained(base_of(False), adapter=path) as engine:
        (pair,) = engine.generate([7], steps=2, output_type="np")
    drawn = (pair.anomaly * 255).round().mean(2) > 127.5
    # specks may be dropped, nothing is added
    assert not (pair.mask[~drawn]).any()
    assert pair.recipe["mask"]["threshold"] == 127.5


def test_training_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    options = options_of(
        system="dh-diff", annotation="mask", steps=4, prompt_dropout=0.3, checkpoint_every=1
    )
    whole = train_adapter(base_of(False), data, tmp_path / "whole", options)
    asked = iter([False, True])
    stopped = train_adapter(
        base_of(False), data, tmp_path / "parts", options, should_stop=lambda: next(asked, True)
    )
    assert stopped.adapter is None
    parts = train_adapter(base_of(False), data, tmp_path / "parts", options)
    assert parts.adapter is not None
    assert whole.adapter is not None
    assert parts.adapter.read_bytes() == whole.adapter.read_bytes()
    summary = adapters.summary(adapters.load(parts.adapter))
    assert summary.coupling == Coupling.dh_diff(summary.sites // 2, "mask")
    again = adapters.AdapterSummary.of(json.loads(json.dumps(summary.record())))
    assert again == summary
    with pytest.raises(SettingsError, match="another annotation"):
        train_adapter(base_of(False), data, tmp_path / "parts", options_of(steps=4))


def test_the_picture_of_a_mask_is_white_on_black(tmp_path: Path) -> None:
    from dualdiff_engine.training.data import find_examples

    data = write_data(tmp_path / "data")
    (example, *_) = find_examples(data, options_of())
    mask = example.annotation(64, "mask")
    assert set(mask[:, :, 0].flatten().tolist()) == {0, 255}
    assert (example.annotation(64, "anomaly") == example.anomaly(64)).all()


def damaged(path: Path, change: Any) -> Path:
    """A file of ours with other metadata, or other tensors."""
    network = coupled()
    assert network.coupling is not None
    tensors, record = network.tensors(), network.coupling.record()
    change(tensors, record)
    save_file(tensors, path, {"coupling": json.dumps(record)} if record else None)
    return path


def _drop(part: str) -> Any:
    def change(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith(part))]

    return change


def _record(**values: Any) -> Any:
    return lambda tensors, record: record.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_record(version=2), "version '2' is not 1"),
        (_record(blocks=[["separate", "twist", "plain", "none"]] * 10), "'twist' is not one of"),
        (_record(blocks=[["separate"]]), "is not four words"),
        (_record(annotation="sound"), "'sound' is not one of"),
        (_record(blocks=[["separate", "none", "plain", "none"]]), "is of 1 blocks, the file has"),
        (_record(placeholder=""), "is not a word"),
        (lambda tensors, record: record.clear(), "is of 'align'|merge|is missing"),
        (_drop("merge.weight"), "merge.weight is missing"),
        (_drop("align.scale"), "align.scale is missing"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        adapters.load(damaged(tmp_path / "x.safetensors", change))


@pytest.mark.parametrize(
    ("cycle", "message"),
    [("separate/none", "is not attention/exchange"), ("apart/none/plain/none", "'apart' is not")],
)
def test_cycles_are_checked(cycle: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        options_of(system="dh-diff", cycle=cycle)


def test_cycles_and_records() -> None:
    coupling = Coupling.dh_diff(5)
    assert coupling.blocks == (*CYCLE, *CYCLE[:2])
    assert Coupling.of(json.loads(json.dumps(coupling.record()))) == coupling
    assert Coupling.released(3).blocks == (Block(),) * 3
    assert "connect/none/align/none" in str(coupling)


def test_prompts_without_the_placeholder_move_nothing(tmp_path: Path) -> None:
    """And the places of the placeholder differ between the prompts of the branches."""
    network = coupled(cycle=KINDS["align"])
    flags = network.places(["a vfx with sks", "sks", "nothing here"])
    assert flags is not None
    assert flags.sum(-1).tolist() == [flags[0].sum(), flags[0].sum(), 0]
    assert int(flags[0].argmax()) != int(flags[1].argmax())
    path = written(network, tmp_path / "adapter.safetensors")
    with Engine.from_pretrained(base_of(False), adapter=path) as engine:
        (pair,) = engine.generate([1], steps=2, prompts=Prompts("a part", "a part"))
        assert pair.image is not None
