"""Published measures, on networks whose weights the user has: IS, FID, KID and IC-LPIPS.

torch-fidelity and lpips compute them; nothing is downloaded. Weights are opened without running
code from them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.evaluation.data import Sample, reduced

# the files that these measures are defined on
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
VGG_FILE = "vgg16-397923af.pth"
# pixels of a side, as IC-LPIPS is published
LPIPS_SIZE = 256
# of a cluster, as published; the others of it are left out
LARGEST_CLUSTER = 50
_BATCH = 8


class Inception:
    """IS, FID and KID through torch-fidelity, on Inception v3 as converted from TensorFlow.

    weights: the file `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity's releases.
    Raises SettingsError when torch-fidelity or the file is missing, or the file cannot be used.
    """

    def __init__(self, weights: str | Path) -> None:
        self._fidelity = _imported("torch_fidelity", "torch-fidelity")
        # checked here, since torch-fidelity unpickles whatever it is given
        state = _state(weights, INCEPTION_FILE)
        if "Mixed_7c.branch1x1.conv.weight" not in state:
            raise SettingsError(f"{weights} does not hold torch-fidelity's Inception v3: {_get()}")
        self._weights = str(weights)

    def __call__(self, samples: Sequence[Sample], train: Sequence[Sample] = ()) -> dict[str, Any]:
        """Inception score, and with training pictures FID and KID; mean and deviation.

        Ten splits as published, one where splits would hold fewer than ten pictures. FID of fewer
        than some thousand pictures is biased upwards, KID is not: the numbers are in the record.
        """
        inputs = [_Pictures(samples)] + ([_Pictures(train)] if train else [])
        splits = 10 if len(samples) >= 100 else 1
        subset = min(len(samples), len(train), 1000)
        names = {f"input{n}": pictures for n, pictures in enumerate(inputs, 1)}
        found = self._fidelity.calculate_metrics(
            **names,
            isc=True,
            fid=subset > 1,
            kid=subset > 1,
            isc_splits=splits,
            kid_subset_size=max(subset, 2),
            batch_size=_BATCH if all(pictures.one_size for pictures in inputs) else 1,
            cuda=torch.cuda.is_available(),
            cache=False,
            verbose=False,
            feature_extractor_weights_path=self._weights,
        )
        keys = {
            "is": "inception_score_mean",
            "is_deviation": "inception_score_std",
            "fid": "frechet_inception_distance",
            "kid": "kernel_inception_distance_mean",
            "kid_deviation": "kernel_inception_distance_std",
        }
        values = {name: float(found[key]) for name, key in keys.items() if key in found}
        return {**values, "pictures": len(samples), "train": len(train) or None, "splits": splits}


class _Pictures(torch.utils.data.Dataset[Tensor]):
    """uint8 [3, H, W], read when asked for."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    @property
    def one_size(self) -> bool:
        return len({sample.pixels().shape for sample in self._samples}) == 1

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._samples[index].pixels().copy()).permute(2, 0, 1)


class Lpips:
    """LPIPS (Zhang et al. 2018) on VGG-16, and IC-LPIPS (Ojha et al. 2021).

    weights: torchvision's `vgg16-397923af.pth`; the linear layers come with the lpips package.
    Raises SettingsError when lpips or the file is missing, or the file cannot be used.
    """

    def __init__(self, weights: str | Path) -> None:
        package = _imported("lpips", "lpips")
        state = _state(weights, VGG_FILE)
        network = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        # lpips numbers layers as torchvision does, in five slices
        names = {name: name.split(".", 1)[1] for name in network.net.state_dict()}
        try:
            found = {name: state[f"features.{own}"] for name, own in names.items()}
            network.net.load_state_dict(found)
        except (KeyError, RuntimeError) as error:
            raise SettingsError(
                f"{weights} does not hold torchvision's VGG-16: {_get()}"
            ) from error
        self._network = network.eval()

    @torch.inference_mode()
    def embed(self, samples: Sequence[Sample]) -> Tensor:
        """[N, D] float32 whose squared Euclidean distances are LPIPS; 32 MB per picture."""
        net = self._network
        return torch.cat([self._embedded(net, samples[n : n + 1]) for n in range(len(samples))])

    def _embedded(self, net: Any, samples: Sequence[Sample]) -> Tensor:
        pixels = np.stack([reduced(sample.pixels(), LPIPS_SIZE) for sample in samples])
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        rows = []
        layers = net.net(net.scaling_layer(pictures))
        for features, linear in zip(layers, net.lins, strict=True):
            weight = linear.model[-1].weight / features[0, 0].numel()
            unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
            rows.append((unit * weight.sqrt()).flatten(1))
        return torch.cat(rows, dim=1)

    def intra_cluster(self, samples: Sequence[Sample], train: Sequence[Sample]) -> dict[str, Any]:
        """IC-LPIPS: diversity of the pictures nearest to one training picture, over all of these.

        Each picture joins the training picture that LPIPS puts nearest; of a cluster, the first 50
        count. The mean of pairwise LPIPS within a cluster, averaged over clusters of two or more.
        """
        anchors = self.embed(train)
        clusters: list[list[Sample]] = [[] for _ in train]
        for sample in samples:
            own = self.embed([sample])
            nearest = int(torch.stack([_squared(own[0], row) for row in anchors]).argmin())
            clusters[nearest].append(sample)
        del anchors
        means = [self._spread(c[:LARGEST_CLUSTER]) for c in clusters if len(c) > 1]
        return {
            "ic_lpips": float(np.mean(means)) if means else None,
            "clusters": [len(cluster) for cluster in clusters],
        }

    def _spread(self, cluster: Sequence[Sample]) -> float:
        rows = self.embed(cluster)
        pairs = [
            _squared(rows[n], rows[m]) for n in range(len(rows)) for m in range(n + 1, len(rows))
        ]
        return float(torch.stack(pairs).mean())


def _squared(some: Tensor, other: Tensor) -> Tensor:
    return (some - other).square().sum()


def _get() -> str:
    return f"use {INCEPTION_FILE} of torch-fidelity's releases, {VGG_FILE} of torchvision"


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"{package} is not installed: pip install 'dualdiff-engine[eval]'"
        ) from error


def _state(weights: str | Path, usual: str) -> dict[str, Tensor]:
    path = Path(weights)
    if not path.is_file():
        raise SettingsError(
            f"no weights file {str(path)!r}: save {usual} there; nothing is downloaded"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch reports a damaged or hostile file by errors of many classes
    except Exception as error:
        raise SettingsError(f"{path} is not a valid weights file: save {usual} again") from error
    if not isinstance(state, dict):
        raise SettingsError(f"{path} is not a valid weights file: save {usual} again")
    return state
