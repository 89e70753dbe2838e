"""The denoiser as CUDA graphs: one launch per call instead of some thousand.

A graph replays kernels at fixed addresses. What changes between calls is therefore copied into
buffers that stay where they are: the inputs of a call, and the weights that an adapter brings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.model.coupling import Coupling
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops.proof import first_line

logger = logging.getLogger(__name__)

# compiles kernels, lets libraries choose theirs and allocate their workspaces
WARM_UP = 2
# each keeps inputs of its own, some tens of megabytes: the least recently used one makes room
MOST_GRAPHS = 8

Run = Callable[[], list[Tensor]]
# records what a function does and returns what does it again; the results may be overwritten then
Capture = Callable[[Run], Run]


class CudaCapture:
    """Records on one GPU; all its graphs take their intermediate results from one pool.

    Sharing is safe because results are copied out before another graph of the pool runs.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise BackendError(f"CUDA graphs need the network on an NVIDIA GPU, it is on {device}")
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                results = run()

        def replay() -> list[Tensor]:
            with torch.cuda.device(self.device):
                graph.replay()
            return results

        return replay


@dataclass(frozen=True)
class Inputs:
    """Tensors of a denoiser call, under the names of `DualUNet.forward`."""

    latents: Tensor
    time_bias: Sequence[Tensor]
    text: Sequence[Tensor]
    background: Sequence[Tensor] | None = None

    @property
    def constants(self) -> list[Tensor]:
        """All but the latents, which alone keep a dtype of their own."""
        return [*self.time_bias, *self.text, *(self.background or ())]

    def shapes(self) -> tuple[object, ...]:
        """Equal for calls that one graph can serve."""
        tensors = (self.latents, *self.constants)
        return (self.background is not None, *((x.shape, x.dtype) for x in tensors))

    def copy(self) -> Inputs:
        """The same values at addresses of their own."""
        background = self.background
        return Inputs(
            self.latents.clone(),
            [x.clone() for x in self.time_bias],
            [x.clone() for x in self.text],
            None if background is None else [x.clone() for x in background],
        )

    def fill(self, source: Inputs) -> None:
        """Take the values of a call of the same shapes."""
        self.latents.copy_(source.latents)
        torch._foreach_copy_(self.constants, source.constants)


class GraphedDenoiser:
    """A `DualUNet` that runs as captured graphs, one per combination of input shapes.

    The same calls with the same results, bit for bit. Seeds, prompts, timesteps, backgrounds and
    adapters change without a new capture; another batch, size, number of guidance rows, or a
    background where there was none is captured when it is first met, which takes three denoiser
    calls. A capture is used once a replay gave the network's own result, bit for bit. capture: how
    a function is recorded, by default on the network's GPU. required: whether what cannot be
    captured is an error; else the network itself runs, and `refused` says why.
    Raises BackendError when the network is not on a GPU, and where `required` is not met.
    """

    def __init__(
        self, unet: DualUNet, capture: Capture | None = None, *, required: bool = True
    ) -> None:
        self.unet, self._required = unet, required
        self.refused = ""
        self._capture = capture or CudaCapture(unet.conv_in.weight.device)
        self._graphs: dict[tuple[object, ...], tuple[Inputs, Run]] = {}
        self._owns_adapter = False

    def time_inputs(self, timesteps: Tensor) -> list[Sequence[Tensor]]:
        """As `DualUNet.time_inputs`: once per run, nothing to capture."""
        return self.unet.time_inputs(timesteps)

    def text_inputs(self, context: Tensor, placeholder: Tensor | None = None) -> list[Tensor]:
        """As `DualUNet.text_inputs`: once per run, nothing to capture."""
        return self.unet.text_inputs(context, placeholder)

    def couple(self, coupling: Coupling | None) -> None:
        """As `DualUNet.couple`; what was captured of another coupling is dropped."""
        if coupling != self.unet.coupling:
            self._graphs.clear()
            self._owns_adapter = False
        self.unet.couple(coupling)

    def release(self) -> None:
        """Drop every graph and every weight."""
        self._graphs.clear()
        self.unet.release()

    @torch.inference_mode()
    def __call__(
        self,
        latents: Tensor,
        time_bias: Sequence[Tensor],
        text: Sequence[Tensor],
        background: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """As `DualUNet.forward`."""

        def run(x: Inputs) -> list[Tensor]:
            return [self.unet(x.latents, x.time_bias, x.text, x.background)]

        return self._replay("noise", run, Inputs(latents, time_bias, text, background))[0]

    @torch.inference_mode()
    def background_shares(
        self, latents: Tensor, time_bias: Sequence[Tensor], text: Sequence[Tensor]
    ) -> list[Tensor]:
        """As `DualUNet.background_shares`."""

        def run(x: Inputs) -> list[Tensor]:
            return self.unet.background_shares(x.latents, x.time_bias, x.text)

        return self._replay("shares", run, Inputs(latents, time_bias, text))

    @torch.inference_mode()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take an adapter's tensors: pointed at before the first capture, copied in after it.

        Raises as `DualUNet.load`: KeyError for a name that is no adapter's, RuntimeError for
        another shape or dtype. Nothing is copied then.
        """
        if not self._owns_adapter:
            self.unet.load(tensors)
            return
        own = dict(self.unet.named_buffers())
        if wrong := [name for name in tensors if name not in own]:
            raise KeyError(f"not part of an adapter: {wrong[:3]}")
        kept = {name: x for name, x in tensors.items() if not own[name].is_meta}
        for name, tensor in kept.items():
            expected, got = own[name], tensor
            if (expected.shape, expected.dtype) != (got.shape, got.dtype):
                raise RuntimeError(
                    f"{name} is {expected.dtype} {list(expected.shape)}, "
                    f"got {got.dtype} {list(got.shape)}"
                )
        # no graph reads what no adapter has brought so far
        self.unet.load({name: x.clone() for name, x in tensors.items() if name not in kept})
        torch._foreach_copy_([own[name] for name in kept], list(kept.values()), non_blocking=True)

    def _replay(
        self, name: str, run: Callable[[Inputs], list[Tensor]], inputs: Inputs
    ) -> list[Tensor]:
        key = (name, *inputs.shapes())
        graph = self._graphs.pop(key, None)
        if graph is None:
            self._own_adapter()
            if len(self._graphs) == MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = self._proved(run, inputs.copy())
        # in order of use
        self._graphs[key] = graph
        buffers, replay = graph
        buffers.fill(inputs)
        return [result.clone() for result in replay()]

    def _proved(self, run: Callable[[Inputs], list[Tensor]], buffers: Inputs) -> tuple[Inputs, Run]:
        """A capture whose replay equals the network itself, or the network itself."""

        def plainly() -> list[Tensor]:
            return run(buffers)

        refused = self.refused
        try:
            if not refused:
                replay = self._capture(plainly)
                # a replay writes to what the one before returned
                replayed = [result.clone() for result in replay()]
                if all(map(torch.equal, replayed, plainly())):
                    return buffers, replay
                refused = "a replay differs from the network's own result"
        except torch.OutOfMemoryError:
            raise
        # what a library cannot do during a capture
        except RuntimeError as error:
            refused = first_line(error)
        if self._required:
            raise BackendError(f"CUDA graphs cannot be used here: {refused}; leave cuda_graph out")
        if not self.refused:
            logger.warning("CUDA graphs are off: %s", refused)
        self.refused = refused
        return buffers, plainly

    def _own_adapter(self) -> None:
        """Give the network a copy of its adapter: the next one may be written over it."""
        if not self._owns_adapter:
            buffers = self.unet.named_buffers()
            self.unet.load({name: x.clone() for name, x in buffers if not x.is_meta})
            self._owns_adapter = True


def wanted(asked: bool | None, device: torch.device) -> bool:
    """Whether to capture; by default on every GPU.

    Raises SettingsError when graphs are asked for without a GPU.
    """
    if asked and device.type != "cuda":
        raise SettingsError(f"cuda_graph needs an NVIDIA GPU, the engine is on {device}")
    if asked is not None:
        return asked
    return device.type == "cuda"
