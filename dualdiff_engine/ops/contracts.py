"""What each op takes, checked in one place: shapes, dtypes, and the words that name a misfit.

Backends that read memory by address call these before they do; what PyTorch computes is checked by
PyTorch. Limits of one kernel (strides, widths) stay with that kernel. Every function raises
ValueError and returns nothing. Notations as in `dualdiff_engine.ops.reference`.
"""

from __future__ import annotations

from torch import Tensor


def shapes(*tensors: Tensor | None) -> str:
    """As messages show them."""
    return ", ".join("None" if x is None else str(list(x.shape)) for x in tensors)


def require(fits: bool, expected: str, *tensors: Tensor | None) -> None:
    """ValueError with the expected and the received shapes unless they fit."""
    if not fits:
        raise ValueError(f"{expected}; got {shapes(*tensors)}")


def same_dtype(op: str, *tensors: Tensor | None) -> None:
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) > 1:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{op} takes tensors of one dtype; got {got}")


def contiguous(op: str, name: str, x: Tensor) -> None:
    """For kernels that read an argument row after row."""
    if not x.is_contiguous():
        raise ValueError(f"{op} takes a contiguous {name}; got strides {list(x.stride())}")


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    columns = weight.shape[0]
    require(
        weight.shape == (columns, input.shape[-1])
        and (bias is None or bias.shape == (columns,))
        and (residual is None or residual.shape == (*input.shape[:-1], columns)),
        "linear takes input [..., C], weight [D, C], bias [D], residual [..., D]",
        input, weight, bias, residual,
    )  # fmt: skip
    same_dtype("linear", input, weight, bias, residual)


def branch_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    background_kv: Tensor | None = None,
    keep: Tensor | None = None,
) -> None:
    columns = weight.shape[-2]
    fits = background_kv is None and keep is None
    if background_kv is not None and keep is not None:
        fits = (
            background_kv.dim() == 3
            and input.shape[1:-1].numel() % background_kv.shape[:2].numel() == 0
            and 0 < background_kv.shape[2] <= columns
            and keep.shape == (1,)
        )
    require(
        fits
        and weight.shape == (input.shape[0], columns, input.shape[-1])
        and (bias is None or bias.shape == (columns,)),
        "branch_linear takes input [F, M, C], weight [F, D, C], bias [D], "
        "and of M = R·B·S rows background_kv [R, S, E <= D] with keep [1]",
        input, weight, bias, background_kv, keep,
    )  # fmt: skip
    same_dtype("branch_linear", input, weight, bias, background_kv, keep)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
) -> None:
    sources = [(key, value)]
    if more_key is not None and more_value is not None:
        sources.append((more_key, more_value))
    elif more_key is not more_value:
        raise ValueError("attention takes both more_key and more_value, or neither; got one")
    if query.dim() != 3 or num_heads < 1 or query.shape[-1] % num_heads:
        raise ValueError(
            f"attention takes query [N, S, C], C of {num_heads} heads; got {shapes(query)}"
        )
    rows, _, channels = query.shape
    for k, v in sources:
        require(
            k.dim() == 3
            and k.shape == v.shape
            and k.shape[::2] == (key.shape[0], channels)
            and (k.shape[0] == rows or (k.shape[0] > 0 and rows % k.shape[0] == 0)),
            f"attention takes, of {rows} rows or the same divisor of them, "
            f"keys and values [{rows}, L, {channels}]",
            k, v,
        )  # fmt: skip
    if sum(k.shape[1] for k, _ in sources) == 0:
        raise ValueError("attention takes at least one key; got none")
    same_dtype("attention", query, key, value, more_key, more_value)


def exchange(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    residual: Tensor,
) -> None:
    channels = input.shape[-1]
    square, line = (channels, channels), (channels,)
    weights = (gate_weight, gate_bias, value_weight, value_bias)
    fits = input.dim() == 3 and input.shape[0] == 2 and residual.shape == input.shape
    if not fits or [x.shape for x in weights] != [square, line, square, line]:
        raise ValueError(
            "exchange takes input and residual [2, M, C], weights [C, C] and biases [C]; "
            f"got {shapes(input, *weights)} and residual {shapes(residual)}"
        )
    same_dtype("exchange", input, *weights, residual)


def merge(input: Tensor, weight: Tensor, residual: Tensor) -> None:
    channels = input.shape[-1]
    fits = input.dim() == 3 and input.shape[0] == 2 and residual.shape == input.shape
    if not fits or weight.shape != (2, channels, channels):
        raise ValueError(
            "merge takes input and residual [2, M, C] and weight [2, C, C]; "
            f"got {shapes(input, weight)} and residual {shapes(residual)}"
        )
    same_dtype("merge", input, weight, residual)


def align(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mean_key: Tensor,
    tokens: Tensor,
    scale: Tensor,
    graphic: Tensor | None = None,
) -> None:
    if query.dim() != 5 or query.shape[0] != 2 or num_heads < 1 or query.shape[-1] % num_heads:
        raise ValueError(
            f"align takes query [2, R, B, S, C], C of {num_heads} heads; got {shapes(query)}"
        )
    _, rows, pairs, positions, channels = query.shape
    length = key.shape[1] if key.dim() == 3 else 0
    require(
        key.shape == value.shape == (2 * rows, length, channels)
        and length > 0
        and mean_key.shape == (2 * rows, channels)
        and tokens.shape == (length,)
        and scale.shape == (1,),
        f"align takes key and value [{2 * rows}, L, {channels}] of L > 0, "
        f"mean_key [{2 * rows}, {channels}], tokens [L], scale [1]",
        key, value, mean_key, tokens, scale,
    )  # fmt: skip
    require(
        graphic is None or graphic.shape in ((positions,), (pairs, positions)),
        f"align takes graphic [{positions}] or [{pairs}, {positions}]",
        graphic,
    )
    same_dtype("align", query, key, value, mean_key, tokens, scale, graphic)


def group_norm_silu(input: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    channels = input.shape[1] if input.dim() == 4 else 0
    require(
        channels > 0
        and num_groups > 0
        and channels % num_groups == 0
        and weight.shape == bias.shape == (channels,),
        f"group_norm_silu takes input [N, C, h, w] of C in {num_groups} groups, weight [C], "
        "bias [C]",
        input, weight, bias,
    )  # fmt: skip
    same_dtype("group_norm_silu", input, weight, bias)


def geglu(input: Tensor, weight: Tensor, bias: Tensor) -> None:
    wide = 2 * (weight.shape[0] // 2)
    require(
        weight.shape == (wide, input.shape[-1]) and bias.shape == (wide,),
        "geglu takes input [..., C], weight [2·I, C], bias [2·I]",
        input, weight, bias,
    )  # fmt: skip
    same_dtype("geglu", input, weight, bias)


def guided_step(noise: Tensor) -> None:
    require(noise.dim() >= 2 and noise.shape[1] == 2, "guided_step takes noise [F, 2, ...]", noise)
