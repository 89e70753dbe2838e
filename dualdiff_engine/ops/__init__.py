"""The ops of the network, each bound once to the backend that serves it.

`bind` is called when an engine is built; what it returns is plain callables, so that nothing is
decided inside the denoising loop. A backend is a module of this package, loaded when it is looked
at: it holds its ops under their names, or hands them out by `load(op)`, and says by
`supported(op, device, dtype) -> (ok, reason)` which it serves. That is a claim: `proof` runs every
op that a backend claims before `choice` takes it. One whose kernels must be measured before `auto`
takes them also says by `proven(device) -> (ok, reason)` whether they were.
PyTorch's scaled_dot_product_attention is the attention of the reference.
"""

from dualdiff_engine.ops.choice import (
    BACKENDS,
    COUPLED,
    NAMES,
    Choice,
    Ops,
    backend_module,
    backend_op,
    bind,
    requested,
    serves,
    usual,
)

__all__ = [
    "BACKENDS",
    "COUPLED",
    "NAMES",
    "Choice",
    "Ops",
    "backend_module",
    "backend_op",
    "bind",
    "requested",
    "serves",
    "usual",
]
