"""The checkpoints of a run: atomic, verified, without pickle, written beside the training loop.

    checkpoints/step-00000120/
        model.safetensors  optimizer.safetensors ...    one file for each group of tensors
        state.json                                      everything that is not a tensor
        manifest.json                                   written last: size and sha256 of each file, tensors that share memory

A checkpoint is written into a hidden temporary folder, synced, and renamed: a folder with a checkpoint's name is whole, and
its hashes prove it when it is read. Only the main process may save, and only it may clean up; every process may read.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dtl import files
from dtl.checkpoint.resume import tensors_file
from dtl.checkpoint.resume.state import FORMAT, OtherFormat, check_format
from dtl.config.models import CheckpointConfig
from dtl.errors import UserError
from dtl.text import to_stdout
from dtl.untrusted import Check, Count, FileName, Record, Sha256, Text, read_json

DEFAULTS = CheckpointConfig()
_NAME = re.compile(r"(?:step-(\d{8,})|\.step-(\d{8,})\.before)")
_GROUP = re.compile(r"[a-z0-9_]{1,100}")
_TEMPORARY = (".writing-", ".deleting-")


def _group(name: str) -> str:
    if not _GROUP.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is not a valid group name: it becomes a file name, so use only lower-case letters, digits and _")
    return name


class _File(Record):
    size: Count
    sha256: Sha256


class _Manifest(Record):
    """manifest.json of a checkpoint."""

    step: Count
    groups: tuple[Annotated[str, Check(_group)], ...]
    files: dict[FileName, _File]
    aliases: dict[Text, dict[Text, Text]]

    @property
    def unlisted(self) -> list[str]:
        """Files that a checkpoint of these groups consists of, and that the manifest does not protect."""
        return [name for name in ("state.json", *(f"{group}.safetensors" for group in self.groups)) if name not in self.files]


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on the disk. `state` is what was given to `save`, through JSON (so tuples come back as lists)."""

    step: int
    path: Path
    state: dict[str, Any]
    groups: tuple[str, ...]
    aliases: dict[str, dict[str, str]] = field(repr=False)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, in memory of their own; names that shared memory when saved share it again."""
        if group not in self.groups:
            raise UserError(f"{self.path} has no tensor group {group!r}; its groups are: {', '.join(self.groups) or 'none'}")
        # Read, not mapped: a shard of a network disk that vanishes under a mapping kills the process (SIGBUS).
        file = self.path / f"{group}.safetensors"
        try:
            tensors = load_safetensors(file.read_bytes())
            for name, other in self.aliases.get(group, {}).items():
                tensors[name] = tensors[other]
        except (SafetensorError, ValueError, KeyError) as error:
            raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error
        return tensors


@dataclass
class _Snapshot:
    """What the writing thread needs; the tensors lie in the store's own host buffers."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    aliases: dict[str, dict[str, str]]
    state: object


class CheckpointStore:
    """Saves and finds the checkpoints in one folder.

    `options.keep`: how many of the newest stay; older ones are deleted only after a new one is complete. `options.keep_done`: see `thin`.
    `options.asynchronous`: write in a thread beside the loop, from a snapshot in host memory (one more copy of the state, reused).
    `options.max_failures`: that many saves in a row may fail (full disk, vanished folder); then `save` raises UserError.
    `log`: takes one line for the user; called from the writing thread too.
    `before_write`: called before anything is written, before it counts, and before older ones are deleted; raises when this process may not write
    any more, for instance because a newer start of the run has taken over.
    """

    def __init__(
        self,
        folder: str | Path,
        options: CheckpointConfig = DEFAULTS,
        *,
        log: Callable[[str], None] = to_stdout,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.options = Path(folder), options
        self.saved_step: int | None = None  # the newest step that this store has put on the disk for certain
        self.save_seconds = 0.0  # the longest that a save has taken until it was on the disk
        self._log, self._before_write = log, before_write
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failures, self._last_error = 0, ""
        self._fault: BaseException | None = None
        self._known: set[int] | None = None
        """Steps of checkpoints that this store found at its first save, or wrote."""

    # ---- writing (main process only)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: object, *, wait: bool = False) -> float:
        """Save a checkpoint of `step`; returns the seconds for which the caller was blocked.

        `tensors`: for each group (model, optimizer, ema ...) names and tensors on any device. `state`: anything JSON takes.
        Waits for a save that is still being written. With `wait`, or a store that is not asynchronous, returns when the
        checkpoint is on the disk (`saved_step` shows whether it worked). Raises UserError after `max_failures` in a row.
        """
        started = time.perf_counter()
        self._settle()
        self._before_write()
        snapshot = self._snapshot(step, tensors, json.loads(json.dumps(state)))
        # One thread a save, not a daemon: when the program ends, the interpreter waits for it, and never for an idle one.
        self._thread = threading.Thread(target=self._write_safely, args=(snapshot,), name=f"checkpoint-{step}")
        self._thread.start()
        if wait or not self.options.asynchronous:
            self._settle()
        return time.perf_counter() - started

    def flush(self) -> None:
        """Wait until the last save is on the disk, or has failed and logged it."""
        self._settle()

    def close(self) -> None:
        """`flush`, then give the host buffers back."""
        try:
            self._settle()
        finally:
            self._buffers.clear()

    def _settle(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        if self._failures >= self.options.max_failures:
            failures, self._failures = self._failures, 0
            raise UserError(f"{failures} checkpoints in a row could not be written to {self.folder}: {self._last_error}")

    def _snapshot(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: object) -> _Snapshot:
        wanted = {(group, name) for group, members in tensors.items() for name in members}
        # What no longer takes part (another phase's optimizer) goes first, so that there is never more than one copy.
        self._buffers = {place: buffer for place, buffer in self._buffers.items() if place in wanted}
        copied: dict[str, dict[str, Tensor]] = {}
        aliases: dict[str, dict[str, str]] = {}
        for group, members in tensors.items():
            _group(group)
            copied[group] = {}
            seen: dict[tuple[object, ...], str] = {}
            for name, tensor in members.items():
                first = seen.setdefault(_memory(tensor), name)
                if first != name and tensor.numel():
                    aliases.setdefault(group, {})[name] = first
                    continue
                buffer = _copy_into(self._buffers.pop((group, name), None), tensor.detach())
                self._buffers[group, name] = copied[group][name] = buffer
        _wait_for_copies(tensor for members in tensors.values() for tensor in members.values())
        return _Snapshot(step, copied, aliases, state)

    def _write_safely(self, snapshot: _Snapshot) -> None:
        started = time.perf_counter()
        try:
            self._write(snapshot)
        except OSError as error:
            self._failures += 1
            self._last_error = _reason(error)
            of = f" (failure {self._failures} in a row, of at most {self.options.max_failures})"
            self._log(f"{self.failure(snapshot.step, of)}; the next save tries again")
        except BaseException as error:  # handed to the caller of the next save: a thread has nobody to raise to
            self._fault = error
        else:
            self._failures = 0
            self.saved_step = snapshot.step
            self.save_seconds = max(self.save_seconds, time.perf_counter() - started)

    def failure(self, step: int, of: str = "") -> str:
        """Why the checkpoint of this step is not there, and what there is instead."""
        kept = self._numbers()
        instead = f"the checkpoint of step {kept[0]} is kept" if kept else "there is no earlier checkpoint"
        return f"the checkpoint of step {step} could not be written to {self.folder}: {self._last_error}{of}; {instead}"

    def _write(self, snapshot: _Snapshot) -> None:
        if not self.folder.is_dir():
            if self.saved_step is not None:
                self._log(f"the folder {self.folder} and its checkpoints no longer exist: creating it again")
            # Without parents: a run folder that has vanished (an unmounted disk) must not grow again somewhere else.
            self.folder.mkdir()
        if self._known is None:
            self._clean()
            self._known = set(self._numbers())
        target = self.folder / f"step-{snapshot.step:08d}"
        temporary = self.folder / f".writing-{target.name}-{os.getpid()}"
        files.remove(temporary)
        temporary.mkdir()
        try:
            facts = {
                f"{group}.safetensors": tensors_file.write_tensors(temporary / f"{group}.safetensors", members) for group, members in snapshot.tensors.items()
            }
            facts["state.json"] = tensors_file.write_json(temporary / "state.json", snapshot.state)
            manifest = {
                "format": FORMAT,
                "step": snapshot.step,
                "groups": list(snapshot.tensors),
                "files": {name: vars(found) for name, found in facts.items()},
                "aliases": snapshot.aliases,
            }
            tensors_file.write_json(temporary / "manifest.json", manifest)
            self._before_write()
            files.publish(temporary, target)
        except BaseException:
            files.discard(temporary)  # at once: on a full disk the next save needs the space
            raise
        self._known.add(snapshot.step)
        self._before_write()
        self._prune(snapshot.step, self._known)

    def _prune(self, step: int, known: Collection[int]) -> None:
        """Delete all but the `keep` newest, and those after `step` that this store knows: they are of a course that the run has left
        (it went on from before them, because they were damaged or because it was started afresh). Others are a newer start's, which has taken over."""
        numbers = self._numbers()
        current = [number for number in numbers if number <= step]
        self._delete([number for number in numbers if number not in current[: self.options.keep] and (number <= step or number in known)])

    def thin(self) -> None:
        """Of a run that is done, and whose model is on the disk: leave the `keep_done` newest, if the newest is proved whole.

        May be interrupted anywhere and called again. What cannot be deleted is logged, and stays."""
        self._before_write()
        try:
            if not self.folder.is_dir():
                return
            self._clean()
            numbers = self._numbers()
            surplus = numbers[self.options.keep_done :]
            problem = _open(self.folder / f"step-{numbers[0]:08d}", numbers[0])[1] if surplus else ""
            if problem:
                self._log(f"checkpoint {self.folder}/step-{numbers[0]:08d} is damaged, so the others are kept: {problem}")
                return
            self._delete(surplus)
        except OSError as error:
            self._log(f"older checkpoints in {self.folder} could not be deleted: {_reason(error)}")

    def _delete(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            for path in self._paths(number):
                # Renamed first: a kill while it is being deleted must not leave a torn checkpoint behind.
                doomed = self.folder / f".deleting-{path.name.strip('.')}-{os.getpid()}"
                os.rename(path, doomed)
                files.remove(doomed)

    def _clean(self) -> None:
        """Delete what killed processes have left half written or half deleted."""
        for path in self.folder.iterdir():
            replaced = _NAME.fullmatch(path.name)
            if path.name.startswith(_TEMPORARY) or (replaced and replaced[2] and (self.folder / f"step-{replaced[2]}").exists()):
                files.remove(path)

    # ---- reading (any process)

    def newest(self) -> Checkpoint | None:
        """The checkpoint with the highest step that is whole; None where there is none at all.

        Damaged ones are named with what was found, and skipped. Raises UserError when there are only damaged ones.
        """
        found = []
        for number in self._numbers():
            for path in self._paths(number):
                checkpoint, problem = _open(path, number)
                if checkpoint is not None:
                    return checkpoint
                found.append(f"{path.name}: {problem}")
                self._log(f"checkpoint {path} is damaged and skipped: {problem}")
        if found:
            raise UserError(f"every checkpoint in {self.folder} is damaged ({'; '.join(found)}): repair the disk, or restart the run with --run.resume never")
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of exactly this step, verified; UserError where it is missing or damaged."""
        problem = "it does not exist"
        for path in self._paths(step):
            checkpoint, problem = _open(path, step)
            if checkpoint is not None:
                return checkpoint
        raise UserError(f"the checkpoint of step {step} in {self.folder} cannot be read: {problem}")

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first (not verified)."""
        return self._numbers()[::-1]

    def _numbers(self) -> list[int]:
        """Newest first, by number: as text, step-100000000 would come before step-99999999."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return []
        return sorted({int(match[1] or match[2]) for match in map(_NAME.fullmatch, names) if match}, reverse=True)

    def _paths(self, number: int) -> list[Path]:
        name = f"step-{number:08d}"
        return [path for path in (self.folder / name, self.folder / f".{name}.before") if path.exists()]


def _open(path: Path, step: int) -> tuple[Checkpoint | None, str]:
    """A checkpoint whose every byte was compared with its manifest, or what is wrong with it."""
    try:
        value = read_json(path / "manifest.json")
        if not isinstance(value, dict) or not isinstance(value.get("format"), int):
            return None, "manifest.json has no format number"
        check_format(value["format"], str(path))
        manifest = _Manifest.from_values(value, "manifest.json")
        if manifest.step != step:
            return None, f"its manifest.json belongs to step {manifest.step}"
        if manifest.unlisted:
            return None, f"manifest.json does not list {manifest.unlisted[0]}, so this file cannot be verified"
        for name, expected in manifest.files.items():
            facts = files.hash_file(path / name)
            if facts.size != expected.size:
                return None, f"{name} has {facts.size} bytes, not {expected.size}"
            if facts.sha256 != expected.sha256:
                return None, f"the content of {name} has changed (sha256)"
        state = read_json(path / "state.json", finite=False)
        if not isinstance(state, dict):
            return None, "state.json: must be an object"
        return Checkpoint(step, path, state, manifest.groups, manifest.aliases), ""
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except OSError as error:
        return None, _reason(error)
    except OtherFormat:
        raise
    except UserError as error:
        return None, str(error).removeprefix(f"{path}/")


def copy_to_host(tensors: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, in the `buffers` of an earlier call where they fit. All are queued, then the host waits once."""
    copied = {name: _copy_into(buffers.get(name), tensor.detach()) for name, tensor in tensors.items()}
    _wait_for_copies(tensors.values())
    return copied


def _wait_for_copies(tensors: Iterable[Tensor]) -> None:
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _copy_into(buffer: Tensor | None, tensor: Tensor) -> Tensor:
    """Copy to host memory, into `buffer` where it fits. The memory layout is kept: a plain copy, even of channels_last."""
    pinned = tensor.is_cuda
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype or buffer.stride() != tensor.stride():
        buffer = torch.empty_like(tensor, device="cpu", memory_format=torch.preserve_format, pin_memory=pinned)
    if tensor.device.type != "cpu" or buffer.stride() != tensor.stride():
        return buffer.copy_(tensor, non_blocking=pinned)
    # Same layout, no gaps: the plain copy. torch's would spread over all threads, and on a machine whose cores are busy (with
    # loader workers, as ever) wait for the last of them, tensor by tensor: seen four times and more as long.
    ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return buffer


def _memory(tensor: Tensor) -> tuple[object, ...]:
    place = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
    return (place, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
