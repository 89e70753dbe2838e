"""Windows: where they lie, what they leave alone, what they cost, what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dualdiff_engine import Engine, Placement, RegionStatistics, SettingsError
from dualdiff_engine.folder_writer import FolderWriter
from dualdiff_engine.pair import to_uint8
from dualdiff_engine.pipeline.decode import decode
from dualdiff_engine.pipeline.masks import extract_mask
from dualdiff_engine.pipeline.placement import Canvases, edge_weight
from dualdiff_engine.pipeline.window import Window, window_around

QUICK: dict[str, Any] = {"steps": 2, "size": 64}


def picture(width: int = 200, height: int = 150, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (height, width, 3), dtype=np.uint8)


def box(left: int, top: int, side: int, of: np.ndarray) -> np.ndarray:
    region = np.zeros(of.shape[:2], np.uint8)
    region[top : top + side, left : left + side] = 255
    return region


def placed(left: int = 120, top: int = 60, side: int = 24, **options: Any) -> Placement:
    of = options.pop("of", picture())
    defaults: dict[str, Any] = {"edge": 1, "object_mask": "all", "window": "auto"}
    return Placement(of, box(left, top, side, of), **{**defaults, **options})


@pytest.mark.parametrize(
    ("around", "of", "size", "ratio", "expected"),
    [
        # half of the window, centred
        ((100, 100, 200, 150), (1000, 800), (64, 64), 2.0, (50, 25, 200, 200)),
        # auto: the size of the run, of which the region is less than half
        ((100, 100, 120, 110), (1000, 800), (64, 64), "auto", (78, 73, 64, 64)),
        # auto: as a ratio of 2 where the region is larger
        ((100, 100, 200, 150), (1000, 800), (64, 64), "auto", (50, 25, 200, 200)),
        # shifted into the picture
        ((0, 0, 100, 100), (1000, 800), (64, 64), 2.0, (0, 0, 200, 200)),
        ((900, 750, 1000, 800), (1000, 800), (64, 64), 2.0, (800, 600, 200, 200)),
        # the run's shape; the shorter side counts
        ((400, 400, 500, 420), (1000, 800), (64, 128), 2.0, (250, 310, 400, 200)),
        # as much as the picture has
        ((10, 10, 60, 60), (80, 100), (64, 64), 2.0, (0, 0, 80, 80)),
        ((10, 10, 20, 20), (40, 30), (64, 64), "auto", (0, 0, 30, 30)),
    ],
)
def test_where_a_window_lies(around: Any, of: Any, size: Any, ratio: Any, expected: Any) -> None:
    window = window_around(around, of, size, ratio, 0)
    assert (window.left, window.top, window.width, window.height) == expected


def test_auto_makes_room_for_the_edge() -> None:
    """A region of 100 pixels, and the edge of 24 drawn pixels on both of its sides, in 64."""
    window = window_around((450, 450, 550, 550), (1000, 1000), (64, 64), "auto", 24)
    assert window.width == 400
    assert 100 / 400 * 64 + 2 * 24 <= 64


def test_a_window_holds_every_box_that_fits() -> None:
    draw = np.random.default_rng(0)
    for _ in range(500):
        width, height = (int(n) for n in draw.integers(70, 300, 2))
        left, top = int(draw.integers(width - 40)), int(draw.integers(height - 40))
        around = left, top, left + int(draw.integers(1, 40)), top + int(draw.integers(1, 40))
        ratio = "auto" if draw.random() < 0.5 else float(draw.uniform(1, 1.7))
        own = window_around(around, (width, height), (64, 64), ratio, 0).box
        assert 0 <= own[0] <= around[0] < around[2] <= own[2] <= width
        assert 0 <= own[1] <= around[1] < around[3] <= own[3] <= height


@pytest.mark.parametrize("paste", ["region", "mask", "difference", "none"])
@pytest.mark.parametrize(("side", "window"), [(24, "auto"), (24, 3.0), (60, 1.5), (20, 2)])
def test_pixels_outside_are_those_of_the_picture(
    dual: Engine, paste: str, side: int, window: Any
) -> None:
    """Windows at the drawn scale, larger and smaller."""
    own = placed(side=side, window=window, paste=paste)
    (pair,) = dual.generate(seeds=[3], placement=own, **QUICK)
    image, anomaly, mask, region = (
        np.asarray(x) for x in (pair.image, pair.anomaly, pair.mask, pair.region)
    )
    assert image.shape == anomaly.shape == (150, 200, 3)
    assert mask.shape == (150, 200)
    assert np.array_equal(region, own.region)
    left, top, width, height = pair.recipe["window"]["box"]
    assert pair.recipe["window"]["picture"] == [200, 150]
    assert pair.recipe["placement"]["window"] == window
    outside = np.ones(mask.shape, bool)
    outside[top : top + height, left : left + width] = False
    if paste != "none":
        outside |= edge_weight(region > 0, 8 * width / 64) == 0
    assert 0.2 < outside.mean() < 1
    assert np.array_equal(image[outside], picture()[outside])
    assert not anomaly[outside].any()
    assert not mask[outside].any()
    if paste != "mask":
        assert (image[region > 0] != picture()[region > 0]).mean() > 0.9
    assert bool(mask.any()) is not pair.empty_mask
    assert pair.recipe["mask"]["area"] == (mask > 0).mean()


@pytest.mark.parametrize("paste", ["region", "difference"])
def test_a_window_at_the_drawn_scale_is_the_placement_on_its_cut(dual: Engine, paste: str) -> None:
    own = placed(paste=paste)
    (pair,) = dual.generate(seeds=[3], placement=own, **QUICK)
    left, top, width, height = pair.recipe["window"]["box"]
    assert (width, height) == (64, 64)
    rows, columns = slice(top, top + 64), slice(left, left + 64)
    cut = Placement(picture()[rows, columns], own.region[rows, columns], edge=1, paste=paste)
    (alone,) = dual.generate(seeds=[3], placement=cut, **QUICK)
    for name in ("image", "anomaly"):
        ours, theirs = (np.asarray(getattr(p, name)).astype(int) for p in (pair, alone))
        # the same sum, rounded in another order
        assert np.abs(ours[rows, columns] - theirs).max() <= 1
    assert np.array_equal(np.asarray(pair.mask)[rows, columns], np.asarray(alone.mask))
    assert pair.scores == alone.scores


def test_what_is_drawn_goes_back_in_its_place(dual: Engine) -> None:
    """Without paste, a window of twice the drawn size is what the decoder drew, enlarged."""
    seen: list[Tensor] = []

    def keep(engine: Engine, step: int, timestep: Any, inputs: dict[str, Tensor]) -> None:
        seen.append(inputs["latents"].clone())

    own = placed(side=64, left=70, top=40, window=2, paste="none", edge=0)
    options = {**QUICK, "callback_on_step_end": keep}
    (pair,) = dual.generate(seeds=[3], placement=own, **options)
    left, top, width, height = pair.recipe["window"]["box"]
    assert (width, height) == (128, 128)
    drawn = [to_uint8(x) for x in decode(dual.vae, seen[-1][0])]
    for name, small in zip(("image", "anomaly"), drawn, strict=True):
        whole = np.asarray(getattr(pair, name))[top : top + 128, left : left + 128]
        large = cv2.resize(small, (128, 128), interpolation=cv2.INTER_CUBIC)
        # rounded before instead of after
        assert np.abs(whole.astype(int) - large).max() <= 2


def test_an_enlarged_difference_keeps_the_grain_of_the_picture(dual: Engine) -> None:
    """Drawn at half the picture's scale: what is finer than that is the picture's own."""
    grain = np.where(np.indices((150, 200)).sum(0) % 2, 150, 100).astype(np.uint8)
    grain = np.repeat(grain[..., None], 3, axis=2)

    def fine(paste: str) -> float:
        own = placed(side=64, left=70, top=40, window=2, paste=paste, edge=0, of=grain)
        (pair,) = dual.generate(seeds=[3], placement=own, **QUICK)
        inside = np.asarray(pair.image)[44:100, 74:130].astype(float)
        return float(np.abs(inside[1:, 1:] - inside[:-1, 1:]).mean())

    # 50 grey levels from pixel to pixel, less what clipping takes; the decoder has noise of its own
    assert fine("difference") > max(25, 1.5 * fine("region"))


@pytest.mark.parametrize("case", ["dual", "bcm"])
def test_pictures_of_a_batch_have_sizes_of_their_own(case: str, engine_of: Any) -> None:
    engine = engine_of(case)
    small, large = picture(100, 90, 1), picture(300, 170, 2)
    each = [
        placed(),
        placed(20, 30, 30, of=small, object_mask=box(10, 20, 50, small)),
        placed(200, 60, 60, of=large, window=2.5, object_mask=box(190, 50, 90, large)),
        # one that is not a window
        Placement(picture(64, 64), box(16, 16, 24, picture(64, 64)), "all"),
    ]
    pairs = engine.generate(seeds=range(4), batch=4, placement=each, **QUICK)
    sizes = [pair.image.size for pair in pairs]
    assert sizes == [(200, 150), (100, 90), (300, 170), (64, 64)]
    assert "window" not in pairs[3].recipe
    assert "window" not in pairs[3].recipe["placement"]
    for seed, pair in enumerate(pairs):
        (alone,) = engine.generate(seeds=[seed], placement=each[seed], **QUICK)
        difference = np.asarray(pair.image).astype(int) - np.asarray(alone.image)
        # the products of a batch are rounded in another order
        assert np.abs(difference).max() <= 1
        assert (
            pair.recipe["window" if seed < 3 else "seed"]
            == alone.recipe["window" if seed < 3 else "seed"]
        )


def test_output_types(dual: Engine) -> None:
    pil, array, tensor = (
        dual.generate(seeds=[3], placement=placed(), output_type=kind, **QUICK)[0]
        for kind in ("pil", "np", "pt")
    )
    assert array.image.dtype == np.float32
    assert tensor.image.shape == (3, 150, 200)
    assert np.array_equal(np.round(array.image * 255), np.asarray(pil.image))
    assert torch.equal(tensor.anomaly.permute(1, 2, 0), torch.from_numpy(array.anomaly))
    assert np.array_equal(tensor.mask.numpy(), np.asarray(pil.mask))
    assert np.array_equal(array.region, np.asarray(pil.region))


def test_the_background_is_the_window_without_its_object(bcm: Engine) -> None:
    whole = picture()
    around = box(90, 40, 80, whole)
    own = placed(object_mask=around)
    (pair,) = bcm.generate(seeds=[1], placement=own, **QUICK)
    left, top, *_ = pair.recipe["window"]["box"]
    rows, columns = slice(top, top + 64), slice(left, left + 64)
    cut = Placement(whole[rows, columns], own.region[rows, columns], "all", edge=1)
    surroundings = Canvases([own], (64, 64), 8, need_object=True).surroundings(0, 0, None)
    assert surroundings.pixels is not None
    expected = np.where(around[rows, columns, None] > 0, 0, whole[rows, columns])
    assert np.array_equal(surroundings.pixels(), expected)
    assert pair.recipe["background"] == surroundings.record
    (other,) = bcm.generate(seeds=[1], placement=cut, **QUICK)
    inside = np.asarray(pair.image)[rows, columns]
    assert not np.array_equal(inside, np.asarray(other.image))


def test_sampled_regions_have_windows_of_their_own(engine_of: Any) -> None:
    whole = picture(400, 300)
    object_mask = box(40, 40, 200, whole)
    # 0.4 % of the picture: 480 pixels
    like = RegionStatistics(((0.004, 1.5),), (1,))
    own = Placement(whole, like, object_mask, edge=1, window="auto")
    for case in ("dual", "bcm"):
        engine = engine_of(case)
        pairs = engine.generate(seeds=range(4), batch=4, placement=own, **QUICK)
        boxes = [tuple(pair.recipe["window"]["box"]) for pair in pairs]
        assert len(set(boxes)) == 4
        for seed, pair in enumerate(pairs):
            region = np.asarray(pair.region) > 0
            # a deviation of the area's logarithm is 0.2
            assert 480 / 2.5 < region.sum() < 480 * 2.5
            assert (object_mask[region] > 0).all()
            left, top, width, height = boxes[seed]
            assert region.sum() == region[top : top + height, left : left + width].sum()
            (alone,) = engine.generate(seeds=[seed], placement=own, **QUICK)
            difference = np.asarray(pair.image).astype(int) - np.asarray(alone.image)
            assert np.abs(difference).max() <= 1
            # they share a recipe, so a folder can be continued
            assert pair.recipe["placement"] == alone.recipe["placement"]
            assert pair.recipe["background"] == alone.recipe["background"]
            # of the picture's area, as the statistics
            mask = np.asarray(pair.mask) // 255
            rim = mask.sum() - cv2.erode(mask, np.ones((3, 3), np.uint8)).sum()
            # half a pixel all along the outline, by the change of size
            assert pair.scores["area_ratio"] == pytest.approx(
                mask.mean() / 0.004, abs=0.5 * rim / mask.size / 0.004
            )


def test_a_thin_sampled_region_can_be_drawn(dual: Engine) -> None:
    """A scratch whose window shrinks it to less than a pixel is widened by a latent pixel."""
    like = RegionStatistics(((0.0005, 2000.0),), (1,))
    own = Placement(picture(600, 500), like, "all", edge=0, window="auto")
    (pair,) = dual.generate(seeds=[1], placement=own, **QUICK)
    left, top, width, height = pair.recipe["window"]["box"]
    region = np.asarray(pair.region) > 0
    assert width > 64
    assert region.sum() == region[top : top + height, left : left + width].sum()
    assert region.sum() * (64 / width) ** 2 >= 64


def ellipse(side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance to an ellipse [side, side], in pixels of 128, and grey levels as drawn.

    Soft edges, rounded to levels, with a noise of 2.
    """
    draw = np.random.default_rng(seed)
    (x0, y0), radius, stretch = draw.uniform(56, 72, 2), draw.uniform(12, 24), draw.uniform(1, 1.7)
    y, x = (np.mgrid[:side, :side] + 0.5) * 128 / side
    distance = np.hypot((x - x0) / stretch, (y - y0) * stretch) - radius
    levels = np.clip(0.5 - distance / 2, 0, 1)[..., None] * 200
    noisy = levels + np.random.default_rng(seed).normal(0, 2, (side, side, 3))
    return distance, np.clip(np.round(noisy), 0, 255).astype(np.uint8)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return float(((mask > 0) & truth).sum() / ((mask > 0) | truth).sum())


@pytest.mark.parametrize("side", [32, 64, 256, 512])
def test_masks_are_found_as_drawn_and_fitted_by_brightness(side: int) -> None:
    """Against the exact ellipse at the window's size, and the two simpler ways."""
    window, scores = Window(0, 0, side, side), []
    for seed in range(6):
        truth, drawn = ellipse(side, seed)[0] < 0, ellipse(128, seed)[1]
        mask = extract_mask(drawn).mask
        channels = (np.ascontiguousarray(drawn[..., c], np.float32) for c in range(3))
        large = np.stack([window.fitted(channel) for channel in channels], -1)
        late = extract_mask(np.clip(np.round(large), 0, 255).astype(np.uint8)).mask
        nearest = cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)
        ours = window.fitted_mask(mask, drawn)
        scores.append([overlap(x, truth) for x in (ours, late, nearest)])
        # half a pixel all along the outline, of the drawn ones or the window's
        distance, pixel = ellipse(512, seed)[0], max(128 / side, 1)
        lost = (np.abs(distance) < 0.25 * pixel).sum() / (distance < 0).sum()
        assert scores[-1][0] > 1 - lost, (seed, scores[-1])
    ours, late, nearest = np.mean(scores, axis=0)
    assert ours > nearest
    # found after the change of size, the outline is as good, but the limits of a mask, which are
    # in drawn pixels, are not
    assert ours > late - 0.003


def test_a_mask_at_the_drawn_size_is_kept_and_flat_ones_only_resized() -> None:
    mask, window = box(20, 24, 16, picture(64, 64)), Window(0, 0, 128, 128)
    flat = np.full((64, 64, 3), 90, np.uint8)
    assert Window(5, 5, 64, 64).fitted_mask(mask, picture(64, 64)) is mask
    assert np.array_equal(window.fitted_mask(mask, flat), np.kron(mask, np.ones((2, 2), np.uint8)))
    empty = np.zeros((64, 64), np.uint8)
    assert not window.fitted_mask(empty, picture(64, 64)).any()
    assert window.fitted_mask(empty + 255, picture(64, 64)).all()


def test_a_large_picture_costs_its_bytes_alone(dual: Engine) -> None:
    """4096 x 3000 pixels, a defect of 60: no copy of the picture in floats."""
    whole = np.zeros((3000, 4096, 3), np.uint8)
    whole[::7, ::5] = (90, 120, 70)
    own = Placement(whole, box(3000, 1000, 60, whole), "all", edge=1, window="auto")
    tracemalloc.start()
    (pair,) = dual.generate(seeds=[1], placement=own, **QUICK)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    image = np.asarray(pair.image)
    left, top, width, height = pair.recipe["window"]["box"]
    assert (width, height) == (120, 120)
    changed = (image != whole).any(axis=2)
    assert changed[1000:1060, 3000:3060].mean() > 0.9
    changed[top : top + height, left : left + width] = False
    assert not changed.any()
    pixels = 4096 * 3000
    # float32 would be 12 bytes a pixel of one picture alone; Pillow's own memory is not traced
    assert peak < 12 * pixels


def test_a_folder_is_continued(dual: Engine, tmp_path: Path) -> None:
    like = RegionStatistics(((0.004, 1.5),), (1,))
    each = [
        Placement(picture(200, 150, n), like, "all", edge=1, window="auto") for n in range(2)
    ] + [placed(of=picture(120, 100, 5), left=40, top=30)]
    options = {**QUICK, "placement": each, "seeds": [4, 5, 6]}
    with FolderWriter(tmp_path) as writer:
        stream = dual.stream(**options, resume=writer)
        writer.write(next(stream))
        stream.close()
    with FolderWriter(tmp_path) as writer:
        for pair in dual.stream(**options, resume=writer):
            writer.write(pair)
        assert writer.present == 1
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [4, 5, 6]
    for row, pair in zip(rows, dual.generate(**options), strict=True):
        written = np.asarray(Image.open(tmp_path / row["files"]["image"])).astype(int)
        assert np.abs(written - np.asarray(pair.image)).max() <= 1
        assert row["recipe"]["window"] == pair.recipe["window"]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (placed(window=1.2, edge=2), r"window 1\.2 leaves no room for the edge at 64 x 64: pass 2"),
        (placed(edge=4), "placement edge leaves no room for a region in a window at 64 x 64"),
        (
            placed(side=60, window=3),
            r"window 3 is 180 x 180 pixels, larger than its picture \(200 x 150\): pass at most "
            r"2\.5, or 'auto'",
        ),
        (
            placed(20, 0, 149, window=1.5),
            r"window 1\.5 is 224 x 224 pixels, larger than its picture \(200 x 150\): pass at most "
            r"1, or 'auto'",
        ),
        (
            Placement(picture(), np.pad(np.ones((9, 180), np.uint8), ((0, 141), (20, 0))) * 255,
                      window="auto"),
            r"region is 180 x 9 pixels, larger than any window of its picture \(150 x 150\)",
        ),
        (placed(side=0), "placement region has no white pixel"),
        (placed(object_mask=box(0, 0, 20, picture())), "placement region lies off the object"),
        (placed(side=5), r"placement region is smaller than a latent pixel \(8 x 8 pixels\)"),
        ([placed(), placed(side=60, window=3)], "placement 1 window 3 is 180 x 180 pixels"),
    ],
)  # fmt: skip
def test_wrong_windows(dual: Engine, placement: Any, message: str) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("computed before checking")

    with pytest.raises(SettingsError, match=message):
        dual.stream(seeds=[1, 2], placement=placement, size=64, callback_on_step_end=never)


@pytest.mark.parametrize("window", ["large", 0.99, True, float("nan"), float("inf"), -1, [2]])
def test_wrong_settings(window: Any) -> None:
    with pytest.raises(SettingsError, match="placement window must be 'auto' or 1 and more"):
        placed(window=window)
