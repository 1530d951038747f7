"""Damaged data in a real run: with `fail` one line and status 2 on every rank at once; with `skip` it goes on, and says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
from harness import history, run, start, status, the_line, wait_for
from recipes import write_recipe
from tiny_images import huge_bmp

from dtl.data.packing.pack import pack
from dtl.data.sampling.plan import EpochPlan
from dtl.data.shards.index import Shards
from dtl.data.verify import verify
from dtl.data.wds.index import index_shards

PHASES = {"all": {"train": "all", "epochs": 1, "lr": 0.05}}
BAD = (9, 400, 1000)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack("digits", folder, shard_bytes=250_000, processes=1, progress=False)
    assert len(list((folder / "train").glob("*.tar"))) > 10
    return folder


@pytest.fixture
def digits(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "digits"))


def arguments(folder: Path, digits: Path, *more: str, **phases: Any) -> list[str]:
    return ["--config", str(write_recipe(folder, phases=phases or PHASES)), "--data.train", str(digits), *more]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/tiny/bad_samples.jsonl").read_text().splitlines()]


# what is done to a sample's image or shard, and what is said
DAMAGES: dict[str, tuple[Callable[[Path, int], object], str]] = {
    "one bit": (damage.flip_bit, "the checksum is wrong"),
    "a zeroed block": (damage.zero_block, "the checksum is wrong"),
    "a truncated shard": (damage.cut_shard, "bytes before the image does"),
    "a cut in a header": (lambda f, n: damage.cut_shard(f, n, in_header=True), "bytes before the image does"),
    "another shard": (lambda f, n: shutil.copy(damage.shard_path(f, 1400), damage.shard_path(f, n)), "the checksum is wrong"),
    "a missing shard": (lambda f, n: damage.shard_path(f, n).unlink(), "the shard is missing"),
    "a label out of range": (lambda f, n: damage.rewrite_index(f, n, labels=10), "label 10 is not one of 10 classes"),
    "no image, crc right": (lambda f, n: damage.put_image(f, n, b"nothing"), "not an image"),
    "60,000 x 60,000": (lambda f, n: damage.put_image(f, n, huge_bmp(), width=60_000, height=60_000), "60000 x 60000 pixels"),
}


WHOLE_SHARDS = ("another shard", "a missing shard")
TAILS = ("a truncated shard", "a cut in a header")


def in_shard(folder: Path, sample: int) -> list[int]:
    shards = Shards.open(folder, whole=True)
    return [n for n in range(shards.num_samples) if shards.shard_of(n) == shards.shard_of(sample)]


def hit(folder: Path, which: str, sample: int) -> list[int]:
    """All samples that the damage to `sample` takes with it."""
    if which in WHOLE_SHARDS:
        return in_shard(folder, sample)
    return [n for n in in_shard(folder, sample) if n >= sample] if which in TAILS else [sample]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("which", list(DAMAGES))
def test_fail_is_one_line_and_status_2_on_all_ranks(tmp_path: Path, digits: Path, which: str, world: int) -> None:
    do, reason = DAMAGES[which]
    shards = Shards.open(digits / "train")
    victim = int(EpochPlan(shards.shard_sizes, seed=0, epoch=0, global_batch_size=120).step_samples(0)[7])  # met at once
    shard, key, offset = damage.shard_path(digits / "train", victim).name, shards.key(victim), int(shards.offsets[victim])
    do(digits / "train", victim)
    job = run(arguments(tmp_path, digits, "--data.workers", str(world - 1)), cwd=tmp_path, world=world, code=2, timeout=60)
    line = the_line(job)
    assert f"{shard}: " in line
    assert " at byte " in line
    assert reason in line
    assert "--data.on-error skip" in line
    if which not in (*WHOLE_SHARDS, *TAILS):
        assert f"{shard}: sample {key} at byte {offset}" in line
    assert status(tmp_path / "runs/tiny")["state"] == "failed"
    assert shard in status(tmp_path / "runs/tiny")["why"]
    assert not (tmp_path / "runs/tiny/history.jsonl").exists(), "at once: before the first step"


@pytest.mark.parametrize("world", [1, 2])
def test_skip_goes_on_and_lists_each_sample_once(tmp_path: Path, digits: Path, world: int) -> None:
    """All of the table in one run of two epochs, a shard each; and a validation image."""
    shards = Shards.open(digits / "train")
    starts = np.cumsum(shards.shard_sizes) - shards.shard_sizes
    assert len(starts) > len(DAMAGES)
    expected: dict[int, str] = {}
    keys = [shards.key(sample) for sample in range(shards.num_samples)]
    for (which, (do, _)), start_of in zip(DAMAGES.items(), starts.tolist()):
        expected |= dict.fromkeys(hit(digits / "train", which, start_of + 3), which)
        do(digits / "train", start_of + 3)
    damage.flip_bit(digits / "val", 5)
    options = ["--data.on-error", "skip", "--data.max-bad", str(len(expected) + 1), "--phases.all.epochs", "2"]
    job = run(arguments(tmp_path, digits, *options), cwd=tmp_path, world=world)
    found = entries(tmp_path)
    assert sorted((entry["split"], entry["sample"]) for entry in found) == [*(("train", sample) for sample in sorted(expected)), ("val", 5)]
    for entry in found:
        which = "one bit" if entry["split"] == "val" else expected[entry["sample"]]
        _, reason = DAMAGES[which]
        assert reason in entry["reason"]
        assert entry["message"].startswith(f"{entry['shard']}: ")
        if entry["split"] == "train":
            assert entry["shard"] == shards.manifest.shards[shards.shard_of(entry["sample"])].url
            assert entry["offset"] == int(shards.offsets[entry["sample"]])
            if which not in (*WHOLE_SHARDS, *TAILS):
                assert entry["key"] == keys[entry["sample"]]
    events = history(tmp_path / "runs/tiny")
    assert [event for event in events if event["event"] == "val"][-1]["num_samples"] == 359
    told = [(event["expected"], event["seen"], event["damaged"]) for event in events if event["event"] == "epoch"]
    assert told == [(1437, 1437, len(expected))] * 2
    assert f"1,437 of 1,437 samples seen, {len(expected)} of them damaged and masked with weight 0" in job.err()


@pytest.mark.parametrize("world", [1, 2])
def test_skip_ends_where_there_are_more_than_allowed(tmp_path: Path, digits: Path, world: int) -> None:
    for sample in BAD:
        damage.flip_bit(digits / "train", sample)
    job = run(arguments(tmp_path, digits, "--data.on-error", "skip", "--data.max-bad", "2"), cwd=tmp_path, world=world, code=2, timeout=60)
    line = the_line(job)
    assert "3 damaged samples are more than data.max_bad 2" in line
    assert "bad_samples.jsonl" in line
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_validation_sample_ends_the_run_too(tmp_path: Path, digits: Path, world: int) -> None:
    damage.zero_block(digits / "val", 300)
    job = run(arguments(tmp_path, digits), cwd=tmp_path, world=world, code=2, timeout=60)
    assert "sample 000300 at byte" in the_line(job)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_shard_that_shrinks_while_training(tmp_path: Path, digits: Path, world: int, on_error: str) -> None:
    phases = {"all": {"train": "all", "epochs": 500, "lr": 0.01}}
    job = start(arguments(tmp_path, digits, "--data.on-error", on_error, "--data.max-bad", "2000", **phases), cwd=tmp_path, world=world)
    folder = tmp_path / "runs/tiny"
    wait_for(lambda: (folder / "history.jsonl").exists() and len(history(folder)) > 3, what="some steps")
    for path in (digits / "train").glob("*.tar"):
        os.truncate(path, 50_000)
    if on_error == "fail":
        job.wait(60).check(2)
        assert "before the image does" in the_line(job)
        return
    wait_for(lambda: (folder / "bad_samples.jsonl").exists() and len(entries(tmp_path)) > 200, what="the ledger")
    job.kill(rank=0, number=signal.SIGTERM)
    job.wait(60).check(75)
    assert all("before the image does" in entry["reason"] for entry in entries(tmp_path))


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize("world", [1, 2])
def test_an_index_that_does_not_belong(tmp_path: Path, digits: Path, world: int, on_error: str) -> None:
    """There is nothing to skip by: it is refused in either case."""
    shutil.copy(digits / "val/index.bin", digits / "train/index.bin")
    job = run(arguments(tmp_path, digits, "--data.on-error", on_error), cwd=tmp_path, world=world, code=2, timeout=60)
    assert "train/index.bin does not belong to the manifest.json beside it" in the_line(job)


def test_quarantine_is_honoured(tmp_path: Path, digits: Path) -> None:
    """After `dtl verify --quarantine` the run meets no damage, and its epoch is so much smaller."""
    for sample in BAD:
        damage.flip_bit(digits / "train", sample)
    verify(digits / "train", processes=1, progress=False, quarantine=True)
    run(arguments(tmp_path, digits), cwd=tmp_path, world=2)
    assert not (tmp_path / "runs/tiny/bad_samples.jsonl").exists()
    assert Shards.open(digits / "train").num_samples == 1434


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_shards_that_webdataset_wrote_train_without_repacking(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own ShardWriter with its defaults (a PAX header a member), names as ImageNet's shards have them; once indexed, once not."""
    import webdataset

    (tmp_path / "wds").mkdir()
    for split in ("train", "val"):
        shards = Shards.open(packed / split)
        with webdataset.ShardWriter(str(tmp_path / f"wds/digits-{split}-%04d.tar"), maxcount=150, verbose=0) as writer:
            for sample in range(0, shards.num_samples, 2):
                image, key = shards.read([sample])[0], f"n{int(shards.labels[sample]):08d}_{sample}"
                writer.write({"__key__": key, "png": image, "cls": int(shards.labels[sample]), "json": {"file": key}})
    capsys.readouterr()
    job = run(arguments(tmp_path, tmp_path / "wds"), cwd=tmp_path)
    assert f"indexing {tmp_path}/wds" in job.err()
    first = [event for event in history(tmp_path / "runs/tiny") if event["event"] == "val"][-1]
    assert first["num_samples"] == 180
    for split in ("train", "val"):
        index_shards([f"{tmp_path}/wds/digits-{split}-*.tar"], out=tmp_path / "indexed" / split, processes=1, progress=False)
    folder = tmp_path / "again"
    folder.mkdir()
    run(arguments(folder, tmp_path / "indexed"), cwd=folder, world=2)
    second = [event for event in history(folder / "runs/tiny") if event["event"] == "val"][-1]
    assert second["num_samples"] == 180
    assert {event["seen"] for event in history(folder / "runs/tiny") if event["event"] == "epoch"} == {719}
