"""Bundles: written, run without the base model, verified, and refused when damaged."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualdiff_engine import Engine, Prompts
from dualdiff_engine.cli import main
from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.export.folder.bundle import add_adapter
from dualdiff_engine.export.folder.folded import trained_prompts
from dualdiff_engine.export.folder.verify import verify_bundle
from small import PICTURES, other_adapter
from support import DATA, Golden, run_pipeline


@pytest.fixture
def copy(bundle: Any, copy_of: Any) -> Path:
    return copy_of(bundle("dual"))


def test_golden_without_the_base_model(golden: Golden, bundle: Any) -> None:
    """Text encoder, denoiser, VAE: everything by ONNX Runtime."""
    with Engine.from_bundle(bundle(golden.name)) as engine:
        embeddings = engine.encode_prompts()
        expected = golden.pipeline["prompt_embeds_blend"]
        assert float((embeddings[0] - expected).abs().max()) <= 5e-6
        _, pictures = run_pipeline(engine, golden)
    assert float((pictures - golden.pipeline["image"]).abs().max()) <= PICTURES


def test_it_says_what_it_chose(bundle: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dualdiff_engine")
    engine = Engine.from_bundle(bundle("dual"))
    (row,) = [row for row in engine.ops.table if row.op == "attention"]
    assert row.backend == "onnxruntime"
    assert row.reason == "CPUExecutionProvider: there is no GPU that PyTorch sees"
    assert "CPUExecutionProvider" in caplog.text


def test_background_pictures(bundle: Any, engine_of: Any) -> None:
    """A picture through the exported VAE encoder and background encoder."""
    import numpy as np

    from dualdiff_engine import Background

    picture = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    options: dict[str, Any] = {
        "background": Background(picture, noise="fixed"), "steps": 2, "output_type": "pt",
    }  # fmt: skip
    ours = Engine.from_bundle(bundle("bcm")).generate([4], **options)
    eager = engine_of("bcm").generate([4], **options)
    assert float((ours[0].image - eager[0].image).abs().max()) <= PICTURES


def test_a_preset(bundle: Any, dual: Engine) -> None:
    options: dict[str, Any] = {"preset": "draft", "output_type": "pt"}
    ours, eager = (
        e.generate([4], **options)[0] for e in (Engine.from_bundle(bundle("dual")), dual)
    )
    assert ours.recipe["calls"] == 10
    assert ours.recipe["preset"] == {"name": "draft", "gate": "not measured"}
    assert float((ours.image - eager.image).abs().max()) <= PICTURES


def test_placements(bundle: Any, engine_of: Any) -> None:
    """A picture per pair, and with background a background per pair, in one batch."""
    import numpy as np

    from dualdiff_engine import Placement

    region = np.zeros((128, 128), np.uint8)
    region[32:80, 40:96] = 255
    options: dict[str, Any] = {"steps": 2, "batch": 2, "output_type": "pt"}
    for case in ("dual", "bcm"):
        each = [
            Placement(
                np.random.default_rng(n).integers(0, 255, (128, 128, 3), dtype=np.uint8),
                region, object_mask=np.pad(region[16:-16, 16:-16], 16),
            )
            for n in range(2)
        ]  # fmt: skip
        wide = np.random.default_rng(2).integers(0, 255, (128, 200, 3), dtype=np.uint8)
        each.append(Placement(wide, np.pad(region, ((0, 0), (72, 0))), "all", window=1.5))
        ours = Engine.from_bundle(bundle(case)).generate([4, 5, 6], placement=each, **options)
        eager = engine_of(case).generate([4, 5, 6], placement=each, **options)
        # the pixels of a window are grey levels
        for one, other, rounding in zip(ours, eager, (0, 0, 1 / 255), strict=True):
            assert one.recipe["placement"] == other.recipe["placement"]
            assert float((one.image - other.image).abs().max()) <= PICTURES + rounding
        assert ours[2].recipe["window"] == eager[2].recipe["window"]
        assert ours[2].image.shape == (3, 128, 200)


def test_a_bundle_of_before_says_what_a_placement_needs(copy: Path) -> None:
    import numpy as np

    from dualdiff_engine import Placement

    (copy / "vae_encoder.onnx").unlink()
    manifest = json.loads((copy / "bundle.json").read_text())
    del manifest["files"]["vae_encoder.onnx"]
    (copy / "bundle.json").write_text(json.dumps(manifest))
    picture = np.zeros((64, 64, 3), np.uint8)
    own = Placement(picture, np.pad(np.full((32, 32), 255, np.uint8), 16))
    with (
        Engine.from_bundle(copy) as engine,
        pytest.raises(BackendError, match=r"no vae_encoder\.onnx, which this request needs: write"),
    ):
        engine.generate([1], placement=own, steps=1)


def test_manifest(bundle: Any) -> None:
    folder = bundle("bcm")
    manifest = json.loads((folder / "bundle.json").read_text())
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == there - {"bundle.json"}
    assert manifest["adapters"].keys() == {manifest["first"]}
    assert "tokenizer/vocab.json" in there
    assert "scheduler/scheduler_config.json" in there
    # nothing of the machine that wrote it
    assert str(DATA) not in (folder / "bundle.json").read_text()
    assert not [
        p for p in folder.rglob("*") if p.is_file() and str(DATA).encode() in p.read_bytes()
    ]


def test_verify(golden: Golden, bundle: Any) -> None:
    report = verify_bundle(bundle(golden.name))
    denoiser = "denoiser_background" if golden.background else "denoiser"
    assert {name.split("/")[1] for name in report["parity"]} == {
        "text_encoder", denoiser, "vae_decoder",
    }  # fmt: skip
    assert all(row["error"] <= row["tolerance"] for row in report["parity"].values())


def test_another_adapter_joins(copy: Path, tmp_path: Path) -> None:
    """As many tensors, other values; both are resident, and verified."""
    other = other_adapter(tmp_path / "other.safetensors")
    report = add_adapter(DATA / "dual" / "model", other, copy)
    assert report["graphs"]["denoiser"]["adapters"].keys() == {"adapter", "other"}
    assert len(verify_bundle(copy)["parity"]) == 6
    first, second = (
        load_file(copy / "adapters" / f"{n}.safetensors") for n in ("adapter", "other")
    )
    assert {n: (t.shape, t.dtype) for n, t in first.items()} == {
        n: (t.shape, t.dtype) for n, t in second.items()
    }
    engine = Engine.from_bundle(copy)
    assert engine.adapters == ["other", "adapter"]
    assert engine.active_adapter == "adapter"
    engine.set_adapter("other")
    eager = Engine.from_pretrained(DATA / "dual" / "model", adapter=other)
    options: dict[str, Any] = {"steps": 2, "output_type": "pt"}
    ours, theirs = engine.generate([1], **options)[0], eager.generate([1], **options)[0]
    assert float((ours.image - theirs.image).abs().max()) <= PICTURES
    assert ours.recipe["adapter"] == {**theirs.recipe["adapter"], "source": "other.safetensors"}
    with pytest.raises(SettingsError, match="holds an adapter 'other'"):
        add_adapter(DATA / "dual" / "model", other, copy)
    with pytest.raises(BackendError, match="another base model"):
        add_adapter(DATA / "bcm" / "model", other, copy, name="third")


def test_prompts_of_the_training_are_the_default(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recorded from the training's record, drawn with unless others are given."""
    from dualdiff_engine.export.folder.bundle import write_manifest

    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    options = {"image_prompt": "a cap with sks", "anomaly_prompt": "sks alone"}
    record = {"adapter": {"sha256": "0" * 64}, "options": options}
    (tmp_path / "training.json").write_text(json.dumps(record))
    trained = Prompts("a cap with sks", "sks alone")
    assert trained_prompts(adapter, "0" * 64) == trained
    # a record that lies there of another adapter
    assert trained_prompts(adapter, "1" * 64) == Prompts()
    (tmp_path / "training.json").write_text("{")
    assert trained_prompts(adapter, "0" * 64) == Prompts()

    path = copy / "adapters" / "adapter.safetensors"
    metadata = {**weight_files.read_metadata(path), "prompts": asdict(trained)}
    weight_files.write(path, load_file(path), metadata)
    manifest = write_manifest(copy)
    assert manifest["adapters"]["adapter"]["prompts"] == asdict(trained)
    with Engine.from_bundle(copy) as engine:
        (pair,) = engine.generate(seeds=[1], steps=1)
        assert pair.recipe["prompts"] == asdict(trained)
        (other,) = engine.generate(seeds=[1], steps=1, prompts=("x", "y"))
        assert other.recipe["prompts"] == asdict(Prompts("x", "y"))
    out = tmp_path / "out"
    common = ["generate", "--base", str(copy), "--steps", "1", "--quiet", "--out", str(out)]
    assert main([*common, "--negative-prompt", "dark"]) == 0
    (row,) = (out / "manifest.jsonl").read_text().splitlines()
    assert json.loads(row)["recipe"]["prompts"] == asdict(replace(trained, negative="dark"))


def test_a_distilled_adapter_stays_one(copy: Path) -> None:
    """Of its file's metadata; a bundle then computes no unconditional rows."""
    from dualdiff_engine.export.folder.bundle import write_manifest

    path = copy / "adapters" / "adapter.safetensors"
    metadata = weight_files.read_metadata(path)
    assert metadata["summary"]["distilled"] is None
    told = {"guidance": 2.5, "teacher": "a" * 64, "steps": 7}
    metadata["summary"]["distilled"] = told
    weight_files.write(path, load_file(path), metadata)
    manifest = write_manifest(copy)
    assert manifest["adapters"]["adapter"]["held_guidance"] == 2.5
    with Engine.from_bundle(copy) as engine:
        assert asdict(engine.active.summary)["distilled"] == told
        (pair,) = engine.generate(seeds=[1], steps=1)
        assert pair.recipe["sampling"]["guidance"] == 1.0
        with pytest.raises(SettingsError, match=r"holds guidance 2\.5 and takes no other"):
            engine.stream(1, guidance=2.5)
    metadata["summary"]["distilled"] = {"guidance": 2.5}
    weight_files.write(path, load_file(path), metadata)
    with pytest.raises(BackendError, match="not a valid folded adapter"):
        Engine.from_bundle(copy)


def test_the_length_of_a_prompt_is_the_graphs(copy: Path) -> None:
    """Not what a tokenizer says whose length the base's text encoder had bounded."""
    from dualdiff_engine.export.folder.bundle import write_manifest

    with Engine.from_bundle(copy) as engine:
        expected = engine.encode_prompts()
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("model_max_length", None)
    path.write_text(json.dumps(config))
    assert write_manifest(copy)["text_length"] == 77
    with Engine.from_bundle(copy) as engine:
        assert engine.text_encoder.tokenizer.model_max_length == 77
        assert torch.equal(engine.encode_prompts(), expected)


def test_a_bundle_folds_nothing(bundle: Any, tmp_path: Path) -> None:
    engine = Engine.from_bundle(bundle("dual"))
    with pytest.raises(BackendError, match=r"no base weights.*dualdiff export adapter"):
        engine.load_adapter(other_adapter(tmp_path / "other.safetensors"))
    with pytest.raises(BackendError, match="holds no adapter 'nobody'; it holds adapter"):
        Engine.from_bundle(bundle("dual"), adapter="nobody")


def test_damage_is_found(copy: Path) -> None:
    path = copy / "network.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    # of the same size: seen by its hash
    Engine.from_bundle(copy)
    with pytest.raises(
        BackendError, match=r"network\.safetensors differs from the file that the bundle was"
    ):
        verify_bundle(copy)
    path.write_bytes(content[:-1])
    with pytest.raises(
        BackendError, match=r"network\.safetensors differs from the file that the bundle was"
    ):
        Engine.from_bundle(copy)
    path.unlink()
    with pytest.raises(BackendError, match=r"has no network\.safetensors"):
        Engine.from_bundle(copy)


@pytest.mark.parametrize(
    "name",
    [
        "denoiser_background.onnx",
        "adapters/other.safetensors",
        "tokenizer/added_tokens.json",
        "tokenizer/denoiser.plan",
        "more/vocab.json",
    ],
)
def test_a_file_that_is_not_listed_is_refused(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"{}")
    said = rf"bundle\.json does not list {name.replace('more/vocab.json', 'more')}: delete it"
    for use in (Engine.from_bundle, verify_bundle):
        with pytest.raises(BackendError, match=said):
            use(copy)
    with pytest.raises(BackendError, match=said):
        # which would list it
        add_adapter(DATA / "dual" / "model", DATA / "dual" / "adapter", copy, name="second")


def test_hidden_files_are_left_alone(copy: Path) -> None:
    """What hubs, mounted volumes and file managers leave in a folder."""
    (copy / ".cache" / "hub").mkdir(parents=True)
    for name in (".gitattributes", ".cache/hub/state", "tokenizer/.DS_Store"):
        (copy / name).write_bytes(b"x")
    Engine.from_bundle(copy)


def test_a_bundle_that_nobody_may_write_is_verified(copy: Path) -> None:
    """By mode, which root ignores, and by what is there afterwards."""
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    for path in (copy, *before):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        report = verify_bundle(copy)
        assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    finally:
        for path in (copy, *before):
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert set(report["parity"]) == {
        f"adapter/{name}" for name in ("denoiser", "text_encoder", "vae_decoder")
    }


def test_another_result_is_found(copy: Path) -> None:
    """Hashes are right, the numbers are not: as with a runtime that computes something else."""
    from dualdiff_engine.export.folder.bundle import write_manifest

    path = copy / "adapters" / "adapter.probe.safetensors"
    probe = load_file(path)
    save_file({**probe, "noise": probe["noise"] * 1.001}, path)
    write_manifest(copy)
    with pytest.raises(BackendError, match=r"denoiser with adapter adapter differs by 1\.0e-03"):
        verify_bundle(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2, this release reads 1"),
        (
            {"files": {"../outside": {"bytes": 1, "sha256": ""}}},
            "lists .* outside the bundle folder: do not use",
        ),
        ({"files": {"x": {"bytes": "1"}}}, "Invalid bundle: "),
        ({"files": []}, "Invalid bundle: "),
    ],
)
def test_manifests_that_are_refused(copy: Path, change: dict[str, Any], said: str) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(BackendError, match=said):
        Engine.from_bundle(copy)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"Invalid bundle: .*recreate it with `dualdiff export bundle`"
    ):
        Engine.from_bundle(tmp_path)


def test_command_line(bundle: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bundle("dual")
    assert main(["verify", str(folder)]) == 0
    assert "files and 0 engines unchanged" in capsys.readouterr().out
    out = tmp_path / "out"
    options = ["--steps", "1", "--quiet", "--out", str(out)]
    # the bundle's own adapter and prompts
    assert main(["generate", "--base", str(folder), *options]) == 0
    assert len(list((out / "image").iterdir())) == 1
    (row,) = (json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines())
    assert row["recipe"]["backends"]["attention"] == "onnxruntime"
    assert row["recipe"]["prompts"]["image"] == "a vfx with sks"
    named = [*options[:-1], str(tmp_path / "other"), "--adapter", "nobody"]
    assert main(["generate", "--base", str(folder), *named]) == 2
    assert "holds no adapter 'nobody'; it holds adapter" in capsys.readouterr().err
    model = str(DATA / "dual" / "model")
    assert main(["generate", "--base", model, *options]) == 2
    assert f"pass --adapter: {model} is not a bundle" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert "Invalid bundle: " in capsys.readouterr().err
