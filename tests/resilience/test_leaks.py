"""Nothing grows over a long run: memory of the trainer and of its loader processes, open files. Slow: `pytest -m soak`."""

from __future__ import annotations

import statistics
from pathlib import Path

import psutil
import pytest
from harness import history, start, wait_for
from process_tree import children
from recipes import write_recipe

EPOCHS = 20
MIB = 2**20


def resident(pid: int) -> int:
    """RSS in bytes, mapped files included; not PSS, which grows when others who share the libraries end."""
    return int(psutil.Process(pid).memory_info().rss)


def open_files(pid: int) -> int:
    return psutil.Process(pid).num_fds()


@pytest.mark.soak
def test_twenty_epochs_grow_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Many shards (more than may be open at once), two loader processes for the whole phase, an evaluation each epoch with its own."""
    from dtl.data.packing.pack import pack
    from dtl.data.shards.index import MAX_OPEN_SHARDS, Shards

    pack("digits", tmp_path / "digits", shard_bytes=16_000, processes=1, progress=False)
    assert len(Shards.open(tmp_path / "digits/train").shard_sizes) > MAX_OPEN_SHARDS
    phases = {"all": {"train": "all", "epochs": EPOCHS, "lr": 0.01}}
    recipe = write_recipe(tmp_path, phases=phases, data={"workers": 2, "image_size": 32, "train": str(tmp_path / "digits")})
    job = start(["--config", str(recipe)], cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    pid = job.processes[0].pid
    assert pid is not None
    rows = []
    for epoch in range(EPOCHS - 1):

        def told(number: int = epoch) -> bool:
            return (run / "history.jsonl").exists() and any(event["event"] == "train" and event["epoch"] > number for event in history(run))

        wait_for(told, seconds=120, what=f"epoch {epoch + 1}")
        # The two oldest are those of training; an evaluation's come and go.
        workers = sorted(children(pid), key=lambda child: psutil.Process(child).create_time())[:2]
        rows.append((resident(pid), [resident(worker) for worker in workers], open_files(pid), max(open_files(worker) for worker in workers)))
    job.wait(900).check(0)
    early, late = rows[4:9], rows[-5:]
    with capsys.disabled():
        for name, part in (("epochs 5 to 9", early), ("epochs 15 to 19", late)):
            trainer = statistics.median(row[0] for row in part) / MIB
            workers = [round(statistics.median(row[1][n] for row in part) / MIB, 1) for n in (0, 1)]
            files, most = max(row[2] for row in part), max(row[3] for row in part)
            print(f"\n{name}: trainer {trainer:.1f} MiB, loader processes {workers} MiB, open files {files} and {most}", end="")
    for column in (lambda row: row[0], lambda row: row[1][0], lambda row: row[1][1]):
        before, after = (statistics.median(column(row) for row in part) for part in (early, late))
        assert after - before < 4 * MIB + 0.01 * before
    assert max(row[2] for row in late) <= max(row[2] for row in early) + 4
    assert max(row[3] for row in rows) <= MAX_OPEN_SHARDS + 64
