"""Which rank the others wait for, and what is printed of it. Ranks are notes here; tests/resilience has them as processes."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtl.distributed import watchdog as module
from dtl.distributed.watchdog import INTERVAL, Heartbeat, Note, Notes, PeerLost, RunningClock, Watchdog, awaited, describe, read_stage


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


def dog(heart: Heartbeat, *, world_size: int = 1, limit: float = 600.0, **calls: Any) -> Watchdog:
    lines = {"log": lambda line: None, "end": lambda line: None, **calls}
    return Watchdog(heart, rank=0, world_size=world_size, name="run", limit=limit, **lines)


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
