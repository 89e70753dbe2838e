"""The kinds of faults that `fault_lab` tries. Each says how to damage something and how to use it.

`use` returns when there is a result that is right, and raises the package's error for a refusal.
Whatever else it raises is a fault of the package.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import disturbed_runs as runs
import hostile_adapters
import hostile_bases
import hostile_folders
import hostile_pictures
from dualdiff_engine import Engine, adapters
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.folder_writer import KINDS as PICTURES
from dualdiff_engine.folder_writer import MANIFEST, FolderWriter
from dualdiff_engine.pictures import MAX_PIXELS, open_picture
from dualdiff_engine.settings import Background
from dualdiff_engine.training import train_adapter
from dualdiff_engine.training.state import STATE
from dualdiff_engine.training.trainer import ADAPTER
from support import CASES, DATA, golden_engine
from training_cases import options_of, write_data

SURROUNDINGS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
DRAWN: dict[str, Any] = {"seeds": [3], "steps": 1, "size": 32}
# of the pictures in a mutated folder, and what the continued run asks for
THERE, ASKED = (5, 6, 7), (5, 6, 7, 8)


@functools.cache
def engine_of(case: str) -> Engine:
    """A golden engine that has drawn once, so that its children find all libraries loaded."""
    engine = golden_engine(case)
    _drawn(engine, case)
    return engine


class Kind:
    """folder: for what all tries share, and for one folder each. seconds: on the clock, for one."""

    seconds = 60

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def damage(self, seed: int, folder: Path) -> str:
        """Make the thing in `folder` with its fault; returns what was done."""
        raise NotImplementedError

    def use(self, seed: int, folder: Path) -> str | None:
        """Returns a remark, or nothing."""
        raise NotImplementedError


def _drawn(engine: Engine, case: str) -> Any:
    background = Background(SURROUNDINGS) if case == "bcm" else None
    (pair,) = engine.generate(**DRAWN, background=background)
    return pair


class Adapters(Kind):
    """Adapter files, `.safetensors` and `.bin`, of both golden models."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for case in CASES:
            adapters.convert(DATA / case / "adapter", folder / f"{case}.safetensors")
            shutil.copy(DATA / case / "adapter/pytorch_lora_weights.bin", folder / f"{case}.bin")
            engine_of(case)

    def _path(self, seed: int, folder: Path) -> Path:
        suffix = "bin" if seed % 5 == 4 else "safetensors"
        return folder / f"{CASES[seed % len(CASES)]}.{suffix}"

    def damage(self, seed: int, folder: Path) -> str:
        path = self._path(seed, folder)
        shutil.copy(self.folder / path.name, path)
        self.fault = hostile_adapters.mutate(path, seed)
        return self.fault

    def use(self, seed: int, folder: Path) -> None:
        path = self._path(seed, folder)
        engine = engine_of(path.stem)
        engine.keep_adapter(adapters.load(path, allow_pickle=True), "mutated")
        _drawn(engine, path.stem)
        assert not hostile_adapters.must_be_refused(self.fault), "this adapter drew"


class Bases(Kind):
    """Base model folders. A picture that changed comes with another hash of the base."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.adapters = {case: adapters.load(DATA / case / "adapter", allow_pickle=True)
                         for case in CASES}  # fmt: skip
        self.good = {case: _drawn(engine_of(case), case) for case in CASES}

    def _pair(self, base: Path, case: str) -> Any:
        with Engine.from_pretrained(base) as engine:
            engine.keep_adapter(self.adapters[case], "adapter")
            return _drawn(engine, case)

    def _case(self, seed: int) -> str:
        return CASES[seed % 4 == 3]

    def damage(self, seed: int, folder: Path) -> str:
        base = hostile_bases.base_copy(folder, self._case(seed))
        return hostile_bases.mutate(base, seed)

    def use(self, seed: int, folder: Path) -> str:
        good = self.good[self._case(seed)]
        pair = self._pair(folder / "base", self._case(seed))
        hashes = [p.recipe["base"]["sha256"] for p in (pair, good)]
        pictures = [p.image.tobytes() + p.anomaly.tobytes() for p in (pair, good)]
        same = pictures[0] == pictures[1]
        assert same or hashes[0] != hashes[1], "another picture with the same hash of the base"
        return "the same pair" if same else "another pair with another hash"


class Pictures(Kind):
    """Pictures of every format, opened as a picture, as a mask, and as a background."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.contents = hostile_pictures.seeds()
        for mode in ("RGB", "L"):
            for form, files in self.contents.items():
                path = folder / f"warm.{form}"
                path.write_bytes(files[0])
                try:
                    open_picture(path, "picture", mode)
                except SettingsError:
                    # a ramp is not a mask
                    continue

    def damage(self, seed: int, folder: Path) -> str:
        fault, content = hostile_pictures.mutate(self.contents, seed)
        (folder / "a.png").write_bytes(content)
        return fault

    def use(self, seed: int, folder: Path) -> str:
        path, mode = folder / "a.png", "L" if seed % 3 == 2 else "RGB"
        try:
            picture = open_picture(path, "picture", mode)
        except SettingsError as error:
            if str(path) not in str(error):
                raise RuntimeError("the message does not name the file") from error
            raise
        assert picture.mode == mode
        assert 0 < picture.width * picture.height <= MAX_PIXELS
        levels = set(np.unique(picture)) if mode == "L" else set()
        assert levels <= {0, 255}, "a mask with other levels than 0 and 255"
        return f"{picture.width} x {picture.height}"


class Manifests(Kind):
    """A folder with pairs whose manifest, or one of whose pictures, is damaged, is continued."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        made = engine_of("dual").generate(seeds=ASKED, steps=1, size=32)
        self.pairs = {pair.seed: pair for pair in made}
        with FolderWriter(folder / "whole") as writer:
            for seed in THERE:
                writer.write(self.pairs[seed])

    def damage(self, seed: int, folder: Path) -> str:
        root = folder / "out"
        shutil.copytree(self.folder / "whole", root)
        if seed % 4 == 3:
            return hostile_folders.mutate_picture(root, random.Random(seed))
        return hostile_folders.mutate_manifest(root / MANIFEST, seed)

    def use(self, seed: int, folder: Path) -> None:
        """Afterwards every seed has one row of this recipe, and its pictures are that seed's."""
        root, recipe = folder / "out", self.pairs[THERE[0]].recipe
        with FolderWriter(root) as writer:
            for _, missing in writer.missing([recipe], ASKED, free=False):
                writer.write(self.pairs[missing])
        rows = [json.loads(line) for line in (root / MANIFEST).read_bytes().splitlines()]
        found = sorted(row["seed"] for row in rows)
        assert found == list(ASKED), f"the folder holds the seeds {found}"
        for row in rows:
            for kind in PICTURES:
                path = root / kind / f"{row['index']:05d}.png"
                with Image.open(path) as picture:
                    wanted = getattr(self.pairs[row["seed"]], kind)
                    same = picture.tobytes() == wanted.tobytes()
                assert same, f"{path} is not the {kind} of seed {row['seed']}"


class States(Kind):
    """The state of a training run is damaged, and the run continued to the same adapter."""

    STEPS = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        engine_of("dual")
        self.data = write_data(folder / "data", 2)
        # in a child: what backward leaves in a process does not survive a fork
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._train(folder / "whole", self.STEPS - 1)
                shutil.copytree(folder / "whole", folder / "end")
                self._train(folder / "end", self.STEPS)
                code = 0
            finally:
                os._exit(code)
        assert runs.ended(pid) == 0
        self.wanted = (folder / "end" / ADAPTER).read_bytes()

    def _train(self, out: Path, steps: int) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            options = options_of(steps=steps, learning_rate=1e-3, flips="none")
            train_adapter(DATA / "dual" / "model", self.data, out, options)

    def damage(self, seed: int, folder: Path) -> str:
        shutil.copytree(self.folder / "whole", folder / "out")
        path, chance = folder / "out" / STATE, random.Random(seed)
        if seed % 6 == 5:
            return hostile_bases.mutate_place(path, chance)
        return hostile_adapters.mutate(path, seed)

    def use(self, seed: int, folder: Path) -> None:
        self._train(folder / "out", self.STEPS)
        seen = (folder / "out" / ADAPTER).read_bytes()
        assert seen == self.wanted, "continued to another adapter"


KINDS: dict[str, type[Kind]] = {
    "adapter": Adapters,
    "base": Bases,
    "picture": Pictures,
    "manifest": Manifests,
    "state": States,
}
