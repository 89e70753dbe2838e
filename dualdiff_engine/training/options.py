"""The options of a training run: frozen, validated on construction, saved with the adapter."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.model.coupling import (
    ANNOTATIONS,
    ANOMALY,
    CYCLE,
    RELEASED,
    Coupling,
    cycle_of,
)
from dualdiff_engine.settings import ANOMALY_PROMPT, IMAGE_PROMPT, MOST_GUIDANCE, require_seed

# what may differ when a run is resumed: none of it changes a finished step
_FREE = ("steps", "checkpoint_every", "sample_every", "samples", "sample_steps", "save_dtype")

# of distillation alone
_DISTILLING = ("distill_guidance", "trajectories", "trajectory_calls")

DUALANODIFF, DH_DIFF = SYSTEMS = ("dualanodiff", "dh-diff")
# of other systems than DualAnoDiff
_COUPLING = ("system", "annotation", "cycle")

_CHOICES: dict[str, tuple[str, ...]] = {
    "system": SYSTEMS,
    "annotation": ANNOTATIONS,
    "flips": ("none", "horizontal", "vertical", "both"),
    "latents": ("sample", "mean"),
    "lr_schedule": ("constant", "cosine"),
    "dtype": ("auto", "float32", "bfloat16"),
    "save_dtype": ("float32", "float16", "bfloat16"),
}
# (name, least, most)
_WHOLE = (
    ("rank", 1, 1024),
    ("blend_width", 1, 4096),
    ("steps", 1, 10_000_000),
    ("batch", 1, 4096),
    ("accumulate", 1, 4096),
    ("warmup", 0, 10_000_000),
    ("checkpoint_every", 1, 10_000_000),
    ("sample_every", 0, 10_000_000),
    ("samples", 1, 64),
    ("sample_steps", 1, 1000),
    ("trajectories", 1, 100_000),
    ("trajectory_calls", 2, 1000),
)


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `train_adapter`.

    Defaults are those of DualAnoDiff (https://arxiv.org/abs/2408.13509) where the paper states
    them.

    Args:
        defect: the defect's folder in `test/` and `ground_truth/`. Empty where no pictures are
            needed: to distil an adapter without background.
        system: `dualanodiff`, or `dh-diff`: our definition of the pattern of Double Helix Diffusion
            (arXiv 2509.12787), see `model.coupling`.
        annotation: what the second branch draws: the `anomaly` on black, or its `mask`, white on
            black.
        cycle: couple block after block in another way than the system does, as
            "attention/exchange/text/exchange,…" of `model.coupling.Block`, again and again.
        pictures: use only the first N pictures, sorted by name (at least 2); None uses all.
        background: also train the background blend; needs object masks.
        text_encoder: also train LoRA on the text encoder.
        rank: of every LoRA, 1 to 1024.
        blend_width: inner width of the background's two affine maps, 1 to 4096.
        size: side of the square pictures in pixels, a multiple of 8; None takes the base's own.
        window: train on windows around the defects: the window's side over the longer side of the
            mask's bounding box, 1 or more, as `Placement.window`; None trains on whole pictures.
        flips: random flips, the same for a picture, its anomaly picture and its background.
        latents: `sample` the VAE's posterior anew in every step, or take its `mean`. Backgrounds
            are always means, as the engine reads them.
        steps: optimizer steps.
        batch: pictures per forward pass.
        accumulate: forward passes per optimizer step. Their product is drawn at once, so 4 x 1 and
            1 x 4 see the same pictures and noises.
        learning_rate: of AdamW, in (0, 1].
        lr_schedule: `constant`, or `cosine` to zero at the last step.
        warmup: steps of linear rise of the learning rate.
        weight_decay: of AdamW, in [0, 1].
        max_grad_norm: largest gradient norm over all parameters; 0 turns clipping off.
        prompt_dropout: probability, in [0, 1], that a picture is trained with empty prompts (and a
            mid-grey background, as in the unconditional rows of sampling). The paper has none.
        image_prompt: prompt of the image branch.
        anomaly_prompt: prompt of the anomaly branch.
        seed: decides initial weights, order, flips and noises, 0 to 2^63-1.
        dtype: of the frozen networks and activations; adapter, optimizer and loss are float32.
        device: cpu, cuda, cuda:1, … or auto.
        gradient_checkpointing: recompute activations: a third more time for much less memory.
        checkpoint_every: steps between saved states that an interrupted run resumes from.
        sample_every: steps between adapters that are kept with a contact sheet; 0 turns this off.
        samples: pairs on a contact sheet, 1 to 64.
        sample_steps: scheduler steps of these pairs.
        save_dtype: of the adapter file.
        distill_guidance: learn another adapter's guided prediction at this scale, above 1, in place
            of pictures; see `train_adapter`. Rank and background are then the other adapter's.
        trajectories: pairs that the other adapter draws to be learnt from.
        trajectory_calls: its denoiser calls on each of them, 2 to 1000.

    Raises:
        SettingsError: a value is out of its range; the message names it.
    """

    defect: str = ""
    system: Literal["dualanodiff", "dh-diff"] = "dualanodiff"
    annotation: Literal["anomaly", "mask"] = "anomaly"
    cycle: str | None = None
    pictures: int | None = None
    background: bool = False
    text_encoder: bool = False
    rank: int = 32
    blend_width: int = 320
    size: int | None = None
    window: float | None = None
    flips: Literal["none", "horizontal", "vertical", "both"] = "both"
    latents: Literal["sample", "mean"] = "sample"
    steps: int = 5000
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 2e-5
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    prompt_dropout: float = 0.0
    image_prompt: str = IMAGE_PROMPT
    anomaly_prompt: str = ANOMALY_PROMPT
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    sample_every: int = 1000
    samples: int = 4
    sample_steps: int = 50
    save_dtype: str = "float32"
    distill_guidance: float | None = None
    trajectories: int = 64
    trajectory_calls: int = 25

    def __post_init__(self) -> None:
        unnamed = not self.defect and self.distill_guidance is None
        if unnamed or self.defect != self.defect.strip("./\\ ") or "/" in self.defect:
            raise SettingsError(
                f"defect must be the name of a folder in test/, got {self.defect!r}"
            )
        for name, least, most in _WHOLE:
            _whole(name, getattr(self, name), least, most)
        if self.pictures is not None:
            _whole("pictures", self.pictures, 2, 1_000_000)
        if self.size is not None:
            _whole("size", self.size, 8, 8192)
        if self.window is not None:
            _within("window", self.window, 1, 1000)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(
                    f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}"
                )
        _within("learning_rate", self.learning_rate, 0, 1, open_below=True)
        _within("weight_decay", self.weight_decay, 0, 1)
        _within("max_grad_norm", self.max_grad_norm, 0, math.inf)
        _within("prompt_dropout", self.prompt_dropout, 0, 1)
        require_seed(self.seed)
        self.coupling(1)
        if self.distill_guidance is not None:
            _within("distill_guidance", self.distill_guidance, 1, MOST_GUIDANCE, open_below=True)

    def coupling(self, blocks: int) -> Coupling | None:
        """Of a network of so many transformer blocks; None: DualAnoDiff's. Raises SettingsError."""
        others = self.system != DUALANODIFF or self.cycle is not None
        if not others and self.annotation == ANOMALY:
            return None
        try:
            usual = CYCLE if self.system == DH_DIFF else RELEASED
            cycle = usual if self.cycle is None else cycle_of(self.cycle)
        except ValueError as error:
            raise SettingsError(f"cycle: {error}") from error
        return Coupling.cycled(cycle, blocks, self.annotation)

    @property
    def per_step(self) -> int:
        """Pictures per optimizer step."""
        return self.batch * self.accumulate

    def binding(self) -> dict[str, Any]:
        """Options that must be equal to resume a run, JSON-ready."""
        bound = {name: value for name, value in asdict(self).items() if name not in _FREE}
        if self.window is None:
            # states of whole pictures do not name it
            del bound["window"]
        if self.coupling(1) is None:
            # nor do states of DualAnoDiff
            bound = {name: value for name, value in bound.items() if name not in _COUPLING}
        if self.distill_guidance is None:
            bound = {name: value for name, value in bound.items() if name not in _DISTILLING}
        # a cosine ends where the run does
        return bound | ({"steps": self.steps} if self.lr_schedule == "cosine" else {})

    def rate(self, step: int) -> float:
        """Learning rate of a step; steps are counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        if self.lr_schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * share)) / 2


def _whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SettingsError(f"{name} must be a whole number from {least} to {most}, got {value!r}")


def _within(
    name: str, value: object, least: float, most: float, *, open_below: bool = False
) -> None:
    fits = isinstance(value, int | float) and math.isfinite(value) and least <= value <= most
    if not fits or (open_below and value == least):
        raise SettingsError(f"{name} must be a number from {least} to {most}, got {value!r}")
