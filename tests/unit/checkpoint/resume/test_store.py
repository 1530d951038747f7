"""The store's promises: what is there is whole, what is damaged is named, and no failure loses the checkpoint before."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dtl import files
from dtl.checkpoint.resume import tensors_file
from dtl.checkpoint.resume.store import CheckpointStore
from dtl.config.models import CheckpointConfig
from dtl.errors import UserError


class Said(list[str]):
    """Stands in for the console: keeps the lines."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def text(self) -> str:
        return "\n".join(self)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def make(tmp_path: Path, said: Said) -> Callable[..., CheckpointStore]:
    (tmp_path / "run").mkdir()

    def build(before_write: Callable[[], None] = lambda: None, **options: Any) -> CheckpointStore:
        return CheckpointStore(tmp_path / "run" / "checkpoints", CheckpointConfig(**options), log=said, before_write=before_write)

    return build


def tensors(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {"model": {"weight": torch.full((100, 10), float(value))}, "optimizer": {"exp_avg/weight": torch.full((100, 10), -float(value))}}


def every_kind() -> dict[str, Tensor]:
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    kinds = {f"{kind}"[6:]: (torch.arange(-3, 9) % 7).to(kind).reshape(3, 4) for kind in types}
    return kinds | {
        "bool": torch.tensor([True, False, True]),
        "number": torch.tensor(7),
        "nothing": torch.empty(0, 4),
        "no_elements_bf16": torch.empty(0, dtype=torch.bfloat16),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "slice": torch.randn(10, 10)[2:5, 1:7:2],
    }


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and _bytes(left) == _bytes(right)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_kind_of_tensor_and_state_comes_back_exactly(make: Callable[..., CheckpointStore], asynchronous: bool) -> None:
    store = make(asynchronous=asynchronous)
    given = every_kind()
    state = {"step": 3, "loss": 0.1 + 0.2, "best": {"all": [1, None, "ä"]}, "worst": float("inf")}
    stalled = store.save(3, {"model": given, "scaler": {}}, state)
    store.close()
    found = store.newest()
    assert found is not None
    assert (found.step, found.state, found.groups) == (3, state, ("model", "scaler"))
    back = found.tensors("model")
    assert back.keys() == given.keys()
    assert [name for name in given if not same(given[name], back[name])] == []
    assert found.tensors("scaler") == {}
    assert 0 <= stalled < 60
    assert store.saved_step == 3
    with pytest.raises(UserError, match="no tensor group 'ema'; its groups are: model, scaler"):
        found.tensors("ema")


def test_the_reference_reader_of_safetensors_agrees(make: Callable[..., CheckpointStore]) -> None:
    from safetensors.torch import load_file

    store, given = make(), every_kind()
    store.save(1, {"model": given}, {}, wait=True)
    back = load_file(store.folder / "step-00000001" / "model.safetensors")
    assert [name for name in given if not same(given[name], back[name])] == []


def test_tied_tensors_are_saved_once_and_tied_again(make: Callable[..., CheckpointStore]) -> None:
    weight = torch.randn(1000, 10)
    store = make()
    store.save(1, {"model": {"a": weight, "b": weight, "row": weight[:1], "other": weight.clone()}}, {}, wait=True)
    found = store.newest()
    assert found is not None
    back = found.tensors("model")
    assert back["a"].data_ptr() == back["b"].data_ptr() != back["other"].data_ptr()
    assert torch.equal(back["b"], weight)
    assert torch.equal(back["row"], weight[:1])
    assert (found.path / "model.safetensors").stat().st_size < 2.2 * weight.nbytes


def test_what_changes_after_save_returned_is_not_in_the_checkpoint(make: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), tensors_file.write_tensors
    monkeypatch.setattr(tensors_file, "write_tensors", lambda *given: (gate.wait(10), write(*given))[1])
    store, given = make(), tensors(1.0)
    state = {"list": [1]}
    store.save(1, given, state)
    given["model"]["weight"].fill_(5.0)
    state["list"].append(2)
    assert store.newest() is None, "a checkpoint that is still being written does not count"
    gate.set()
    store.flush()
    found = store.newest()
    assert found is not None
    assert found.state == {"list": [1]}
    assert torch.equal(found.tensors("model")["weight"], torch.full((100, 10), 1.0))


def test_a_save_waits_for_the_one_before_and_reuses_its_memory(make: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch) -> None:
    active, most, pointers, write = [0], [0], [], tensors_file.write_tensors
    gate = threading.Event()

    def held(path: Path, members: dict[str, Tensor]) -> tensors_file.FileFacts:
        active[0] += 1
        most[0] = max(most[0], active[0])
        pointers.append({name: tensor.data_ptr() for name, tensor in members.items()})
        assert gate.wait(60)
        active[0] -= 1
        return write(path, members)

    monkeypatch.setattr(tensors_file, "write_tensors", held)
    store = make(keep=10)
    store.save(1, tensors(1), {})  # returns while its writing is held
    second = threading.Thread(target=store.save, args=(2, tensors(2), {}))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "it waits"
    assert store.steps() == []
    gate.set()
    second.join(60)
    store.flush()
    assert store.steps() == [1, 2]
    assert most == [1]
    assert pointers[:2] == pointers[2:]
    assert [torch.mean(store.at(step).tensors("model")["weight"]).item() for step in (1, 2)] == [1.0, 2.0]


def test_only_the_newest_are_kept_by_number(make: Callable[..., CheckpointStore]) -> None:
    store = make(keep=2)
    for step in (9, 10, 99_999_999, 100_000_000):
        store.save(step, tensors(), {})
    store.close()
    assert store.steps() == [99_999_999, 100_000_000]
    assert sorted(os.listdir(store.folder)) == ["step-100000000", "step-99999999"]
    newest = store.newest()
    assert newest is not None
    assert newest.step == 100_000_000
    with pytest.raises(ValidationError, match=r"(?s)keep.*greater than or equal to 1"):
        make(keep=0)


@pytest.mark.parametrize("keep", [1, 2])
def test_saving_a_step_again_replaces_it(make: Callable[..., CheckpointStore], keep: int) -> None:
    store = make(keep=keep)
    store.save(4, tensors(1), {"turn": 1})
    store.save(4, tensors(2), {"turn": 2}, wait=True)
    assert os.listdir(store.folder) == ["step-00000004"]
    found = store.newest()
    assert found is not None
    assert (found.state, found.tensors("model")["weight"][0, 0]) == ({"turn": 2}, 2)


def listed(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["files"]
    return files


def edit(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(value | changes))


def damage_truncate(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)


def damage_flip(folder: Path) -> None:
    with open(folder / "optimizer.safetensors", "r+b") as file:
        file.seek(-50, os.SEEK_END)
        byte = file.read(1)
        file.seek(-50, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (damage_truncate, r"model.safetensors has 100 bytes, not 4\d\d\d"),
    "flipped bit": (damage_flip, r"the content of optimizer.safetensors has changed"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), r"manifest.json: not valid JSON"),
    "strange manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), r"manifest.json has no format number"),
    "no state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "other step": (lambda folder: edit(folder, step=7), "belongs to step 7"),
    "no files listed": (lambda folder: edit(folder, files={}), r"manifest.json does not list state.json"),
    "one file not listed": (lambda folder: edit(folder, files={"state.json": listed(folder)["state.json"]}), r"does not list model.safetensors"),
    "a file elsewhere": (lambda folder: edit(folder, files={"../../x": {"size": 1, "sha256": "0" * 64}}), r"files.*must be a file name without a folder"),
    "a digest that is none": (
        lambda folder: edit(folder, files={"state.json": {"size": 1, "sha256": "/etc"}}),
        r"state.json.sha256: '/etc' is not a SHA-256",
    ),
    "a group elsewhere": (lambda folder: edit(folder, groups=["../x"]), r"groups.0: '../x' is not a valid group name"),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_falls_back_and_says_what_was_damaged(make: Callable[..., CheckpointStore], said: Said, kind: str) -> None:
    damage, message = DAMAGES[kind]
    store = make()
    for step in (10, 20):
        store.save(step, tensors(step), {"step": step}, wait=True)
    damage(store.folder / "step-00000020")
    found = store.newest()
    assert found is not None
    assert found.step == 10
    assert len(said) == 1
    assert re.search(f"step-00000020 is damaged and skipped: .*{message}", said[0])
    with pytest.raises(UserError, match=message):
        store.at(20)

    # Going on from 10 leaves the damaged 20 behind as soon as there is something newer than 10.
    store.save(15, tensors(15), {}, wait=True)
    assert store.steps() == [10, 15]


def test_all_damaged_is_refused_and_none_is_none(make: Callable[..., CheckpointStore]) -> None:
    store = make()
    assert store.newest() is None
    store.save(1, tensors(), {}, wait=True)
    damage_truncate(store.folder / "step-00000001")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(step-00000001: .*--run.resume never"):
        store.newest()
    with pytest.raises(UserError, match=r"step 8 .* it does not exist"):
        store.at(8)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (99, r"newer dtl \(checkpoint format 99, this dtl reads 3\): update dtl"),
        (1, r"older dtl \(checkpoint format 1, this dtl reads 3\): use the dtl version that started the run, or .*--run.name NEW, .*--run.resume never"),
    ],
)
def test_another_format_is_refused_clearly(make: Callable[..., CheckpointStore], found: int, message: str) -> None:
    store = make()
    store.save(1, tensors(), {}, wait=True)
    path = store.folder / "step-00000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": found}))
    with pytest.raises(UserError, match=message):
        store.newest()


@contextmanager
def full_disk(after_bytes: int) -> Iterator[None]:
    """No file may grow beyond this: the write fails in the middle of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_and_tried_again(make: Callable[..., CheckpointStore], said: Said) -> None:
    store = make(max_failures=3)
    store.save(1, tensors(1), {}, wait=True)
    with full_disk(2000):
        store.save(2, tensors(2), {})
        store.save(3, tensors(3), {}, wait=True)
    assert len(said) == 2
    assert "checkpoint of step 2 could not be written" in said[0]
    assert "File too large (failure 1 in a row, of at most 3); the checkpoint of step 1 is kept; the next save tries again" in said[0]
    assert "2 in a row" in said[1]
    assert os.listdir(store.folder) == ["step-00000001"], "nothing half written is left on a full disk"
    assert store.saved_step == 1
    assert store.failure(3) == f"the checkpoint of step 3 could not be written to {store.folder}: File too large; the checkpoint of step 1 is kept"
    store.save(4, tensors(4), {}, wait=True)
    assert store.saved_step == 4
    with full_disk(2000):  # the count starts anew after a success
        store.save(5, tensors(5), {})
        store.save(6, tensors(6), {})
        store.save(7, tensors(7), {})
        with pytest.raises(UserError, match=r"3 checkpoints in a row could not be written to .*: File too large"):
            store.flush()
    assert store.steps() == [1, 4]
    newest = store.newest()
    assert newest is not None
    assert newest.tensors("model")["weight"][0, 0] == 4


def test_a_removed_folder_is_told_and_made_anew(make: Callable[..., CheckpointStore], said: Said, tmp_path: Path) -> None:
    store = make()
    store.save(1, tensors(), {}, wait=True)
    files.remove(store.folder)
    store.save(2, tensors(), {}, wait=True)
    assert "and its checkpoints no longer exist" in said.text()
    assert store.steps() == [2]
    files.remove(tmp_path / "run")
    store.save(3, tensors(), {}, wait=True)
    assert "checkpoint of step 3 could not be written" in said[-1]
    assert "No such file or directory" in said[-1]
    assert not (tmp_path / "run").exists(), "a run folder that vanished must not grow again"


def test_a_process_of_an_older_start_writes_nothing(make: Callable[..., CheckpointStore]) -> None:
    calls = []

    def ghost() -> None:
        calls.append(1)
        if len(calls) == 5:  # each save asks three times
            raise UserError("start 2 has taken over")

    store = make(before_write=ghost)
    store.save(1, tensors(), {}, wait=True)
    store.save(2, tensors(), {})  # allowed at first, taken over while it writes
    with pytest.raises(UserError, match="start 2 has taken over"):
        store.flush()
    assert os.listdir(store.folder) == ["step-00000001"]


def test_a_fault_in_the_thread_reaches_the_caller(make: Callable[..., CheckpointStore]) -> None:
    store = make()
    store.save(1, {"model": {"odd": torch.zeros(2, dtype=torch.complex64)}}, {})
    with pytest.raises(TypeError, match=r"tensor odd has dtype torch.complex64"):
        store.close()
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(2, tensors(), {"bad": object()})
    with pytest.raises(ValueError, match="not a valid group name"):
        store.save(2, {"../x": {}}, {})


KILLED = """
import os, random, signal, sys, time
import torch
from dtl.checkpoint.resume.store import CheckpointStore
from dtl.config.models import CheckpointConfig

def run(folder, pipe):
    store = CheckpointStore(folder, CheckpointConfig(keep=2))
    found = store.newest()
    step = 0 if found is None else found.step
    if found is not None:
        values = {float(t.unique()) for g in found.groups for t in found.tensors(g).values()}
        assert values == {float(step)} and found.state == {"step": step}, (step, values, found.state)
    os.write(pipe, f"{step}\\n".encode())
    while True:
        step += 1
        value = {"a": torch.full((100_000,), float(step)), "b": torch.full((3,), float(step))}
        store.save(step, {"model": value, "optimizer": value}, {"step": step})

torch.set_num_threads(1)
random.seed(0)
# Kills fall into the first saves, whatever a save takes on this disk; the slowest of three, as most of the time goes into syncing.
probe, seconds = CheckpointStore(sys.argv[1] + "-probe", CheckpointConfig(keep=2)), []
for step in range(1, 4):
    begun = time.monotonic()
    probe.save(step, {"model": {"a": torch.zeros(100_000)}, "optimizer": {"a": torch.zeros(100_000)}}, {"step": step}, wait=True)
    seconds.append(time.monotonic() - begun)
assert probe.newest() is not None  # loads here, not in each child, what reads checkpoints
probe.close()
window = max(0.03, 3 * max(seconds))
kills, hits = 0, 0
while kills < 30 or (hits < 5 and kills < 300):
    kills += 1
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(sys.argv[1], writing)
        finally:
            os._exit(1)
    os.close(writing)
    line = os.read(reading, 100).decode()
    assert line, "the child failed"
    time.sleep(random.random() * window)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    folder = sys.argv[1]
    left = os.path.isdir(folder) and any(not name.startswith("step-") for name in os.listdir(folder))
    hits += left
    print(line.strip(), int(left))
"""


def test_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run([sys.executable, tmp_path / "killed.py", tmp_path / "checkpoints"], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    starts, leftovers = zip(*[map(int, line.split()) for line in done.stdout.splitlines()], strict=True)
    assert starts == tuple(sorted(starts))
    assert starts[-1] > 0
    assert sum(leftovers) >= 5, "some of the kills fell into a save"
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(keep=2))
    store.save(10**6, tensors(), {}, wait=True)
    assert [name for name in os.listdir(store.folder) if not name.startswith("step-")] == [], "leftovers go at the next save"


@pytest.mark.parametrize("killed_after", ["set aside", "replaced"])
def test_killed_while_a_step_is_replaced(make: Callable[..., CheckpointStore], monkeypatch: pytest.MonkeyPatch, killed_after: str) -> None:
    """Between the two renames the old folder is found where it was set aside; after them the new one counts."""
    make().save(4, tensors(1), {"turn": 1}, wait=True)
    renames, rename = [], os.rename

    def until_killed(source: Path, target: Path) -> None:
        if len(renames) == 1 and killed_after == "set aside":
            raise KeyboardInterrupt
        renames.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", until_killed)
    if killed_after == "replaced":
        monkeypatch.setattr(files, "fsync_folder", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt) if len(renames) == 2 else None)
    store = make()
    store.save(4, tensors(2), {"turn": 2})
    with pytest.raises(KeyboardInterrupt):
        store.flush()
    monkeypatch.undo()
    found = make().newest()
    assert found is not None
    assert found.state == {"turn": 1 if killed_after == "set aside" else 2}
    store = make(keep=1)
    store.save(5, tensors(5), {}, wait=True)
    assert os.listdir(store.folder) == ["step-00000005"]


def test_a_run_that_is_done_keeps_its_last(make: Callable[..., CheckpointStore], said: Said) -> None:
    store = make(keep=4, keep_done=2)
    for step in (10, 20, 30, 40):
        store.save(step, tensors(), {}, wait=True)
    (store.folder / ".deleting-step-00000005-1").mkdir()
    store.thin()
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000030", "step-00000040"]
    assert store.newest() is not None
    store.thin()
    assert store.steps() == [30, 40]
    assert said == []


def test_nothing_is_deleted_beside_a_damaged_last_one(make: Callable[..., CheckpointStore], said: Said) -> None:
    store = make(keep=3)
    for step in (10, 20, 30):
        store.save(step, tensors(), {}, wait=True)
    (store.folder / "step-00000030/model.safetensors").write_bytes(b"damaged")
    store.thin()
    assert store.steps() == [10, 20, 30]
    assert "step-00000030 is damaged, so the others are kept: model.safetensors has 7 bytes" in said.text()


def test_what_cannot_be_deleted_does_not_fail_a_run_that_is_done(make: Callable[..., CheckpointStore], said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(keep=3)
    store.save(10, tensors(), {}, wait=True)
    store.save(20, tensors(), {}, wait=True)

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refused)
    store.thin()
    assert store.steps() == [10, 20]
    assert "could not be deleted: Permission denied" in said.text()


def test_what_a_newer_start_has_saved_is_not_deleted(make: Callable[..., CheckpointStore], tmp_path: Path) -> None:
    """A process that was cut off comes back in the middle of a save, when another start has gone on and has ended."""
    old = make(keep=2)
    old.save(4, tensors(), {}, wait=True)
    new = make(keep=2)
    new.save(29, tensors(), {}, wait=True)
    new.save(30, tensors(), {}, wait=True)
    old.save(5, tensors(), {}, wait=True)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))[-2:] == ["step-00000029", "step-00000030"]


def test_a_start_that_may_not_write_any_more_deletes_nothing(make: Callable[..., CheckpointStore], tmp_path: Path) -> None:
    asked = 0

    def taken_over() -> None:
        nonlocal asked
        asked += 1
        if asked == 6:  # each save asks before it writes, before it counts, and before it deletes
            raise UserError("a newer start has taken over")

    store = make(taken_over, keep=1)
    store.save(4, tensors(), {}, wait=True)
    with pytest.raises(UserError, match="taken over"):
        store.save(5, tensors(), {}, wait=True)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-00000004", "step-00000005"]
