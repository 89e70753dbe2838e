"""GraphedDenoiser: what is copied, what is captured when, and equality with the network itself.

Without a GPU nothing is captured: `Recorder` stands for it and keeps what replays rely on.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from dualdiff_engine.adapters import fold
from dualdiff_engine.bench.step.case import RandomWeights, network_config, random_adapter
from dualdiff_engine.errors import BackendError
from dualdiff_engine.model import cuda_graph
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import bind
from support import Recorder

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")
CPU = torch.device("cpu")


def adapter(seed: int, device: torch.device, *, background: bool) -> dict[str, Tensor]:
    base = RandomWeights.of("tiny", 0)
    drawn = random_adapter(RandomWeights(base.shapes, seed), background=background, rank=4)
    return fold.fold_sites(base, drawn.sites, device, torch.float32)


def network(device: torch.device = CPU, *, background: bool = True) -> DualUNet:
    unet = DualUNet(network_config("tiny"), bind(device=device), background=True)
    unet.load(fold.fold_network(RandomWeights.of("tiny", 0), device, torch.float32))
    unet.load(adapter(0, device, background=background))
    return unet


def drawn(seed: int, *shape: int, device: torch.device = CPU) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def call(
    unet: DualUNet, seed: int, *, batch: int = 2, size: int = 8, rows: int = 2, length: int = 7
) -> dict[str, Any]:
    """Inputs of a call: latents, timestep and prompts are functions of the seed."""
    device = unet.conv_in.weight.device
    context = drawn(seed + 1, 2, rows, length, unet.config.context_width, device=device)
    # as the sampler passes them: a view
    latents = drawn(seed, batch, 2, 4, size, size, device=device).transpose(0, 1).unsqueeze(1)
    return {
        "latents": latents,
        "time_bias": unet.time_inputs(torch.tensor([17.0 * seed + 3], device=device))[0],
        "text": unet.text_inputs(context),
    }


def with_background(unet: DualUNet, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    rows, size = inputs["text"][0].shape[1], inputs["latents"].shape[-1]
    noised = drawn(seed, rows, 4, size, size, device=inputs["latents"].device)
    shares = unet.background_shares(noised, inputs["time_bias"], inputs["text"])
    return {**inputs, "background": shares}


def test_new_values_are_copied_into_one_capture() -> None:
    unet, recorder = network(), Recorder()
    graphed = GraphedDenoiser(unet, recorder)
    results = []
    for seed in range(3):
        inputs = call(unet, seed)
        results.append((graphed(**inputs), unet(**inputs)))
    assert recorder.captures == 1
    # also the earlier ones: no replay writes to what was handed out
    assert all(torch.equal(ours, theirs) for ours, theirs in results)


def test_background_is_another_capture_then_copied_too() -> None:
    unet, recorder = network(), Recorder()
    graphed = GraphedDenoiser(unet, recorder)
    for seed in range(2):
        plain = call(unet, seed)
        inputs = with_background(unet, plain, seed)
        assert torch.equal(graphed(**plain), unet(**plain))
        assert torch.equal(graphed(**inputs), unet(**inputs))
        assert not torch.equal(graphed(**inputs), graphed(**plain))
    assert recorder.captures == 2


def test_background_pass() -> None:
    unet, recorder = network(), Recorder()
    graphed = GraphedDenoiser(unet, recorder)
    kept = []
    for seed in range(2):
        inputs = call(unet, seed)
        noised = drawn(seed + 5, 2, 4, 8, 8)
        arguments = noised, inputs["time_bias"], inputs["text"]
        kept.append((graphed.background_shares(*arguments), unet.background_shares(*arguments)))
    assert recorder.captures == 1
    for ours, theirs in kept:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "change", [{"batch": 3}, {"size": 16}, {"rows": 1}, {"length": 5}], ids=lambda c: next(iter(c))
)
def test_other_shapes_are_other_captures(change: dict[str, int]) -> None:
    unet, recorder = network(), Recorder()
    graphed = GraphedDenoiser(unet, recorder)
    for options in ({}, change, {}, change):
        inputs = call(unet, 1, **options)
        assert torch.equal(graphed(**inputs), unet(**inputs))
    assert recorder.captures == 2
    # the dtype of the latents decides what is computed: another graph
    half = call(unet, 1)
    half["latents"] = half["latents"].double()
    graphed(**half)
    assert recorder.captures == 3


def test_the_network_reads_the_same_addresses_every_time() -> None:
    unet = network()
    graphed = GraphedDenoiser(unet, Recorder())
    seen: list[list[int]] = []

    def look(module: DualUNet, arguments: tuple[Any, ...]) -> None:
        latents, time_bias, text, background = arguments
        tensors = [latents, *time_bias, *text, *background, *module.parameters(), *module.buffers()]
        seen.append([x.data_ptr() for x in tensors])

    unet.register_forward_pre_hook(look)
    for seed in range(3):
        graphed(**with_background(unet, call(unet, seed), seed))
        graphed.load(adapter(seed, CPU, background=True))
    # one capture, a replay and the network itself to compare, and three replays
    assert len(seen) == 6
    assert all(addresses == seen[0] for addresses in seen)


def test_adapters_are_pointed_at_then_copied() -> None:
    unet, recorder = network(), Recorder()
    graphed = GraphedDenoiser(unet, recorder)
    first, second = (adapter(seed, CPU, background=True) for seed in (1, 2))
    pristine = copy.deepcopy([first, second])
    graphed.load(first)
    name = next(iter(first))
    assert unet.get_buffer(name).data_ptr() == first[name].data_ptr()
    for tensors in (first, second, first):
        graphed.load(tensors)
        fresh = network()
        fresh.load(tensors)
        inputs = with_background(fresh, call(fresh, 4), 4)
        assert torch.equal(graphed(**inputs), fresh(**inputs))
    assert recorder.captures == 1
    # resident adapters are read, never written to
    for tensors, before in zip([first, second], pristine, strict=True):
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_a_background_adapter_after_a_plain_one() -> None:
    unet = network(background=False)
    graphed = GraphedDenoiser(unet, Recorder())
    graphed(**call(unet, 0))
    richer = adapter(1, CPU, background=True)
    kept = copy.deepcopy(richer)
    for tensors in (richer, adapter(2, CPU, background=True), richer):
        graphed.load(tensors)
        fresh = network()
        fresh.load(tensors)
        inputs = with_background(fresh, call(fresh, 4), 4)
        assert torch.equal(graphed(**inputs), fresh(**inputs))
    assert all(torch.equal(richer[name], kept[name]) for name in kept)


def test_load_refuses_what_does_not_fit_and_copies_nothing() -> None:
    unet = network()
    graphed = GraphedDenoiser(unet, Recorder())
    inputs = call(unet, 0)
    before = graphed(**inputs)
    tensors = adapter(1, CPU, background=True)
    name = next(n for n in tensors if n.endswith("out_bias"))
    for wrong, error, message in (
        ({"conv_in.weight": unet.conv_in.weight}, KeyError, "conv_in.weight"),
        ({"nonsense": tensors[name]}, KeyError, "nonsense"),
        # would broadcast
        ({name: tensors[name][:1]}, RuntimeError, r"out_bias is .* \[16\], got .* \[1\]"),
        ({name: tensors[name].double()}, RuntimeError, "got torch.float64"),
    ):
        with pytest.raises(error, match=message):
            graphed.load({**tensors, **wrong})
    assert torch.equal(graphed(**inputs), before)


def test_the_least_recently_used_graph_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    unet, recorder = network(), Recorder()
    graphed = GraphedDenoiser(unet, recorder)
    for batch, captures in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        graphed(**call(unet, 0, batch=batch))
        assert recorder.captures == captures


def test_time_bias_is_the_networks() -> None:
    unet = network()
    timesteps = torch.tensor([1.0, 500.0])
    ours, theirs = (x.time_inputs(timesteps) for x in (GraphedDenoiser(unet, Recorder()), unet))
    for mine, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_a_network_on_a_cpu_is_refused() -> None:
    with pytest.raises(BackendError, match="need the network on an NVIDIA GPU, it is on cpu"):
        GraphedDenoiser(network())


@GPU
def test_replays_equal_the_network_bit_for_bit() -> None:
    device = torch.device("cuda")
    unet = network(device)
    graphed, fresh = GraphedDenoiser(unet), network(device)
    for seed in range(3):
        tensors = adapter(seed, device, background=True)
        graphed.load(tensors)
        fresh.load(tensors)
        for batch in (2, 1):
            plain = call(fresh, seed, batch=batch)
            inputs = with_background(fresh, plain, seed)
            assert torch.equal(graphed(**plain), fresh(**plain))
            assert torch.equal(graphed(**inputs), fresh(**inputs))
            noised = drawn(seed, 2, 4, 8, 8, device=device)
            arguments = noised, plain["time_bias"], plain["text"]
            ours, theirs = (x.background_shares(*arguments) for x in (graphed, fresh))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def fails(run: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing. More")


def replays_something_else(run: Any) -> Any:
    return lambda: [result + 1e-6 for result in run()]


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (fails, "RuntimeError: operation not permitted when stream is capturing"),
        (replays_something_else, "a replay differs from the network's own result"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_or_is_refused(capture: Any, reason: str) -> None:
    unet = network()
    graphed = GraphedDenoiser(unet, capture, required=False)
    for seed in range(2):
        inputs = call(unet, seed)
        assert torch.equal(graphed(**inputs), unet(**inputs))
    assert graphed.refused == reason
    with pytest.raises(BackendError, match=f"cannot be used here: {reason}; leave cuda_graph out"):
        GraphedDenoiser(unet, capture)(**call(unet, 0))
