"""Mask of the defect from the anomaly picture: by thresholds alone, or by a saliency model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dualdiff_engine.errors import SegmenterError, SettingsError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# a 5 x 5 pixel dot at 512 x 512: smaller ones are decoder artefacts more often than defects
DEFAULT_MIN_AREA = 1e-4

# deviation in pixels: cuts white noise to 0.28 of its deviation, yet a 2 px scratch keeps 2/3
DETECTION_BLUR = 1.0
# the background is nearly black by definition, so a quarter of the range is generous
BRIGHTEST_BACKGROUND = 64.0
# the usual cut of sigma clipping: drops one Gaussian pixel in 700, which shifts no median
CLIPPING = 3.0
# rounding to 8 bits alone has a deviation of 0.29 grey levels
SMALLEST_NOISE = 0.3
# 5 deviations would give one false pixel in three megapixels of Gaussian noise; the maximum of
# three channels and compression have heavier tails
STRONG_DEVIATIONS, STRONG_CONTRAST = 7.0, 12.0
# weak pixels count only next to strong ones, so this may cut into the tail of the noise; the
# contrasts (grey levels) keep faint decoder blotches out of a picture that has next to no noise
WEAK_DEVIATIONS, WEAK_CONTRAST = 3.5, 6.0
# wider than the soft edge of a defect, narrow enough to follow its shading; odd, in pixels
EDGE_WINDOW = 31
# further rounds change the mean overlap on bench/synthetic_masks.py by 0.001 at most
EDGE_ROUNDS = 3
# closes the one-to-four pixel bites that fine dark texture leaves in an edge
BITE = 5
# part of the picture, a square of 23 pixels at 512 x 512: larger holes are openings
LARGEST_HOLE = 0.002
# smaller ones are openings too where defect covers less of the surroundings: a ring twice as
# wide as its hole, or the gap between crossing scratches
FILLED_SURROUNDINGS = 0.5

# of a mask that was drawn: halfway between black and white
DRAWN_THRESHOLD = 127.5
# U2-Net (Qin et al. 2020) was trained on these statistics and at this size
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
TRAINING_SIZE = 320
# U2-Net halves its input five times
SIZE_MULTIPLE = 32


@dataclass(frozen=True)
class MaskResult:
    """Mask of one picture.

    Attributes:
        mask: uint8 [H, W], 255 on the defect and 0 elsewhere, nothing in between.
        threshold: what a pixel had to exceed: for `extract_mask` a brightness in [0, 255] (the
            mean over the mask of the local thresholds, or the detection limit of an empty mask),
            for `Segmenter` the probability 0.5.
        area: fraction of the picture's pixels that the mask holds, in [0, 1].
        empty: whether the mask holds no pixel.
    """

    mask: Bytes
    threshold: float
    area: float
    empty: bool


def extract_mask(anomaly: Bytes, *, min_area: float = DEFAULT_MIN_AREA) -> MaskResult:
    """Find the defect on a nearly black background; needs no model and no tuning.

    1. Brightness is the largest channel, so that a pure blue defect is as bright as a white one.
    2. Level and noise of the background come from sigma clipping that starts at the darkest pixels.
    3. Hysteresis (Canny 1986) on the slightly blurred brightness finds where defects are.
    4. Their edges lie, on the unblurred brightness, halfway between the background and the mean
       brightness of the defect nearby; mask and mean are refined in turn (the two-means
       threshold of Ridler and Calvard 1978, made local).
    5. Bites and small holes are filled, specks are dropped.

    A defect may cover the whole picture, unless it is darker than 64 grey levels: then at least a
    quarter of the picture has to be background.

    Args:
        anomaly: uint8 [H, W, 3], RGB.
        min_area: connected parts below this fraction of the picture are dropped, in [0, 1).

    Returns:
        The mask; `empty` for a black picture and for one that holds only noise.

    Raises:
        SettingsError: `anomaly` or `min_area` is not as described.
    """
    _check_picture(anomaly)
    if not 0 <= min_area < 1:
        raise SettingsError(f"min_area is {min_area}; pass a fraction of the picture in [0, 1)")
    blurred = cv2.GaussianBlur(anomaly.astype(np.float32), (0, 0), DETECTION_BLUR).max(axis=2)
    level, noise = _background(blurred)
    strong = level + max(STRONG_DEVIATIONS * noise, STRONG_CONTRAST)
    weak = level + max(WEAK_DEVIATIONS * noise, WEAK_CONTRAST)
    region = _hysteresis(blurred, weak, strong)
    brightness = anomaly.max(axis=2).astype(np.float32)
    inside, thresholds = _locate_edges(brightness, region, level)
    mask = _fill(np.where(inside, 255, 0).astype(np.uint8))
    mask = _drop_specks(mask, min_area * mask.size)
    return _result(mask, float(thresholds[mask > 0].mean()) if mask.any() else strong)


def drawn_mask(picture: Bytes, *, min_area: float = DEFAULT_MIN_AREA) -> MaskResult:
    """The mask that an adapter drew itself, white on black: what is at least half white.

    picture: uint8 [H, W, 3]. min_area as of `extract_mask`. Raises SettingsError.
    """
    _check_picture(picture)
    mask = np.where(picture.mean(axis=2) > DRAWN_THRESHOLD, 255, 0).astype(np.uint8)
    return _result(_drop_specks(mask, min_area * mask.size), DRAWN_THRESHOLD)


def _background(brightness: Floats) -> tuple[float, float]:
    """Level and deviation of the background, in grey levels."""
    # neighbouring pixels of a blurred picture are alike, and a quarter of them is four times faster
    sample = brightness[::2, ::2]
    level, noise = 0.0, SMALLEST_NOISE
    limit = min(float(np.percentile(sample, 25)), BRIGHTEST_BACKGROUND)
    for _ in range(20):
        dark = sample[sample <= limit]
        if not dark.size:
            break
        # the upper side alone gives the deviation, for black cuts off the lower one
        level, one_above = (float(value) for value in np.percentile(dark, (50, 84.1)))
        noise = max(one_above - level, SMALLEST_NOISE)
        previous, limit = limit, min(level + CLIPPING * noise, BRIGHTEST_BACKGROUND)
        if abs(limit - previous) < 0.01:
            break
    return level, noise


def _hysteresis(brightness: Floats, weak: float, strong: float) -> Flags:
    """Connected regions above `weak` that hold at least one pixel above `strong`."""
    _, labels = cv2.connectedComponents((brightness > weak).astype(np.uint8))
    return np.isin(labels, np.unique(labels[brightness > strong]))


def _locate_edges(brightness: Floats, region: Flags, level: float) -> tuple[Flags, Floats]:
    """Pixels of the region on the defect's side of its edges, and the threshold of every pixel."""
    inside, thresholds = region, np.empty_like(brightness)
    window = (EDGE_WINDOW, EDGE_WINDOW)
    for _ in range(EDGE_ROUNDS):
        # pixels at the edge are mixed with background: the deeper inside, the more one counts
        depth = cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, 3)
        depth = np.minimum(depth, EDGE_WINDOW)  # infinite where all the picture is inside
        # half a pixel in the window is less than any defect and more than rounding errors
        weight = np.maximum(cv2.blur(depth, window), 0.5 / EDGE_WINDOW**2)
        thresholds = (level + cv2.blur(depth * brightness, window) / weight) / 2
        inside = region & (brightness > thresholds)
    return inside, thresholds


def _fill(mask: Bytes) -> Bytes:
    """Close bites in the edges and holes too small to be openings of the defect."""
    bite = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (BITE, BITE))
    closed = np.asarray(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, bite), np.uint8)
    contours, hierarchy = cv2.findContours(closed, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for index, contour in enumerate(contours):
        is_hole = hierarchy[0][index][3] >= 0
        if not is_hole or cv2.contourArea(contour) > LARGEST_HOLE * closed.size:
            continue
        left, top, width, height = cv2.boundingRect(contour)
        rows = slice(max(top - height, 0), top + 2 * height)
        columns = slice(max(left - width, 0), left + 2 * width)
        if np.mean(closed[rows, columns] > 0) >= FILLED_SURROUNDINGS:
            cv2.drawContours(closed, contours, index, 255, cv2.FILLED)
    return closed


def _drop_specks(mask: Bytes, smallest: float) -> Bytes:
    """Drop connected parts of fewer than `smallest` pixels."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask)
    # part 0 is the background
    large = 1 + np.flatnonzero(statistics[1:, cv2.CC_STAT_AREA] >= smallest)
    return np.where(np.isin(labels, large), 255, 0).astype(np.uint8)


def _result(mask: Bytes, threshold: float) -> MaskResult:
    pixels = int(np.count_nonzero(mask))
    return MaskResult(mask, threshold, pixels / mask.size, pixels == 0)


def _check_picture(anomaly: Bytes) -> None:
    if not isinstance(anomaly, np.ndarray) or anomaly.dtype != np.uint8:
        kind = getattr(anomaly, "dtype", type(anomaly).__name__)
        raise SettingsError(f"the anomaly picture has dtype {kind}; pass a uint8 array [H, W, 3]")
    if anomaly.ndim != 3 or anomaly.shape[2] != 3 or not anomaly.size:
        raise SettingsError(
            f"the anomaly picture has shape {anomaly.shape}; pass an RGB array [H, W, 3]"
        )


class Segmenter:
    """A saliency model of the U2-Net kind (Qin et al. 2020), run by ONNX Runtime on the CPU.

    The model has one float32 input [1, 3, h, w] and any number of outputs, of which the first,
    [1, 1, h, w] or [1, h, w], is used. A dimension may be dynamic; a dynamic h or w becomes the
    picture's own, rounded to a multiple of 32.

    Before: resize, divide by the picture's maximum, subtract the ImageNet mean, divide by the
    ImageNet deviation. After: an output that lies within [0, 1] is a probability as it is; one
    with any value outside is taken for logits and goes through the sigmoid. It is resized back
    and compared with 0.5. The min-max normalisation of the U2-Net demo is left out on purpose:
    it would find a defect in every picture, empty ones included.
    """

    def __init__(self, path: str | Path) -> None:
        """Load the model and run it once on a black picture, so that a misfit shows here.

        Args:
            path: an ONNX file.

        Raises:
            SegmenterError: ONNX Runtime is not installed, or the file is missing, damaged, or
                holds a model with other inputs or outputs than described.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise SegmenterError(
                "a segmenter needs onnxruntime: pip install dualdiff-engine[segment]"
            ) from error
        self._path = Path(path)
        if not self._path.is_file():
            raise self._error("no such file", "pass the path of an ONNX model")
        options = onnxruntime.SessionOptions()
        # every failure becomes an exception here; the log would only repeat it on the terminal
        options.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(self._path), options, providers=["CPUExecutionProvider"]
            )
        # the errors of onnxruntime share no public base class
        except Exception as error:
            problem = f"not a usable ONNX model ({_first_line(error)})"
            raise self._error(problem, "export it again") from error
        self._check_input()
        self._probability(np.zeros((TRAINING_SIZE, TRAINING_SIZE, 3), np.uint8))

    def __call__(self, anomaly: Bytes) -> MaskResult:
        """Segment one picture.

        Args:
            anomaly: uint8 [H, W, 3], RGB.

        Raises:
            SettingsError: `anomaly` is not as described.
            SegmenterError: the model fails on a picture of this size, or gives NaN or infinity.
        """
        _check_picture(anomaly)
        height, width = anomaly.shape[:2]
        probability = cv2.resize(self._probability(anomaly), (width, height))
        return _result(np.where(probability > 0.5, 255, 0).astype(np.uint8), 0.5)

    def _error(self, problem: str, remedy: str) -> SegmenterError:
        return SegmenterError(f"segmenter {self._path}: {problem}; {remedy}")

    def _check_input(self) -> None:
        inputs = [(entry.type, list(entry.shape)) for entry in self._session.get_inputs()]
        kind, shape = inputs[0] if len(inputs) == 1 else ("", [])
        if kind == "tensor(float)" and len(shape) == 4:
            # a dynamic dimension is a name or None, which takes any size
            batch, channels = (size if isinstance(size, int) else None for size in shape[:2])
            if batch in (1, None) and channels in (3, None):
                return
        raise self._error(
            f"its inputs are {inputs}", "export it with one float32 input [1, 3, h, w]"
        )

    def _probability(self, picture: Bytes) -> Floats:
        """Probability of the defect, float32 [h, w] at the model's own output size."""
        entry = self._session.get_inputs()[0]
        height, width = (
            size if isinstance(size, int) else max(round(own / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE
            for size, own in zip(entry.shape[2:], picture.shape[:2], strict=True)
        )
        scaled = cv2.resize(picture, (width, height)).astype(np.float32)
        # a black picture has no maximum to divide by
        scaled /= max(float(scaled.max()), 1.0)
        planes = ((scaled - IMAGENET_MEAN) / IMAGENET_DEVIATION).transpose(2, 0, 1)[None]
        try:
            output = self._session.run(None, {entry.name: planes})[0]
        except Exception as error:
            problem = f"the model fails on an input of {height} x {width} ({_first_line(error)})"
            raise self._error(problem, "export it with h and w fixed, or both dynamic") from error
        return self._as_probability(output)

    def _as_probability(self, output: Any) -> Floats:
        kind = (getattr(output, "dtype", type(output).__name__), getattr(output, "shape", ()))
        if kind[0] != np.float32 or kind[1][:-2] not in ((1,), (1, 1)) or not output.size:
            problem = f"its first output is {kind[0]} {list(kind[1])}"
            raise self._error(
                problem, "export it with a first output of float32 [1, 1, h, w] or [1, h, w]"
            )
        values: Floats = output.reshape(output.shape[-2:])
        if not np.isfinite(values).all():
            raise self._error("its output holds NaN or infinity", "export it in float32 again")
        if values.min() < 0 or values.max() > 1:
            # the sigmoid, in the form that cannot overflow
            values = ((1 + np.tanh(values / 2)) / 2).astype(np.float32)
        return values


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
