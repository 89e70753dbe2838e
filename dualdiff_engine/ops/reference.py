"""Every op in plain PyTorch: the definition, the oracle, and what ONNX exports.

Notations: F branches, R guidance rows, B pairs, N = F·R·B rows, S positions, L text tokens,
C channels, H heads, D = C/H. Inputs are never written to. Other backends take the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[..., Tensor]

INTERACTION_EPS = 1e-6
# A score map whose deviation over the positions is less than this, times 1 + its mean, is flat: an
# fp32 sum does not tell it from rounding.
FLAT = 1e-6


def supported(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Every op, everywhere."""
    return True, "plain PyTorch"


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b + residual.

    input [..., C], weight [D, C], bias [D], residual [..., D] -> [..., D], in the input's dtype.
    """
    out = F.linear(input, weight, bias)
    return out if residual is None else out.add_(residual)


def branch_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    background_kv: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    linear: Linear | None = None,
) -> Tensor:
    """y_f = x_f W_fᵀ + b: one weight per branch, one bias for all.

    input [F, M, C], weight [F, D, C], bias [D] -> [F, M, D], in the input's dtype.
    background_kv [R, S, E] and keep [1] join the background to keys and values: the last E columns
    of branch 0, its rows seen as [R, B, S], become keep · y_0 + background_kv. Where pairs have
    backgrounds of their own, R stands for R·B, and B is 1. linear: computes the products; by
    default PyTorch does, each written where it belongs.
    """
    out = input.new_empty(*input.shape[:-1], weight.shape[1])
    for x, w, y in zip(input.flatten(1, -2), weight, out.flatten(1, -2), strict=True):
        if linear is not None:
            y.copy_(linear(x, w, bias))
        elif bias is None:
            torch.mm(x, w.t(), out=y)
        else:
            torch.addmm(bias, x, w.t(), out=y)
    if background_kv is not None and keep is not None:
        rows, positions, width = background_kv.shape
        own = out[0].view(rows, -1, positions, weight.shape[1])[..., -width:]
        own.copy_(torch.addcmul(background_kv.unsqueeze(1), own, keep))
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
    *,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """softmax(q [k, k']ᵀ / sqrt(D)) [v, v'] per head, no mask.

    query [N, S, C], key and value [N, L, C], and optionally a second source of both [N, L', C],
    joined in the same softmax; last dimension contiguous, rows may be strided (views into a packed
    projection) -> [N, S, C] contiguous. Softmax statistics in fp32. Sources may have fewer rows, N'
    that divide N: row n of the queries then reads row n % N', so that the branches share them.
    attend: computes one source of as many rows; by default PyTorch does.
    """
    attend = attend or _attend
    if more_key is not None and more_value is not None:
        key, value = torch.cat([key, more_key], dim=1), torch.cat([value, more_value], dim=1)
    if key.shape[0] == query.shape[0]:
        return attend(query, key, value, num_heads)
    # the rows that share a source are one long row of queries
    groups, positions = query.shape[0] // key.shape[0], query.shape[1]
    merged = query.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2)
    out = attend(merged, key, value, num_heads).unflatten(1, (groups, positions))
    return out.transpose(0, 1).flatten(0, 1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, bias: Tensor | None = None
) -> Tensor:
    """PyTorch's attention of rows [N, ., C]; bias [N, 1, S, L] joins the scores of all heads."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    out = F.scaled_dot_product_attention(heads(query), heads(key), heads(value), bias)
    return out.transpose(1, 2).flatten(2)


def align(
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
    """Attention to the prompt, each branch's drawn to where the other one looks for its tokens T.

        m_f[s] = q_f[s] · mean_key_f / (H sqrt(D)), then of mean 0 and deviation 1 over s
        A_f[h, s, l] = q_f[h, s] · k_f[h, l] / sqrt(D)
        A_f[h, s, l in T] += scale · m_g[s] + strength · (2 graphic[s] - 1), g the other branch
        out_f = softmax(A_f) v_f

    query [2, R, B, S, C] contiguous, key and value [2·R, L, C] -> [2, R, B, S, C]. mean_key
    [2·R, C]: the mean of key over T, so that m is the mean score over heads and T; tokens [L]: 1
    for T, else 0; scale [1]; graphic [B, S] or [S] in [0, 1]: where the tokens belong; strength:
    of the graphic. m in fp32, and 0 at all positions where its deviation is below FLAT · (1 +
    |mean|); softmax statistics in fp32.
    """
    _, rows, pairs, positions, channels = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    merged = query.reshape(2 * rows, -1, channels)
    scores = merged.to(wide) @ mean_key.to(wide).unsqueeze(-1)
    scores = scores.view(2, rows, pairs, positions) / math.sqrt(channels * num_heads)
    bias = scale.to(wide) * _standardised(scores).flip(0)
    if graphic is not None:
        bias = bias + strength * (2 * graphic.to(wide) - 1)
    mask = bias.to(query.dtype).view(2 * rows, 1, -1, 1) * tokens
    return _attend(merged, key, value, num_heads, mask).view(query.shape)


def _standardised(scores: Tensor) -> Tensor:
    """Of mean 0 and deviation 1 over the last axis; 0 where they are flat, see FLAT."""
    mean = scores.mean(-1, keepdim=True)
    centred = scores - mean
    variance = centred.square().mean(-1, keepdim=True)
    flat = variance < (FLAT * (1 + mean.abs())).square()
    # a root of 0 has no gradient
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, variance).sqrt())


def exchange(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    residual: Tensor,
    eps: float = INTERACTION_EPS,
    *,
    linear: Linear = linear,
) -> Tensor:
    """The folded interaction of the two branches at every position (model of the paper's SAIM).

    With x̂_f = (x_f - mean) / sqrt(var + eps) over C and d = x̂_0 - x̂_1:

        gate_f = sigmoid(x̂_f · (M d) + m · d)
        y_f = residual_f + x_f + V (x̂_1 + gate_f d) + v

    input and residual [2, M, C]; M = gate_weight [C, C], m = gate_bias [C]; V = value_weight
    [C, C], v = value_bias [C] -> [2, M, C]. Statistics, score and gate in fp32.
    """
    channels = input.shape[-1]
    normed = F.layer_norm(input, (channels,), eps=eps)
    difference = normed[0] - normed[1]
    projected = linear(difference, gate_weight)
    # m·d rides on the same pass over d as a matrix-vector product
    shared = torch.mv(difference.float(), gate_bias.float())
    scores = (normed.float() * projected).sum(-1) + shared
    gate = torch.sigmoid(scores).unsqueeze(-1).to(input.dtype)
    mixed = torch.addcmul(normed[1], gate, difference)
    return linear(mixed, value_weight, value_bias, residual).add_(input)


def merge(
    input: Tensor,
    weight: Tensor,
    residual: Tensor,
    eps: float = INTERACTION_EPS,
    *,
    linear: Linear = linear,
) -> Tensor:
    """Each branch moves by what the other one has and it lacks.

    With x̂_f = (x_f - mean) / sqrt(var + eps) over C, and g the other branch:

        y_f = residual_f + x_f + G_f (x̂_g - x̂_f)

    input and residual [2, M, C], weight [2, C, C], of which row f is G_f -> [2, M, C]. Statistics
    in fp32.
    """
    normed = F.layer_norm(input, (input.shape[-1],), eps=eps)
    # one difference, and so one product, for both
    moved = linear(normed[1] - normed[0], weight.flatten(0, 1)).unflatten(-1, (2, -1))
    return torch.stack([input[0] + moved[:, 0], input[1] - moved[:, 1]]).add_(residual)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
) -> Tensor:
    """Of maps [N, C, h, w] channels-last by weight [D, C, k, k], bias [D] -> [N, D, h', w']."""
    return F.conv2d(input, weight, bias, stride, padding)


def group_norm_silu(
    input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """silu(group_norm(x)). input [N, C, h, w] channels-last -> the same; statistics in fp32."""
    return F.silu(F.group_norm(input, num_groups, weight, bias, eps), inplace=True)


def geglu(input: Tensor, weight: Tensor, bias: Tensor, *, linear: Linear = linear) -> Tensor:
    """a · gelu(b), (a, b) = halves of x Wᵀ + bias, with the exact (erf) GELU.

    input [..., C], weight [2·I, C], bias [2·I] -> [..., I].
    """
    value, gate = linear(input, weight, bias).chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def guided_step(noise: Tensor, guidance: float) -> Tensor:
    """u + s (c - u). noise [F, 2, B, ...], rows (uncond, cond) -> [F, B, ...] in fp32."""
    uncond, cond = noise.float().unbind(1)
    return torch.add(uncond, cond - uncond, alpha=guidance)
