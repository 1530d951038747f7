"""status.json, lock files, quarantine lists, history and lists of bad samples: used where they are right, never a traceback."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_mutations import attempt, mutated_bytes, mutated_json

from dtl.data.shards.manifest import Manifest, Shard
from dtl.data.shards.quarantine import QUARANTINE_NAME, Quarantine
from dtl.report.csv_file import write_csv
from dtl.report.record import read_run
from dtl.runs.bad_samples import read_ledger
from dtl.runs.folder import Owner, Status, read_status, stopped_under_this_agent
from dtl.runs.history import History

FOLDER = Path(tempfile.mkdtemp(prefix="dtl-fuzz-"))
RUN = FOLDER / "run"
RUN.mkdir()
STATUS: dict[str, Any] = {
    "state": "stopped", "why": "a signal", "step": 12, "incarnation": 2, "host": "n1", "pid": 3, "time": 1.5,
    "launcher": {"host": "n1", "pid": 2, "process_start": "77", "restarts": 0},
    "progress": {"step": 12, "starts": 1},
    "phases": [{"phase": "head", "task": "classify", "epochs": 1.0, "seconds": 2.5, "val": {"top1": 0.5, "loss": 1.0, "num_samples": 7}, "best": None}],
    "model": "runs/a/model",
}  # fmt: skip
OWNER = {"host": "n1", "pid": 3, "machine": "x", "process_start": "7", "since": "2025-01-01", "slurm": ["1", "0"], "elastic": None, "released": False}
MANIFEST = Manifest(
    version=1,
    classes=("a", "b"),
    display_names={},
    shards=tuple(Shard(url=f"s-{n}.tar", samples=3, bytes=90, sha256="0" * 64) for n in range(2)),
    class_counts=(4, 2),
    dataset_id="1d" * 16,
    index_sha256="a" * 64,
    made_by={},
)
QUARANTINE = {
    "version": 1, "of": "1d" * 16, "index": "index-without.bin", "index_sha256": "b" * 64, "shard_samples": [2, 3], "class_counts": [3, 2],
    "samples": [{"sample": 1, "shard": "s-0.tar", "key": "k", "offset": 5, "reason": "cut"}],
}  # fmt: skip
HISTORY = [
    {"event": "train", "phase": "head", "epoch": 0, "step": 1, "loss": "nan", "lr": 0.1, "images_per_second": 3.0, "data_wait": 0.0},
    {"event": "val", "phase": "head", "epoch": 0, "step": 1, "loss": 1.0, "top1": 0.5, "top5": 1.0, "num_samples": 7},
    {"event": "note", "note": "stopped", "step": 1},
]
TRANSFER = {"source": "a.pth", "by": "auto", "coverage": 1.0, "totals": {"loaded": {"tensors": 3, "parameters": 9}}, "warnings": ["w"], "notes": ["n"]}
BAD = [{"split": "train", "sample": 3, "shard": "s", "key": "k", "offset": 5, "reason": "cut", "message": "m"}]


def lines(values: list[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    text = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    each = st.tuples(*(mutated_json(value) for value in values)).map(lambda parts: b"\n".join(parts) + b"\n")
    return mutated_bytes(text) | each


def check_status(data: bytes) -> None:
    (RUN / "status.json").write_bytes(data)
    assert isinstance(read_status(RUN), Status)
    stopped_under_this_agent(RUN)
    record = read_run(RUN)
    assert all("\n" not in words for words in record.missing)


def check_owner(data: bytes) -> None:
    owner, _ = attempt(lambda: Owner.parse(data, "lock"))
    assert owner is None or owner.pid >= 0


def check_quarantine(data: bytes) -> None:
    (FOLDER / QUARANTINE_NAME).write_bytes(data)
    found, refusal = attempt(lambda: Quarantine.of_folder(FOLDER, MANIFEST))
    if found is None:
        assert QUARANTINE_NAME in refusal
    else:
        assert os.path.basename(found.index) == found.index
        assert found.applied(MANIFEST).num_samples == MANIFEST.num_samples - len(found.samples)


def check_history(data: bytes) -> None:
    (RUN / "history.jsonl").write_bytes(data)
    record = read_run(RUN)
    for phase in record.phases:
        assert phase.last_step < 2**63
    write_csv([RUN], FOLDER / "out.csv")
    (RUN / "copy.jsonl").write_bytes(data)
    history = History(RUN / "copy.jsonl")
    history.truncate_after(0)
    (RUN / "copy.jsonl").unlink()


def check_transfer(data: bytes) -> None:
    (RUN / "transfer.json").write_bytes(data)
    record = read_run(RUN)
    assert record.transfer is None or record.transfer.by is not None
    (RUN / "transfer.json").unlink()


def check_bad_samples(data: bytes) -> None:
    (RUN / "bad_samples.jsonl").write_bytes(data)
    assert all(isinstance(entry["split"], str) and isinstance(entry["sample"], int) for entry in read_ledger(RUN / "bad_samples.jsonl"))


CASES: dict[str, tuple[Callable[[bytes], None], st.SearchStrategy[bytes]]] = {
    "status": (check_status, mutated_json(STATUS)),
    "lock": (check_owner, mutated_json(OWNER)),
    "quarantine": (check_quarantine, mutated_json(QUARANTINE)),
    "history": (check_history, lines(HISTORY)),
    "transfer": (check_transfer, mutated_json(TRANSFER)),
    "bad samples": (check_bad_samples, lines(BAD)),
}


@pytest.mark.parametrize("name", CASES)
def test_changed_records(name: str) -> None:
    check, data = CASES[name]
    (RUN / "history.jsonl").write_text("")
    settings(max_examples=100, deadline=None)(given(data)(check))()


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_many_changed_records(name: str) -> None:
    check, data = CASES[name]
    (RUN / "history.jsonl").write_text("")
    settings(max_examples=20_000, deadline=None)(given(data)(check))()


def test_right_records_pass() -> None:
    (RUN / "history.jsonl").write_text("")
    check_status(json.dumps(STATUS).encode())
    assert read_status(RUN).phases[0]["val"]["top1"] == 0.5
    (FOLDER / QUARANTINE_NAME).write_text(json.dumps(QUARANTINE))
    assert Quarantine.of_folder(FOLDER, MANIFEST) is not None
