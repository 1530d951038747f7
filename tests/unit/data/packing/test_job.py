"""An interrupted packing resumes from its working folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packed_folders import hashes, pack
from tiny_images import image_folder

from dtl.data.packing import tasks as pack_tasks
from dtl.data.packing.job import Job
from dtl.data.shards.index import Manifest, Shards
from dtl.errors import UserError


class _Cut(Exception):
    pass


def pack_until_the_third_shard(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packing that was cut off: its work folder holds what two shards have left."""
    real = pack_tasks.run_task

    def cut(job: Job, task: dict[str, Any]) -> int:
        if task["kind"] == "shard" and task["number"] == 2:
            raise _Cut
        return real(job, task)

    monkeypatch.setattr(pack_tasks, "run_task", cut)
    with pytest.raises(_Cut):
        pack(source, out, shard_bytes=50_000)
    monkeypatch.undo()


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4, 6])
def test_an_interrupted_packing_goes_on(source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Stopped after some of the 5 chunks of reading or of the shards: it is no data set, and the next call does only what is left."""
    tasks: list[str] = []
    real = pack_tasks.run_task

    def counting(job: Job, task: dict[str, Any]) -> int:
        if len(tasks) == stop_after:
            raise _Cut
        tasks.append(task["kind"])
        return real(job, task)

    monkeypatch.setattr(pack_tasks, "run_task", counting)
    with pytest.raises(_Cut):
        pack(source, tmp_path / "d", shard_bytes=50_000)
    with pytest.raises(UserError, match=r"holds no manifest.json"):
        Shards.open(tmp_path / "d")
    monkeypatch.undo()

    read: list[int] = []
    reading = Job.read
    monkeypatch.setattr(Job, "read", lambda job, sample: read.append(sample) or reading(job, sample))
    pack(source, tmp_path / "d", shard_bytes=50_000)
    assert hashes(tmp_path / "d") == hashes(packed)
    assert len(read) < 300 or stop_after == 0, "300 is reading everything twice"


def test_a_finished_shard_that_was_damaged_is_written_again(source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack_until_the_third_shard(source, tmp_path / "d", monkeypatch)
    shard = tmp_path / "d" / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    pack(source, tmp_path / "d", shard_bytes=50_000)
    assert hashes(tmp_path / "d") == hashes(packed)


def test_an_interrupted_packing_of_other_options_starts_clean(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pack_tasks.run_task

    def cut(job: Job, task: dict[str, Any]) -> int:
        if task["kind"] == "shard" and task["number"] == 1:
            raise _Cut
        return real(job, task)

    monkeypatch.setattr(pack_tasks, "run_task", cut)
    with pytest.raises(_Cut):
        pack(source, tmp_path / "d", shard_bytes=30_000)
    monkeypatch.undo()
    pack(source, tmp_path / "d", seed=5)
    pack(source, tmp_path / "fresh", seed=5)
    assert hashes(tmp_path / "d") == hashes(tmp_path / "fresh")


@pytest.mark.parametrize("again", ["same options", "other options"])
def test_interrupted_between_the_manifests_of_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    root = image_folder(tmp_path / "s", {"a": 20, "b": 20})
    real = Manifest.write
    monkeypatch.setattr(Manifest, "write", lambda manifest, folder: _cut() if folder.name == "val" else real(manifest, folder))
    with pytest.raises(_Cut):
        pack(root, tmp_path / "d", val_fraction=0.25)
    monkeypatch.undo()
    assert (tmp_path / "d" / "train" / "manifest.json").exists()
    options: dict[str, Any] = {"val_fraction": 0.25} if again == "same options" else {"val_fraction": 0.5, "shard_bytes": 20_000}
    pack(root, tmp_path / "d", **options)
    pack(root, tmp_path / "fresh", **options)
    assert hashes(tmp_path / "d") == hashes(tmp_path / "fresh")


def _cut() -> None:
    raise _Cut


@pytest.mark.parametrize("text", ["[" * 100_000, '{"reasons": [[99999999, "x"]]}', '{"reasons": 7}', '{"bytes": 1e400, "sha256": "../x"}', "", "\0"])
def test_results_that_somebody_changed_are_made_again(source: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    pack_until_the_third_shard(source, tmp_path / "d", monkeypatch)
    work = next((tmp_path / "d").glob(".packing-*"))
    results = [*work.glob("scan-*.json"), *work.glob("all-*.json")]
    assert len(results) == 5 + 2
    for path in results:
        path.write_text(text)
    huge = b"\x93NUMPY\x01\x00\x46\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(69) + b"\n"
    (work / "scan-00000.npy").write_bytes(huge)
    (work / "names.bin").write_bytes(b"")
    pack(source, tmp_path / "d", shard_bytes=50_000)
    assert hashes(tmp_path / "d") == hashes(packed)
