"""Recipe of the demo base: `python -m dualdiff_engine.demo.train.base OUTPUT`.

Writes a diffusers Stable Diffusion folder and `training.json`, the record, in three stages: the
autoencoder, a larger decoder for its latents, and the denoiser on them. A stage that is recorded is
not run again. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dualdiff_engine.demo.train import autoencoder, decoder, denoiser, material
from dualdiff_engine.pair import versions

AUTOENCODER_PICTURES, DECODER_PICTURES, DENOISER_PICTURES = 3000, 3000, 5000
TEST_PICTURES, DECODER_TEST_PICTURES = 60, 96


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    output: Path = options.output
    # whatever mode the caller is in
    with torch.inference_mode(False), torch.enable_grad():
        for stage in STAGES:
            if stage not in _recorded(output):
                _record(output, stage, STAGES[stage](output, options.seed), options)


def _recorded(output: Path) -> dict[str, Any]:
    path = output / "training.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _record(output: Path, stage: str, made: dict[str, Any], options: argparse.Namespace) -> None:
    path = output / "training.json"
    record = _recorded(output)
    record[stage] = {
        **made,
        "seed": options.seed,
        "device": f"cpu, {options.threads} threads, {platform.machine()}",
        "versions": versions(),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _train_autoencoder(output: Path, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    pictures = _pictures(seed)
    torch.manual_seed(seed)
    vae = autoencoder.build()
    losses = autoencoder.train(vae, pictures, seed, tqdm.write)
    autoencoder.normalise(vae, pictures[:512])
    _save_autoencoder(vae, output)
    return {
        "pictures": len(pictures),
        "steps": autoencoder.STEPS,
        "seconds": round(time.monotonic() - start),
        "losses": {name: round(value, 5) for name, value in losses.items()},
        "unseen_psnr_db": _unseen_psnr(vae, seed),
    }


def _pictures(seed: int) -> torch.Tensor:
    return autoencoder.as_tensor(material.any_pictures(AUTOENCODER_PICTURES, 2 * seed))


def _unseen_psnr(vae: Any, seed: int) -> float:
    unseen = autoencoder.as_tensor(material.any_pictures(TEST_PICTURES, 2 * seed + 1))
    return round(autoencoder.error(vae.float(), unseen), 2)


def _train_decoder(output: Path, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    pictures, masks = _marked_pictures(DECODER_PICTURES, 2 * seed)
    unseen, unseen_masks = _marked_pictures(DECODER_TEST_PICTURES, 2 * seed + 1)
    torch.manual_seed(seed)
    narrow = _load_autoencoder(output)
    vae = decoder.widen(narrow)
    loss = decoder.train(vae, decoder.shown(vae, pictures, masks), seed, tqdm.write)
    _save_autoencoder(vae, output)
    vae = vae.float()
    return {
        "pictures": len(pictures),
        "steps": decoder.STEPS,
        "seconds": round(time.monotonic() - start),
        "loss": round(loss, 5),
        "unseen_psnr_db": {
            name: {
                "everywhere": round(autoencoder.error(each, unseen), 2),
                "in_defects": round(autoencoder.error(each, unseen, unseen_masks), 2),
            }
            for name, each in (("before", narrow), ("after", vae))
        },
    }


def _marked_pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, masks = material.marked_pictures(count, seed)
    return autoencoder.as_tensor(pictures), torch.from_numpy(np.stack(masks)) > 0


def _save_autoencoder(vae: Any, output: Path) -> None:
    vae.half().save_pretrained(output / "vae")
    path = output / "vae" / "config.json"
    config = json.loads(path.read_text())
    # where it was loaded from on the machine that trained it
    config.pop("_name_or_path", None)
    _write_json(path, config)


def _load_autoencoder(output: Path) -> Any:
    """As the engine will read it: rounded to half precision."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(output / "vae", torch_dtype=torch.float32).eval()


def _train_denoiser(output: Path, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    vae = _load_autoencoder(output)
    pictures, prompts = zip(*material.good_pictures(DENOISER_PICTURES, 2 * seed + 2), strict=True)
    latents = autoencoder.encode(vae, autoencoder.as_tensor(list(pictures)))
    denoiser.write_tokenizer(output / "tokenizer")
    tokenizer = denoiser.load_tokenizer(output / "tokenizer")
    torch.manual_seed(seed)
    unet, text = denoiser.build_unet(), denoiser.build_text_encoder(tokenizer)
    tokens = denoiser.tokenise(tokenizer, list(prompts))
    empty = denoiser.tokenise(tokenizer, [""])[0]
    loss = denoiser.train(unet, text, latents, tokens, empty, seed, tqdm.write)
    text.half().save_pretrained(output / "text_encoder")
    _write_json(output / "scheduler" / "scheduler_config.json", denoiser.SCHEDULER)
    _write_json(output / "model_index.json", _INDEX)
    unet.half().save_pretrained(output / "unet")
    return {
        "pictures": len(pictures),
        "steps": denoiser.STEPS,
        "batch": denoiser.BATCH,
        "seconds": round(time.monotonic() - start),
        "loss": round(loss, 5),
    }


STAGES = {
    "autoencoder": _train_autoencoder,
    "decoder": _train_decoder,
    "denoiser": _train_denoiser,
}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
    "scheduler": ["diffusers", denoiser.SCHEDULER["_class_name"]],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
