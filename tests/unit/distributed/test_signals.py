"""Requests to stop: noted at any time, and before the first step they interrupt work that has no collective in it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from dtl.distributed import signals as module
from dtl.distributed.signals import STOP_SIGNALS, Signals, StageInterrupted, Stopped, StopWatcher


@pytest.fixture
def signals() -> Iterator[Signals]:
    caught = Signals(prints=True)
    caught.catch()
    yield caught
    caught.release()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_printed_once(signals: Signals, capfd: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    assert (signals.received, signals.requested, signals.origin) == (None, False, "a signal to another rank")
    signal.raise_signal(number)
    if number != signal.SIGINT:  # a second one ends the process
        signal.raise_signal(number)
    assert (signals.received, signals.origin) == (number, number.name)
    assert capfd.readouterr().err == "\ndtl: stopping after this step; Ctrl-C again ends at once\n"
    assert signals.stop_before_first_step is None, "the first step is past"


def test_handlers_are_those_from_before_when_it_is_released() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    signals = Signals(prints=False)
    signals.catch()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    signals.release()
    signals.release()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert "signals" not in {thread.name for thread in threading.enumerate()}


def test_in_another_thread_nothing_is_caught() -> None:
    before, signals = signal.getsignal(signal.SIGTERM), Signals(prints=False)
    thread = threading.Thread(target=signals.catch)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    signals.request_stop("checkpoint.deadline_seconds")
    assert (signals.requested, signals.received, signals.why) == (True, signal.SIGUSR1, "checkpoint.deadline_seconds")


def test_breakable_work_is_interrupted_only_before_the_first_step(signals: Signals) -> None:
    signals.early = True
    with pytest.raises(StageInterrupted), signals.breakable():
        signal.raise_signal(signal.SIGTERM)
    assert signals.stop_before_first_step == "a signal"
    with pytest.raises(StageInterrupted), signals.breakable():
        pytest.fail("the request came before")
    signals.early = False
    with signals.breakable():
        signal.raise_signal(signal.SIGTERM)


def test_what_cleans_up_after_an_interruption_is_not_interrupted(signals: Signals) -> None:
    signals.early, cleaned = True, []

    def interrupted() -> None:
        with signals.breakable():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                cleaned.append(True)

    with pytest.raises(StageInterrupted):
        interrupted()
    assert cleaned


def test_work_outside_breakable_is_never_interrupted(signals: Signals) -> None:
    signals.early = True
    signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once(signals: Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    over, order = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: (ended.append(code), over.set()))
    signals.on_abort = lambda: order.append("abort") or 1 / 0  # an error in it must not keep the process
    signal.raise_signal(signal.SIGINT)
    assert not over.wait(0.05)
    signal.raise_signal(signal.SIGINT)
    assert over.wait(10)
    assert ended == [130]
    assert order == ["abort"]
    assert "dtl: ended at once" in capfd.readouterr().err


def test_the_watcher_announces_this_ranks_request(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.002)
    announced = threading.Event()
    with StopWatcher(signals, announce=announced.set, announced=lambda: False, due=lambda: None):
        assert signals.early
        signal.raise_signal(signal.SIGTERM)
        assert announced.wait(10)
    assert not signals.early
    assert signals.origin == "SIGTERM"


@pytest.mark.parametrize(("theirs", "due", "why"), [(True, None, "a signal"), (False, "checkpoint.deadline_seconds", "checkpoint.deadline_seconds")])
def test_the_watcher_obeys_another_rank_and_the_clock(signals: Signals, monkeypatch: pytest.MonkeyPatch, theirs: bool, due: str | None, why: str) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.002)
    over = threading.Event()
    with StopWatcher(signals, announce=lambda: pytest.fail("it is not ours"), announced=lambda: theirs, due=lambda: due):
        with pytest.raises(StageInterrupted), signals.breakable():
            over.wait(10)
        assert signals.stop_before_first_step == why
    assert signals.origin == ("a signal to another rank" if theirs else "SIGUSR1")


def test_the_watcher_ends_quietly_when_the_store_is_gone(signals: Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.002)
    asked = threading.Event()

    def announced() -> bool:
        asked.set()
        raise RuntimeError("connection reset")

    with StopWatcher(signals, announce=lambda: None, announced=announced, due=lambda: None):
        assert asked.wait(10)
    assert not signals.requested


def test_a_stop_tells_why_and_where() -> None:
    stopped = Stopped("SIGTERM", step=7)
    assert (str(stopped), stopped.why, stopped.step) == ("stopped by SIGTERM at step 7", "SIGTERM", 7)
