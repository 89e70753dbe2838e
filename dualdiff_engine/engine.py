"""The engine: a base model, resident adapters, and pairs out of them."""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine import adapters, memory, request
from dualdiff_engine.adapters import fold as weights
from dualdiff_engine.adapters.fold import Resident
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.errors import BaseModelError, SettingsError
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import Ops, bind
from dualdiff_engine.pair import Pair, check_output_type
from dualdiff_engine.pipeline import background as backgrounds
from dualdiff_engine.pipeline.background import BackgroundBank
from dualdiff_engine.pipeline.generate import Job, StepCallback, draw_pairs
from dualdiff_engine.pipeline.masks import Segmenter, extract_mask
from dualdiff_engine.pipeline.text import TextEncoder
from dualdiff_engine.recipe import describe
from dualdiff_engine.settings import Background, Prompts, Sampling

# backends that run an exported network; their code is loaded when one is asked for
EXPORTED = ("onnxruntime", "tensorrt")
BUNDLE = "bundle.json"


def _exported() -> Any:
    return importlib.import_module("dualdiff_engine.export.run.engine")


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
        cuda_graph: bool = False,
        *,
        unet: DualUNet | None = None,
        text_encoder: TextEncoder | None = None,
        vae: Any = None,
    ) -> None:
        """unet, text_encoder, vae: what runs in place of the base's own, with the same calls."""
        self.base, self.ops, self.device, self.dtype = base, ops, device, dtype
        self.max_batch = max_batch
        self.text_encoder = text_encoder or TextEncoder(*base.load_text())
        # fp16 overflows in this decoder; bf16 that is computed in fp32 gains nothing by rounding
        wide = dtype == torch.float16 or ops.widened
        self.vae = vae or base.load_vae(device, torch.float32 if wide else dtype)
        self.unet = unet or DualUNet(base.unet_config, ops, background=True)
        # what the loop calls: the network, or its captured graphs
        self.denoiser: DualUNet | GraphedDenoiser = self.unet
        if unet is None:
            self._load(weights.fold_network(base.unet, device, dtype))
        if lacking := self.unet.missing():
            raise BaseModelError(
                f"the base UNet lacks {weights.diffusers_name(lacking[0])} "
                f"({len(lacking)} tensors in all): download it again"
            )
        if cuda_graph:
            self.denoiser = GraphedDenoiser(self.unet)
        self._residents: dict[str, Resident] = {}
        self._active: str | None = None
        self.interrupted = False
        self._bank: tuple[object, BackgroundBank] | None = None

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        *,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        backend: str = "auto",
        cuda_graph: bool | None = None,
        max_batch: int | None = None,
        allow_pickle: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        exported: str | Path | None = None,
        trust: bool = False,
    ) -> Engine:
        """Load a base model and, if given, an adapter.

        base: a diffusers Stable Diffusion folder or a hub id. adapter: see `load_adapter`. dtype:
        float32, bfloat16, float16 or auto (fp32 on a CPU, bf16 on a GPU that has it). backend: auto
        or a name that `dualdiff doctor` lists, or "op=name,…" for single ops, or onnxruntime or
        tensorrt, which run the denoiser of `exported`, a folder by `dualdiff export onnx`; trust:
        also TensorRT engines that others built. cuda_graph: replay captured CUDA graphs, by default
        where Triton serves attention on a GPU. max_batch: most pairs computed at once, by default 4
        on a CPU and 32 on a GPU.
        Raises BaseModelError, AdapterError, BackendError, SettingsError.
        """
        if backend in EXPORTED or exported is not None or Path(base, BUNDLE).is_file():
            return _exported().from_pretrained(
                base, exported, backend, adapter, dtype, device, max_batch, allow_pickle, revision,
                local_files_only, trust,
            )  # fmt: skip
        device = request.device_of(device)
        dtype = request.dtype_of(dtype, device)
        max_batch = request.max_batch_of(max_batch) or (32 if device.type == "cuda" else 4)
        ops = bind(backend, device=device, dtype=dtype)
        graphed = request.cuda_graph_of(cuda_graph, device, ops)
        # the small file first: a wrong adapter is refused before gigabytes are read
        loaded = adapters.load(adapter, allow_pickle=allow_pickle) if adapter else None
        model = BaseModel(base, revision=revision, local_files_only=local_files_only)
        if device.type == "cpu":
            memory.keep_freed_blocks()
        with torch.inference_mode():
            engine = cls(model, ops, device, dtype, max_batch, graphed)
            if loaded is not None:
                engine.keep_adapter(loaded, adapters.default_name(str(adapter)))
        return engine

    @classmethod
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
        """Run a folder by `dualdiff export bundle`, which needs no base model beside it.

        adapter: one of the bundle's, by default its first; all are resident. backend: auto takes
        the fastest that runs here and says in `ops.table` which and why. trust: run TensorRT
        engines that somebody else built. Raises BackendError.
        """
        return _exported().from_bundle(path, adapter, device, backend, max_batch, trust)

    def load_adapter(
        self, source: str | Path, name: str | None = None, *, allow_pickle: bool = False
    ) -> str:
        """Read, check and fold an adapter, keep it resident and make it the active one.

        source: a `.safetensors` file, an adapter folder or a `checkpoint-N` folder. name: how to
        refer to it, by default the file's or folder's. Returns the name. Raises AdapterError, and
        SettingsError when an adapter of that name is resident.
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
        sites = weights.site_shapes(self.unet, self.base.unet_config.context_width)
        adapters.check_fits(adapter, sites, self.text_encoder.layers)
        folded = weights.fold_sites(self.base.unet, adapter.sites, self.device, self.dtype)
        text = self.text_encoder.fold(adapter.text)
        self.keep_folded(name, Resident(adapters.summary(adapter), folded, text))

    def keep_folded(self, name: str, folded: Resident) -> None:
        """Keep an adapter that was folded elsewhere and make it the active one."""
        self._load(folded.sites)
        self._residents[name] = folded
        self._active, self._bank = name, None

    def set_adapter(self, name: str) -> None:
        """Make a resident adapter the active one: tensors are pointed at, nothing is computed."""
        if name not in self._residents:
            known = ", ".join(self._residents) or "none"
            raise SettingsError(f"no adapter {name!r} is loaded (loaded: {known})")
        self._load(self._residents[name].sites)
        self._active, self._bank = name, None

    def unload_adapter(self, name: str) -> None:
        """Forget a resident adapter; if it is active, set another before generating."""
        if self._residents.pop(name, None) is None:
            raise SettingsError(f"no adapter {name!r} is loaded")
        if self._active == name:
            self._active, self._bank = None, None

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

    def generate(self, n: int | Sequence[int] | None = None, **options: Any) -> list[Pair]:
        """All pairs of `stream(n, **options)`, in order; after `interrupt`, those finished."""
        return list(self.stream(n, **options))

    @torch.inference_mode()
    def stream(
        self,
        n: int | Sequence[int] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        batch: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        size: int | tuple[int, int] | None = None,
        prompts: Prompts | tuple[str, str] | None = None,
        background: Background | None = None,
        latents: Tensor | None = None,
        background_latents: Tensor | None = None,
        background_noise: Tensor | None = None,
        segmenter: str | Path | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = False,
    ) -> Generator[Pair, None, None]:
        """Draw pairs, handing each out as soon as its batch is done.

        n: how many, with fresh seeds; or the seeds, one per pair. A pair depends on its own seed,
        not on its batch. batch: pairs computed at once. steps, guidance, scheduler, size (pixels,
        one number or height and width): see `Sampling`; by default the released 100 steps at 2.5,
        or 50 at 2.0 with a background, in the base model's own size. latents [n, 2, 4, h, w],
        background_latents [2, 4, h, w] (uncond, cond) and background_noise [calls, 2, 4, h, w]
        replace the draws. segmenter: an ONNX file that makes the masks.
        callback_on_step_end(engine, step, timestep, {"latents": [B, 2, 4, h, w]}) as in diffusers.
        Everything is checked before anything is computed.
        Raises SettingsError, SegmenterError, OutOfMemoryError.
        """
        resident = self._require_adapter()
        with_background = background is not None or background_latents is not None
        trained = bool(resident.summary["background"])
        request.check_background(self._active, trained, with_background, background_noise)
        height, width = request.size_of(size, self.base.sample_size * self.pixels_per_latent)
        sampling = Sampling(
            steps=steps if steps is not None else (50 if with_background else 100),
            guidance=guidance if guidance is not None else (2.0 if with_background else 2.5),
            scheduler=scheduler or type(self.base.scheduler).__name__,
            height=height,
            width=width,
        )
        h, w = self.latent_size(sampling)
        if latents is not None:
            latents = request.tensor_of("latents", latents, ("n", 2, 4, h, w))
        chosen = request.seeds_of(n, seeds, None if latents is None else len(latents))
        batch = request.batch_of(batch, self.max_batch, len(chosen))
        check_output_type(output_type)
        segment = Segmenter(segmenter) if segmenter else extract_mask
        spoken = Prompts.of(prompts)
        calls = len(self.scheduler(sampling).timesteps)
        # everything above is cheap; from here on, networks run
        context = self.encode_prompts(spoken)[:, -sampling.rows :]
        text = self.unet.text_projections(context.to(self.device, self.dtype))
        bank, described = self._background_bank(
            sampling, spoken, calls, background, background_latents, background_noise
        )
        recipe = describe(self, resident.summary, sampling, spoken, described)
        given = {"latents": latents, "background_latents": background_latents}
        recipe["given"] = [name for name, tensor in given.items() if tensor is not None]
        recipe["segmenter"] = str(segmenter) if segmenter else None
        self.interrupted = False
        job = Job(
            self._active, chosen, batch, sampling, text, bank, latents, segment, output_type,
            callback_on_step_end, progress, recipe,
        )  # fmt: skip
        return draw_pairs(self, job)

    def interrupt(self) -> None:
        """Stop the running `generate` or `stream` after its current step; finished pairs stay."""
        self.interrupted = True

    def close(self) -> None:
        """Drop every weight."""
        self._residents.clear()
        self._active, self._bank = None, None
        self.denoiser = self.unet
        self.unet.to("meta")
        self.vae.to("meta")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.inference_mode()
    def encode_prompts(self, prompts: Prompts | tuple[str, str] | None = None) -> Tensor:
        """Embeddings [2 branches, 2 rows (negative, prompt), L, X] fp32, by the active adapter."""
        text = self._residents[self._active].text if self._active else {}
        return self.text_encoder.encode_pair(Prompts.of(prompts), text)

    @torch.inference_mode()
    def predict_noise(
        self,
        latents: Tensor,
        timestep: float,
        context: Tensor,
        background_latents: Tensor | None = None,
    ) -> Tensor:
        """One denoiser call.

        latents [2 branches, R or 1, B, 4, h, w]; context [2, R, L, X]; background_latents
        [R, 4, h, w], already noised to the timestep -> noise [2, R, B, 4, h, w] in the engine's
        dtype.
        """
        self._require_adapter()
        bias = self.unet.time_bias(torch.tensor([float(timestep)], device=self.device))[0]
        text = self.unet.text_projections(context.to(self.device, self.dtype))
        shares = None
        if background_latents is not None:
            shares = self.denoiser.background_shares(background_latents.to(self.device), bias, text)
        return self.denoiser(latents.to(self.device), bias, text, shares)

    # -----------------------------------------------------------------------------------------

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

    @property
    def pixels_per_latent(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_size(self, sampling: Sampling) -> tuple[int, int]:
        step = self.pixels_per_latent
        if sampling.height % step or sampling.width % step:
            raise SettingsError(f"height and width must be multiples of {step} for this VAE")
        return sampling.height // step, sampling.width // step

    def scheduler(self, sampling: Sampling) -> Any:
        scheduler = self.base.make_scheduler(sampling.scheduler)
        scheduler.set_timesteps(sampling.steps, device=self.device)
        return scheduler

    def _background_bank(
        self,
        sampling: Sampling,
        prompts: Prompts,
        calls: int,
        background: Background | None,
        latents: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[BackgroundBank | None, dict[str, Any] | None]:
        """The bank of a job (the last one, if nothing it depends on changed) and its record."""
        if background is None and latents is None:
            return None, None
        shape = (2, 4, *self.latent_size(sampling))
        mode = background.noise if background else "fresh"
        seed = background.noise_seed if background else 0
        record: dict[str, Any] = {"noise": mode, "noise_seed": seed, "picture_sha256": None}
        if noise is not None:
            noise = request.tensor_of("background_noise", noise, (calls, *shape))
            record["noise"] = "given"
        if latents is not None:
            latents = request.tensor_of("background_latents", latents, shape)
        else:
            assert background is not None
            pixels = backgrounds.cut_out(background, sampling.height, sampling.width)
            record["picture_sha256"] = backgrounds.digest(pixels)
            key = (record["picture_sha256"], shape, sampling.rows, prompts, mode, seed)
            if noise is None and self._bank is not None and self._bank[0] == key:
                return self._bank[1], record
            latents = backgrounds.encode(self.vae, pixels)
        bank = BackgroundBank(
            latents[-sampling.rows :].to(self.device),
            self.base.noiser(),
            mode if noise is None else noise[:, -sampling.rows :],
            seed,
            memory.spare_bytes(self.device),
        )
        if record["picture_sha256"] is not None and noise is None:
            self._bank = (key, bank)
        return bank, record
