"""The engine API: seeds, batches, schedulers, adapters, callbacks, memory, wrong arguments."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dualdiff_engine import (
    AdapterError,
    BackendError,
    Background,
    BaseModelError,
    Engine,
    OutOfMemoryError,
    Pair,
    PairError,
    Prompts,
    SettingsError,
    adapters,
)
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.ops import bind
from support import DATA, Recorder, golden_engine, relative

QUICK: dict[str, Any] = {"steps": 3, "size": 64}


def pixels(pair: Pair) -> np.ndarray:
    return np.stack([np.asarray(pair.image), np.asarray(pair.anomaly)]).astype(int)


def surroundings(**options: Any) -> Background:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    return Background(picture, mask, **options)


def other_adapter(folder: Path) -> Path:
    """The dual golden adapter with every tensor changed."""
    tensors = torch.load(DATA / "dual/adapter/pytorch_lora_weights.bin", weights_only=True)
    path = folder / "other.safetensors"
    save_file({name: 1.1 * tensor + 0.01 for name, tensor in tensors.items()}, path)
    return path


def test_pair_and_recipe(dual: Engine) -> None:
    (pair,) = dual.generate(seeds=[7], **QUICK)
    assert isinstance(pair.image, Image.Image)
    assert (pair.image.mode, pair.anomaly.mode, pair.mask.mode) == ("RGB", "RGB", "L")
    assert pair.image.size == pair.anomaly.size == pair.mask.size == (64, 64)
    assert set(np.unique(np.asarray(pair.mask))) <= {0, 255}
    recipe = json.loads(json.dumps(pair.recipe))
    assert recipe["seed"] == pair.seed == 7
    assert recipe["sampling"] == {
        "steps": 3,
        "guidance": 2.5,
        "scheduler": "PNDMScheduler",
        "height": 64,
        "width": 64,
    }
    assert recipe["prompts"] == {"image": "a vfx with sks", "anomaly": "sks", "negative": ""}
    assert len(recipe["base"]["sha256"]) == len(recipe["adapter"]["sha256"]) == 64
    assert recipe["background"] is None
    assert recipe["backends"] == {row.op: row.backend for row in bind().table}
    assert recipe["versions"]["torch"] == torch.__version__


def test_seeds_may_come_first(dual: Engine) -> None:
    assert [pair.seed for pair in dual.generate([5, 6], **QUICK)] == [5, 6]
    assert len({pair.seed for pair in dual.generate(3, **QUICK)}) == 3


def test_output_types_agree(dual: Engine) -> None:
    pil, numpy, tensor = (
        dual.generate(seeds=[7], output_type=kind, **QUICK)[0] for kind in ("pil", "np", "pt")
    )
    assert numpy.image.shape == (64, 64, 3)
    assert numpy.image.dtype == np.float32
    assert tensor.image.shape == (3, 64, 64)
    assert np.array_equal(np.asarray(pil.image), np.round(numpy.image * 255).astype(np.uint8))
    assert np.array_equal(numpy.image, tensor.image.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(pil.mask), numpy.mask)
    assert np.array_equal(numpy.mask, tensor.mask.numpy())


@pytest.mark.parametrize("case", ["dual", "bcm"])
def test_a_pair_is_a_function_of_its_seed(case: str, engine_of: Any) -> None:
    engine = engine_of(case)
    options = {**QUICK, **({"background": surroundings()} if case == "bcm" else {})}
    alone = {seed: engine.generate(seeds=[seed], **options)[0] for seed in (1, 2, 3)}
    for seeds, batch in (([3, 1, 2], 3), ([2, 3, 1], 2), ([1, 1], 2)):
        for pair in engine.generate(seeds=seeds, batch=batch, **options):
            # fp32 on a CPU: at most one grey level, anywhere
            assert np.abs(pixels(pair) - pixels(alone[pair.seed])).max() <= 1
    assert np.abs(pixels(alone[1]) - pixels(alone[2])).max() > 1


def test_stochastic_schedulers_draw_per_pair(dual: Engine) -> None:
    options = {**QUICK, "scheduler": "EulerAncestralDiscreteScheduler"}
    alone = {seed: dual.generate(seeds=[seed], **options)[0] for seed in (1, 2)}
    for pair in dual.generate(seeds=[2, 1], **options):
        assert np.abs(pixels(pair) - pixels(alone[pair.seed])).max() <= 1


def test_every_scheduler_of_the_base_runs(dual: Engine) -> None:
    tried = []
    for kind in dual.base.scheduler.compatibles:
        try:
            dual.base.make_scheduler(kind.__name__)
        except SettingsError:
            # those that need a package which is not there
            continue
        (pair,) = dual.generate(seeds=[0], steps=4, size=64, scheduler=kind.__name__)
        tried.append(kind.__name__)
        assert np.isfinite(pixels(pair)).all()
    assert len(tried) >= 12


def test_without_guidance_only_prompted_rows_run(dual: Engine) -> None:
    rows = []
    hook = dual.unet.conv_out.register_forward_hook(lambda m, i, o: rows.append(o.shape[0]))
    try:
        for guidance in (1.0, 0.0, 2.5):
            dual.generate(seeds=[1], guidance=guidance, steps=1, size=64)
    finally:
        hook.remove()
    # PNDM's single step calls once; two branches, then twice as many rows
    assert sorted(set(rows)) == [2, 4]
    assert rows.count(2) == 2 * rows.count(4)


def test_sizes_need_not_be_square(dual: Engine) -> None:
    (pair,) = dual.generate(seeds=[1], steps=1, size=(72, 104))
    assert pair.image.size == (104, 72)
    assert pair.mask.size == (104, 72)


def test_large_pictures_are_decoded_as_exactly_as_small_ones(dual: Engine) -> None:
    """Rounding is a matter of depth; PyTorch's GroupNorm, channels last, adds the map's size."""
    exact = copy.deepcopy(dual.vae).double()
    lost = []
    for side in (16, 64):
        latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
        lost.append(
            relative(dual.vae.decode(latents).sample, exact.decode(latents.double()).sample)
        )
    assert lost[1] <= 2 * lost[0]


def test_prompts_change_the_picture(dual: Engine) -> None:
    default, changed, negative = (
        dual.generate(seeds=[1], prompts=prompts, **QUICK)[0]
        for prompts in (None, ("sks", "sks"), Prompts(negative="blurry"))
    )
    assert np.abs(pixels(default) - pixels(changed)).max() > 0
    assert np.abs(pixels(default) - pixels(negative)).max() > 0


def test_switching_adapters_leaves_no_trace(tmp_path: Path) -> None:
    engine = golden_engine("dual")
    before = engine.generate(seeds=[1], output_type="pt", **QUICK)[0]
    first = engine.active_adapter
    assert engine.load_adapter(other_adapter(tmp_path)) == "other"
    other = engine.generate(seeds=[1], output_type="pt", **QUICK)[0]
    assert engine.adapters == [first, "other"]
    engine.set_adapter(first)
    again = engine.generate(seeds=[1], output_type="pt", **QUICK)[0]
    assert torch.equal(before.image, again.image)
    assert torch.equal(before.anomaly, again.anomaly)
    assert not torch.equal(before.image, other.image)
    assert other.recipe["adapter"]["source"].endswith("other.safetensors")
    engine.unload_adapter(first)
    with pytest.raises(SettingsError, match="no adapter is active"):
        engine.generate()
    with pytest.raises(SettingsError, match=r"no adapter 'adapter' is loaded \(loaded: other\)"):
        engine.set_adapter("adapter")


def test_graphs_draw_the_same_pairs(tmp_path: Path) -> None:
    """A recorder stands for the capture: what the loop passes must be copied, or it shows."""
    plain, graphed, recorder = golden_engine("dual"), golden_engine("dual"), Recorder()
    graphed.denoiser = GraphedDenoiser(graphed.unet, recorder)
    other = other_adapter(tmp_path)
    for seed, name in ((1, "adapter"), (2, "other"), (2, "adapter")):
        for engine in (plain, graphed):
            if name not in engine.adapters:
                engine.load_adapter(other)
            engine.set_adapter(name)
        ours, theirs = (
            e.generate(seeds=[seed], output_type="pt", **QUICK)[0] for e in (graphed, plain)
        )
        assert torch.equal(ours.image, theirs.image)
        assert torch.equal(ours.anomaly, theirs.anomaly)
    assert recorder.captures == 1


def test_switching_under_a_running_stream_is_refused(tmp_path: Path) -> None:
    engine = golden_engine("dual")
    stream = engine.stream([1, 2], batch=1, **QUICK)
    next(stream)
    engine.load_adapter(other_adapter(tmp_path))
    with pytest.raises(SettingsError, match="'adapter', which is no longer active: finish"):
        next(stream)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/bottle_broken.safetensors", "bottle_broken"),
        ("a/bottle_broken/pytorch_lora_weights.bin", "bottle_broken"),
        ("a/bottle_broken", "bottle_broken"),
        ("a/bottle_broken/checkpoint-500", "bottle_broken/checkpoint-500"),
        ("a/bottle/checkpoint-500/pytorch_lora_weights.safetensors", "bottle/checkpoint-500"),
    ],
)
def test_adapters_are_called_by_what_tells_them_apart(source: str, name: str) -> None:
    assert adapters.default_name(source) == name


def test_a_name_is_not_taken_twice(dual: Engine) -> None:
    with pytest.raises(SettingsError, match="an adapter 'adapter' is loaded: unload it, or pass"):
        dual.load_adapter(DATA / "dual/adapter", allow_pickle=True)


def test_a_refused_adapter_changes_nothing(dual: Engine) -> None:
    before = dual.generate(seeds=[1], output_type="pt", **QUICK)[0]
    with pytest.raises(AdapterError, match="is a pickle"):
        dual.load_adapter(DATA / "bcm/adapter", name="other")
    after = dual.generate(seeds=[1], output_type="pt", **QUICK)[0]
    assert torch.equal(before.image, after.image)


def test_callback_may_change_latents(dual: Engine) -> None:
    seen = []

    def zero_last(engine: Engine, step: int, timestep: Any, inputs: dict[str, Any]) -> Any:
        seen.append((step, int(timestep), tuple(inputs["latents"].shape)))
        return {"latents": torch.zeros_like(inputs["latents"])}

    first, second = dual.generate(seeds=[1, 2], callback_on_step_end=zero_last, **QUICK)
    assert [s[0] for s in seen] == list(range(len(seen)))
    assert {s[2] for s in seen} == {(2, 2, 4, 8, 8)}
    assert np.array_equal(pixels(first), pixels(second))


def test_interrupt_keeps_finished_pairs(dual: Engine) -> None:
    calls = []

    def stop_in_second_batch(engine: Engine, step: int, *_: Any) -> None:
        calls.append(step)
        if len(calls) == 6:
            engine.interrupt()

    pairs = dual.generate(
        seeds=[1, 2, 3], batch=1, callback_on_step_end=stop_in_second_batch, **QUICK
    )
    assert [pair.seed for pair in pairs] == [1]
    assert len(dual.generate(seeds=[1], **QUICK)) == 1


def test_stream_hands_pairs_out_as_they_finish(dual: Engine) -> None:
    calls = []
    stream = dual.stream(
        seeds=[1, 2], batch=1, callback_on_step_end=lambda *a: calls.append(a[1]), **QUICK
    )
    assert calls == []
    assert next(stream).seed == 1
    half = len(calls)
    assert next(stream).seed == 2
    assert len(calls) == 2 * half


def machine_for(most: int, real: Any) -> Any:
    """A denoiser that runs out of memory above a batch."""

    def forward(self: Any, latents: Any, *rest: Any) -> Any:
        if latents.shape[2] > most:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(self, latents, *rest)

    return forward


def test_a_batch_that_does_not_fit_is_halved_and_drawn_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = golden_engine("dual")
    expected = engine.generate(seeds=range(5), batch=1, scheduler="DDPMScheduler", **QUICK)
    real = type(engine.unet).forward
    monkeypatch.setattr(type(engine.unet), "forward", machine_for(1, real))
    pairs = engine.generate(seeds=range(5), batch=4, scheduler="DDPMScheduler", **QUICK)
    assert [pair.seed for pair in pairs] == list(range(5))
    for one, other in zip(expected, pairs, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    # told once
    assert [record.args for record in caplog.records] == [(4, 2)]


def test_out_of_memory_at_one_pair_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = golden_engine("dual")
    real = type(engine.unet).forward
    monkeypatch.setattr(type(engine.unet), "forward", machine_for(0, real))
    with pytest.raises(OutOfMemoryError, match="batch of 1 pair: not even one pair fits"):
        engine.generate(seeds=range(4), batch=4, **QUICK)


def test_a_pair_that_is_not_finite_is_raised_or_handed_out(dual: Engine) -> None:
    def spoil(engine: Engine, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        if step == 1:
            tensors["latents"][1] = float("nan")
        return tensors

    faults: list[Any] = []
    options = {"batch": 3, "callback_on_step_end": spoil, **QUICK}
    pairs = dual.generate(seeds=[1, 2, 3], on_fault=faults.append, **options)
    good, _, too = dual.generate(seeds=[1, 2, 3], batch=3, **QUICK)
    assert [pair.seed for pair in pairs] == [1, 3]
    for one, other in zip((good, too), pairs, strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    assert [fault.seed for fault in faults] == [2]
    assert "not finite from step 1 on, in float32" in faults[0].reason
    with pytest.raises(PairError, match=r"seed 2 cannot be used: .* not finite from step 1"):
        dual.generate(seeds=[1, 2, 3], **options)


def test_given_latents_must_be_finite(dual: Engine) -> None:
    latents = torch.zeros(1, 2, 4, 8, 8)
    latents[0, 1, 2, 3, 4] = float("inf")
    with pytest.raises(SettingsError, match="latents holds NaN or infinity"):
        dual.generate(latents=latents, **QUICK)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"latents": None}, "returned latents NoneType"),
        ({"latents": torch.zeros(1)}, r"returned latents \[1\]: return a tensor \[1, 2, 4"),
    ],
)
def test_a_callback_must_hand_back_latents(dual: Engine, returned: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dual.generate(seeds=[1], callback_on_step_end=lambda *_: returned, **QUICK)


@pytest.mark.parametrize("change", ["set_adapter", "unload_adapter", "load_adapter", "generate"])
def test_nothing_changes_under_a_running_batch(dual: Engine, change: str) -> None:
    name = dual.active_adapter
    calls = {
        "set_adapter": lambda engine: engine.set_adapter(name),
        "unload_adapter": lambda engine: engine.unload_adapter(name),
        "load_adapter": lambda engine: engine.load_adapter(
            DATA / "dual" / "adapter", "again", allow_pickle=True
        ),
        "generate": lambda engine: engine.generate(seeds=[9], **QUICK),
    }
    with pytest.raises(SettingsError, match="the engine is drawing"):
        dual.generate(
            seeds=[1], callback_on_step_end=lambda engine, *_: calls[change](engine), **QUICK
        )
    assert dual.adapters == [name]
    assert len(dual.generate(seeds=[1], **QUICK)) == 1


def test_another_file_under_the_same_name_ends_a_stream() -> None:
    engine = golden_engine("dual")
    name = engine.active_adapter
    stream = engine.stream(seeds=[1, 2], batch=1, **QUICK)
    next(stream)
    engine.unload_adapter(name)
    engine.load_adapter(DATA / "dual" / "adapter", name, allow_pickle=True)
    with pytest.raises(SettingsError, match="no longer active"):
        next(stream)


def test_an_interruption_before_a_run_is_not_lost(dual: Engine) -> None:
    dual.interrupt()
    assert dual.generate(seeds=[1], **QUICK) == []
    assert len(dual.generate(seeds=[1], **QUICK)) == 1


def test_other_errors_are_not_taken_for_memory(
    dual: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(type(dual.unet), "forward", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dual.generate(seeds=[1], **QUICK)


def test_close_drops_the_weights() -> None:
    with golden_engine("dual") as engine:
        assert engine.generate(seeds=[1], **QUICK)
    assert all(p.is_meta for p in engine.unet.parameters())
    with pytest.raises(SettingsError, match="no adapter is active"):
        engine.generate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a positive whole number, got 0"),
        ({"n": "3"}, "n must be a positive whole number, got '3'"),
        ({"n": 2.5}, "n must be a positive whole number"),
        ({"n": 3, "seeds": [1]}, "n is 3 but there are 1 seeds"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [-1]}, "seed must be from 0 to"),
        ({"seeds": ["7"]}, "seed must be a whole number, got '7'"),
        ({"seeds": [2**63]}, "seed must be from 0 to"),
        ({"batch": 0}, "batch must be from 1 to 4"),
        ({"batch": 5}, r"batch must be from 1 to 4 \(max_batch of the engine\), got 5"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000"),
        ({"steps": 2.0}, "steps must be a whole number"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"scheduler": "Euler"}, "no scheduler 'Euler': choose one of DDIMScheduler"),
        ({"size": 65}, "height must be a multiple of 8"),
        ({"size": (64, 0)}, "width must be a multiple of 8"),
        ({"size": "64"}, r"size must be one number or \(height, width\)"),
        ({"prompts": "sks"}, "prompts must be Prompts"),
        ({"prompts": (1, 2)}, "prompt 'image' must be text"),
        ({"prompts": ("sks " * 200, "sks")}, "tokens, at most 77"),
        ({"output_type": "jpg"}, "output_type must be one of pil, np, pt"),
        ({"segmenter": "no.onnx"}, "no.onnx"),
        ({"background": surroundings()}, "trained without background: leave it out"),
        ({"background_noise": torch.zeros(1)}, "background_noise needs a background"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents must be .* \['n', 2, 4, 8, 8\], got"),
        ({"latents": torch.zeros(2, 2, 4, 8, 8), "n": 3}, "latents hold 2 pairs, asked for 3"),
        ({"latents": [1]}, "latents must be a floating-point tensor"),
    ],
)
def test_wrong_requests(dual: Engine, options: dict[str, Any], message: str) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("computed before checking")

    n = options.pop("n", None)
    before = options.copy()
    with pytest.raises((SettingsError, ValueError), match=message):
        dual.generate(n, **{"size": 64, "callback_on_step_end": never, **options})
    options.update(before, n=n) if n is not None else options.update(before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": "nowhere/at/all"}, BaseModelError, "no base model at 'nowhere/at/all'"),
        ({"base": "someone/unknown-model"}, BaseModelError, "could not be downloaded"),
        ({"base": DATA}, BaseModelError, "has no unet/"),
        ({"adapter": "missing.safetensors"}, AdapterError, "no adapter at 'missing.safetensors'"),
        ({"adapter": DATA / "bcm/adapter"}, AdapterError, "dualdiff convert"),
        ({"dtype": "int8"}, SettingsError, "dtype must be auto, float32"),
        ({"dtype": "float16"}, SettingsError, "float16 on a CPU"),
        ({"device": "tpu"}, SettingsError, "no device 'tpu'"),
        ({"device": "mps"}, SettingsError, "device 'mps' is not supported"),
        ({"backend": "fastest"}, BackendError, "no backend is called 'fastest'"),
        ({"cuda_graph": True}, SettingsError, "cuda_graph needs an NVIDIA GPU"),
        ({"tf32": True}, SettingsError, "tf32 is for float32 on a GPU"),
        ({"tune": "always"}, SettingsError, "tune must be one of auto, never"),
        ({"max_batch": 0}, SettingsError, "max_batch must be a positive whole number"),
    ],
)
def test_wrong_engines(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine.from_pretrained(**{"base": DATA / "dual/model", "device": "cpu", **options})


def copy_of_base(folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(DATA / "dual/model", folder / "model"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", None, "has no diffusion_pytorch_model"),
        ("unet/diffusion_pytorch_model.safetensors", b"not a model", "not a valid safetensors"),
        ("unet/config.json", b"{", "config.json cannot be read"),
        ("unet/config.json", b"[]", "is not a JSON object"),
        ("vae/diffusion_pytorch_model.safetensors", None, "has no diffusion_pytorch_model"),
        ("text_encoder/model.safetensors", None, "has no model.safetensors: download"),
        ("tokenizer/vocab.json", None, "vocab.json is missing: download"),
        (
            "scheduler/scheduler_config.json",
            b'{"_class_name": "os"}',
            "is not a scheduler of Stable Diffusion",
        ),
    ],
)
def test_damaged_bases(tmp_path: Path, file: str, change: bytes | None, message: str) -> None:
    base = copy_of_base(tmp_path)
    (base / file).unlink()
    if change is not None:
        (base / file).write_bytes(change)
    with pytest.raises(BaseModelError, match=message):
        Engine.from_pretrained(base).base.scheduler  # noqa: B018


def test_base_without_a_tensor(tmp_path: Path) -> None:
    base = copy_of_base(tmp_path)
    path = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["mid_block.resnets.1.norm1.weight"]
    save_file(tensors, path)
    with pytest.raises(BaseModelError, match=r"mid_block\.resnets\.1\.norm1\.weight"):
        Engine.from_pretrained(base)
    tensors["mid_block.resnets.1.norm1.weight"] = torch.ones(3)
    save_file(tensors, path)
    with pytest.raises(BaseModelError, match=r"norm1.* by its config.json it should have"):
        Engine.from_pretrained(base)


def test_adapter_of_another_base(dual: Engine, tmp_path: Path) -> None:
    tensors = torch.load(DATA / "dual/adapter/pytorch_lora_weights.bin", weights_only=True)
    kept = {k: v for k, v in tensors.items() if "mid_block" not in k}
    path = tmp_path / "half.safetensors"
    save_file(kept, path)
    assert adapters.load(path).rank == 4
    with pytest.raises(AdapterError, match=r"unet\.mid_block.* is missing"):
        dual.load_adapter(path)
