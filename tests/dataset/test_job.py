"""The job file: what it takes, and one line for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

from dualdiff_engine.dataset import job_file
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.plan import Shard, Task, seed_of
from dualdiff_engine.errors import SettingsError

JOB = """
base: demo
out: data
defects:
  - {product: washer, defect: chip, adapter: demo:washer/chip, pairs: 3}
"""


def load(tmp_path: Path, text: str = JOB, *changes: str) -> Job:
    (tmp_path / "job.yaml").write_text(text, "utf-8")
    return job_file.load(tmp_path / "job.yaml", changes)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sd").mkdir()
    changes = ["base=sd", "defects.0.adapter=a.safetensors", "defects.0.pictures=good/*.png"]
    job = load(tmp_path, JOB, *changes, "defects.0.object_masks=all")
    assert job.root == tmp_path / "data"
    assert job.base == str(tmp_path / "sd")
    assert job.defects[0].adapter == str(tmp_path / "a.safetensors")
    assert job.defects[0].pictures == str(tmp_path / "good/*.png")
    assert job.defects[0].object_masks == "all"
    # a hub id has no folder
    assert load(tmp_path, JOB, "base=owner/model").base == "owner/model"


def test_what_is_stored_is_the_job(tmp_path: Path) -> None:
    changes = ["gates.area=[p01, 0.5]", "limits.vram=20GiB", "sampling.size=[64, 32]"]
    job = load(tmp_path, JOB, *changes, "good={washer: g, held_out: 0.2}")
    assert job.limits.vram == 20 << 30
    import json

    assert job_file.parse(json.loads(job_file.stored(job))) == job


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["x=1"], ["job.yaml: x: there is no such field", "base, out"]),
        (["defects.0.foo=1"], ["defects[0].foo", "product, defect"]),
        (["defects.0.pairs=0"], ["defects[0].pairs", "greater than or equal to 1, got 0"]),
        (["defects.0.pairs=1000001"], ["defects[0].pairs", "1000000"]),
        (["defects.0.product=../x"], ["defects[0].product", "folder"]),
        (["defects.0.product=con"], ["folder"]),
        (["defects.0.edge=1"], ["edge needs pictures"]),
        (["defects.0.mask=change"], ["mask change needs pictures"]),
        (["limits.batch=x"], ["limits.batch: Input should be 'auto', or", "got 'x'"]),
        (["limits.vram=much"], ["limits.vram"]),
        (["workers=ray://head"], ["ray://head is not supported", "--shard i/n"]),
        (["sampling.steps=0"], ["sampling: steps must be"]),
        (["gates.area=[0.5, 0.1]"], ["area", "swap"]),
        (["gates.agreement=[p01, null]"], ["agreement", "numbers"]),
        (["gates.area=[.nan, 1]"], ["gates.area"]),
        (["good.washer=1"], ["good.washer"]),
        (["good.held_out=x"], ["good.held_out"]),
        (["defects.3.pairs=1"], ["there is no '3'"]),
        (["pairs"], ["write key=value"]),
        (["seed=-1"], ["seed"]),
        (["seed=9223372036854775808"], ["seed"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, changes: list[str], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as raised:
        load(tmp_path, JOB, *changes)
    message = str(raised.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"a: &x 1\nb: *x\n", "aliases"),
        (b"base: 1\nbase: 2\n", "given twice"),
        (b"[", "line 1"),
        (b"- 1", "not a job"),
        (b"", "not a job"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a: " * 5000, "not plain YAML"),
        (b"[" * 5000, "not plain YAML"),
        (b"a: !!python/object/apply:os.getcwd []", "not plain YAML"),
        (b"#" * (1 << 20) + b"##", "1 MiB"),
        (b"out: x\ndefects: []\n", "base: it is missing"),
    ],
)
def test_files_from_others(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=word) as raised:
        job_file.load(tmp_path / "job.yaml")
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_defect_twice(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such job file"):
        job_file.load(tmp_path / "job.yaml")
    twice = JOB + "  - {product: Washer, defect: chip, adapter: demo:washer/chip, pairs: 3}\n"
    with pytest.raises(SettingsError, match="Washer/chip is listed twice"):
        load(tmp_path, twice)


def test_every_field_is_documented() -> None:
    def missing(schema: dict[str, Any]) -> list[str]:
        parts = {"Job": schema, **schema["$defs"]}
        fields = ((p, f, v) for p, s in parts.items() for f, v in s["properties"].items())
        return [f"{part}.{name}" for part, name, field in fields if not field.get("description")]

    assert missing(Job.model_json_schema()) == []


def test_seeds_differ_and_are_the_same_everywhere() -> None:
    seeds = {
        seed_of(job, product, "d", number, attempt)
        for job in (0, 1)
        for product in ("a", "b")
        for number in range(50)
        for attempt in (0, 1)
    }
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    # written down: a dataset must be continued by later versions
    assert Task("bottle/broken", 12, 1).seed(7) == seed_of(7, "bottle", "broken", 12, 1)
    assert seed_of(0, "bottle", "broken_large", 0, 0) == GOLDEN


GOLDEN = 8027216707047787282


def test_shards_share_the_numbers() -> None:
    shards = [Shard.parse(f"{n}/3") for n in range(3)]
    assert sorted(n for shard in shards for n in shard.numbers(10)) == list(range(10))
    for text in ("3/3", "x", "-1/3", "0/0", "1", "0/1000000"):
        with pytest.raises(SettingsError, match="write i/n"):
            Shard.parse(text)
