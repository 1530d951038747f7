"""Real runs on shards behind a real HTTP server that misbehaves: the same result as from the disk, each shard fetched once a node."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_server import Server
from harness import history, run, start, wait_for
from recipes import weights_hash, write_recipe

from dtl.data.packing.pack import pack
from dtl.data.shards.index import Manifest


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    pack("digits", folder, shard_bytes=300_000, processes=1, progress=False)
    assert len(list((folder / "train").glob("*.tar"))) > 5
    return folder


@pytest.fixture
def server(packed: Path) -> Iterator[Server]:
    with Server(packed) as running:
        yield running


def arguments(folder: Path, source: object, *more: str, workers: int = 2, epochs: int = 1) -> list[str]:
    recipe = write_recipe(folder, phases={"all": {"train": "all", "epochs": epochs, "lr": 0.05}})
    return ["--config", str(recipe), "--data.train", str(source), "--data.workers", str(workers), "--data.window", "400", *more]


@pytest.fixture(scope="module")
def local(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on local shards."""
    folder = tmp_path_factory.mktemp("local")
    run(arguments(folder, packed), cwd=folder, world=2)
    return folder / "runs/tiny"


def check_same(folder: Path, local: Path) -> None:
    notes = [event for event in history(folder / "runs/tiny") if event["event"] != "note"]
    assert notes == [event for event in history(local) if event["event"] != "note"]
    assert weights_hash(folder / "runs/tiny") == weights_hash(local)


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "cache/remote").glob("*/*"))


def test_two_ranks_with_two_workers_each_fetch_each_shard_once(packed: Path, server: Server, local: Path, tmp_path: Path) -> None:
    server.plan = {"train/shard-00001.tar": ["500"], "train/shard-00003.tar": ["drop 100000"], "val/shard-00000.tar": ["html"]}
    job = run(arguments(tmp_path, server.url), cwd=tmp_path, world=2)
    assert "Traceback" not in job.err()
    check_same(tmp_path, local)
    names = {f"{split}/{file.name}" for split in ("train", "val") for file in (packed / split).glob("*.tar")}
    good = [name for name, status in ((name, status) for name, _, status in server.requests) if name.endswith(".tar") and status != 500]
    twice = {"train/shard-00003.tar", "val/shard-00000.tar"}  # the rest of one, and one after the page
    assert {name: good.count(name) for name in names} == {name: 2 if name in twice else 1 for name in names}
    assert len(cached(tmp_path)) - len({path.parent for path in cached(tmp_path)}) == len(names), "nothing is left but the shards and a lock of each folder"

    before = len([name for name, _, _ in server.requests if name.endswith(".tar")])
    run(arguments(tmp_path, server.url, "--run.resume", "never"), cwd=tmp_path, world=1)
    assert len([name for name, _, _ in server.requests if name.endswith(".tar")]) == before, "the second run has them all"


def test_a_small_cache_gives_up_what_is_needed_last(packed: Path, server: Server, tmp_path: Path) -> None:
    small = ["--data.window", "100", "--data.global-batch-size", "80", "--data.workers", "1"]
    (tmp_path / "local").mkdir()
    run(arguments(tmp_path / "local", packed, *small, epochs=2), cwd=tmp_path / "local", world=2)
    sizes = {split: sum(file.stat().st_size for file in (packed / split).glob("*.tar")) for split in ("train", "val")}
    largest = max(file.stat().st_size for file in packed.rglob("*.tar"))
    limit = int(sizes["val"] + 0.7 * sizes["train"])
    worst, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            worst[0] = max(worst[0], sum(_size(path) for path in cached(tmp_path)))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(arguments(tmp_path, server.url, *small, "--data.cache-gb", str(limit / 1e9), epochs=2), cwd=tmp_path, world=2)
    finally:
        done.set()
        watcher.join()
    check_same(tmp_path, tmp_path / "local/runs/tiny")
    assert limit - largest < worst[0] <= limit
    downloads = server.downloads()
    num = len(list((packed / "train").glob("*.tar")))
    fetched = sum(count for name, count in downloads.items() if name.startswith("train"))
    assert num < fetched < 2 * num, "some had to be fetched again for the second epoch, but not all"
    assert all(count == 1 for name, count in downloads.items() if name.startswith("val"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_too_small_a_cache_is_told_before_the_first_step(server: Server, tmp_path: Path) -> None:
    job = run(arguments(tmp_path, server.url, "--data.cache-gb", "0.0005"), cwd=tmp_path, code=2)
    line = job.err().strip()
    assert line.startswith("dtl: data.cache_gb 0.0005 (0.5 MB) is too small for the remote shards that are in use at the same time (data.train: ")
    assert "for a window of 400 shuffled samples and the start of the next one; data.val: " in line
    assert "use --data.cache-gb " in line
    assert not [name for name, _, _ in server.requests if name.endswith(".tar")]


def test_killed_in_the_middle_of_a_download(packed: Path, server: Server, local: Path, tmp_path: Path) -> None:
    server.seconds_per_block = 0.02
    job = start(arguments(tmp_path, server.url), cwd=tmp_path, world=2)
    wait_for(lambda: [path for path in cached(tmp_path) if path.suffix == ".part" and _size(path) > 20_000], what="a part")
    job.kill()
    wait_for(lambda: _still(tmp_path), seconds=10, what="loader processes and the helper to end with their trainer")
    assert [path for path in cached(tmp_path) if path.suffix == ".part"]
    server.seconds_per_block = 0.0
    before = len(server.requests)
    run(arguments(tmp_path, server.url), cwd=tmp_path, world=2)
    check_same(tmp_path, local)
    assert any(at > 0 and status == 206 for _, at, status in server.requests[before:]), "it went on from the part"
    assert not [path for path in cached(tmp_path) if path.suffix in (".part", ".lock", ".failed")]


def _still(folder: Path) -> bool:
    """Whether nobody fetches any more."""
    before = [_size(path) for path in cached(folder)]
    time.sleep(0.5)
    return before == [_size(path) for path in cached(folder)]


def test_a_shard_that_is_gone(packed: Path, server: Server, tmp_path: Path) -> None:
    server.always["train/shard-00002.tar"] = "404"
    job = run(arguments(tmp_path, server.url), cwd=tmp_path, world=2, code=2)
    lines = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
    assert len(lines) == 1, job.err()
    assert f"{server.url}/train/shard-00002.tar cannot be downloaded: HTTP 404 Not Found (check the address) (1 attempt)" in lines[0]
    assert "Traceback" not in job.err()

    # Nothing is known about its samples, so they are not skipped as damaged ones either; when it is back, the same command goes on.
    samples = Manifest.read(packed / "train").shards[2].samples
    more = ["--data.on-error", "skip", "--data.max-bad", str(samples), "--run.resume", "never"]
    job = run(arguments(tmp_path, server.url, *more), cwd=tmp_path, code=2)
    assert "shard-00002.tar: a sample at byte " in job.err()
    assert "start the same command again when it can be read" in job.err()
    assert not (tmp_path / "runs/tiny/bad_samples.jsonl").exists()
    server.always.clear()
    run(arguments(tmp_path, server.url, *more), cwd=tmp_path)
    assert not (tmp_path / "runs/tiny/bad_samples.jsonl").exists()


SOURCES: dict[str, Any] = {
    "http": lambda server, packed, split, last: f"{server.url}/{split}/shard-{{00000..{last}}}.tar?signature={time.time()}",
    "pipe": lambda server, packed, split, last: f"pipe:cat {packed}/{split}/shard-{{00000..{last}}}.tar",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_tars_named_straight_in_the_config(packed: Path, server: Server, tmp_path: Path, kind: str) -> None:
    def sources() -> list[str]:
        last = {split: sorted((packed / split).glob("*.tar"))[-1].stem[-5:] for split in ("train", "val")}
        train, val = (SOURCES[kind](server, packed, split, last[split]) for split in ("train", "val"))
        return [*arguments(tmp_path, train, workers=1), "--data.val", val]

    run(sources(), cwd=tmp_path)
    first = history(tmp_path / "runs/tiny")
    if kind == "http":
        assert set(server.downloads().values()) == {1}, "what was fetched for the index is kept for the training"
        run([*sources(), "--run.resume", "never"], cwd=tmp_path)
        assert history(tmp_path / "runs/tiny") == first
        assert set(server.downloads().values()) == {1}, "another signature is not another shard"
    assert next(event["num_samples"] for event in first if event["event"] == "val") > 100


def test_a_manifest_from_elsewhere_runs_no_commands(packed: Path, tmp_path: Path) -> None:
    www = Path(shutil.copytree(packed, tmp_path / "www"))
    manifest = (www / "train/manifest.json").read_text().replace('"url": "shard-00000.tar"', f'"url": "pipe:touch {tmp_path}/ran"')
    (www / "train/manifest.json").write_text(manifest)
    with Server(www) as server:
        job = run(arguments(tmp_path, server.url), cwd=tmp_path, code=2)
    assert "a remote manifest may list only files below it and addresses of its own kind" in job.err()
    job = run(arguments(tmp_path, www), cwd=tmp_path, code=2)
    assert "and commands are run only from your own config: if you trust this folder, allow it with --data.allow-pipe true" in job.err()
    assert not os.path.exists(tmp_path / "ran")
