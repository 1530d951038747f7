"""dtl.machine: cores and their quota, which process is which, children that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dtl import machine


@pytest.mark.parametrize(
    ("quota", "share", "cores"), [("max 100000", None, None), ("50000 100000", 0.5, 1), ("150000 100000", 1.5, 2), ("garbage", None, None)]
)
def test_a_container_s_quota_counts(monkeypatch: pytest.MonkeyPatch, quota: str, share: float | None, cores: int | None) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: quota)
    assert machine.core_share() == (share or 8.0)
    assert machine.num_cores() == (cores or 8)


@pytest.mark.parametrize(
    ("mine", "others", "quota", "share"),
    [
        (range(8), [], 99, 8.0),
        (range(8), [range(8)] * 3, 99, 2.0),  # four processes that may use the same cores (torchrun)
        (range(4), [range(4, 8), range(8, 12)], 99, 4.0),  # bound to cores of their own (srun --cpus-per-task)
        (range(4), [range(2, 8)], 99, 3.0),
        (range(64), [range(64)] * 7, 16, 2.0),  # a container's quota is for all of its processes
        (range(2), [], 0.5, 0.5),
    ],
)
def test_cores_are_divided_among_those_that_may_use_them(mine: range, others: list[range], quota: float, share: float) -> None:
    assert machine.core_share(frozenset(mine), [frozenset(other) for other in others], quota) == pytest.approx(share)


@pytest.mark.parametrize(
    ("cores", "gib", "on_cpu", "workers"),
    [
        (16.0, None, False, 15),  # the training process has one
        (128.0, None, False, 16),
        (4.0, 0.7, False, 2),
        (1.0, None, False, 1),
        (2.0, None, True, 2),  # as it was before there was `auto`
        (1.0, None, True, 1),
        (0.5, 0.0, True, 1),
        (8.0, None, True, 2),
        (32.0, None, True, 8),
    ],
)
def test_loader_processes_follow_from_cores_and_memory(cores: float, gib: float | None, on_cpu: bool, workers: int) -> None:
    memory = None if gib is None else int(gib * 2**30)
    assert machine.loader_processes(cores, memory, on_cpu=on_cpu, batch_bytes=64 * 3 * 224**2) == workers


def test_two_hyperthreads_are_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= len(machine.physical_cores(machine.own_cores())) <= len(machine.own_cores())
    for siblings in ("{0},{1}", "{0}-{1}"):
        machine._first_thread.cache_clear()
        monkeypatch.setattr(Path, "read_text", lambda self, s=siblings: s.format(int(self.parts[5][3:]) % 4, int(self.parts[5][3:]) % 4 + 4))
        assert machine.physical_cores(frozenset({0, 1, 4, 7})) == {0, 1, 3}
    machine._first_thread.cache_clear()


def test_a_process_is_known_by_its_start_and_state() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        start = machine.process_start(child.pid)
        assert start is not None
        assert machine.process_start(child.pid) == start
        assert machine.process_state(child.pid) is not None
        child.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 10
        while machine.process_state(child.pid) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        assert machine.process_state(child.pid) == "T"
    finally:
        child.kill()
        assert child.stdin is not None
        child.stdin.close()
    until = time.monotonic() + 10
    while machine.process_state(child.pid) is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert machine.process_state(child.pid) is None, "a zombie has ended"
    assert machine.process_start(child.pid) is None
    child.wait()
    assert machine.process_start(child.pid) is None


def test_pids_are_valid_in_this_boot_and_namespace() -> None:
    assert machine.pid_space() == machine.pid_space()
    code = "from dtl.machine import pid_space; print(pid_space())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == str(machine.pid_space())


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent is killed; the child, which would sleep for an hour, ends by itself."""
    watch = "from dtl.machine import end_with_parent; end_with_parent(os.getppid(), seconds=0.05)"
    child = f"import os, time; {watch}; print(os.getpid(), flush=True); time.sleep(3600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(3600)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert machine.process_state(pid) is not None
    process.kill()
    process.wait()
    process.stdout.close()
    until = time.monotonic() + 20
    while machine.process_state(pid) is not None and time.monotonic() < until:
        time.sleep(0.05)
    assert machine.process_state(pid) is None


def test_a_fresh_python_takes_any_words(tmp_path: Path) -> None:
    command = machine.fresh_python("builtins", "print", "it's", 'a "word"', "{root}")
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == 'it\'s a "word" {root}\n'


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(3600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    machine.end_process(child, patience=0.2)
    assert child.returncode == -signal.SIGKILL
    child.stdout.close()
    machine.end_process(child)


def test_what_may_wait_for_ever_is_left_behind() -> None:
    assert machine.within(10.0, lambda: 5) == 5
    assert machine.within(10.0, lambda: None) is None
    with pytest.raises(KeyError, match="here"):
        machine.within(10.0, lambda: {}["here"])
    code = "import time; from dtl import machine; machine.within(0.2, lambda: time.sleep(1000))"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr.endswith("NoAnswer: no answer within 0.2 s\n")
    assert time.monotonic() - began < 30


def test_a_process_is_known_to_have_ended_on_its_own_machine_only() -> None:
    here = machine.Process.this()
    assert here.is_here
    assert not here.has_ended
    child = subprocess.Popen(["sleep", "60"])
    other = replace(here, pid=child.pid, start=machine.process_start(child.pid))
    assert not other.has_ended
    child.kill()
    child.wait()
    assert other.has_ended
    assert replace(here, start="1").has_ended, "another process has its number"
    assert not replace(other, space="another machine").has_ended
    assert not replace(other, space=None).has_ended
