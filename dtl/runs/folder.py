"""One run folder, one run: who works in it, which start of it this is, and how it ended. No torch in here.

    runs/NAME/status.json               {"state": running|done|stopped|failed, "why", "step", ...}
    runs/NAME/lock/00000003.json        the third start's owner: host, pid, when; the highest number counts
    runs/NAME/lock/00000003.beat        a number that the owner counts up while it lives

Every start takes the next incarnation number by creating its file exclusively, which is atomic on network disks too. A process
of an older start (a ghost on a node that was cut off) is thereby outdated the moment a newer one begins, finds out in
`check_incarnation`, and can never write its way back: each start touches files of its own number only.

May a start take the folder? The owner before it
1. released the folder: yes;
2. ran on this very machine: yes if its process has ended (a pid that was given to another process does not count as alive);
3. ran elsewhere, and belongs to the same job as we do, started anew (Slurm has requeued it, or the elastic agent has formed the
   ranks again): yes, at once. Should it still live there, it is a ghost;
4. ran elsewhere, in another job: its heartbeat decides. Unmoved for 2 minutes by the clock of the disk, or for `stale_seconds`
   while we watch: yes. As soon as it moves: no. No clocks of two machines are ever compared.

Only a folder that is new, empty, or a run's already is used (`check_is_run`): dtl replaces and deletes files in it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from dtl.errors import Occupied, UserError
from dtl.files import clear_folder, write_json_whole, write_whole
from dtl.machine import pid_space, process_start
from dtl.text import to_stderr, to_stdout
from dtl.untrusted import Check, Count, NumbersObject, Record, Text, read_text

REFUSED_TRANSFER = "transfer_refused.json"
"""The whole report of pretrained weights that were not loaded."""
MADE = (
    "lock", "status.json", "config.yaml", "history.jsonl", "bad_samples.jsonl", "looks.jsonl", "copies.csv", "transfer.json", REFUSED_TRANSFER,
    "predictions.npy", "checkpoints", "model", "report", "wandb", "tensorboard", "profile",
)  # fmt: skip
"""What dtl makes in a run folder."""
REPORT_FILE = re.compile(r"index\.html|(curves|compare|predictions|mistakes|confusion|classes|training(-[\w-]+)?)(-narrow)?\.png")
"""What a report's folder holds."""
_CHECKPOINT = re.compile(r"step-\d{8,}|\.step-\d{8,}\.before|\.(writing|deleting)-step-\d{8,}.*")
STATES = ("running", "done", "stopped", "failed")
_LONG_DEAD_SECONDS = 120.0
_SECONDS_TO_PRINT = 20.0
_LOCK_NAME = re.compile(r"(\d{8})\.json")


class Launcher(Record):
    """The process that started a run's ranks, and how often it has started them anew."""

    host: Text = ""
    pid: Count = 0
    process_start: Text | None = None
    restarts: Count = 0


class Progress(Record):
    """How many starts in a row have begun at one step."""

    step: Count
    starts: Count


def _phase_row(row: dict[str, Any]) -> dict[str, Any]:
    numbers = ("epochs", "seconds", "images_per_second", "kept_step", "kept_epoch", "blend", "train_loss")
    val = row.get("val")
    if not isinstance(row.get("phase"), str) or not isinstance(row.get("task", ""), str):
        raise ValueError("phase and task must be strings")
    if not isinstance(val, dict | None):
        raise ValueError("val must be an object")
    for name, value in (*((name, row.get(name)) for name in numbers), *(val or {}).items()):
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{name} must be a number")
    return row


class Status(Record):
    """status.json. Of `phases` each row is a finished phase (see `note_result`), which an older dtl may have written NaN into."""

    finite = False
    state: Text = "unknown"
    why: Text = ""
    step: Count = 0
    incarnation: Count = 0
    launcher: Launcher | None = None
    progress: Progress | None = None
    phases: tuple[Annotated[NumbersObject, Check(_phase_row)], ...] = ()
    model: Text | None = None
    test: NumbersObject | None = None
    """Of a finished run with a test set: its metrics there."""


class Owner(Record):
    """Who works in a run folder: lock/NUMBER.json. One that cannot be read is empty, and its heartbeat decides."""

    host: Text = "unknown"
    pid: Count = 0
    machine: Text | None = None
    process_start: Text | None = None
    since: Text = "unknown"
    slurm: tuple[Text, Text] | None = None
    elastic: Text | None = None
    released: bool = False


class Superseded(UserError):
    """This process belongs to an older start of the run: it must write nothing and end."""


class RunFolder:
    """The run folder of one start. Only the main process acquires it; others may give its number to `check_incarnation`.

    `stale_seconds`: how long an owner on another machine must have been silent, `beat_seconds`: how often ours is written.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        stale_seconds: float = 30.0,
        beat_seconds: float = 5.0,
        log: Callable[[str], None] = to_stdout,
    ) -> None:
        self.path = Path(path)
        self.incarnation = 0  # 0: not acquired
        self._lock = self.path / "lock"
        self._stale_seconds, self._beat_seconds, self._log = stale_seconds, beat_seconds, log
        self._progress: Progress | None = None  # goes into every status.json of this start
        self.launch_variables: dict[str, str] | None = None
        """What of the environment the run was launched with; goes into every status.json too."""
        self._owner: dict[str, Any] = {}
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self) -> int:
        """Create the folder where needed, and make it ours; returns the number of this start (1 for the first).

        Raises UserError when the folder cannot be written, is not a run's, or when another run works in it.
        """
        try:
            check_is_run(self.path)
            self._lock.mkdir(parents=True, exist_ok=True)
            while not self._claim(newest_incarnation(self.path)):
                pass
            self._beat(0)
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be written: {error.strerror or error}") from error
        self._heart = threading.Thread(target=self._beat_on, name="run-heartbeat", daemon=True)
        self._heart.start()
        return self.incarnation

    def check_incarnation(self) -> None:
        """Raise Superseded when a newer start of the run has taken over."""
        check_incarnation(self.path, self.incarnation)

    def write_status(self, state: str, *, why: str = "", step: int = 0, test: Mapping[str, Any] | None = None, **more: object) -> None:
        """Write status.json, atomically, unless a newer start has taken over (Superseded)."""
        if state not in STATES:
            raise ValueError(f"state {state!r} is none of {STATES}")
        self.check_incarnation()
        facts = {"state": state, "why": why, "step": step, "incarnation": self.incarnation}
        progress = {} if self._progress is None else {"progress": asdict(self._progress)}
        here = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "launcher": _launcher()}
        launch = {} if self.launch_variables is None else {"launch": self.launch_variables}
        tested = {} if test is None else {"test": dict(test)}
        write_json_whole(self.path / "status.json", facts | here | launch | progress | more | tested)

    def clear(self) -> None:
        """Remove what an earlier run has left here; what the user has put beside it stays."""
        clear_folder(self.path / "checkpoints", _CHECKPOINT)
        clear_folder(self.path / "model", re.compile(r"model\.(json|safetensors)"))
        clear_folder(self.path / "report", REPORT_FILE)
        clear_folder(self.path / "profile", re.compile(r".+\.(json|writing)"))
        clear_folder(self.path, re.compile(r"(history|bad_samples)\.jsonl|(transfer|status)\.json|predictions\.npy|\.model\.before|\.writing-model-\d+"))

    def count_starts(self, step: int) -> int:
        """How many starts in a row, this one included, have begun at `step`: more than a few make no progress. Kept in status.json."""
        before = read_status(self.path).progress
        number = before.starts + 1 if before is not None and before.step == step else 1
        self._progress = Progress(step=step, starts=number)
        return number

    def release(self) -> None:
        """Leave the folder to whoever comes next. Nothing happens in a process that has not acquired it, or if it is gone."""
        if self._heart is None:
            return
        self._stop.set()
        self._heart.join()
        self._heart = None
        if newest_incarnation(self.path) == self.incarnation:
            with suppress(OSError):
                write_json_whole(self._file("json"), self._owner | {"released": True})
                self._file("beat").unlink(missing_ok=True)

    def __enter__(self) -> RunFolder:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def _claim(self, last: int) -> bool:
        """Take the number after `last`; False when somebody was faster, UserError when its owner is at work."""
        if last:
            self._require_stale(last)
        self._owner = _describe_self()
        try:
            descriptor = os.open(self._lock / f"{last + 1:08d}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(self._owner))
            file.flush()
            os.fsync(file.fileno())
        self.incarnation = last + 1
        for number in range(last, 0, -1):  # the numbers below need no file: only the highest counts
            names = [self._lock / f"{number:08d}.{kind}" for kind in ("json", "beat")]
            if not any(name.exists() for name in names):
                break
            for name in names:
                name.unlink(missing_ok=True)
        return True

    def _require_stale(self, number: int) -> None:
        owner = _read_owner(self._lock / f"{number:08d}.json")
        if owner is None:
            time.sleep(0.2)  # its file may have been created a moment ago, and be written now
            owner = _read_owner(self._lock / f"{number:08d}.json") or Owner()
        if owner.released:
            return
        who = f"host {owner.host}, pid {owner.pid or 'unknown'}"
        alive = _lives_here(owner)
        if alive is None:
            alive = not _restarts(owner) and self._beats(number, who)
        if alive:
            raise Occupied(
                f"another process is training in {self.path} ({who}, since {owner.since}): wait until it ends, stop it, "
                "or give this run another name with --run.name NEW"
            )

    def _beats(self, number: int, who: str) -> bool:
        """Whether the owner's heartbeat moves while we watch."""
        beat = self._lock / f"{number:08d}.beat"
        if self._age(beat) > _LONG_DEAD_SECONDS:
            return False
        before, until = _read_text(beat), time.monotonic() + self._stale_seconds
        self._log(f"{self.path} is locked by {who}: waiting up to {self._stale_seconds:.0f} s for a sign that it is alive")
        while time.monotonic() < until:
            time.sleep(min(1.0, self._stale_seconds / 10))
            # Read, not stat: an open asks the file server, the attributes of a file may be cached for a minute.
            if _read_text(beat) != before:
                return True
        return False

    def _age(self, path: Path) -> float:
        """Seconds since the file was written, both ends by the clock of the disk's own machine."""
        probe = self._lock / f".now-{socket.gethostname()}-{os.getpid()}"
        try:
            write_whole(probe, lambda _: None, sync=False)
            return probe.stat().st_mtime - path.stat().st_mtime
        except FileNotFoundError:
            return 0.0  # claimed a moment ago, or no heartbeat yet: watch it
        finally:
            probe.unlink(missing_ok=True)

    def _beat_on(self) -> None:
        count = 0
        while not self._stop.wait(self._beat_seconds):
            count += 1
            with suppress(OSError):  # a disk that is away for a while must not end the run
                if newest_incarnation(self.path) != self.incarnation:
                    return
                self._beat(count)

    def _beat(self, count: int) -> None:
        write_whole(self._file("beat"), lambda file: file.write(str(count).encode()), sync=False)

    def _file(self, kind: str) -> Path:
        return self._lock / f"{self.incarnation:08d}.{kind}"


def check_is_run(path: Path) -> None:
    """UserError unless a folder is not there, holds nothing, or is a run of this dtl or an earlier one. Hidden files are nothing, and so are empty folders
    (a disk may be mounted at checkpoints/) and the notes of a Slurm job, which it writes before the run starts (slurm/job.sh)."""
    try:
        with os.scandir(path) as found:
            entries = sorted(entry.name for entry in found if not entry.name.startswith(".") and not _is_no_content(entry))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if path.exists():
            raise UserError(f"the run folder {path} is a file: choose another name with --run.name NEW") from None
        raise
    if entries and not (newest_incarnation(path) or read_status(path).state in STATES or any((path / "checkpoints").glob("step-*/manifest.json"))):
        raise UserError(
            f"{path} is not empty (it holds '{entries[0]}'{' and more' if len(entries) > 1 else ''}), and no run of dtl made it: its files would be replaced; "
            "choose another name with --run.name NEW, or another folder with --run.dir"
        )
    for name in MADE:
        if (path / name).is_symlink():
            raise UserError(f"{path / name} is a link: dtl writes and deletes inside of the run folder only; link the run folder itself, or use --run.dir")


def _is_no_content(entry: os.DirEntry[str]) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        return False
    if entry.name == "slurm":  # never deleted by dtl
        return True
    with os.scandir(entry.path) as inside:
        return all(one.name == "lost+found" for one in inside)


def newest_incarnation(path: str | Path) -> int:
    """The number of the newest start in a run folder, 0 where there was none yet (or the folder is gone)."""
    try:
        names = os.listdir(Path(path) / "lock")
    except OSError:
        return 0
    return max((int(match[1]) for match in map(_LOCK_NAME.fullmatch, names) if match), default=0)


def heartbeat(path: Path) -> str | None:
    """What shows that a run's owner is alive, without waiting for it: None where nobody works in the folder, a text that stays the same while the owner
    lives on this machine, or else the number that it counts up."""
    number = newest_incarnation(path)
    owner = _read_owner(path / "lock" / f"{number:08d}.json") if number else None
    if not number or (owner is not None and owner.released):
        return None
    alive = None if owner is None else _lives_here(owner)
    if alive is None:
        return f"{number} {_read_text(path / 'lock' / f'{number:08d}.beat')}"
    return f"{number} alive" if alive else None


def check_incarnation(path: str | Path, incarnation: int) -> None:
    """Raise Superseded when a start newer than `incarnation` has taken the run folder. Costs one listing of a small folder."""
    newest = newest_incarnation(path)
    if newest > incarnation:
        owner = _read_owner(Path(path) / "lock" / f"{newest:08d}.json") or Owner()
        raise Superseded(
            f"this process is of start {incarnation} of the run in {path}, and start {newest} has taken over "
            f"(host {owner.host}, pid {owner.pid or 'unknown'}): this one stops"
        )


def read_status(path: str | Path) -> Status:
    """What status.json of a run folder says; one of state "unknown" where there is none, or none that can be used: starts must not hang on it."""
    try:
        return Status.read(Path(path) / "status.json")
    except (OSError, UserError):
        return Status()


def stopped_under_this_agent(path: str | Path) -> bool:
    """The run was stopped, and the same elastic agent starts it once more, because it takes exit status 75 for a fault.

    Called by every rank on its own, before anything that takes seconds; the main process prints why it leaves.
    """
    status, now = read_status(path), _launcher()
    then = status.launcher
    if status.state != "stopped" or then is None or now["restarts"] <= then.restarts:
        return False
    # Another node's agent may have restarted us; on the same one, it must be the very same process.
    if then.host == now["host"] and (then.pid, then.process_start) != (now["pid"], now["process_start"]):
        return False
    if os.environ.get("RANK", "0") == "0":
        to_stderr(f"dtl: {path} was stopped, and its launcher restarted it: exiting; the same command resumes")
    else:
        time.sleep(_SECONDS_TO_PRINT)  # the first to leave makes the launcher end the others, and rank 0 is to print why
    return True


def never_began(path: str | Path) -> bool:
    """Whether a folder only says why the start of a run failed, and holds nothing of a run."""
    place = Path(path)
    left = ("history.jsonl", "config.yaml", "checkpoints", "model")
    return (place / "status.json").is_file() and not any((place / name).exists() for name in left)


def why_none_began(path: str | Path) -> str:
    """In words, for a folder of `never_began`."""
    return f"its start failed before the first step ({read_status(path).why or 'unknown reason'})"


def _describe_self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": pid_space(),
        "process_start": process_start(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "slurm": _slurm_job(),
        "elastic": _elastic_job(),
    }


def _launcher() -> dict[str, Any]:
    """The process that has started this one, and how often it has started its ranks anew (torchrun and accelerate export it)."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "host": socket.gethostname(),
        "pid": os.getppid(),
        "process_start": process_start(os.getppid()),
        "restarts": int(restarts) if restarts.isdigit() else 0,
    }


def _restarts(owner: Owner) -> bool:
    """Whether we are the same job as the owner, started anew by Slurm or by the elastic agent."""
    slurm, elastic = _slurm_job(), _elastic_job()
    before = owner.slurm
    # The same job and the same start of it: two programs of one batch script, which must not share a folder.
    requeued = slurm is not None and before is not None and slurm[0] == before[0] and slurm[1] != before[1]
    return requeued or (elastic is not None and elastic == owner.elastic)


def _slurm_job() -> list[str] | None:
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def _elastic_job() -> str | None:
    # Launchers without a rendezvous of their own call every job "none".
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if job == "none" else job


def _lives_here(owner: Owner) -> bool | None:
    """Whether the owner's process lives on this machine; None when it ran elsewhere, or that cannot be known."""
    machine = pid_space()
    if machine is None or owner.machine != machine or not owner.pid:
        return None
    return process_start(owner.pid) == owner.process_start


def _read_owner(path: Path) -> Owner | None:
    try:
        return Owner.read(path)
    except (OSError, UserError):
        return None


def _read_text(path: Path) -> str | None:
    try:
        return read_text(path)
    except (OSError, UserError):
        return None
