"""What ships works: its size, its exactness, its pictures, and the commands that show it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualdiff_engine import Engine, adapters, cli
from dualdiff_engine import pictures as sheet
from dualdiff_engine.demo.factory.samples import make
from dualdiff_engine.demo.presets import BASE, MODEL, PRESETS, SAMPLING, Preset, find
from dualdiff_engine.demo.train.adapters import OPTIONS, PICTURES
from support import relative


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(BASE)


def test_ships_within_thirty_megabytes() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".txt"}
    assert sum(path.stat().st_size for path in files) <= 30_000_000


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_adapters_are_as_their_records_say(preset: Preset) -> None:
    adapter = adapters.load(preset.adapter)
    record = json.loads((preset.adapter / "training.json").read_text())
    assert record["adapter"]["sha256"] == adapter.sha256
    assert adapter.has_background == preset.background == record["options"]["background"]
    assert adapter.rank == record["options"]["rank"] == OPTIONS["rank"]
    pictures = [row["file"] for row in record["data"] if row["file"].startswith("test/")]
    assert len(pictures) == PICTURES == 8
    assert sum(p.background for p in PRESETS.values()) >= 2


@pytest.mark.parametrize("name", PRESETS)
def test_folded_and_unfolded_networks_agree(engine: Engine, name: str) -> None:
    """End to end: what was trained, and what the engine made of its file."""
    from safetensors.torch import load_file

    from dualdiff_engine.base_model import BaseModel
    from dualdiff_engine.training.network import TrainableNetwork
    from dualdiff_engine.training.options import TrainingOptions

    preset = find(name)
    options = TrainingOptions(
        defect=preset.defect,
        background=preset.background,
        **{key: OPTIONS[key] for key in ("rank", "blend_width")},
    )
    unfolded = TrainableNetwork(BaseModel(BASE), options, torch.device("cpu"), torch.float32)
    unfolded.load(load_file(preset.adapter / "pytorch_lora_weights.safetensors"))
    engine.load_adapter(preset.adapter, name)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 2, 4, 32, 32, generator=generator)
    background = torch.randn(1, 4, 32, 32, generator=generator) if preset.background else None
    with torch.inference_mode():
        context = engine.encode_prompts(preset.prompts)[:, 1:]
        repeated = background.repeat(2, 1, 1, 1) if background is not None else None
        for timestep in (981, 501, 21):
            steps = torch.full((2,), timestep)
            expected = unfolded(latents, steps, context.repeat(1, 2, 1, 1), repeated)
            noise = engine.predict_noise(latents[:, None], timestep, context, background)
            assert relative(noise[:, 0], expected) <= 5e-6
    engine.unload_adapter(name)


def test_pictures_show_the_defect_where_the_mask_says(engine: Engine) -> None:
    preset = find("fabric/stain")
    engine.load_adapter(preset.adapter, "stain")
    pairs = engine.generate(seeds=[0, 1], output_type="np", **preset.options())
    engine.unload_adapter("stain")
    assert not any(pair.empty_mask for pair in pairs)
    for pair in pairs:
        inside = pair.mask > 0
        assert 0.01 < inside.mean() < 0.25
        difference = np.abs(pair.image - pair.anomaly).mean(axis=2)
        # the branches draw the same thing there, unlike black, and the anomaly picture nothing
        # elsewhere
        assert difference[inside].mean() < pair.image[inside].mean() / 2
        assert pair.anomaly[~inside].mean() < 0.05


def test_demo_writes_pairs_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["demo", "--out", str(out), "--count", "2", "--steps", "2"]) == 0
    rows = [json.loads(line) for line in (out / "manifest.jsonl").open()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert [row["recipe"]["prompts"]["image"] for row in rows] == [
        "a washer with a piece of sks"
    ] * 2
    assert Image.open(out / "sheet.png").size == (
        2 * 128 + sheet.GAP,
        3 * 128 + 2 * sheet.GAP + sheet.CAPTION,
    )
    assert str(out / "sheet.png") in capsys.readouterr().out


def test_generate_takes_a_demo_and_the_users_choices(tmp_path: Path) -> None:
    words = ["generate", "--demo", "washer/stain", "--out", str(tmp_path), "--seed", "4", "--quiet"]
    assert cli.main([*words, "--steps", "1"]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "manifest.jsonl").open())
    sampling = row["recipe"]["sampling"]
    assert (sampling["steps"], sampling["guidance"]) == (1, SAMPLING["guidance"])
    assert row["recipe"]["prompts"]["image"] == "a washer with a piece of sks"
    assert row["recipe"]["background"]["noise"] == "fixed"
    assert Path(row["recipe"]["base"]["source"]) == BASE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--demo", "gear/dent"], "no demo 'gear/dent': choose one of washer/chip"),
        (["--demo", "tile/chip", "--base", "x"], "leave out --base and --adapter"),
        ([], "pass --base and --adapter, --base with a bundle, or --demo"),
        (["--base", "x"], "pass --adapter: x is not a bundle"),
    ],
)
def test_unusable_choices_are_told_before_anything_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["generate", *words, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_overlay_tints_the_mask_and_nothing_else() -> None:
    product = make("tile", "chip", seed=1)
    image, mask = Image.fromarray(product.image), Image.fromarray(product.mask)
    shown = np.asarray(sheet.overlay(image, mask))
    changed = (shown != product.image).any(axis=2)
    assert changed[product.mask > 0].all()
    far = np.ones_like(changed)
    rows, columns = np.nonzero(product.mask)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            far[np.clip(rows + down, 0, 127), np.clip(columns + right, 0, 127)] = False
    assert not changed[far].any()


def test_a_wider_decoder_starts_as_the_old_one_and_leaves_the_latents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dualdiff_engine.demo.train import autoencoder, decoder, material

    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        old = autoencoder.build().eval()
        wide = decoder.widen(old)
        marked = material.marked_pictures(3, 0)
        pictures, masks = (
            autoencoder.as_tensor(marked[0]),
            torch.from_numpy(np.stack(marked[1])) > 0,
        )
        shown = decoder.shown(wide, pictures, masks)
        latents = autoencoder.encode(old, pictures)
        with torch.no_grad():
            before, after = (vae.decode(latents).sample for vae in (old, wide))
        # fp32 sums in another order
        assert torch.allclose(shown.latents, latents, atol=1e-5 * float(latents.abs().max()))
        assert torch.allclose(after, before, atol=1e-5 * float(before.abs().max()))
        monkeypatch.setattr(decoder, "STEPS", 3)
        monkeypatch.setattr(decoder, "CROP_STEPS", 2)
        monkeypatch.setattr(decoder, "BATCH", 2)
        monkeypatch.setattr(decoder, "WHOLE_BATCH", 1)
        decoder.train(wide, shown, 0, lambda line: None)
        assert torch.equal(autoencoder.encode(wide, pictures), shown.latents)
        with torch.no_grad():
            assert not torch.allclose(wide.decode(latents).sample, after, atol=1e-3)


def test_recipes_of_the_base_make_a_folder_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed recipe runs end to end, for a step each."""
    from dualdiff_engine.demo.train import autoencoder, base, decoder, denoiser

    for kind in ("AUTOENCODER", "DECODER", "DENOISER", "TEST", "DECODER_TEST"):
        monkeypatch.setattr(base, f"{kind}_PICTURES", 3)
    monkeypatch.setattr(decoder, "STEPS", 2)
    monkeypatch.setattr(decoder, "CROP_STEPS", 1)
    monkeypatch.setattr(decoder, "BATCH", 1)
    monkeypatch.setattr(decoder, "WHOLE_BATCH", 1)
    monkeypatch.setattr(autoencoder, "STEPS", 2)
    monkeypatch.setattr(autoencoder, "CROP_STEPS", 1)
    monkeypatch.setattr(denoiser, "STEPS", 2)
    # bfloat16 is slow on processors without such instructions
    monkeypatch.setattr(denoiser, "BATCH", 2)
    threads = torch.get_num_threads()
    try:
        base.main([str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "training.json").read_text())
    assert set(record) == {"autoencoder", "decoder", "denoiser"}
    assert set(record["decoder"]["unseen_psnr_db"]) == {"before", "after"}
    with Engine.from_pretrained(tmp_path) as engine:
        engine.load_adapter(find("fabric/hole").adapter)
        assert len(engine.generate(seeds=[1], steps=1)) == 1
