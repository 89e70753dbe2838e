"""YOLO's segmentation: an outline per connected part, by the package supervision.

data.yaml
images/SPLIT/NAME.png  labels/SPLIT/NAME.txt     SPLIT: train, val; empty for normal pictures

Outer outlines alone would lose holes; supervision joins holes to them by seams.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dualdiff_engine.dataset.formats.data_yaml import write_data_yaml
from dualdiff_engine.dataset.formats.parts import Part, parts_of
from dualdiff_engine.dataset.formats.tree import Tree, place


def write(tree: Tree, root: Path) -> None:
    """Write it. Raises OSError and SettingsError."""
    write_data_yaml(tree, root, tree.classes)
    for item in tree.items():
        place(item.image, root / "images" / item.split / f"{item.name}.png")
        lines: list[str] = []
        if item.label is not None:
            for part in parts_of(item.flags()):
                lines += _lines(part, item.label)
        label = root / "labels" / item.split / f"{item.name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(f"{line}\n" for line in lines), "ascii")


def _lines(part: Part, label: int) -> list[str]:
    import supervision
    from supervision.dataset.formats.yolo import detections_to_yolo_annotations

    flags = part.flags
    for anchor in ((0, 0), (1, 1)):
        # a pixel, or a row of them, has no outline, and would become a box in a file of outlines;
        # at the border of the picture it can grow to one side only
        if not supervision.mask_to_polygons(flags):
            flags = _grown(part.flags, anchor)
    left, top, width, height = part.box
    found = supervision.Detections(
        xyxy=np.array([[left, top, left + width, top + height]], np.float32),
        mask=flags[None],
        class_id=np.array([label]),
    )
    return list(
        detections_to_yolo_annotations(found, image_shape=flags.shape, approximation_percentage=0.0)
    )


def _grown(flags: NDArray[np.bool_], anchor: tuple[int, int]) -> NDArray[np.bool_]:
    square = np.ones((2, 2), np.uint8)
    return np.asarray(cv2.dilate(flags.astype(np.uint8), square, anchor=anchor)) > 0
