"""Damaged data in a real run: with `fail` one line and status 2 on every rank at once; with `skip` it goes on, and says so."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import history, run, start, status, wait_for
from recipes import write_recipe

sys.path.append(str(Path(__file__).parents[1] / "unit" / "data"))
import damage

from dtl.data.foreign import index_shards
from dtl.data.index import Shards
from dtl.data.pack import pack
from dtl.data.verify import verify

PHASES = {"all": {"train": "all", "epochs": 1, "lr": 0.05}}
BAD = (9, 400, 1000)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack("digits", folder, shard_bytes=600_000, processes=1, progress=False)
    assert len(list((folder / "train").glob("*.tar"))) > 2
    return folder


@pytest.fixture
def digits(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "digits"))


def arguments(folder: Path, digits: Path, *more: str, **phases: Any) -> list[str]:
    return ["--config", str(write_recipe(folder, phases=phases or PHASES)), "--data.train", str(digits), *more]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/tiny/bad_samples.jsonl").read_text().splitlines()]


def the_line(text: str) -> str:
    """The one line that says what is wrong; no rank says anything more of it."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("dtl: ")]
    assert len(lines) == 1, text
    return lines[0]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit": (lambda f: damage.flip_bit(f, 9), "the bytes are not those that were packed"),
    "a truncated shard": (lambda f: damage.cut_shard(f, 9), "before the image does"),
    "a missing shard": (lambda f: damage.shard_path(f, 9).unlink(), "the shard is missing"),
    "another shard": (lambda f: shutil.copy(damage.shard_path(f, 1400), damage.shard_path(f, 9)), "the bytes are not those that were packed"),
    "no image": (lambda f: damage.put_image(f, 9, b"nothing"), "not an image"),
    "a label out of range": (lambda f: damage.rewrite_index(f, 9, labels=10), "label 10 is not one of 10 classes"),
}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("which", list(DAMAGES))
def test_fail_is_one_line_and_status_2_on_all_ranks(tmp_path: Path, digits: Path, which: str, world: int) -> None:
    do, reason = DAMAGES[which]
    shard = damage.shard_path(digits / "train", 9).name
    do(digits / "train")
    job = run(arguments(tmp_path, digits), cwd=tmp_path, world=world, code=2, timeout=60)
    line = the_line(job.err())
    assert shard in line
    assert " at byte " in line
    assert reason in line
    assert "--data.on-error skip" in line
    if which in ("one bit", "no image", "a label out of range"):
        assert f"{shard}: sample 000009 at byte " in line
    assert status(tmp_path / "runs/tiny")["state"] == "failed"
    assert shard in status(tmp_path / "runs/tiny")["why"]


@pytest.mark.parametrize("world", [1, 2])
def test_skip_goes_on_and_lists_each_sample_once(tmp_path: Path, digits: Path, world: int) -> None:
    for sample in BAD:
        damage.flip_bit(digits / "train", sample)
    damage.flip_bit(digits / "val", 5)
    options = ["--data.on-error", "skip", "--data.max-bad", "4"]
    run(arguments(tmp_path, digits, *options, "--phases.all.epochs", "2"), cwd=tmp_path, world=world)
    found = entries(tmp_path)
    assert sorted((entry["split"], entry["sample"]) for entry in found) == [*(("train", sample) for sample in BAD), ("val", 5)]
    shards = Shards.open(digits / "train")
    for entry in found:
        if entry["split"] == "train":
            assert entry["key"] == shards.key(entry["sample"])
            assert entry["offset"] == int(shards.offsets[entry["sample"]])
            assert "crc32" in entry["reason"]
    validation = [event for event in history(tmp_path / "runs/tiny") if event["event"] == "val"]
    assert validation[-1]["num_samples"] == 359


@pytest.mark.parametrize("world", [1, 2])
def test_skip_ends_where_there_are_more_than_allowed(tmp_path: Path, digits: Path, world: int) -> None:
    for sample in BAD:
        damage.flip_bit(digits / "train", sample)
    job = run(arguments(tmp_path, digits, "--data.on-error", "skip", "--data.max-bad", "2"), cwd=tmp_path, world=world, code=2, timeout=60)
    line = the_line(job.err())
    assert "3 damaged samples are more than data.max_bad 2" in line
    assert "bad_samples.jsonl" in line
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_validation_sample_ends_the_run_too(tmp_path: Path, digits: Path, world: int) -> None:
    damage.zero_block(digits / "val", 300)
    job = run(arguments(tmp_path, digits), cwd=tmp_path, world=world, code=2, timeout=60)
    assert "sample 000300 at byte" in the_line(job.err())


def test_skip_with_a_label_out_of_range(tmp_path: Path, digits: Path) -> None:
    damage.rewrite_index(digits / "train", 9, labels=10)
    run(arguments(tmp_path, digits, "--data.on-error", "skip", "--data.max-bad", "1"), cwd=tmp_path, timeout=60)
    assert [entry["sample"] for entry in entries(tmp_path)] == [9]


@pytest.mark.parametrize("world", [1, 2])
def test_a_shard_that_shrinks_while_training(tmp_path: Path, digits: Path, world: int) -> None:
    phases = {"all": {"train": "all", "epochs": 500, "lr": 0.01}}
    job = start(arguments(tmp_path, digits, **phases), cwd=tmp_path, world=world)
    folder = tmp_path / "runs/tiny"
    wait_for(lambda: (folder / "history.jsonl").exists() and len(history(folder)) > 3, what="some steps")
    for path in (digits / "train").glob("*.tar"):
        os.truncate(path, 100_000)
    job.wait(60).check(2)
    assert "before the image does" in the_line(job.err())


@pytest.mark.parametrize("world", [1, 2])
def test_an_index_that_does_not_belong(tmp_path: Path, digits: Path, world: int) -> None:
    shutil.copy(digits / "val/index.bin", digits / "train/index.bin")
    job = run(arguments(tmp_path, digits), cwd=tmp_path, world=world, code=2, timeout=60)
    assert "train/index.bin does not belong to the manifest.json beside it" in the_line(job.err())


def test_quarantine_is_honoured(tmp_path: Path, digits: Path) -> None:
    """After `dtl verify --quarantine` the run meets no damage, and its epoch is so much smaller."""
    for sample in BAD:
        damage.flip_bit(digits / "train", sample)
    verify(digits / "train", processes=1, progress=False, quarantine=True)
    run(arguments(tmp_path, digits), cwd=tmp_path, world=2)
    assert not (tmp_path / "runs/tiny/bad_samples.jsonl").exists()
    assert Shards.open(digits / "train").num_samples == 1434


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("world", [1, 2])
def test_shards_that_webdataset_wrote_train_without_repacking(tmp_path: Path, packed: Path, world: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own ShardWriter with its defaults (a PAX header a member), names as ImageNet's shards have them; once indexed, once not."""
    webdataset = pytest.importorskip("webdataset")
    for split in ("train", "val"):
        shards = Shards.open(packed / split)
        with webdataset.ShardWriter(str(tmp_path / f"digits-{split}-%04d.tar"), maxcount=150, verbose=0) as writer:
            for sample in range(0, shards.num_samples, 2):
                image, key = shards.read([sample])[0], f"n{int(shards.labels[sample]):08d}_{sample}"
                writer.write({"__key__": key, "png": image, "cls": int(shards.labels[sample]), "json": {"file": key}})
    capsys.readouterr()
    (tmp_path / "wds").mkdir()
    for path in tmp_path.glob("*.tar"):
        path.rename(tmp_path / "wds" / path.name)
    job = run(arguments(tmp_path, tmp_path / "wds"), cwd=tmp_path, world=world)
    assert f"indexing {tmp_path}/wds" in job.err() or world > 1, "another rank may have been first; only the main process talks"
    first = [event for event in history(tmp_path / "runs/tiny") if event["event"] == "val"][-1]
    assert first["num_samples"] == 180
    for split in ("train", "val"):
        index_shards([f"{tmp_path}/wds/digits-{split}-*.tar"], out=tmp_path / "indexed" / split, processes=1, progress=False)
    folder = tmp_path / "again"
    folder.mkdir()
    run(arguments(folder, tmp_path / "indexed"), cwd=folder, world=world)
    assert [event for event in history(folder / "runs/tiny") if event["event"] == "val"][-1] == first
