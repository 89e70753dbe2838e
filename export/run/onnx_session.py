"""ONNX Runtime sessions over torch tensors, on the CPU or on a GPU, never on another than asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dualdiff_engine.device import is_out_of_memory
from dualdiff_engine.errors import BackendError, DualDiffError, OutOfMemoryError

_AGAIN = "copy the whole folder again, or export it again"
_ELEMENT = {
    torch.float32: 1,
    torch.int64: 7,
    torch.float16: 10,
    torch.bfloat16: 16,
}


def onnxruntime() -> Any:
    """The package. Raises BackendError that names the extra to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed: pip install 'dualdiff-engine[onnx]', or [ort-gpu] for "
            "NVIDIA GPUs"
        ) from error
    # the package tells by warnings what is raised here as errors
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def provider_of(device: torch.device) -> tuple[str, dict[str, Any]]:
    """The execution provider of a device. Raises BackendError when the runtime lacks it."""
    if device.type == "cpu":
        return "CPUExecutionProvider", {}
    available = onnxruntime().get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise BackendError(
            f"this ONNX Runtime cannot run on {device}: it offers {', '.join(available)}; install "
            "'dualdiff-engine[ort-gpu]' in place of onnxruntime, or use device='cpu'"
        )
    # tf32 would cost three digits of an fp32 export
    return "CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}


class Session:
    """A graph file on a device. Tensors go in and come out on that device, without copies.

    changed: values for initializers of the graph, by name, in their stored layout.
    """

    def __init__(
        self, path: Path, device: torch.device, changed: Mapping[str, Tensor] | None = None
    ) -> None:
        runtime = onnxruntime()
        provider, settings = provider_of(device)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # a session that spins between calls takes the cores from the PyTorch around it
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # the session reads these where they are, as long as it lives
        self._changed = _override(runtime, options, changed or {})
        try:
            self.session = runtime.InferenceSession(
                str(path), options, providers=[(provider, settings)]
            )
        except Exception as error:
            raise _error(path, "load", error) from error
        self.session.disable_fallback()
        if self.session.get_providers()[0] != provider:
            raise BackendError(
                f"{path} was to run on {device}, but ONNX Runtime could not start its "
                f"{provider}: its CUDA or cuDNN libraries are missing or of another version"
            )
        self.path, self.device = path, device
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        """Outputs in the graph's order. Raises BackendError, OutOfMemoryError."""
        try:
            return self._run(inputs)
        except Exception as error:
            raise _error(self.path, "run", error) from error

    def _run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        binding = self.session.io_binding()
        where, index = self.device.type, self.device.index or 0
        held = []
        for name in self.inputs:
            tensor = inputs[name].detach().to(self.device).contiguous()
            held.append(tensor)
            binding.bind_input(
                name, where, index, _ELEMENT[tensor.dtype], list(tensor.shape), tensor.data_ptr()
            )
        for name in self.outputs:
            binding.bind_output(name, where, index)
        if where == "cuda":
            # what made the inputs ran on PyTorch's stream, the session has its own
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [from_dlpack(value) for value in binding.get_outputs()]


def _error(path: Path, verb: str, error: Exception) -> DualDiffError:
    """One of ours for whatever ONNX Runtime raises: a dozen classes with no base of their own."""
    if is_out_of_memory(error):
        return OutOfMemoryError(f"in {path}", "use a smaller batch or size")
    # several lines: which input, which axis, what was expected
    words = " ".join(str(error).split())[:400]
    return BackendError(f"ONNX Runtime cannot {verb} {path} ({words}): {_AGAIN}")


def _override(runtime: Any, options: Any, changed: Mapping[str, Tensor]) -> list[Any]:
    """Give a session other values for initializers; returns what holds their memory."""
    arrays = {name: _numpy(tensor) for name, tensor in changed.items()}
    values = [
        runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ELEMENT[changed[name].dtype])
        for name, array in arrays.items()
    ]
    if values:
        # before the graph is optimised: `add_initializer` is heard after it, when constants were
        # folded and half precision was widened, with the values of the file
        options.add_external_initializers(list(arrays), values)
    return [arrays, values]


def _numpy(tensor: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its bits as integers."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
