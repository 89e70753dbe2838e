"""Whether anomalib reads what `dualdiff export-dataset` writes.

Run ``python bench/anomalib_reads.py [--mvtec DIR] [--mvtec-ad2 DIR] [--loco DIR]
[--output-json FILE]`` in an environment of its own with anomalib 2.7, torch 2.14.1, torchvision
0.29.1 and pandas below 3 (with 3, MVTecLOCO fails); of this package it needs nothing. Each DIR is
an export of that format. Every pair has to be found, its mask has to be of its own picture, and
hold 0 and 1 alone.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def readers(form: str, root: Path, product: Path) -> Iterator[tuple[str, Any]]:
    """Name and data module of whatever reads a format."""
    from anomalib.data import Folder, MVTecAD, MVTecAD2, MVTecLOCO

    # this thread alone: what is read counts, not how fast
    options = {"num_workers": 0, "eval_batch_size": 1}
    if form == "mvtec":
        yield "MVTecAD", MVTecAD(root=root, category=product.name, **options)
        defects = sorted(path.name for path in (product / "ground_truth").iterdir())
        folder = Folder(
            name=product.name,
            root=product,
            normal_dir="train/good",
            normal_test_dir="test/good",
            abnormal_dir=[f"test/{defect}" for defect in defects],
            mask_dir=[f"ground_truth/{defect}" for defect in defects],
            **options,
        )
        yield "Folder", folder
    elif form == "mvtec-ad2":
        yield "MVTecAD2", MVTecAD2(root=root, category=product.name, **options)
    else:
        yield "MVTecLOCO", MVTecLOCO(root=root, category=product.name, **options)


def pairs_in(product: Path) -> int:
    """Masks on the disk: one per pair."""
    return len(list(product.glob("**/ground_truth/**/*.png")))


def read(module: Any) -> dict[str, Any]:
    """What a data module finds. Some split the tests for validation: both are counted."""
    module.prepare_data()
    module.setup()
    test = module.test_data
    sets = [test]
    # anomalib takes validation from the tests unless the format has one of its own
    if getattr(module, "val_data", None) is not None:
        sets.append(module.val_data)
    found: set[str] = set()
    wrong, levels = [], set()
    # normal pictures are not opened: with pandas 3 some readers of 2.7 give them a mask path of NaN
    pairs = (
        data[n]
        for data in sets
        for n, label in enumerate(list(data.samples["label_index"]))
        if label == 1
    )
    for item in pairs:
        image = Path(item.image_path)
        mask = Path(item.mask_path)
        found.add(str(image))
        fits = image.stem in (mask.stem.removesuffix("_mask"), mask.parent.name)
        if not fits or (image.parent.name not in mask.parts):
            wrong.append(str(image))
        levels |= {int(level) for level in item.gt_mask.unique()}
    return {
        "train": len(module.train_data),
        "pairs": len(found),
        "wrong_masks": wrong,
        "levels": sorted(levels),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    forms = ("mvtec", "mvtec-ad2", "loco")
    for form in forms:
        parser.add_argument(f"--{form}", type=Path, metavar="DIR", help=f"a {form} export")
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="keep the record")
    options = vars(parser.parse_args(arguments))
    rows = []
    for form in forms:
        root = options[form.replace("-", "_")]
        for product in sorted(path for path in root.iterdir()) if root else ():
            for name, module in readers(form, root, product):
                row = {"format": form, "reader": name, "product": product.name, **read(module)}
                row["whole"] = (
                    row["pairs"] == pairs_in(product)
                    and not row["wrong_masks"]
                    and set(row["levels"]) <= {0, 1}
                )
                rows.append(row)
    names = ("anomalib", "pandas", "torch", "torchvision")
    record = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "rows": rows,
    }
    text = json.dumps(record, indent=2) + "\n"
    if options["output_json"]:
        options["output_json"].write_text(text, "utf-8")
    print(text, end="")
    if not all(row["whole"] for row in rows):
        raise SystemExit("anomalib does not read every pair")


if __name__ == "__main__":
    main()
