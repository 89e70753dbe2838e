"""Named tensors of a released adapter -> validated `Adapter`. Foreign names die here.

Format: https://arxiv.org/abs/2408.13509 and the files its released programs write: per-branch LoRA
on q, k, v, out of every attention site, the interaction of the two branches, optionally the
background blend and LoRA on the text encoder.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.adapters import files
from dualdiff_engine.adapters.distilled import Distilled
from dualdiff_engine.errors import AdapterError
from dualdiff_engine.exchanges import INTERACTION, KINDS, of_kind
from dualdiff_engine.exchanges.kind import Affine
from dualdiff_engine.model.coupling import ALIGN, Block, Coupling, blocks_of
from dualdiff_engine.settings import BRANCHES

PROJECTIONS = ("q", "k", "v", "out")

_SITE_KEY = re.compile(
    r"unet\.(?P<site>.+\.attn[12])\.processor\.(?P<chained>chained_proc\.)?(?P<part>.+)"
)
_LORA_PART = re.compile(r"to_(q|k|v|out)_lora\.([01])\.(down|up)\.weight")
# how far the scores of the placeholder's tokens move with the other branch's, at text sites
_SCALE = "align.scale"
_MLP_PART = re.compile(r"temporal_condition_mlp\.([01])\.(weight|bias)")
_TEXT_KEY = re.compile(
    r"text_encoder\.(?P<layer>.+\.self_attn)\.to_(q|k|v|out)_lora\.(down|up)\.weight"
)

# names that wrappers of a network add when it is saved through them
_WRAPPERS = (
    *("module", "_orig_mod", "_forward_module"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
)
# PEFT's, of two parts that are not wrappers alone
_PEFT = re.compile(r"(^|(?<=\bunet\.)|(?<=\btext_encoder\.))base_model\.model\.")

_USE_OURS = "pass an adapter trained with DualAnoDiff"
_INCOMPLETE = "the adapter is incomplete; use an intact copy or another checkpoint"

# what names of other families look like, the most specific first
_FAMILIES = {
    r"lora_(unet|te\d?|transformer)_": "a kohya-style LoRA",
    r"text_encoder_[23]\.": "an SDXL or SD3 LoRA",
    r"transformer\.": "a LoRA of a transformer model (Flux, SD3)",
    r".*\.lora_(A|B|magnitude_vector)\b": "a PEFT LoRA",
    r".*\.(lora|lora_linear_layer)\.(down|up)\.": "a one-branch diffusers LoRA",
    r".*processor\.to_\w+_lora\.(down|up)\.": "a plain, one-branch diffusers LoRA",
    r".*alpha$": "a LoRA scaled by alpha",
    r".*\b(hada_w\d|lokr_w\d)": "a LyCORIS adapter",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model)\.": "a whole checkpoint",
}


@dataclass(frozen=True)
class LowRank:
    """down [r, in], up [out, r]; the weight changes by up @ down."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class BackgroundBlend:
    """ctx = (1 - amount) h + amount (expand (reduce h_bg)), both affine."""

    reduce: Affine
    expand: Affine
    amount: Tensor


@dataclass(frozen=True)
class SiteAdapter:
    """What an adapter holds for one attention site.

    lora[branch][projection]; parts of its kind of exchange, as that kind reads them; scale [1] of
    a text site that aligns.
    """

    lora: tuple[Mapping[str, LowRank], Mapping[str, LowRank]]
    parts: Mapping[str, Any]
    background: BackgroundBlend | None
    exchange: str = INTERACTION
    scale: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.lora[0]["q"].up.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A validated adapter: sites by module path in the UNet, text LoRA by module path.

    window: the ratio of the windows that it was trained on; None: whole pictures, or not known.
    distilled: the guidance that it holds; None: an adapter that needs unconditional rows for it.
    coupling: of its branches; None: DualAnoDiff's.
    """

    sites: Mapping[str, SiteAdapter]
    text: Mapping[str, Mapping[str, LowRank]]
    rank: int
    parameters: int
    sha256: str = ""
    source: str = ""
    window: float | None = None
    distilled: Distilled | None = None
    coupling: Coupling | None = None

    @property
    def has_background(self) -> bool:
        return any(site.background is not None for site in self.sites.values())


def load(source: str | Path, *, allow_pickle: bool = False) -> Adapter:
    """Read and validate an adapter; nothing is folded and no base model is needed.

    Args:
        source: a `.safetensors` file, an adapter folder, or a `checkpoint-N` folder.
        allow_pickle: also open a `.bin` file, with `weights_only` and bounded in size.

    Returns:
        The adapter, its tensors on the CPU in the dtype of the file.

    Raises:
        AdapterError: the file is missing, damaged, a pickle that was not allowed, or not a
            complete DualAnoDiff adapter; the message names the tensor.
    """
    path = files.find(source, allow_pickle=allow_pickle)
    tensors = files.read(path)
    return _parsed(tensors, files.origin(path), str(path), files.sha256(path))


def _parsed(
    tensors: Mapping[str, Tensor], made: files.Origin, source: str, sha256: str = ""
) -> Adapter:
    loaded = parse(tensors, made.coupling, source=source, sha256=sha256)
    return replace(loaded, window=made.window, distilled=made.distilled)


def default_name(source: str | Path) -> str:
    """The name of an adapter: its file's, or its folder's if the file has the released name."""
    path = Path(source).absolute()
    if path.stem == files.STEM:
        path = path.parent
    name = path.name.removesuffix(".safetensors").removesuffix(".bin")
    return f"{path.parent.name}/{name}" if name.startswith("checkpoint-") else name


def convert(source: str | Path, target: str | Path) -> Adapter:
    """Write any adapter as `.safetensors`, with the same tensors under the same names.

    Args:
        source: as of `load`; pickles are opened, always with `weights_only`.
        target: the file to write, replaced if it exists; its name ends in `.safetensors`.

    Returns:
        The adapter, with the sha256 of the new file.

    Raises:
        AdapterError: `source` is not a valid adapter, or `target` has another suffix.
        OutputError: `target` cannot be written.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise AdapterError(f"{str(target)!r} must end in .safetensors")
    path = files.find(source, allow_pickle=True)
    tensors, made = files.read(path), files.origin(path)
    _parsed(tensors, made, str(path))
    files.write(target, tensors, made)
    return _parsed(tensors, made, str(target), files.sha256(target))


def parse(
    tensors: Mapping[str, Tensor],
    coupling: Coupling | None = None,
    *,
    source: str = "",
    sha256: str = "",
) -> Adapter:
    """Names -> structure; every site complete, every shape consistent. Raises AdapterError.

    coupling: that the file names; None: DualAnoDiff's.
    """
    tensors, given = _unwrapped(tensors)
    site_parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    chained: set[str] = set()
    text_parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if (match := _SITE_KEY.fullmatch(name)) and _known_part(match["part"]):
            if match["part"] in site_parts[match["site"]]:
                raise AdapterError(
                    f"{name} occurs twice, with and without chained_proc: keep one of them"
                )
            site_parts[match["site"]][match["part"]] = tensor
            if match["chained"]:
                chained.add(match["site"])
        elif match := _TEXT_KEY.fullmatch(name):
            text_parts[match["layer"]][name.rpartition("self_attn.")[2]] = tensor
        else:
            raise AdapterError(_foreign(name, given[name]))
    if not site_parts:
        raise AdapterError(
            f"{next(iter(tensors), 'the file')}: no UNet attention weights found; not a "
            f"DualAnoDiff adapter: {_USE_OURS}"
        )
    background = any("temporal_a" in parts for parts in site_parts.values())
    _check_chained(chained, background)
    coupled = _coupled(site_parts, coupling)
    sites = {
        site: _site(
            site,
            _Parts(_prefix(site, site in chained), site_parts[site]),
            background,
            coupled[site.rpartition(".")[0]],
        )
        for site in sorted(site_parts)
    }
    text = {
        layer: _text_layer(_Parts(f"text_encoder.{layer}", text_parts[layer]))
        for layer in sorted(text_parts)
    }
    _one_rank("text_encoder.", tensors)
    return Adapter(
        sites=sites,
        text=text,
        rank=_one_rank("unet.", tensors),
        parameters=sum(t.numel() for t in tensors.values()),
        sha256=sha256,
        source=source,
        coupling=coupling,
    )


def _coupled(sites: Iterable[str], coupling: Coupling | None) -> dict[str, Block]:
    """Transformer block -> how it is coupled. Raises AdapterError for another number of them."""
    blocks = blocks_of(sites)
    chosen = coupling or Coupling.released(len(blocks))
    if len(chosen.blocks) != len(blocks):
        raise AdapterError(
            f"the coupling is of {len(chosen.blocks)} blocks, the file has tensors of "
            f"{len(blocks)}: {_INCOMPLETE}"
        )
    return dict(zip(blocks, chosen.blocks, strict=True))


def _unwrapped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """By names without what DistributedDataParallel, `torch.compile` and others add: tensors, and
    their names in the file.
    """
    plain: dict[str, Tensor] = {}
    given: dict[str, str] = {}
    for name, tensor in tensors.items():
        own = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        own = _PEFT.sub("", own)
        if own in plain:
            raise AdapterError(
                f"{own} occurs twice, with and without {' or '.join(_WRAPPERS)}: keep one of them"
            )
        plain[own], given[own] = tensor, name
    return plain, given


def named(adapter: Adapter) -> dict[str, Tensor]:
    """The inverse of `parse`: tensors by their released names, of what is used alone."""
    tensors: dict[str, Tensor] = {}

    def affine(name: str, one: Affine) -> None:
        tensors.update({f"{name}.weight": one.weight, f"{name}.bias": one.bias})

    def low_rank(name: str, one: LowRank) -> None:
        tensors.update({f"{name}.down.weight": one.down, f"{name}.up.weight": one.up})

    for path, site in adapter.sites.items():
        prefix = _prefix(path, site.background is not None)
        for branch, lora in enumerate(site.lora):
            for part, pair in lora.items():
                low_rank(f"{prefix}.to_{part}_lora.{branch}", pair)
        for part, tensor in of_kind(site.exchange).named(site.parts).items():
            tensors[f"{prefix}.{part}"] = tensor
        if site.scale is not None:
            tensors[f"{prefix}.{_SCALE}"] = site.scale
        if site.background is not None:
            affine(f"{prefix}.temporal_condition_mlp.0", site.background.reduce)
            affine(f"{prefix}.temporal_condition_mlp.1", site.background.expand)
            tensors[f"{prefix}.temporal_a"] = site.background.amount
    for path, text in adapter.text.items():
        for part, pair in text.items():
            low_rank(f"text_encoder.{path}.to_{part}_lora", pair)
    return tensors


def _known_part(part: str) -> bool:
    patterns = (_LORA_PART, _MLP_PART, *(of_kind(name).pattern for name in KINDS))
    return part in ("temporal_a", _SCALE) or any(p.fullmatch(part) for p in patterns)


def _prefix(site: str, chained: bool) -> str:
    return f"unet.{site}.processor" + (".chained_proc" if chained else "")


def _foreign(unwrapped: str, name: str) -> str:
    """The message for a foreign tensor, with the family it seems to come from.

    unwrapped: its name without wrappers. name: in the file.
    """
    for pattern, family in _FAMILIES.items():
        if re.match(pattern, unwrapped):
            return f"{name}: this is {family}, not a two-branch DualAnoDiff adapter: {_USE_OURS}"
    if match := re.match(r"(.+?\.)(unet|text_encoder)\.", name):
        return (
            f"{name} starts with {match[1]!r}, which names of an adapter do not: save it again "
            "without that prefix"
        )
    return f"{name} is not part of a DualAnoDiff adapter: remove it or retrain"


def _check_chained(chained: set[str], background: bool) -> None:
    for site in sorted(chained):
        if not background or not site.endswith("attn1"):
            raise AdapterError(
                f"{_prefix(site, True)}: only self-attention of an adapter with background has "
                "this name: remove `chained_proc.`, or add the missing background tensors"
            )


@dataclass
class _Parts:
    """The tensors of one module; taking one checks that it is there and shaped as expected."""

    prefix: str
    tensors: Mapping[str, Tensor]

    def take(self, name: str, *shape: int | None) -> Tensor:
        if name not in self.tensors:
            raise AdapterError(f"{self.prefix}.{name} is missing: {_INCOMPLETE}")
        tensor = self.tensors[name]
        fits = tensor.dim() == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            want = ["any" if n is None else n for n in shape]
            raise AdapterError(
                f"{self.prefix}.{name} has shape {list(tensor.shape)}, expected {want}: the file "
                "is damaged or belongs to another model; use an intact copy"
            )
        return tensor

    def affine(self, name: str, *shape: int) -> Affine:
        return Affine(self.take(f"{name}.weight", *shape), self.take(f"{name}.bias", shape[0]))

    def low_rank(self, name: str, out: int | None, inner: int | None) -> LowRank:
        down = self.take(f"{name}.down.weight", None, inner)
        return LowRank(down, self.take(f"{name}.up.weight", out, down.shape[0]))


def _site(name: str, parts: _Parts, background: bool, block: Block) -> SiteAdapter:
    is_self = name.endswith("attn1")
    exchange = block.exchange if is_self else block.text_exchange
    aligns = not is_self and block.text == ALIGN
    _check_kind(parts, exchange, aligns)
    channels = of_kind(exchange).channels(parts)
    context = channels if is_self else None
    inner = {"q": channels, "k": context, "v": context, "out": channels}
    lora = tuple(
        {p: parts.low_rank(f"to_{p}_lora.{branch}", channels, inner[p]) for p in PROJECTIONS}
        for branch in range(len(BRANCHES))
    )
    widths = {lora[b][p].down.shape[1] for b in range(len(BRANCHES)) for p in ("k", "v")}
    if len(widths) > 1:
        raise AdapterError(
            f"{parts.prefix}: k and v have different input widths {sorted(widths)}: the file is "
            "damaged; use an intact copy"
        )
    held = of_kind(exchange).read(parts, channels)
    scale = parts.take(_SCALE, 1) if aligns else None
    blend = None
    blend_parts = [p for p in parts.tensors if p == "temporal_a" or _MLP_PART.fullmatch(p)]
    if background and (is_self or blend_parts):
        # text sites of such adapters carry these too: checked, and unused
        width = parts.take("temporal_condition_mlp.0.weight", None, channels).shape[0]
        loaded = BackgroundBlend(
            reduce=parts.affine("temporal_condition_mlp.0", width, channels),
            expand=parts.affine("temporal_condition_mlp.1", channels, width),
            amount=parts.take("temporal_a", 1),
        )
        blend = loaded if is_self else None
    elif blend_parts:
        raise AdapterError(
            f"{parts.prefix}.{blend_parts[0]} is a background tensor, but the file has no "
            f"temporal_a: {_INCOMPLETE}"
        )
    return SiteAdapter((lora[0], lora[1]), held, blend, exchange, scale)


def _check_kind(parts: _Parts, exchange: str, aligns: bool) -> None:
    """Refuse tensors of another coupling than the one that the file names."""
    for part in sorted(parts.tensors):
        others = (n for n in KINDS if n != exchange and of_kind(n).pattern.fullmatch(part))
        other = "align" if part == _SCALE and not aligns else next(others, None)
        if other is not None:
            raise AdapterError(
                f"{parts.prefix}.{part} is of {other!r}, but the file couples this site by "
                f"{exchange!r}{' and align' if aligns else ''}: its `coupling` is lost or of "
                "another file; use an intact copy"
            )


def _text_layer(parts: _Parts) -> Mapping[str, LowRank]:
    width = parts.take("to_q_lora.down.weight", None, None).shape[1]
    return {p: parts.low_rank(f"to_{p}_lora", width, width) for p in PROJECTIONS}


def _one_rank(where: str, tensors: Mapping[str, Tensor]) -> int:
    """The rank of all LoRA under a prefix, 0 if there is none."""
    ranks = {
        name: tensor.shape[0]
        for name, tensor in tensors.items()
        if name.startswith(where) and name.endswith(".down.weight")
    }
    if not ranks:
        return 0
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    for name, rank in ranks.items():
        if rank != usual:
            raise AdapterError(
                f"{name} has rank {rank}, the others have rank {usual}: the file is damaged; use "
                "an intact copy"
            )
    return usual


def check_fits(
    adapter: Adapter,
    sites: Mapping[str, tuple[int, int]],
    text_layers: Mapping[str, int],
) -> None:
    """Refuse an adapter that was trained on another base.

    sites: the base's (channels, context width) by module path. text_layers: hidden width by path.
    """
    remedy = "the adapter was trained on another base model; load that base"
    for name, site in adapter.sites.items():
        if name not in sites:
            raise AdapterError(f"unet.{name}: the base model has no such attention site: {remedy}")
        have = (site.channels, site.lora[0]["k"].down.shape[1])
        if have != sites[name]:
            raise AdapterError(
                f"unet.{name} has (channels, context width) {have}, the base has {sites[name]}: "
                f"{remedy}"
            )
    if missing := sorted(set(sites) - set(adapter.sites)):
        raise AdapterError(
            f"unet.{missing[0]} is missing; every attention site of the base needs weights: "
            f"{remedy}"
        )
    for layer, pairs in adapter.text.items():
        width = pairs["q"].down.shape[1]
        if layer not in text_layers:
            raise AdapterError(f"text_encoder.{layer}: the base model has no such layer: {remedy}")
        if text_layers[layer] != width:
            raise AdapterError(
                f"text_encoder.{layer} has width {width}, the base has {text_layers[layer]}: "
                f"{remedy}"
            )
    if adapter.text and (missing := sorted(set(text_layers) - set(adapter.text))):
        raise AdapterError(f"text_encoder.{missing[0]} is missing: {_INCOMPLETE}")


@dataclass(frozen=True)
class AdapterSummary:
    """What is known of an adapter without its tensors; JSON-ready through `record`.

    file: its path. rank: of all LoRA. sites: how many. background: whether it needs one. blend: the
    learnt share of the background per site. text_encoder_layers: how many carry LoRA.
    context_width: of the prompts that it reads. base: the family of base models that it fits.
    window, distilled, coupling: as in `Adapter`.
    """

    file: str
    sha256: str
    branches: list[str]
    rank: int
    sites: int
    background: bool
    blend: dict[str, float]
    text_encoder_layers: int
    parameters: int
    context_width: list[int]
    base: str
    window: float | None = None
    distilled: Distilled | None = None
    coupling: Coupling | None = None

    @property
    def held_guidance(self) -> float | None:
        """Of a distilled adapter."""
        return self.distilled.guidance if self.distilled else None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> AdapterSummary:
        """The inverse of `asdict`. Raises TypeError and ValueError for anything else."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a summary is a mapping, not {type(values).__name__}")
        distilled = values.get("distilled")
        held = None if distilled is None else Distilled.of(distilled)
        coupling = values.get("coupling")
        coupled = None if coupling is None else Coupling.of(coupling)
        return cls(**{**values, "distilled": held, "coupling": coupled})

    def record(self) -> dict[str, Any]:
        """JSON-ready; `of` is the inverse."""
        coupling = None if self.coupling is None else self.coupling.record()
        return {**asdict(self), "coupling": coupling}


def summary(adapter: Adapter) -> AdapterSummary:
    """What `dualdiff inspect` shows."""
    widths = sorted(
        {s.lora[0]["k"].down.shape[1] for n, s in adapter.sites.items() if n.endswith("attn2")}
    )
    families = {768: "SD-1.x", 1024: "SD-2.x"}
    blends = {n: s.background for n, s in adapter.sites.items() if s.background is not None}
    return AdapterSummary(
        file=adapter.source,
        sha256=adapter.sha256,
        branches=list(BRANCHES),
        rank=adapter.rank,
        sites=len(adapter.sites),
        background=adapter.has_background,
        blend={name: float(blend.amount.to(torch.float64)) for name, blend in blends.items()},
        text_encoder_layers=len(adapter.text),
        parameters=adapter.parameters,
        context_width=widths,
        base=", ".join(families.get(w, f"a model with text width {w}") for w in widths),
        window=adapter.window,
        distilled=adapter.distilled,
        coupling=adapter.coupling,
    )
