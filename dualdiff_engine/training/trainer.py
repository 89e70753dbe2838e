"""The training run: draws, losses, steps, and what is written when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from dualdiff_engine import adapters
from dualdiff_engine.adapters import files as adapter_files
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.device import device_of, dtype_of, is_out_of_memory, keep_freed_blocks
from dualdiff_engine.errors import BaseModelError, OutputError, SettingsError, TrainingError
from dualdiff_engine.folder_writer import lock
from dualdiff_engine.pipeline.text import TextEncoder
from dualdiff_engine.settings import BRANCHES, Background
from dualdiff_engine.training import data as folders
from dualdiff_engine.training import record, state
from dualdiff_engine.training.distillation import GuidedCalls, Teacher, guided_calls, weights
from dualdiff_engine.training.latents import Draw, LatentSet, encode
from dualdiff_engine.training.network import TrainableNetwork
from dualdiff_engine.training.options import TrainingOptions

ADAPTER = f"{adapter_files.STEM}.safetensors"
LOCK = ".lock"


@dataclass(frozen=True)
class TrainingResult:
    """The result of `train_adapter`.

    Attributes:
        adapter: the adapter file; None if the run was stopped before its last step.
        losses: float32 [steps done, 2 branches].
    """

    adapter: Path | None
    losses: Tensor


def train_adapter(
    base: str | Path,
    data: str | Path | None,
    output: str | Path,
    options: TrainingOptions,
    *,
    teacher: str | Path | None = None,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train an adapter into a folder; an existing run in it is resumed.

    A resumed run gives the result of an uninterrupted one, on a CPU bit for bit. All inputs are
    checked before anything is computed.

    Args:
        base: a diffusers Stable Diffusion folder or hub id.
        data: a folder in MVTec layout, see `dualdiff_engine.training.data`; None where no pictures
            are needed: to distil an adapter without background.
        output: the folder to write. It receives `pytorch_lora_weights.safetensors`,
            `training.json`, `loss.png` (if matplotlib is installed), `checkpoint-N/` as asked for,
            and the state to resume from.
        options: see `TrainingOptions`.
        teacher: the adapter whose guided prediction is learnt, as of `adapters.load`; given
            together with `options.distill_guidance`.
        progress: show a progress bar on stderr.
        should_stop: called after every step; True ends the run, which can be resumed later.

    Returns:
        The adapter file and the losses.

    Raises:
        DataError: pictures or masks are unusable; one line per fault.
        SettingsError: an option does not fit the base, or the folder holds another run.
        BaseModelError: the base model is missing, incomplete or not supported.
        OutputError: the folder cannot be written, or another run is writing to it.
        TrainingError: out of memory, or a loss, gradient, parameter or moment is not finite.
        AdapterError: the adapter does not fit into `save_dtype`.
    """
    try:
        # the caller may be in inference mode
        with torch.inference_mode(False), torch.enable_grad():
            taught = _taught(teacher, options)
            return _Run(base, data, Path(output), options, progress, taught).train(should_stop)
    except Exception as error:
        # one of ours says already what ran out
        if isinstance(error, TrainingError) or not is_out_of_memory(error):
            raise
        raise TrainingError(
            "out of memory: use a smaller batch (and accumulate more), gradient_checkpointing, "
            "dtype bfloat16 or a smaller size"
        ) from error


def _taught(path: str | Path | None, options: TrainingOptions) -> Teacher | None:
    if path is None and options.distill_guidance is None:
        return None
    if path is None or options.distill_guidance is None:
        raise SettingsError(
            "distill_guidance (--distill-guidance) and teacher (--from) go together"
        )
    if options.coupling(1) is not None:
        raise SettingsError("system, annotation and cycle (--system, …) are those of --from")
    return Teacher.open(path, options.distill_guidance)


class _Run:
    """One run into one folder. Building it checks everything and computes nothing."""

    # of the placeholder, [2 branches, 2 (prompt, empty), L], where the coupling aligns
    places: Tensor | None = None

    def __init__(
        self,
        base: str | Path,
        data: str | Path | None,
        output: Path,
        options: TrainingOptions,
        progress: bool,
        teacher: Teacher | None = None,
    ) -> None:
        options = teacher.options(options) if teacher else options
        self.options, self.output, self.progress = options, output, progress
        self.teacher = teacher
        # of the prompts, where it is the same in every step
        self.context: Tensor | None = None
        self.device = device_of(options.device)
        self.dtype = dtype_of(options.dtype, self.device)
        if self.dtype == torch.float16:
            raise SettingsError("this GPU has no bfloat16: train with dtype float32")
        self.examples, self.surroundings, self.files = _pictures(data, options, teacher)
        self.base = BaseModel(base)
        if teacher is not None:
            layers = TextEncoder(*self.base.load_text()).layers
            adapters.check_fits(teacher.adapter, self.base.site_shapes, layers)
        self.noiser = self.base.noiser()
        self.target = self.noiser.config.prediction_type
        if self.target not in ("epsilon", "v_prediction"):
            raise BaseModelError(
                f"the base model predicts {self.target!r}; use one that predicts epsilon or "
                "v_prediction"
            )
        self.size = self._size()
        self.place = {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "size": self.size,
        }
        self.bound = {
            **options.binding(),
            **self.place,
            "base": self.base.sha256,
            "data": self.files,
        }
        if teacher is not None:
            self.bound["teacher"] = teacher.adapter.sha256
        self.state = output / state.STATE
        self.losses = torch.zeros(0, 2)
        self.done = done = state.steps_done(self.state, self.bound)
        if done > options.steps:
            raise SettingsError(
                f"{output} holds a run of {done} steps, more than steps={options.steps}: choose "
                "another folder or more steps"
            )

    def _size(self) -> int:
        """Pixels of a side."""
        step = self.base.pixels_per_latent
        # training pictures are square
        size = self.options.size or min(self.base.picture_size)
        if size % step:
            raise SettingsError(f"size must be a multiple of {step} for this VAE, got {size}")
        return size

    def train(self, should_stop: Callable[[], bool]) -> TrainingResult:
        options = self.options
        with _folder(self.output):
            self._prepare()
            done = len(self.losses)
            bar = tqdm(total=options.steps, initial=done, disable=not self.progress, unit="step")
            with bar:
                for step in range(done, options.steps):
                    losses = self._step(step)
                    self.losses = torch.cat([self.losses, losses[None]])
                    bar.update()
                    bar.set_postfix(loss=f"{float(losses.sum()):.4f}", refresh=False)
                    stopping = should_stop() and step + 1 < options.steps
                    self._write(step + 1, stopping)
                    if stopping:
                        return TrainingResult(None, self.losses)
            return TrainingResult(self._finish(), self.losses)

    def _prepare(self) -> None:
        """Load networks, encode the pictures, restore a saved state."""
        options = self.options
        if self.device.type == "cpu":
            keep_freed_blocks()
        calls = self._guided_calls() if self.teacher and self.done < options.steps else None
        self.network = TrainableNetwork(self.base, options, self.device, self.dtype)
        if self.teacher is not None:
            self.network.start_at(self.teacher.adapter)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters.values(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=True,
        )
        if self.state.exists():
            self.losses = state.restore(self.state, self.network.parameters, self.optimizer)
        places = self.network.places(self._prompts)
        self.places = None if places is None else places.unflatten(0, (2, 2))
        if self.teacher is None and not self.network.trains_text:
            self.context = self._encode_prompts().detach()
        if self.done < options.steps:
            self.lessons: LatentSet | GuidedCalls = calls or self._encode()

    def _guided_calls(self) -> GuidedCalls:
        options = self.options
        assert self.teacher is not None, "called to distil"
        surroundings = self._encode() if options.background else None
        bar = tqdm(
            total=options.trajectories, disable=not self.progress, unit="trajectory", leave=False
        )
        with bar:
            calls, context = guided_calls(
                self.base, self.teacher, options, self.size, self.device, surroundings, bar
            )
        self.context = context.to(self.device)
        self.weights = weights(self.noiser).to(self.device)
        return calls

    def _encode(self) -> LatentSet:
        vae = self.base.load_vae(self.device, torch.float32)
        pictures = len(self.examples)
        bar = tqdm(total=pictures, disable=not self.progress, unit="picture", leave=False)
        with bar:
            return encode(vae, self.examples, self.options, self.size, bar)

    def _encode_prompts(self) -> Tensor:
        """[2 branches, 2 (prompt, empty), L, X]."""
        return self.network.encode(self._prompts).unflatten(0, (2, 2))

    @property
    def _prompts(self) -> list[str]:
        """Of each branch, its own and the empty one."""
        return [self.options.image_prompt, "", self.options.anomaly_prompt, ""]

    def _step(self, step: int) -> Tensor:
        """One optimizer step; the losses of both branches, [2] on the CPU."""
        options = self.options
        drawn = self.lessons.draw(options, step, self.noiser.config.num_train_timesteps)
        total = torch.zeros(2)
        parts: Iterator[Draw] | Iterator[GuidedCalls] = drawn.split(options.batch)
        for part in parts:
            losses = self._losses(part) / options.accumulate
            losses.sum().backward()
            total += losses.detach().cpu()
        _require_finite("loss", total, step, total)
        # infinity clips nothing: the factor is 1
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters.values(), options.max_grad_norm or math.inf
        )
        _require_finite("gradient", norm, step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _guided_losses(self, calls: GuidedCalls) -> Tensor:
        """Weighted mean squared error of the guided prediction, by branch, [2]."""
        assert self.context is not None, "encoded with the teacher's text encoder"
        counted = self.weights[calls.timesteps.to(self.device)]
        return (calls.errors(self.network, self.context) * counted).mean(1)

    def _losses(self, drawn: Draw | GuidedCalls) -> Tensor:
        """Mean squared error of what is predicted, by branch, [2]."""
        if isinstance(drawn, GuidedCalls):
            return self._guided_losses(drawn)
        device = self.device
        clean = drawn.latents.transpose(0, 1).to(device)
        noise = drawn.noise.transpose(0, 1).to(device)
        times = drawn.timesteps.to(device)
        background = None
        if drawn.background is not None and drawn.background_noise is not None:
            background = self.noiser.add_noise(
                drawn.background.to(device), drawn.background_noise.to(device), times
            )
        context = self.context if self.context is not None else self._encode_prompts()
        chosen = drawn.dropped.long().to(device) if drawn.dropped.any() else slice(1)
        places = None if self.places is None else self.places.to(device)[:, chosen]
        # both branches at the same timesteps
        noised = _by_branch(self.noiser.add_noise, clean, noise, times)
        given = (noised, times, context[:, chosen], background)
        predicted = self.network(*given, *([] if places is None else [places])).float()
        target = noise
        if self.target == "v_prediction":
            target = _by_branch(self.noiser.get_velocity, clean, noise, times)
        return F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)

    def _write(self, done: int, stopping: bool) -> None:
        """Save what is due after `done` steps: the state last.

        A run that is killed in between is resumed from the state before, comes here again, and
        writes the same files. Once the state is there, so is everything that is older.
        """
        options = self.options
        kept = options.sample_every and done % options.sample_every == 0
        saved = stopping or done % options.checkpoint_every == 0 or done == options.steps
        if not kept and not saved:
            return
        state.require_finite(self.network.parameters, self.optimizer, self.losses)
        if kept:
            folder = self.output / f"checkpoint-{done}"
            self._save_adapter(folder / ADAPTER)
            self._draw_sheet(folder)
        if saved:
            record.draw_curve(self.output / record.CURVE, self.losses)
            parameters = self.network.parameters
            state.save(self.state, parameters, self.optimizer, self.losses, self.bound)

    def _save_adapter(self, path: Path) -> None:
        dtype = getattr(torch, self.options.save_dtype)
        distilled = self.teacher.told(len(self.losses)) if self.teacher else None
        made = adapter_files.Origin(self.options.window, distilled, self.network.coupling)
        adapter_files.write(path, self.network.tensors(dtype), made)

    def _draw_sheet(self, folder: Path) -> None:
        try:
            record.draw_sheet(
                folder / record.SHEET,
                self.base.source,
                folder / ADAPTER,
                self.options,
                self.size,
                (str(self.device), str(self.dtype)),
                self.surroundings,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # the options that make training smaller do not help here
            raise TrainingError(
                f"out of memory while the pairs of {folder.name} were drawn: resume with "
                "sample_every=0; the last saved state is kept"
            ) from error

    def _finish(self) -> Path:
        path = self.output / ADAPTER
        self._save_adapter(path)
        made = {"options": asdict(self.options), **self.place, "data": self.files}
        if self.teacher is not None:
            made["teacher"] = {"sha256": self.teacher.adapter.sha256}
        record.write(self.output, path, self.base, made, self.losses)
        return path


def _pictures(
    data: str | Path | None, options: TrainingOptions, teacher: Teacher | None
) -> tuple[list[folders.Example], list[Background], list[dict[str, str]]]:
    """Examples, backgrounds of sample sheets, and a listing of the files.

    Raises SettingsError where pictures are missing, or are not needed.
    """
    if teacher is not None and not options.background:
        if data is not None or options.defect:
            raise SettingsError(
                "an adapter without background is distilled from its own pairs: leave out data and "
                "defect"
            )
        return [], [], []
    if data is None or not options.defect:
        raise SettingsError(
            "pass data and defect: "
            + ("their pictures lend surroundings" if teacher else "the pictures to learn from")
        )
    examples = folders.find_examples(data, options)
    backgrounds = folders.sheet_backgrounds(data, examples, options)
    return examples, backgrounds, folders.listing(data, examples)


def _require_finite(what: str, value: Tensor, step: int, losses: Tensor) -> None:
    """Raises TrainingError; step is counted from 0."""
    if not value.isfinite().all():
        told = ", ".join(f"{b} {v:.4g}" for b, v in zip(BRANCHES, losses.tolist(), strict=True))
        raise TrainingError(
            f"the {what} is not finite at step {step + 1}: use a lower learning_rate or dtype "
            f"float32, in another folder (losses: {told}); the last saved state is kept"
        )


def _by_branch(
    combine: Callable[[Tensor, Tensor, Tensor], Tensor], clean: Tensor, noise: Tensor, times: Tensor
) -> Tensor:
    """clean, noise [2, B, 4, h, w], times [B] -> [2, B, 4, h, w]."""
    return torch.stack([combine(c, n, times) for c, n in zip(clean, noise, strict=True)])


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """The output folder, created if missing and locked. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        held = (path / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): choose another folder"
        ) from error
    with held:
        try:
            lock(held)
        except OSError as error:
            raise OutputError(
                f"another run is writing to {path}: wait for it or choose another folder"
            ) from error
        yield
