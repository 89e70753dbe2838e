"""The training run: draws, losses, steps, and what is written when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from dualdiff_engine import adapter_files, memory, request
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.errors import BaseModelError, OutputError, SettingsError
from dualdiff_engine.training import data as folders
from dualdiff_engine.training import record, state
from dualdiff_engine.training.latents import Draw, LatentSet, encode
from dualdiff_engine.training.network import TrainableNetwork
from dualdiff_engine.training.options import TrainingOptions

ADAPTER = f"{adapter_files.STEM}.safetensors"


@dataclass(frozen=True)
class TrainingResult:
    """adapter: the file, or None if the run was stopped before its last step.

    losses [steps done, 2 branches] fp32.
    """

    adapter: Path | None
    losses: Tensor


def train_adapter(
    base: str | Path,
    data: str | Path,
    output: str | Path,
    options: TrainingOptions,
    *,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train an adapter into a folder; a run that the folder holds is continued.

    base: a diffusers Stable Diffusion folder or hub id. data: a folder in MVTec layout, see
    `dualdiff_engine.training.data`. output receives `pytorch_lora_weights.safetensors`,
    `training.json`, `loss.png` (where matplotlib is installed), `checkpoint-N/` as asked for, and
    the state to continue from. should_stop: asked after every step; a stopped run is continued like
    a killed one. A continued run gives the result of an undisturbed one, on a CPU bit for bit.
    Everything is checked before anything is computed.
    Raises DataError, SettingsError, BaseModelError, OutputError.
    """
    run = _Run(base, data, Path(output), options, progress)
    return run.train(should_stop)


class _Run:
    def __init__(
        self,
        base: str | Path,
        data: str | Path,
        output: Path,
        options: TrainingOptions,
        progress: bool,
    ) -> None:
        self.options, self.output, self.data, self.progress = options, output, data, progress
        self.device = request.device_of(options.device)
        self.dtype = request.dtype_of(options.dtype, self.device)
        if self.dtype == torch.float16:
            raise SettingsError("this GPU has no bfloat16: train with dtype float32")
        self.examples = folders.find_examples(data, options)
        self.base = BaseModel(base)
        self.noiser = self.base.noiser()
        self.target = self.noiser.config.prediction_type
        if self.target not in ("epsilon", "v_prediction"):
            raise BaseModelError(
                f"the base predicts {self.target!r}; trained are epsilon and v_prediction"
            )
        if self.device.type == "cpu":
            memory.keep_freed_blocks()
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{output} cannot be written ({error.strerror}): choose another folder"
            ) from error
        self.files = folders.listing(data, self.examples)
        self.bound = {**options.binding(), "base": self.base.sha256, "data": self.files}

    def train(self, should_stop: Callable[[], bool]) -> TrainingResult:
        options = self.options
        latents = self._encode()
        self.network = TrainableNetwork(self.base, options, self.device, self.dtype)
        parameters = list(self.network.parameters.values())
        self.optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.losses = torch.zeros(0, 2)
        if (path := self.output / state.STATE).exists():
            self.losses = state.restore(path, self.network.parameters, self.optimizer, self.bound)
        self.context = None if self.network.trains_text else self._encode_prompts().detach()
        done = len(self.losses)
        bar = tqdm(total=options.steps, initial=done, disable=not self.progress, unit="step")
        with bar:
            for step in range(done, options.steps):
                losses = self._step(step, latents)
                self.losses = torch.cat([self.losses, losses[None]])
                bar.update()
                bar.set_postfix(loss=f"{float(losses.sum()):.4f}")
                stopping = should_stop() and step + 1 < options.steps
                self._write(step + 1, stopping)
                if stopping:
                    return TrainingResult(None, self.losses)
        return TrainingResult(self._finish(), self.losses)

    def _encode(self) -> LatentSet:
        vae = self.base.load_vae(self.device, torch.float32)
        size = self.size(vae)
        with tqdm(
            total=len(self.examples), disable=not self.progress, unit="picture", leave=False
        ) as bar:
            return encode(vae, self.examples, self.options, size, bar)

    def size(self, vae: Any) -> int:
        """Pixels of a side."""
        step = 2 ** (len(vae.config.block_out_channels) - 1)
        size = self.options.size or self.base.sample_size * step
        if size % step:
            raise SettingsError(f"size must be a multiple of {step} for this VAE, got {size}")
        return size

    def _encode_prompts(self) -> Tensor:
        """[2 branches, 2 (prompt, empty), L, X]."""
        options = self.options
        prompts = [options.image_prompt, "", options.anomaly_prompt, ""]
        return self.network.encode(prompts).unflatten(0, (2, 2))

    def _step(self, step: int, latents: LatentSet) -> Tensor:
        """One optimizer step; the losses of both branches, [2] on the CPU."""
        options = self.options
        drawn = latents.draw(options, step, self.noiser.config.num_train_timesteps)
        total = torch.zeros(2)
        for part in drawn.split(options.batch):
            losses = self._losses(part) / options.accumulate
            losses.sum().backward()
            total += losses.detach().cpu()
        if options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(
                list(self.network.parameters.values()), options.max_grad_norm
            )
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _losses(self, drawn: Draw) -> Tensor:
        """Mean squared error of the predicted noise, by branch, [2]."""
        device = self.device
        clean = drawn.latents.transpose(0, 1).to(device)
        noise = drawn.noise.transpose(0, 1).to(device)
        times = drawn.timesteps.to(device)
        noised = self._noised(clean, noise, times)
        background = None
        if drawn.background is not None and drawn.background_noise is not None:
            background = self.noiser.add_noise(
                drawn.background.to(device), drawn.background_noise.to(device), times
            )
        context = self.context if self.context is not None else self._encode_prompts()
        if drawn.dropped.any():
            context = context[:, drawn.dropped.long().to(device)]
        else:
            context = context[:, :1]
        predicted = self.network(noised, times, context, background).float()
        target = noise
        if self.target == "v_prediction":
            target = torch.stack(
                [self.noiser.get_velocity(clean[b], noise[b], times) for b in (0, 1)]
            )
        return F.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)

    def _noised(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Both branches at the same timesteps, [2, B, 4, h, w]."""
        return torch.stack([self.noiser.add_noise(clean[b], noise[b], times) for b in (0, 1)])

    def _write(self, done: int, stopping: bool) -> None:
        options = self.options
        if stopping or done % options.checkpoint_every == 0 or done == options.steps:
            state.save(
                self.output / state.STATE,
                self.network.parameters,
                self.optimizer,
                self.losses,
                self.bound,
            )
        if options.sample_every and done % options.sample_every == 0:
            folder = self.output / f"checkpoint-{done}"
            self._save_adapter(folder / ADAPTER)

    def _save_adapter(self, path: Path) -> None:
        dtype = getattr(torch, self.options.save_dtype)
        adapter_files.write(path, self.network.tensors(dtype))

    def _finish(self) -> Path:
        path = self.output / ADAPTER
        self._save_adapter(path)
        record.write(self.output, self.base, self.options, self.files, self.losses, path)
        return path
