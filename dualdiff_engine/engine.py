"""The engine: a base model, resident adapters, and pairs out of them."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dualdiff_engine import adapters
from dualdiff_engine.adapters import fold
from dualdiff_engine.adapters.fold import Resident
from dualdiff_engine.base_model import BUNDLE, BaseModel
from dualdiff_engine.device import (
    device_of,
    dtype_of,
    enough_memory,
    keep_freed_blocks,
    numerics,
    tf32_of,
)
from dualdiff_engine.errors import BackendError, BaseModelError, SettingsError
from dualdiff_engine.model import binding, doubling, tuning
from dualdiff_engine.model import cuda_graph as graphs
from dualdiff_engine.model.call import Denoiser
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import Ops, bind
from dualdiff_engine.pair import Facts, Fault, Pair
from dualdiff_engine.pipeline import generate as pipeline
from dualdiff_engine.pipeline.background import BankStore
from dualdiff_engine.pipeline.batches import BatchMemory, BusyLock
from dualdiff_engine.pipeline.request import Resumed, Run, check
from dualdiff_engine.pipeline.text import TextEncoder
from dualdiff_engine.settings import (
    Background,
    Placement,
    Prompts,
    Sampling,
    max_batch_of,
    sampling_of,
)

T = TypeVar("T")
# diffusers' convention: (engine, step, timestep, {"latents": [B, 2, 4, h, w]}) -> the same dict
StepCallback = Callable[["Engine", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
# where installed packages register what runs exported networks, under the backend's name
RUNTIMES = "dualdiff_engine.runtimes"
# what loading can still be made to need
_LESS = "close other programs, use dtype bfloat16, or a machine or container with more memory"


@functools.cache
def runtimes() -> Mapping[str, importlib.metadata.EntryPoint]:
    """Backends that run an exported denoiser, by name; each is loaded when asked for."""
    return {point.name: point for point in importlib.metadata.entry_points(group=RUNTIMES)}


def runtime(name: str) -> Any:
    """The module that builds engines around exported networks. Raises BackendError."""
    if name not in runtimes():
        raise BackendError(
            f"no runtime {name!r} is installed: install dualdiff-engine again with pip, or choose "
            f"of {', '.join(runtimes()) or 'none'}"
        )
    try:
        return runtimes()[name].load()
    except ImportError as error:
        raise BackendError(
            f"exported networks need {error.name or error}, which is not installed: pip install "
            "'dualdiff-engine[onnx]', or [ort-gpu] for NVIDIA GPUs"
        ) from error


class Engine:
    """Draws pairs of one base model with one of its resident adapters.

    Build with `Engine.from_pretrained`; use as a context manager, or `close` it. Not thread-safe,
    except for `interrupt`.
    """

    def __init__(
        self,
        base: BaseModel,
        ops: Ops,
        device: torch.device,
        dtype: torch.dtype,
        max_batch: int,
        cuda_graph: bool | None = False,
        tune: str = "auto",
        tf32: bool = False,
        *,
        denoiser: Denoiser | None = None,
        text_encoder: TextEncoder | None = None,
        vae: Any = None,
    ) -> None:
        """denoiser, text_encoder, vae: run in place of the base model's own."""
        self.base, self.ops, self.device, self.dtype = base, ops, device, dtype
        self.max_batch = max_batch
        self.tf32 = tf32
        # where the network calls its ops, if what serves them differs by shape
        self._places: tuning.Places = {}
        self.text_encoder = text_encoder or TextEncoder(*base.load_text())
        # fp16 overflows in this decoder; bf16 that is computed in fp32 gains nothing by rounding
        wide = dtype == torch.float16 or ops.widened
        self.vae = vae or base.load_vae(device, torch.float32 if wide else dtype)
        # what the loop calls: the network, its captured graphs, or what was handed in
        self.denoiser: Denoiser = denoiser or self._network(cuda_graph, tune)
        self._residents: dict[str, Resident] = {}
        self._active: str | None = None
        self.interrupted = False
        self._banks = BankStore()
        self._busy, self._batches = BusyLock(), BatchMemory()

    def _network(self, cuda_graph: bool | None, tune: str) -> Denoiser:
        """The base's UNet as coupled branches, folded; no adapter is loaded yet."""
        tokens = self.text_encoder.tokenizer.model_max_length
        network = tuning.Network(self.base.unet_config, self.base.sample_size, tokens)
        self.ops, self._places = tuning.settle(
            self.ops, network, self.device, self.dtype, self.max_batch, tune
        )
        self.unet = DualUNet(self.base.unet_config, self.ops, background=True)
        self.denoiser = self.unet
        self._load(fold.fold_network(self.base.unet, self.device, self.dtype))
        if lacking := self.unet.missing():
            raise BaseModelError(
                f"the base UNet lacks {fold.diffusers_name(lacking[0])} "
                f"({len(lacking)} tensors in all): download it again"
            )
        if doubling.fits(self.device, self.dtype):
            self.unet.fold_doublings()
        if cuda_graph is False or not graphs.wanted(cuda_graph, self.device):
            return self.unet
        return GraphedDenoiser(self.unet, required=cuda_graph is True)

    @classmethod
    @enough_memory("while the model is loaded", _LESS)
    def from_pretrained(
        cls,
        base: str | Path,
        *,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        backend: str | Mapping[str, str] = "auto",
        cuda_graph: bool | None = None,
        max_batch: int | None = None,
        tune: str = "auto",
        tf32: bool = False,
        allow_pickle: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        exported: str | Path | None = None,
        trust: bool = False,
    ) -> Engine:
        """Load a base model and, if given, an adapter.

        base: a diffusers Stable Diffusion folder or a hub id. adapter: see `load_adapter`. dtype:
        float32, bfloat16, float16 or auto (fp32 on a CPU, bf16 on a GPU that has it). backend: auto
        or a name that `dualdiff doctor` lists, or "op=name,…" for single ops, or the choice that a
        recipe holds under "backends", or onnxruntime or tensorrt, which run the denoiser of
        `exported`, a folder by `dualdiff export onnx`; trust: also TensorRT engines that others
        built. cuda_graph: replay captured CUDA graphs, by default on every GPU where a replay gives
        the network's own result. max_batch: most pairs computed at once, by default 4 on a CPU and
        32 on a GPU. tune: auto measures, the first time on a GPU, which backend is fastest for each
        call (about a minute; kept in the user's cache folder); never takes what was measured
        before, by `dualdiff tune` too, else the usual choice. tf32: let a GPU round what float32
        products and convolutions take to TF32, 10 bits, which is faster.
        Raises BaseModelError, AdapterError, BackendError, SettingsError, OutOfMemoryError.
        """
        named = backend if isinstance(backend, str) else ""
        if exported is not None or named in runtimes() or Path(base, BUNDLE).is_file():
            return runtime(named if named in runtimes() else "onnxruntime").from_pretrained(
                base, exported, backend, adapter, dtype, device, max_batch, allow_pickle, revision,
                local_files_only, trust,
            )  # fmt: skip
        tuning.check_mode(tune)
        device = device_of(device)
        dtype = dtype_of(dtype, device)
        tf32_of(tf32, device, dtype)
        max_batch = max_batch_of(max_batch) or (32 if device.type == "cuda" else 4)
        ops = bind(backend, device=device, dtype=dtype)
        # refused before gigabytes are read
        graphs.wanted(cuda_graph, device)
        # the small file first, for the same reason
        loaded = adapters.load(adapter, allow_pickle=allow_pickle) if adapter else None
        model = BaseModel(base, revision=revision, local_files_only=local_files_only)
        model.check()
        if device.type == "cpu":
            keep_freed_blocks()
        with torch.inference_mode():
            engine = cls(model, ops, device, dtype, max_batch, cuda_graph, tune, tf32)
            if loaded is not None:
                engine.keep_adapter(loaded, adapters.default_name(str(adapter)))
        return engine

    @classmethod
    @enough_memory("while the bundle is loaded", _LESS)
    def from_bundle(
        cls,
        path: str | Path,
        *,
        adapter: str | None = None,
        device: str | torch.device = "auto",
        backend: str = "auto",
        max_batch: int | None = None,
        trust: bool = False,
    ) -> Engine:
        """Run a folder by `dualdiff export bundle`, which needs no base model.

        adapter: one of the bundle's, by default its first; all are resident. backend: auto takes
        the fastest that runs here and says in `ops.table` which and why. trust: run TensorRT
        engines that somebody else built. Raises BackendError, OutOfMemoryError.
        """
        return runtime("onnxruntime").from_bundle(path, adapter, device, backend, max_batch, trust)

    @enough_memory("while the adapter is loaded", _LESS)
    def load_adapter(
        self, source: str | Path, name: str | None = None, *, allow_pickle: bool = False
    ) -> str:
        """Read, check and fold an adapter, keep it resident and make it the active one.

        source: a `.safetensors` file, an adapter folder or a `checkpoint-N` folder. name: how to
        refer to it, by default the file's or folder's. Returns the name. Raises AdapterError,
        OutOfMemoryError, and SettingsError when an adapter of that name is resident.
        """
        name = name or adapters.default_name(source)
        if name in self._residents:
            raise SettingsError(f"an adapter {name!r} is loaded: unload it, or pass another name=")
        loaded = adapters.load(source, allow_pickle=allow_pickle)
        self.keep_adapter(loaded, name)
        return name

    @torch.inference_mode()
    def keep_adapter(self, adapter: adapters.Adapter, name: str) -> None:
        """Check and fold a parsed adapter and make it the active one. Raises AdapterError."""
        adapters.check_fits(adapter, self.base.site_shapes, self.text_encoder.layers)
        folded = fold.fold_sites(self.base.unet, adapter.sites, self.device, self.dtype)
        text = self.text_encoder.fold(adapter.text)
        self.keep_folded(name, Resident(adapters.summary(adapter), folded, text))

    def keep_folded(self, name: str, folded: Resident) -> None:
        """Keep an adapter that was folded elsewhere and make it the active one.

        Raises SettingsError while pairs are drawn.
        """
        with self._busy.held():
            self._take(folded)
            self._residents[name] = folded
            self._activate(name)

    def set_adapter(self, name: str) -> None:
        """Make a resident adapter the active one: tensors are pointed at, nothing is computed."""
        resident = self.resident(name)
        with self._busy.held():
            self._take(resident)
            self._activate(name)

    def unload_adapter(self, name: str) -> None:
        """Forget a resident adapter; if it is active, set another before generating."""
        if name not in self._residents:
            raise SettingsError(f"no adapter {name!r} is loaded")
        with self._busy.held():
            del self._residents[name]
            if self._active == name:
                self._activate(None)

    @property
    def adapters(self) -> list[str]:
        """Names of the resident adapters."""
        return list(self._residents)

    @property
    def active_adapter(self) -> str | None:
        return self._active

    @property
    def active(self) -> Resident:
        """The active adapter's folded tensors. Raises SettingsError when none is."""
        return self._require_adapter()

    def resident(self, name: str) -> Resident:
        """The folded tensors of an adapter. Raises SettingsError when none is loaded so."""
        if name not in self._residents:
            known = ", ".join(self._residents) or "none"
            raise SettingsError(f"no adapter {name!r} is loaded (loaded: {known})")
        return self._residents[name]

    def generate(
        self,
        n: int | Sequence[int] | None = None,
        *,
        sampling: Sampling | None = None,
        seeds: int | Sequence[int] | None = None,
        batch: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        size: int | tuple[int, int] | None = None,
        preset: str | None = None,
        prompts: Prompts | tuple[str, str] | None = None,
        background: Background | Sequence[Background] | None = None,
        placement: Placement | Sequence[Placement] | None = None,
        latents: Tensor | None = None,
        background_latents: Tensor | None = None,
        background_noise: Tensor | None = None,
        segmenter: str | Path | None = None,
        mask: str = "anomaly",
        accept: str | Mapping[str, float] | None = None,
        attempts: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        on_fault: Callable[[Fault], None] | None = None,
        resume: Resumed | None = None,
        progress: bool = False,
    ) -> list[Pair]:
        """Draw pairs.

        Args:
            n: How many pairs, with fresh seeds; or the seeds, one per pair. Default: 1.
            sampling: Steps, guidance, scheduler, size, preset and the scheduler's own options in
                one object. Or give the first five singly.
            seeds: One per pair, or the seed of one pair, 0 to 2^63-1. A pair depends on its own
                seed, not on its batch.
            batch: Pairs computed at once, 1 to `max_batch`. Default: as many as fit in both.
            steps: Scheduler steps; PNDM makes one denoiser call more. Default: 100, with a
                background 50, as released.
            guidance: Guidance scale. Default: 2.5, with a background 2.0, as released. A distilled
                adapter holds its own and takes no other.
            scheduler: Class name of a diffusers scheduler. Default: the base model's.
            size: Pixels, one number or (height, width). Default: the base model's.
            preset: "released", "fast", "draft" or "distilled", which fills in what is not given.
                Default: none, which is the same as "released".
            prompts: `Prompts`, or (image prompt, anomaly prompt). Default: those that the bundle
                records for the adapter, else the released ones.
            background: The surroundings to keep, for adapters trained with a background; one for
                all pairs, or one per pair. Default with a placement: its picture, object black.
            placement: Where the defect goes, on which normal picture; one for all pairs, or one per
                pair. All else stays as in the picture. With a window, the pair has its size.
            latents: [n, 2, 4, h, w] in place of the draws; standard normal.
            background_latents: [2, 4, h, w] (uncond, cond) in place of the encoded background.
            background_noise: [calls, 2, 4, h, w] in place of the draws.
            segmenter: An ONNX file that makes the masks, in place of the built-in threshold.
            mask: What the mask is made from: the anomaly image; with a placement also the visible
                change, "change", or the anomaly image where there is change, "both".
            accept: Bounds that the pair's scores have to keep, such as {"min_area": 0.001}, or
                "default"; see `pipeline.scores`. A pair that misses one is drawn again with other
                noise of the same seed.
            attempts: How often a pair is drawn at most, 1 to 64. Default: 4. Then the attempt that
                misses fewest bounds is taken, with `accepted` False.
            output_type: "pil", "np" or "pt"; see `Pair`.
            callback_on_step_end: Called with (engine, step, timestep, {"latents": [B, 2, 4, h, w]})
                after every step, as in diffusers; what it returns under "latents" goes on.
            on_fault: Called with a `Fault` for every pair that came out unusable, which is then
                left out. Default: raise PairError.
            resume: Where the pairs go, a `FolderWriter`: what it holds is not drawn again.
            progress: Show a progress bar on stderr.

        Returns:
            The pairs, in the order of their seeds; after `interrupt`, those that were finished.

        Raises:
            SettingsError: A value is wrong. Nothing has been computed then.
            SegmenterError: The segmenter cannot be used.
            PairError: A pair came out unusable: not finite, or of one colour.
            OutOfMemoryError: Not even one pair fits, to be drawn or to be decoded. A larger batch
                is halved and drawn again.
            OutputError: `resume` holds pairs of another recipe.
        """
        return list(
            self.stream(
                n,
                sampling=sampling,
                seeds=seeds,
                batch=batch,
                steps=steps,
                guidance=guidance,
                scheduler=scheduler,
                size=size,
                preset=preset,
                prompts=prompts,
                background=background,
                placement=placement,
                latents=latents,
                background_latents=background_latents,
                background_noise=background_noise,
                segmenter=segmenter,
                mask=mask,
                accept=accept,
                attempts=attempts,
                output_type=output_type,
                callback_on_step_end=callback_on_step_end,
                on_fault=on_fault,
                resume=resume,
                progress=progress,
            )
        )

    def stream(
        self,
        n: int | Sequence[int] | None = None,
        *,
        sampling: Sampling | None = None,
        seeds: int | Sequence[int] | None = None,
        batch: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        size: int | tuple[int, int] | None = None,
        preset: str | None = None,
        prompts: Prompts | tuple[str, str] | None = None,
        background: Background | Sequence[Background] | None = None,
        placement: Placement | Sequence[Placement] | None = None,
        latents: Tensor | None = None,
        background_latents: Tensor | None = None,
        background_noise: Tensor | None = None,
        segmenter: str | Path | None = None,
        mask: str = "anomaly",
        accept: str | Mapping[str, float] | None = None,
        attempts: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        on_fault: Callable[[Fault], None] | None = None,
        resume: Resumed | None = None,
        progress: bool = False,
    ) -> Generator[Pair, None, None]:
        """As `generate`, but hand out each pair as soon as its batch is done.

        Arguments and errors are those of `generate`. Everything is checked by this call; networks
        run when the first pair is asked for.
        """
        run = self._run()
        request = check(
            run,
            n,
            seeds,
            sampling_of(sampling, steps, guidance, scheduler, size, preset),
            batch=batch,
            prompts=prompts,
            background=background,
            placement=placement,
            latents=latents,
            background_latents=background_latents,
            background_noise=background_noise,
            segmenter=segmenter,
            mask=mask,
            accept=accept,
            attempts=attempts,
            output_type=output_type,
            callback=partial(callback_on_step_end, self) if callback_on_step_end else None,
            on_fault=on_fault,
            resume=resume,
            progress=progress,
        )
        return self._until_interrupted(pipeline.generate(run, request))

    def unfinished(
        self,
        n: int | Sequence[int] | None = None,
        *,
        seeds: int | Sequence[int] | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Generator[Callable[[], Pair], None, None]:
        """As `stream`, but hand out what makes each pair: one call, in any thread.

        Masks and scores are made by it, so that the device goes on meanwhile. options: those of
        `pipeline.request.check`.
        """
        run = self._run()
        request = check(run, n, seeds, sampling or Sampling(), **options)
        return self._until_interrupted(pipeline.unfinished(run, request))

    def _until_interrupted(self, pairs: Generator[T, None, None]) -> Generator[T, None, None]:
        """The pairs of a run; an interruption ends this run and no later one."""
        try:
            yield from pairs
        finally:
            self.interrupted = False

    def _run(self) -> Run:
        """The parts that draw pairs with the active adapter."""
        resident, name = self._require_adapter(), self._active
        summary = resident.summary
        adapter: dict[str, Any] = {"source": summary.file, "sha256": summary.sha256}
        if summary.held_guidance is not None:
            adapter["guidance"] = summary.held_guidance
        facts = Facts(
            base={"source": self.base.source, "sha256": self.base.sha256},
            adapter=adapter,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            backends=self.ops.recorded,
            tf32=self.tf32,
        )
        return Run(
            denoiser=self.denoiser,
            ops=self.ops,
            text_encoder=self.text_encoder,
            text_weights=resident.text,
            vae=self.vae,
            make_scheduler=self.base.make_scheduler,
            make_noiser=self.base.noiser,
            banks=self._banks,
            device=self.device,
            dtype=self.dtype,
            max_batch=self.max_batch,
            size=self.base.picture_size,
            pixels_per_latent=self.base.pixels_per_latent,
            scheduler=type(self.base.scheduler).__name__,
            adapter=name,
            trained_background=summary.background,
            coupling=summary.coupling,
            window=summary.window,
            held_guidance=summary.held_guidance,
            prompts=resident.prompts,
            facts=facts,
            # by content: another file may have been loaded under the name
            is_active=lambda: self._active == name and self._require_adapter() is resident,
            interrupted=lambda: self.interrupted,
            busy=self._busy,
            batches=self._batches,
        )

    def interrupt(self) -> None:
        """Stop the running `generate` or `stream` after its current step; finished pairs stay.

        Before one, the next one draws nothing: a Ctrl-C while a model loads is not lost.
        """
        self.interrupted = True

    def close(self) -> None:
        """Drop every weight."""
        self._residents.clear()
        self._activate(None)
        self.denoiser.release()
        self.vae.to("meta")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.inference_mode()
    def encode_prompts(self, prompts: Prompts | tuple[str, str] | None = None) -> Tensor:
        """Embeddings [2 branches, 2 rows (negative, prompt), L, X] fp32, by the active adapter.

        prompts: as for `generate`.
        """
        resident = self._residents[self._active] if self._active else None
        text = resident.text if resident else {}
        if prompts is None and resident is not None:
            prompts = resident.prompts
        tokens = self.text_encoder.tokenize_pair(Prompts.of(prompts))
        return self.text_encoder.encode_pair(tokens, text)

    @torch.inference_mode()
    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        context: Tensor,
        background_latents: Tensor | None = None,
        placeholder: Tensor | None = None,
    ) -> Tensor:
        """One denoiser call.

        latents [2 branches, R or 1, B, 4, h, w]; context [2, R, L, X]; background_latents
        [R, 4, h, w], already noised to the timestep; placeholder [2, R, L] as of
        `TextEncoder.places`, for couplings that align -> noise [2, R, B, 4, h, w] in the engine's
        dtype.
        """
        self._require_adapter()
        shares, run = None, self.denoiser
        with numerics(self.device, self.tf32):
            time = run.time_inputs(torch.tensor([float(timestep)], device=self.device))[0]
            text = run.text_inputs(context.to(self.device, self.dtype), placeholder)
            if background_latents is not None:
                shares = run.background_shares(background_latents.to(self.device), time, text)
            return run(latents.to(self.device), time, text, shares)

    # -----------------------------------------------------------------------------------------

    def _activate(self, name: str | None) -> None:
        self._active = name
        self._banks.clear()
        if name is not None and self._places:
            kind = "background" if self._residents[name].summary.background else "plain"
            binding.rebind(self.unet, self.ops, self._places[kind])

    def _take(self, resident: Resident) -> None:
        """Couple the branches as an adapter does, and load its tensors."""
        self.denoiser.couple(resident.summary.coupling)
        self._load(resident.sites)

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            self.denoiser.load(tensors)
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise BaseModelError(f"unet weights do not match unet/config.json: {reason}") from error

    def _require_adapter(self) -> Resident:
        if self._active is None:
            raise SettingsError("no adapter is active: call load_adapter or set_adapter first")
        return self._residents[self._active]
