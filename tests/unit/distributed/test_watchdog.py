"""Which rank the others wait for, and what is printed of it. Ranks are notes here; tests/resilience has them as processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtl.distributed import watchdog as module
from dtl.distributed.watchdog import INTERVAL, Heartbeat, Loss, Note, Notes, PeerLost, RunningClock, Watchdog, awaited, describe, read_stage
from dtl.errors import UserError
from dtl.machine import Process, process_start


def note(rank: int, tick: int = 5, **facts: Any) -> Note:
    return Note(rank, **{"count": 1, "host": "a", "pid": 7, "stage": "load", "step": 3, "tick": tick, "age": 9.0, **facts})


def test_the_stage_is_shared_with_who_watches_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTL_STAGES", str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    assert read_stage(tmp_path / "rank-2") == ("", 0, 0, 0)
    heart = Heartbeat()
    assert read_stage(tmp_path / "rank-2") == ("", 0, 0, 0)
    heart.enter("forward", 12)
    heart.enter("backward")
    assert read_stage(tmp_path / "rank-2") == ("backward", 12, 2, os.getpid())
    (tmp_path / "rank-2").write_bytes(b"short")
    assert read_stage(tmp_path / "rank-2") == ("", 0, 0, 0)


def test_the_rank_that_is_furthest_behind_is_awaited() -> None:
    notes = [note(0), note(1, 4), note(2), note(3, 4)]
    assert [one.rank for one in awaited(notes)] == [1, 3]
    assert awaited([note(0), note(1)]) == []
    assert describe([note(0), note(1)]) == "all 2 ranks are in stage load of step 3, but their collective does not complete (network?)"
    many = [note(0, 6), *(note(rank) for rank in range(1, 8))]
    assert describe(many).startswith("waiting for rank 1 (host a, pid 7), in stage load of step 3, for 9 s; rank 2")
    assert describe(many).endswith("; and 3 more ranks")


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"ended": "boom"}, r"which ended: boom"),
        ({"ended": ""}, r"which ended"),
        ({"fate": "is stopped (SIGSTOP)", "what": "cat.jpg"}, r"which is stopped (SIGSTOP); it was last in stage load of step 3, cat.jpg"),
        ({"silent": 3 * INTERVAL}, r"silent for 6 s, last seen in stage load of step 3"),
        ({"silent": 3 * INTERVAL, "count": -1}, r"which has sent no heartbeat yet"),
    ],
)
def test_a_rank_that_is_gone_is_awaited_before_those_behind(facts: dict[str, Any], text: str) -> None:
    gone = note(1, 9, **facts)
    assert gone.gone
    assert awaited([note(0, 1), gone]) == [gone]
    assert describe([note(0, 1), gone]) == f"waiting for rank 1 (host a, pid 7), {text}"


def test_a_rank_that_lost_another_one_is_not_the_culprit() -> None:
    victim, culprit = note(1, ended="lost another rank", silent=60.0), note(2, ended="out of memory")
    assert awaited([note(0), victim, culprit]) == [culprit]


def test_the_clock_stands_still_while_the_process_does() -> None:
    real = [100.0]
    clock = RunningClock(lambda: real[0])
    assert clock() == 100.0
    clock._state = (100.0, 0.0)  # as at the start of its thread
    for _ in range(5):
        real[0] += 1.5  # a busy machine: late, but running
        assert clock() == real[0]
        clock.beat()
    before = clock()
    real[0] += 7200.0  # suspended: whoever wakes first looks at once
    assert clock() == before + 6.0
    clock.beat()
    assert clock() == before + 6.0, "the beat changes nothing that was seen"
    real[0] += 1.0
    assert clock() == before + 7.0


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    made = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(made.port))
    return made


def test_notes_reach_the_other_ranks(store: Any) -> None:
    first, second, heart = Notes(0, 3, "run"), Notes(1, 3, "run"), Heartbeat()
    heart.enter("evaluate", 40)
    second.write(heart, what="cat.jpg")
    unwritten, seen, missing = first.read()
    assert (seen.stage, seen.step, seen.tick, seen.pid, seen.what, seen.gone) == ("evaluate", 40, 1, os.getpid(), "cat.jpg", False)
    assert unwritten.count == missing.count == -1
    second.write(heart, ended="boom")
    assert first.read()[1].ended == "boom"
    assert Notes(0, 3, "another run").read()[1].count == -1


def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(0, 2, "run")
    Notes(1, 2, "run").write(Heartbeat())
    for state, fate in ((None, "has ended"), ("T", "is stopped (SIGSTOP)"), ("S", "")):
        monkeypatch.setattr(module, "process_state", lambda pid, state=state: state)
        assert notes.read()[1].fate == fate


def dog(heart: Heartbeat, *, rank: int = 0, world_size: int = 1, limit: float = 600.0, **calls: Any) -> Watchdog:
    lines = {"log": lambda line: None, "end": lambda line: None, **calls}
    return Watchdog(heart, rank=rank, world_size=world_size, name="run", limit=limit, **lines)


def test_an_error_of_the_network_is_told_as_the_rank_that_is_gone(store: Any) -> None:
    Notes(1, 2, "run").write(Heartbeat(), ended="out of memory")
    with pytest.raises(PeerLost, match=r"^lost rank 1 \(host .*, pid \d+\), which ended: out of memory$"), dog(Heartbeat(), world_size=2):
        raise RuntimeError("[gloo] Connection closed by peer")
    assert Notes(1, 2, "run").read()[0].ended == "lost another rank"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("connection")])
def test_any_other_error_is_left_as_it_is(store: Any, error: Exception) -> None:
    Notes(1, 2, "run").write(Heartbeat(), ended="out of memory")
    with pytest.raises(type(error)) as caught, dog(Heartbeat(), world_size=2):
        raise error
    assert caught.value is error
    assert Notes(1, 2, "run").read()[0].ended == str(error)


def test_a_rank_that_parts_says_so_once(store: Any) -> None:
    heart = Heartbeat()
    with dog(heart, world_size=2):
        heart.part()
        assert Notes(1, 2, "run").read()[0].ended == ""


def test_a_stall_is_reported_and_then_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    ended: list[str] = []
    codes: list[int] = []
    over = threading.Event()

    monkeypatch.setattr(module.os, "_exit", lambda code: (codes.append(code), over.set()))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    heart = Heartbeat()
    heart.what = lambda: "cat.jpg"
    heart.enter("load", 7)
    with dog(heart, limit=0.5, log=logged.append, end=ended.append):
        assert over.wait(20)
    assert re.match(r"no progress for \d+ s: rank 0 ", logged[0])
    assert "in stage load of step 7, cat.jpg" in logged[0]
    assert codes[0] == 1
    assert "(run.timeout_minutes): rank 0" in ended[0]


def test_a_stage_that_may_take_hours_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    twice = threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda code: pytest.fail("a slow start is no stall"))
    heart = Heartbeat()
    heart.enter("data")
    with dog(heart, limit=0.1, log=lambda line: (logged.append(line), len(logged) == 4 and twice.set()), end=lambda line: pytest.fail(line)):
        assert twice.wait(20)  # at twice the age each time: past the limit
    assert all("stage data" in line for line in logged)


# ---- ranks that are lost while this one is held


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a watchdog would end its process; what it looks at it looks at often."""
    over = threading.Event()
    sleep = module.time.sleep
    monkeypatch.setattr(module.os, "_exit", lambda code: over.set())
    monkeypatch.setattr(module.time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(module, "INTERVAL", 0.1)
    return over


@pytest.fixture
def ended() -> Process:
    """A process of this machine that has ended; its number may be another one's by now."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return replace(Process.this(), pid=done.pid, start="1")


def note_of(process: Process, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heart = Heartbeat()
    heart.enter("backward", 12)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "getpid", lambda: process.pid)
        Notes(rank, 3, "run").write(heart)


def held() -> Heartbeat:
    heart = Heartbeat()
    heart.enter("forward", 12)
    return heart


def test_a_process_that_has_ended_ends_the_run_at_once(store: Any, exits: threading.Event, ended: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    note_of(ended, 1, monkeypatch)
    lines: list[str] = []
    with dog(held(), world_size=3, end=lines.append, processes=[Process.this(), ended, Process.this()]):
        assert exits.wait(20)
    assert re.fullmatch(rf"lost rank 1 \(host \S+, pid {ended.pid}\), which has ended; it was last in stage backward of step 12", lines[0])
    assert Notes(2, 3, "run").loss() == Loss(lines[0], reporter=0)


def test_all_ranks_hear_of_it_by_one_key_and_one_reports(store: Any, exits: threading.Event) -> None:
    """Rank 5 of 8, on another machine than the one that was lost."""
    Notes(7, 8, "run").declare(Loss("lost rank 6", reporter=5))
    assert Notes(2, 8, "run").declare(Loss("lost rank 6, says another", reporter=0)) == Loss("lost rank 6", reporter=5), "the first verdict counts"
    lines: list[str] = []
    for rank in (5, 4):
        watching = dog(held(), rank=rank, world_size=8, end=lines.append)
        assert watching._notes is not None
        watching._notes.read = lambda ranks=None: pytest.fail("it reads no notes")  # type: ignore[method-assign, assignment]
        exits.clear()
        with watching:
            assert exits.wait(20)
    assert lines == ["lost rank 6"]


def test_an_error_that_ends_one_rank_ends_the_others(store: Any, exits: threading.Event) -> None:
    lines: list[str] = []
    with dog(held(), world_size=2, end=lines.append):
        with pytest.raises(ValueError, match="boom"), dog(Heartbeat(), rank=1, world_size=2):
            raise ValueError("boom")
        assert exits.wait(20)
    assert re.fullmatch(r"lost rank 1 \(host \S+, pid \d+\), which ended: boom", lines[0])


def test_a_rank_that_leaves_by_itself_is_left_to_it(store: Any, exits: threading.Event, ended: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    note_of(ended, 1, monkeypatch)
    leaving = held()
    leaving.leaves = True
    with dog(leaving, world_size=3, processes=[Process.this(), ended, Process.this()]):
        assert not exits.wait(1.0)


def test_an_error_that_all_ranks_have_met_leaves_them_time(store: Any, exits: threading.Event, ended: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may be slower than the others, in closing its loader; its own line and exit status are the right ones."""
    with pytest.raises(UserError), dog(Heartbeat(), rank=1, world_size=2):
        raise UserError("the loss is not finite")
    lines: list[str] = []
    slow = held()
    with dog(slow, world_size=2, end=lines.append, processes=[Process.this(), ended]):
        assert not exits.wait(1.0)
        monkeypatch.setattr(module, "_SECONDS_TO_LEAVE", 0.0)
        assert exits.wait(20), "but not for ever"
    assert "lost rank 1 " in lines[0]
    assert lines[0].endswith("which ended: the loss is not finite")


def test_no_step_is_broken_off(store: Any, exits: threading.Event, ended: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that get on find out together."""
    note_of(ended, 1, monkeypatch)
    busy = Heartbeat()
    with dog(busy, world_size=3, processes=[Process.this(), ended, Process.this()]):
        for step in range(50):
            busy.enter("forward", step)
            assert not exits.wait(0.02)


@pytest.mark.parametrize("where", ["stopped here", "silent elsewhere"])
def test_a_silent_rank_is_not_a_lost_one(store: Any, exits: threading.Event, ended: Process, where: str) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    sleeper.send_signal(signal.SIGSTOP)
    stopped = replace(Process.this(), pid=sleeper.pid, start=process_start(sleeper.pid))
    other = stopped if where == "stopped here" else replace(ended, space="another machine")
    try:
        with dog(held(), world_size=2, processes=[Process.this(), other]):
            assert not exits.wait(1.0)
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize(("rank", "ends"), [(1, ["lost the main process (rank 0), or the network connection to it"]), (2, [])])
def test_a_store_that_is_closed_is_the_end_of_the_main_process(
    store: Any, exits: threading.Event, monkeypatch: pytest.MonkeyPatch, rank: int, ends: list[str]
) -> None:
    lines: list[str] = []
    closed = False
    with dog(held(), rank=rank, world_size=3, end=lines.append):
        monkeypatch.setattr(Notes, "write", _unreachable)
        monkeypatch.setattr(module, "_store_is_closed", lambda: closed)
        assert not exits.wait(0.7), "it does not answer: the network may be down for a while"
        closed = True
        assert exits.wait(20)
    assert lines == ends


def test_who_listens_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        assert not module._store_is_closed()
    assert module._store_is_closed()


def _unreachable(*_: object, **__: object) -> None:
    raise RuntimeError("the rendezvous store cannot be reached")


def test_in_a_stall_two_ranks_read_and_one_of_them_speaks(store: Any, exits: threading.Event) -> None:
    for rank in range(4):
        Notes(rank, 4, "run").write(Heartbeat())
    logged: dict[int, list[str]] = {0: [], 1: [], 3: []}
    spoke = threading.Event()
    dogs = {rank: dog(held(), rank=rank, world_size=4, limit=6.0, log=lambda line, rank=rank: (logged[rank].append(line), spoke.set())) for rank in logged}
    read = dogs[3]._notes.read  # type: ignore[union-attr]
    reads: list[object] = []
    dogs[3]._notes.read = lambda ranks=None: reads.append(ranks) or read(ranks)  # type: ignore[union-attr, method-assign, func-returns-value]
    with dogs[0], dogs[1], dogs[3]:
        assert spoke.wait(20)
    assert "waiting for rank 2 " in (logged[0] + logged[1])[0]
    assert (logged[3], reads) == ([], [])


@pytest.mark.parametrize(
    ("notes", "waiting", "speaks"),
    [([note(0), note(1), note(2, 4)], [0, 1], 0), ([note(0, 4), note(1), note(2)], [1, 2], 1), ([note(0, fate="is stopped"), note(1, 4), note(2)], [2], 1)],
)
def test_who_speaks(notes: list[Note], waiting: list[int], speaks: int) -> None:
    assert module._spokesman(notes, waiting) == speaks


def test_the_first_notes_come_early(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that died within its first 2 s was said to have been in stage start of step 0."""
    monkeypatch.setattr(module, "INTERVAL", 30.0)
    heart = Heartbeat()
    with dog(heart, world_size=2):
        heart.enter("load", 3)
        deadline = time.monotonic() + 15
        while (seen := Notes(1, 2, "run").read()[0]).stage == "start" and time.monotonic() < deadline:
            time.sleep(0.1)
    assert (seen.stage, seen.step) == ("load", 3)
