"""Measures on published networks: how the libraries are called, and against the libraries."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualdiff_engine import cli
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.evaluation.data import Sample, find_pairs, find_real
from dualdiff_engine.evaluation.perceptual import Inception, Lpips
from evaluation_cases import blobs, good, write_real, write_run

INCEPTION_STATE = {"Mixed_7c.branch1x1.conv.weight": torch.zeros(1)}


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return find_pairs(write_run(tmp_path / "run", blobs(5, 0)))


@pytest.fixture
def train(tmp_path: Path) -> list[Sample]:
    return find_real(write_real(tmp_path / "real", blobs(3, 1), good(4, 3)))


class Fidelity(ModuleType):
    """Stands in for torch_fidelity and remembers what it was asked."""

    def calculate_metrics(self, **asked: Any) -> dict[str, float]:
        self.asked = asked
        found = {"inception_score_mean": 2.0, "inception_score_std": 0.5}
        if asked["kid"]:
            names = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
            found |= dict.fromkeys(names, 0.25) | {"frechet_inception_distance": 30.0}
        return found


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> Fidelity:
    module = Fidelity("torch_fidelity")
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    return module


def test_fidelity_is_asked_for_what_can_be_told(
    tmp_path: Path, fidelity: Fidelity, samples: list[Sample], train: list[Sample]
) -> None:
    weights = tmp_path / "inception.pth"
    torch.save(INCEPTION_STATE, weights)
    measure = Inception(weights)
    alone = measure(samples)
    assert alone == {"is": 2, "is_deviation": 0.5, "pictures": 5, "train": None, "splits": 1}
    assert not fidelity.asked["fid"]
    both = measure(samples, train)
    assert (both["fid"], both["kid"], both["train"]) == (30, 0.25, 3)
    asked = fidelity.asked
    assert (asked["kid_subset_size"], asked["cache"]) == (3, False)
    assert asked["feature_extractor_weights_path"] == str(weights)
    pixels = asked["input1"][2]
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(blobs(5, 0).images[2]))
    assert measure(samples * 20)["splits"] == 10
    assert asked["batch_size"] == 8
    # pictures of several sizes cannot be stacked
    Image.new("RGB", (40, 40)).save(train[0].image)
    measure(samples, train)
    assert fidelity.asked["batch_size"] == 1


def test_command_adds_what_weights_allow(
    tmp_path: Path, fidelity: Fidelity, samples: list[Sample], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "inception.pth"
    torch.save(INCEPTION_STATE, weights)
    words = ["eval", "quality", "--pairs", str(tmp_path / "run"), "--inception", str(weights)]
    assert cli.main(words) == 0
    assert "| IS | 2 |" in capsys.readouterr().out


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, measure in (("torch_fidelity", Inception), ("lpips", Lpips)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SettingsError, match=r"pip install 'dualdiff-engine\[eval\]'"):
            measure(tmp_path / "x.pth")


def test_unusable_weights_are_told_and_run_no_code(tmp_path: Path, fidelity: Fidelity) -> None:
    with pytest.raises(SettingsError, match=r"save weights-inception-2015.* nothing is downloaded"):
        Inception(tmp_path / "x.pth")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    with pytest.raises(SettingsError, match="is not a valid weights file"):
        Inception(tmp_path / "broken.pth")
    torch.save({"x": Path("code would run")}, tmp_path / "hostile.pth")
    with pytest.raises(SettingsError, match="is not a valid weights file"):
        Inception(tmp_path / "hostile.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(SettingsError, match="is not a valid weights file"):
        Inception(tmp_path / "list.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SettingsError, match="does not hold torch-fidelity's Inception v3"):
        Inception(tmp_path / "other.pth")


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convolution = torch.nn.Conv2d(2, 1, 1, bias=False)
        torch.nn.init.constant_(convolution.weight, 0.5)
        self.model = torch.nn.Sequential(torch.nn.Dropout(), convolution)


class LPIPS(torch.nn.Module):
    """The parts of lpips.LPIPS that are used, with two layers of two channels."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        assert (net, pnet_rand, verbose) == ("vgg", True, False)
        super().__init__()
        self.scaling_layer = torch.nn.Identity()
        self.net = Trunk()
        self.lins = torch.nn.ModuleList([Linear(), Linear()])

    def forward(self, some: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for first, second in zip(self.net(some), self.net(other), strict=True):
            unit = [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in (first, second)]
            total = total + (0.5 * (unit[0] - unit[1]) ** 2).sum(1).mean()
        return total


class Trunk(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slice1 = torch.nn.Sequential()
        self.slice1.add_module("0", torch.nn.Conv2d(3, 2, 3))
        self.slice2 = torch.nn.Sequential()
        self.slice2.add_module("2", torch.nn.Conv2d(2, 2, 3))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.slice1(pictures).relu()
        return first, self.slice2(first).relu()


def vgg_file(path: Path, trunk: torch.nn.Module) -> Path:
    """The trunk's random weights under torchvision's names."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "features." + name.split(".", 1)[1]: torch.randn(t.shape, generator=generator) * 0.1
        for name, t in trunk.state_dict().items()
    }
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, path)
    return path


def as_lpips_reads(sample: Sample) -> torch.Tensor:
    from dualdiff_engine.evaluation.data import reduced

    pixels = torch.from_numpy(reduced(sample.pixels(), 256).copy())
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def check_ic_lpips(measure: Lpips, samples: list[Sample], train: list[Sample]) -> None:
    """Against the definition, with distances of the package itself, pair by pair."""
    network = measure._network

    def distance(some: Sample, other: Sample) -> float:
        return float(network(as_lpips_reads(some), as_lpips_reads(other)))

    nearest = [int(np.argmin([distance(s, anchor) for anchor in train])) for s in samples]
    clusters = [[s for s, n in zip(samples, nearest, strict=True) if n == k] for k in range(3)]
    means = [
        np.mean([distance(a, b) for a, b in combinations(cluster, 2)])
        for cluster in clusters
        if len(cluster) > 1
    ]
    found = measure.intra_cluster(samples, train)
    assert found["clusters"] == [len(cluster) for cluster in clusters]
    # the same float32 sums in another order
    assert found["ic_lpips"] == pytest.approx(np.mean(means), rel=1e-4)


def test_ic_lpips_is_its_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: list[Sample], train: list[Sample]
) -> None:
    module = ModuleType("lpips")
    module.LPIPS = LPIPS  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    measure = Lpips(vgg_file(tmp_path / "vgg.pth", Trunk()))
    check_ic_lpips(measure, samples, train)
    assert measure.intra_cluster(samples[:1], train)["ic_lpips"] is None
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(SettingsError, match="does not hold torchvision's VGG-16"):
        Lpips(tmp_path / "other.pth")


@pytest.mark.slow
def test_ic_lpips_agrees_with_the_package(
    tmp_path: Path, samples: list[Sample], train: list[Sample]
) -> None:
    lpips = pytest.importorskip("lpips")
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    measure = Lpips(vgg_file(tmp_path / "vgg.pth", network.net))
    check_ic_lpips(measure, samples[:3], train)


@pytest.mark.slow
def test_fidelity_takes_what_it_is_given(
    tmp_path: Path, samples: list[Sample], train: list[Sample]
) -> None:
    """The package itself, on random weights: its names and types still fit."""
    fidelity = pytest.importorskip("torch_fidelity")
    path = tmp_path / "inception.pth"
    kind = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        # without weights it would fetch them; its own random ones will do
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        torch.manual_seed(0)
        torch.save(kind("x", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    found = Inception(path)(samples, train)
    assert 1 <= found["is"] < 10
    assert all(np.isfinite(found[name]) for name in ("fid", "kid"))
