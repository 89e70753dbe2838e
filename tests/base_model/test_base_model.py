"""What people hand over as a base model: variants that load, and faults that are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualdiff_engine import BaseModelError, Engine
from dualdiff_engine.base_model import BaseModel
from hostile_bases import DEEP, LFS_POINTER, base_copy, change_json, change_tensors
from support import DATA

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
FILES = {part: f"{part}/{stem}.safetensors" for part, stem in STEMS.items()}
SCHEDULER = "scheduler/scheduler_config.json"
CPU = torch.device("cpu")


def drawn(base: Path, **options: Any) -> bytes:
    adapter = DATA / "dual/adapter"
    with Engine.from_pretrained(base, adapter=adapter, allow_pickle=True) as engine:
        return engine.generate(seeds=3, steps=1, **options)[0].image.tobytes()


@pytest.fixture(scope="module")
def want() -> bytes:
    return drawn(DATA / "dual/model")


def in_shards(path: Path, variant: str = "") -> None:
    """Split a weights file as diffusers and transformers do."""
    tensors = load_file(path)
    stem = path.name.removesuffix(".safetensors")
    names = sorted(tensors)
    halves = {f"{stem}{variant}-0000{n + 1}-of-00002.safetensors": names[n::2] for n in (0, 1)}
    for name, own in halves.items():
        save_file({key: tensors[key] for key in own}, path.with_name(name), {"format": "pt"})
    places = {key: name for name, own in halves.items() for key in own}
    index = path.with_name(f"{stem}.safetensors.index{variant}.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    path.unlink()


def test_saved_in_half_precision_alone(tmp_path: Path, want: bytes) -> None:
    base = base_copy(tmp_path)
    for file in FILES.values():
        (base / file).rename(base / file.replace(".safetensors", ".fp16.safetensors"))
    assert drawn(base) == want


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_saved_in_shards(tmp_path: Path, want: bytes, variant: str) -> None:
    base = base_copy(tmp_path)
    for file in FILES.values():
        in_shards(base / file, variant)
    assert drawn(base) == want
    assert BaseModel(base).sha256 == BaseModel(DATA / "dual/model").sha256


def test_full_precision_is_preferred(tmp_path: Path) -> None:
    base = base_copy(tmp_path)
    for file in FILES.values():
        (base / file.replace(".safetensors", ".fp16.safetensors")).write_bytes(b"not read")
    assert BaseModel(base).sha256 == BaseModel(DATA / "dual/model").sha256
    assert BaseModel(base).load_vae(CPU, torch.float32)


def test_a_vae_with_the_names_of_old_releases(tmp_path: Path, want: bytes) -> None:
    base = base_copy(tmp_path)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            for ours, theirs in old.items():
                if ours in name:
                    tensors[name.replace(ours, theirs)] = tensors.pop(name)

    change_tensors(base / FILES["vae"], rename)
    assert drawn(base) == want


@pytest.mark.parametrize("part", STEMS)
@pytest.mark.parametrize("kind", ["one gone", "half gone", "one more", "other shape", "NaN"])
def test_weights_that_are_not_those_of_the_network(tmp_path: Path, part: str, kind: str) -> None:
    """diffusers and transformers draw random numbers for tensors that a file lacks."""
    base, named = base_copy(tmp_path), []

    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in sorted(tensors, reverse=True) if "norm" in name)
        named.append(name.removeprefix("text_model."))
        if kind == "one gone":
            del tensors[name]
        elif kind == "half gone":
            named[0] = "more tensors"
            for other in sorted(tensors)[::2]:
                del tensors[other]
        elif kind == "one more":
            tensors["surplus"] = torch.ones(2)
            named[0] = "surplus"
        elif kind == "other shape":
            tensors[name] = tensors[name][1:].clone()
        else:
            tensors[name] = torch.full_like(tensors[name], float("nan"))

    change_tensors(base / FILES[part], change)
    with pytest.raises(BaseModelError, match=f"{part}/{STEMS[part]}") as caught:
        Engine.from_pretrained(base)
    assert named[0] in str(caught.value)


@pytest.mark.parametrize("part", STEMS)
@pytest.mark.parametrize(
    "dtype", ["int64", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "complex64"]
)
def test_weights_that_are_not_floating_point(tmp_path: Path, part: str, dtype: str) -> None:
    base = base_copy(tmp_path)

    def convert(tensors: dict[str, Any]) -> None:
        name = next(name for name in sorted(tensors) if "norm" in name)
        tensors[name] = tensors[name].to(getattr(torch, dtype))

    change_tensors(base / FILES[part], convert)
    with pytest.raises(BaseModelError, match=r"has dtype .* the engine reads F64, F32, F16, BF16"):
        Engine.from_pretrained(base)


@pytest.mark.parametrize("part", STEMS)
def test_half_a_download(tmp_path: Path, part: str) -> None:
    def refused(message: str, remedy: str = "download") -> None:
        with pytest.raises(BaseModelError, match=message) as caught:
            Engine.from_pretrained(base)
        assert remedy in str(caught.value)
        assert "pickle" not in str(caught.value)

    base = base_copy(tmp_path)
    path = base / FILES[part]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused("is not a valid safetensors file")
    path.write_bytes(b"")
    refused("is empty")
    path.write_bytes(LFS_POINTER)
    refused("is a Git LFS pointer", "git lfs pull")
    path.unlink()
    refused(f"has no {STEMS[part]}.safetensors")
    path.symlink_to("../../blobs/gone")
    refused("cannot be read")
    path.unlink()
    half = path.with_name("a1b2.incomplete")
    half.write_bytes(content[:100])
    refused("a1b2.incomplete is a half download")
    half.unlink()
    path.write_bytes(content)
    in_shards(path)
    next(path.parent.glob("*-00002-of-*")).unlink()
    refused("00002-of-00002.safetensors is missing")
    next(path.parent.glob("*.index.json")).unlink()
    refused("is a shard without its index")


def test_only_pickles_are_called_pickles(tmp_path: Path) -> None:
    base = base_copy(tmp_path)
    (base / FILES["vae"]).rename(base / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"pickled weights \(diffusion_pytorch_model.bin\)"):
        Engine.from_pretrained(base)
    (base / "vae/diffusion_pytorch_model.bin").rename(base / "vae/mine.safetensors")
    with pytest.raises(BaseModelError, match=r"mine.safetensors has another name: rename it"):
        Engine.from_pretrained(base)


def test_what_nobody_reads_is_not_part_of_the_identity(tmp_path: Path) -> None:
    before = BaseModel(DATA / "dual/model").sha256
    base = base_copy(tmp_path)
    shutil.copy(base / FILES["unet"], base / "unet/diffusion_pytorch_model.non_ema.safetensors")
    shutil.copy(base / FILES["unet"], base / "unet/diffusion_pytorch_model.fp16.safetensors")
    (base / "LICENSE").write_text("free")
    (base / "vae/notes.txt").write_text("mine")
    (base / "tokenizer/license.txt").write_text("free")
    for path in base.rglob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(dict(reversed(content.items())), indent=7) + "\n")
    change_json(base / "unet/config.json", _diffusers_version="9", _name_or_path="/home/me")
    change_json(base / "vae/config.json", scaling_factor=0.18215, force_upcast=True)
    change_json(base / "text_encoder/config.json", torch_dtype="float32", initializer_range=1)
    # PNDM's defaults, left out
    change_json(base / SCHEDULER, set_alpha_to_one=..., trained_betas=...)
    assert BaseModel(base).sha256 == before


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("unet/config.json", {"norm_eps": 1e-6}),
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        (SCHEDULER, {"beta_end": 0.02}),
        (SCHEDULER, {"prediction_type": "v_prediction"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 50}),
    ],
)
def test_what_shapes_a_picture_is(tmp_path: Path, file: str, values: dict[str, Any]) -> None:
    base = base_copy(tmp_path)
    change_json(base / file, **values)
    assert BaseModel(base).sha256 != BaseModel(DATA / "dual/model").sha256


@pytest.mark.parametrize("part", STEMS)
def test_one_weight_is(tmp_path: Path, part: str) -> None:
    base = base_copy(tmp_path)

    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in sorted(tensors) if "norm" in name)
        tensors[name] = tensors[name] + 1

    change_tensors(base / FILES[part], change)
    assert BaseModel(base).sha256 != BaseModel(DATA / "dual/model").sha256


@pytest.mark.parametrize(
    ("value", "size"),
    [([16, 24], (192, 128)), ([8, 8], (64, 64)), (8, (64, 64)), (None, (512, 512))],
)
def test_size_of_the_pictures(tmp_path: Path, value: Any, size: tuple[int, int]) -> None:
    base = base_copy(tmp_path)
    change_json(base / "unet/config.json", sample_size=value)
    assert BaseModel(base).picture_size == size[::-1]
    if size[0] < 512:
        adapter = DATA / "dual/adapter"
        with Engine.from_pretrained(base, adapter=adapter, allow_pickle=True) as engine:
            assert engine.generate(seeds=3, steps=1)[0].image.size == size


@pytest.mark.parametrize("limit", [..., int(1e30), 1e30, 77, 500])
def test_prompts_are_as_long_as_the_text_encoder_reads(
    tmp_path: Path, want: bytes, limit: Any
) -> None:
    base = base_copy(tmp_path)
    change_json(base / "tokenizer/tokenizer_config.json", model_max_length=limit)
    assert drawn(base) == want


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_tokenizer_without_its_vocabulary_is_named(tmp_path: Path, name: str) -> None:
    base = base_copy(tmp_path)
    (base / "tokenizer" / name).unlink()
    with pytest.raises(BaseModelError, match=rf"tokenizer/{name} is missing: download"):
        BaseModel(base).load_tokenizer()


def test_a_tokenizer_without_its_configuration(tmp_path: Path, want: bytes) -> None:
    base = base_copy(tmp_path)
    (base / "tokenizer/tokenizer_config.json").unlink()
    assert drawn(base) == want


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("unet/config.json", {"layers_per_block": True}, "layers_per_block"),
        ("unet/config.json", {"transformer_layers_per_block": 10**9}, "transformer_layers"),
        ("unet/config.json", {"block_out_channels": [10**9] * 4}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": [16] * 10**5}, "block_out_channels"),
        ("unet/config.json", {"block_out_channels": "abcd"}, "block_out_channels"),
        ("unet/config.json", {"attention_head_dim": 7}, "of 7 heads"),
        ("unet/config.json", {"attention_head_dim": 10**9}, "attention_head_dim"),
        ("unet/config.json", {"norm_eps": -1}, "norm_eps"),
        ("unet/config.json", {"norm_num_groups": 0}, "norm_num_groups"),
        ("unet/config.json", {"cross_attention_dim": 10**9}, "cross_attention_dim"),
        ("unet/config.json", {"sample_size": 0}, "sample_size"),
        ("unet/config.json", {"sample_size": [16, 16, 16]}, "sample_size"),
        ("unet/config.json", {"sample_size": "64"}, "sample_size"),
        ("vae/config.json", {"layers_per_block": 10**9}, "layers_per_block"),
        ("vae/config.json", {"block_out_channels": [10**9] * 4}, "block_out_channels"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("text_encoder/config.json", {"hidden_size": 64}, "cross_attention_dim 32"),
        ("text_encoder/config.json", {"vocab_size": 10}, "lacks|has shape|knows"),
        ("text_encoder/config.json", {"hidden_act": "x"}, "hidden_act"),
        ("text_encoder/config.json", {"max_position_embeddings": 10**9}, "max_position_embeddings"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -3}, "model_max_length"),
        ("tokenizer/vocab.json", {"!</w>": 3}, "vocab.json"),
        ("tokenizer/vocab.json", {"zz": 10**9}, "has a token 1000000000"),
        (SCHEDULER, {"_class_name": "UNet2DConditionModel"}, "scheduler of"),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "of Stable"),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "scheduler of"),
        (SCHEDULER, {"_class_name": ["PNDMScheduler"]}, "scheduler of"),
        (SCHEDULER, {"num_train_timesteps": 10**9}, "num_train_timesteps"),
        (SCHEDULER, {"beta_start": -0.5}, "beta_start"),
        (SCHEDULER, {"beta_end": "0.012"}, "beta_end"),
        (SCHEDULER, {"beta_schedule": "cubic"}, "beta_schedule"),
        (SCHEDULER, {"trained_betas": [0.5] * 3}, "trained_betas"),
        (SCHEDULER, {"skip_prk_steps": "yes"}, "skip_prk_steps"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "AutoencoderTiny"),
        ("model_index.json", {"text_encoder_2": ["transformers", "X"]}, "text_encoder_2"),
    ],
)  # fmt: skip
def test_values_that_no_such_model_has(
    tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    base = base_copy(tmp_path)
    change_json(base / file, **values)
    with pytest.raises(BaseModelError, match=message) as caught:
        Engine.from_pretrained(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        *("unet/config.json", "vae/config.json", "text_encoder/config.json"),
        *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "model_index.json"),
    ],
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "cannot be read as JSON"),
        (b"", "is empty"),
        (LFS_POINTER, "Git LFS pointer"),
        (b'{"a": "\xe9"}', "cannot be read as JSON"),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b"[1]", "is not a JSON object"),
        (b'{"a": 1', "cannot be read as JSON"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    base = base_copy(tmp_path)
    (base / file).write_bytes(content)
    with pytest.raises(BaseModelError, match=message):
        Engine.from_pretrained(base)


def make_pipe(path: Path) -> None:
    subprocess.run(["mkfifo", path], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes and devices in folders")
@pytest.mark.parametrize(
    "make",
    [
        make_pipe,
        Path.mkdir,
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to("nowhere"),
    ],
    ids=["pipe", "folder", "loop", "device", "dangling"],
)
@pytest.mark.parametrize(
    "file", ["unet/config.json", "tokenizer/vocab.json", "model_index.json", *FILES.values()]
)
def test_what_is_not_a_file(tmp_path: Path, file: str, make: Callable[[Path], None]) -> None:
    base = base_copy(tmp_path)
    (base / file).unlink()
    make(base / file)
    with pytest.raises(BaseModelError, match=r"is not a regular file|cannot be read"):
        Engine.from_pretrained(base)


def test_a_folder_that_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BaseModelError, match="no base model at"):
        BaseModel(tmp_path / "loop")
