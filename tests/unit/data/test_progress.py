"""Progress: a line now and then where stderr is no terminal, a bar where it is one, nothing where it is not visible."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from dtl.data import progress as module
from dtl.data.progress import PackProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, 1000.0 + seconds)


def test_a_line_every_ten_seconds(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with PackProgress(visible=True, unit="shards") as progress:
        progress.start("reading", 4000)
        for seconds in (1, 9, 11, 15, 20.5, 22):
            clock(seconds)
            progress.advance(500)
        assert capsys.readouterr().err == "reading: 1,500 of 4,000 shards\nreading: 3,000 of 4,000 shards\n", "ten seconds after the last line, not the start"
        progress.start("packing", 10)
        progress.advance(1)
        clock(33)
        progress.advance(2)
    assert capsys.readouterr().err == "packing: 3 of 10 shards\n", "each pass counts from 0"


def test_nothing_where_it_is_not_visible(clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]) -> None:
    with PackProgress(visible=False) as progress:
        progress.start("reading", 10)
        clock(100)
        progress.advance(1)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_which_ends_with_an_error_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = PackProgress(visible=True)

    def broken_off() -> None:
        with progress:
            progress.start("reading", 10)
            progress.advance(7)
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert " 7/10" in capsys.readouterr().err
    assert progress._bar.live.is_started is False
