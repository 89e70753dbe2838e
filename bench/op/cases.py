"""Inputs for the calls of a denoiser step, and the formula of each in plain PyTorch."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualdiff_engine.bench.op.calls import Spec
from dualdiff_engine.exchanges.interaction import fold_interaction
from dualdiff_engine.exchanges.kind import Affine
from dualdiff_engine.ops import reference

# scores of plain attention that are held at once
SCORE_BYTES = 1 << 30
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Problem:
    """A call with random inputs.

    plain: the formula in PyTorch, neither fused nor folded, on the same arguments in any dtype.
    libraries: what PyTorch offers for it. own: for sources that rows share, the arguments with a
    copy for every row, so with as many FLOPs and the same result. axes: by argument, the axis of
    its independent rows, and out_axis that of the result; rows: those on which the error is
    measured.
    """

    spec: Spec
    arguments: tuple[Any, ...]
    plain: Callable[..., Tensor]
    libraries: Mapping[str, Callable[..., Tensor]]
    axes: Mapping[int, int]
    out_axis: int
    rows: Tensor
    own: tuple[Any, ...] = ()

    def sample(self, dtype: torch.dtype) -> list[Any]:
        """The arguments with only the sampled rows, in the layout that they have."""

        def cast(x: Tensor) -> Tensor:
            # a selection of channels-last maps is no longer that
            layout = torch.channels_last if x.dim() == 4 else torch.preserve_format
            return x.to(dtype, memory_format=layout)

        return [
            cast(x.index_select(self.axes[i], self.rows) if i in self.axes else x)
            if isinstance(x, Tensor)
            else x
            for i, x in enumerate(self.arguments)
        ]

    def sampled(self, out: Tensor) -> Tensor:
        return out.index_select(self.out_axis, self.rows)


def problem(spec: Spec, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Problem:
    """Draw the inputs of a call; activations and results are of order one."""
    generator = torch.Generator(device).manual_seed(seed)
    names = inspect.signature(getattr(reference, spec.op)).parameters

    def draw(shape: tuple[int, ...], name: str) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        if "weight" in name:
            drawn = 1 + 0.1 * drawn if len(shape) == 1 else drawn / math.sqrt(shape[-1])
        if name in ("tokens", "graphic"):
            # a word is a token or two, a graphic half of the picture
            drawn = (
                (torch.arange(drawn.numel(), device=device) < 2) if name == "tokens" else drawn > 0
            )
            drawn = drawn.view(shape).float()
        return (0.3 * drawn if "bias" in name or name == "keep" else drawn).to(dtype)

    arguments = tuple(
        draw(x, name) if isinstance(x, tuple) else x
        for x, name in zip(spec.arguments, names, strict=False)
    )
    return _COMPLETE[spec.op](spec, arguments, draw)


def _ends(count: int, device: torch.device, most: int = 2) -> Tensor:
    """The first and the last of `count` rows, `most` of them."""
    first = torch.arange(min(most // 2, count), device=device)
    return torch.unique(torch.cat([first, count - 1 - first]))


def _linear(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    def plain(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        out = F.linear(input, weight, bias)
        return out if residual is None else out + residual

    axes = {0: 0, 3: 0} if len(arguments) == 4 else {0: 0}
    rows = _ends(arguments[0].shape[0], arguments[0].device)
    # with the sum in place, which is all that PyTorch offers
    library = {"F.linear": reference.linear}
    return Problem(spec, arguments, plain, library, axes, 0, rows)


def _branch_linear(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    def plain(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        background_kv: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        outs = [F.linear(x, w, bias) for x, w in zip(input, weight, strict=True)]
        if background_kv is not None and keep is not None:
            width = outs[0].shape[-1] - background_kv.shape[-1]
            rows = outs[0].view(
                background_kv.shape[0], -1, background_kv.shape[1], outs[0].shape[-1]
            )
            joined = keep * rows[..., width:] + background_kv[:, None]
            outs[0] = torch.cat([rows[..., :width], joined], dim=-1).view_as(outs[0])
        return torch.stack(outs)

    def bmm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.bmm(input, weight.transpose(1, 2))
        return out if bias is None else out.add_(bias)

    count, device = arguments[0].shape[1], arguments[0].device
    rows = _ends(count, device, 256)
    if len(arguments) == 5:
        # background_kv belongs to all positions of a pair: whole pairs, of every guidance row
        groups, positions, _ = arguments[3].shape
        pairs = torch.arange(count, device=device).view(groups, -1, positions)
        rows = pairs[:, _ends(pairs.shape[1], device)].flatten()
    library = {"bmm": bmm} if len(arguments) < 4 else {}
    return Problem(spec, arguments, plain, library, {0: 1}, 1, rows)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
) -> Tensor:
    """Scores, softmax and weighted sum one after the other, some rows at a time."""
    if more_key is not None and more_value is not None:
        key, value = torch.cat([key, more_key], dim=1), torch.cat([value, more_value], dim=1)
    key, value = (x.repeat(query.shape[0] // x.shape[0], 1, 1) for x in (key, value))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (
            x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)

    scores = num_heads * query.shape[1] * key.shape[1] * query.element_size()
    at_once = max(1, SCORE_BYTES // scores)
    parts = [x.split(at_once) for x in (query, key, value)]
    return torch.cat([attend(*part) for part in zip(*parts, strict=True)])


def _attention(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    query, key, value, num_heads, *more = arguments
    if more or query.shape[0] != key.shape[0]:
        return _shared_attention(spec, arguments)
    # keys and values are views into a packed projection, of self-attention queries too
    if query.shape == key.shape:
        query, key, value = torch.cat([query, key, value], dim=-1).chunk(3, dim=-1)
    else:
        key, value = torch.cat([key, value], dim=-1).chunk(2, dim=-1)
    libraries = {"sdpa": reference.attention}
    if query.is_cuda:
        libraries = {name: functools.partial(_sdpa, backend) for name, backend in SDPA.items()}
    rows = _ends(query.shape[0], query.device)
    arguments = (query, key, value, num_heads)
    return Problem(spec, arguments, plain_attention, libraries, {0: 0, 1: 0, 2: 0}, 0, rows)


def _shared_attention(spec: Spec, arguments: tuple[Any, ...]) -> Problem:
    """Of sources that groups of rows share: whatever row is asked for, it reads all of one."""
    query, key, value, num_heads, *more = arguments
    if len(more) == 2 and key.shape[0] * 2 == query.shape[0]:
        # views into the packed projection of both branches
        packed = torch.cat([torch.cat([key, value], dim=-1), torch.cat(more, dim=-1)])
        (key, more_key), (value, more_value) = (x.chunk(2) for x in packed.chunk(2, dim=-1))
        more = [more_key, more_value]
    arguments = (query, key, value, num_heads, *more)
    rows = _ends(query.shape[1], query.device, 256)
    library = {} if query.is_cuda else {"sdpa": reference.attention}
    joined = [torch.cat(x, dim=1) if more else x[0] for x in ((key, *more[:1]), (value, *more[1:]))]
    groups = query.shape[0] // key.shape[0]
    own = (query, *(x.repeat(groups, 1, 1) for x in joined), num_heads)
    return Problem(spec, arguments, plain_attention, library, {0: 1}, 1, rows, own)


def _align(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    query, key, value, num_heads, _, tokens, *rest = arguments
    key, value = torch.cat([key, value], dim=-1).chunk(2, dim=-1)
    mean_key = (tokens @ key) / tokens.sum()
    arguments = (query, key, value, num_heads, mean_key, tokens, *rest)
    axes = {0: 2} | ({7: 0} if len(rest) > 1 and rest[1].dim() == 2 else {})
    rows = _ends(query.shape[2], query.device)
    return Problem(spec, arguments, plain_align, {}, axes, 2, rows)


def plain_align(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mean_key: Tensor,
    tokens: Tensor,
    scale: Tensor,
    graphic: Tensor | None = None,
    strength: float = 0.0,
) -> Tensor:
    """Means, their standard form, scores, softmax and weighted sum one after the other."""
    branches, rows = query.shape[:2]
    key, value = (
        x.view(branches, rows, 1, -1, num_heads, x.shape[-1] // num_heads).transpose(3, 4)
        for x in (key, value)
    )
    width = key.shape[-1]
    mean = (query * mean_key.view(branches, rows, 1, 1, -1)).sum(-1) / num_heads
    deviation, average = torch.std_mean(mean, dim=-1, correction=0, keepdim=True)
    bias = scale * ((mean - average) / deviation).flip(0)
    if graphic is not None:
        bias = bias + strength * (2 * graphic - 1)
    heads = query.unflatten(-1, (num_heads, width)).transpose(3, 4)
    scores = heads @ key.mT / math.sqrt(width) + bias[:, :, :, None, :, None] * tokens
    return (torch.softmax(scores, dim=-1) @ value).transpose(3, 4).flatten(4)


def _merge(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    def plain(input: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        normed = F.layer_norm(input, input.shape[-1:], eps=reference.INTERACTION_EPS)
        moved = torch.stack([F.linear(normed[1 - f] - normed[f], weight[f]) for f in range(2)])
        return residual + input + moved

    rows = _ends(arguments[0].shape[1], arguments[0].device, 256)
    return Problem(spec, arguments, plain, {}, {0: 1, 2: 1}, 1, rows)


def _sdpa(backend: SDPBackend, *arguments: Any) -> Tensor:
    with sdpa_kernel(backend):
        return reference.attention(*arguments)


def _exchange(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    outputs, residual = arguments[0], arguments[5]
    channels = outputs.shape[-1]
    parts = {}
    for name in ("norm", "input", "query", "key", "value", "output"):
        shape = (channels,) if name == "norm" else (channels, channels)
        parts[name] = Affine(draw(shape, f"{name}_weight"), draw((channels,), f"{name}_bias"))

    def plain(input: Tensor, *rest: Any) -> Tensor:
        """The ten products of the unfolded interaction."""
        part = {n: Affine(a.weight.to(input), a.bias.to(input)) for n, a in parts.items()}
        norm = part["norm"]
        normed = F.layer_norm(input, (channels,), norm.weight, norm.bias, reference.INTERACTION_EPS)
        entry = F.linear(normed, *_pair(part["input"]))
        query, key, value = (F.linear(entry, *_pair(part[n])) for n in ("query", "key", "value"))
        scores = torch.einsum("fmc,gmc->mfg", query, key) / math.sqrt(channels)
        mixed = torch.einsum("mfg,gmc->fmc", torch.softmax(scores, dim=-1), value)
        return rest[-1] + input + F.linear(mixed, *_pair(part["output"]))

    folded = fold_interaction(parts, torch.empty(0, dtype=torch.float64, device=outputs.device))
    names = ("gate_weight", "gate_bias", "value_weight", "value_bias")
    arguments = (outputs, *(folded[name].to(outputs.dtype) for name in names), residual)
    rows = _ends(outputs.shape[1], outputs.device, 256)
    return Problem(spec, arguments, plain, {}, {0: 1, 5: 1}, 1, rows)


def _pair(affine: Affine) -> tuple[Tensor, Tensor]:
    return affine.weight, affine.bias


def _group_norm_silu(
    spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]
) -> Problem:
    def plain(input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.silu(F.group_norm(input, num_groups, weight, bias, eps))

    maps = arguments[0].contiguous(memory_format=torch.channels_last)
    rows = _ends(maps.shape[0], maps.device)
    return Problem(spec, (maps, *arguments[1:]), plain, {}, {0: 0}, 0, rows)


def _geglu(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    def plain(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        value, gate = F.linear(input, weight, bias).chunk(2, dim=-1)
        return value * F.gelu(gate)

    rows = _ends(arguments[0].shape[0], arguments[0].device)
    return Problem(spec, arguments, plain, {}, {0: 0}, 0, rows)


def _guided_step(spec: Spec, arguments: tuple[Any, ...], draw: Callable[..., Tensor]) -> Problem:
    def plain(noise: Tensor, guidance: float) -> Tensor:
        wide = torch.promote_types(noise.dtype, torch.float32)
        uncond, cond = noise.to(wide).unbind(1)
        return uncond + guidance * (cond - uncond)

    rows = _ends(arguments[0].shape[2], arguments[0].device)
    # the row axis of the result has moved up
    return Problem(spec, arguments, plain, {}, {0: 2}, 1, rows)


_COMPLETE: dict[str, Callable[[Spec, tuple[Any, ...], Callable[..., Tensor]], Problem]] = {
    "linear": _linear,
    "branch_linear": _branch_linear,
    "attention": _attention,
    "exchange": _exchange,
    "merge": _merge,
    "align": _align,
    "group_norm_silu": _group_norm_silu,
    "geglu": _geglu,
    "guided_step": _guided_step,
}
