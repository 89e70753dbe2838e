"""What the folded doublings of the VAE decoder save on a CPU, and what they cost in digits.

Run ``python -m dualdiff_engine.bench.vae_decode [--rounds N] [--output-json FILE]``. SD-1.5's VAE
with random weights, fp32, one picture of 512 x 512 per call; the error is against fp64, at 128.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.base_model import doubling
from dualdiff_engine.bench import machine
from dualdiff_engine.bench.clock import interleaved
from dualdiff_engine.bench.step.random_base import VAE

LATENT, SMALL_LATENT = 64, 16
CPU = torch.device("cpu")


def decoder(seed: int = 0) -> Any:
    """Every call draws the same weights."""
    from diffusers import AutoencoderKL

    levels = len(VAE["block_out_channels"])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKL(
            **VAE,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
        )
    return vae.eval()


def run(rounds: int) -> dict[str, Any]:
    two_steps, folded = decoder(), decoder()
    doubling.fold(folded)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, LATENT, LATENT, generator=generator)
    with torch.inference_mode():
        seconds = interleaved(
            {
                "two_steps": lambda: two_steps.decode(latents),
                "folded": lambda: folded.decode(latents),
            },
            CPU,
            rounds=rounds,
            patience_s=1e9,
            warm_up=1,
        )
        small = latents[:, :, :SMALL_LATENT, :SMALL_LATENT]
        drawn = {
            name: vae.decode(small).sample
            for name, vae in (("two_steps", two_steps), ("folded", folded))
        }
        exact = two_steps.double().decode(small.double()).sample
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        **machine.facts(CPU),
        "model": "SD-1.5's VAE decoder, random weights, fp32, 512 x 512",
        "rounds": len(seconds["folded"]),
        "median_s": medians,
        "ratio": medians["two_steps"] / medians["folded"],
        "largest_error": {
            name: ((got - exact).abs().max() / exact.abs().max()).item()
            for name, got in drawn.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="keep the record")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} times nothing: use 1 or more")
    record = run(options.rounds)
    text = json.dumps(record, indent=2) + "\n"
    if options.output_json:
        options.output_json.write_text(text, "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
