"""The console: a bar on a terminal, few plain lines in a log file, and the closing table."""

from __future__ import annotations

import io
import re

import pytest

from dtl.runs.console import Console, summary_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(console: Console, steps: range) -> None:
    for step in steps:
        console.progress(step=step, epoch=1, loss=0.5, lr=0.01, images_per_second=1234.5, data_wait=0.5)


def test_a_log_file_gets_few_plain_lines() -> None:
    out = io.StringIO()
    console = Console(stream=out, plain_seconds=60)
    console.start_phase("head", first_step=100, num_steps=500)
    report(console, range(101, 601))
    console.print("100% [bold] plain")
    console.close()
    assert out.getvalue().splitlines() == [
        "head  step 101/600  epoch 1  loss 0.5000  lr 0.01  1,234 images/s  waiting for data 50%",
        "head  step 600/600  epoch 1  loss 0.5000  lr 0.01  1,234 images/s  waiting for data 50%",
        "100% [bold] plain",
    ]


def test_a_terminal_gets_a_bar_and_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    import threading

    before, out = threading.active_count(), Terminal()
    console = Console(stream=out)
    console.start_phase("head", first_step=0, num_steps=50, step=10)
    report(console, range(11, 30))
    console.print("saved [x] " + "long " * 50)
    report(console, range(30, 51))
    assert threading.active_count() == before, "no thread whose lock a forked worker could inherit"
    console.end_phase()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "saved [x] " + "long " * 50 in text
    assert re.search(r"head .*11/50 *epoch 1 +loss 0.5000", text)
    assert "50/50" in text
    assert len(out.getvalue()) < 10_000


def test_the_closing_table() -> None:
    rows = [
        {"phase": "pretext", "epochs": 3, "seconds": 61.23, "images_per_second": 12345.6, "train_loss": 0.25, "val_loss": None},
        {
            "phase": "all",
            "epochs": 1.5,
            "seconds": 5,
            "images_per_second": 800,
            "kept_epoch": 4,
            "train_loss": 0.1,
            "val_loss": 0.2,
            "top1": 0.97654,
            "interval": "91.7-98.2",
            "looks": 10,
            "test_top1": 0.9612,
        },
    ]
    assert summary_table(rows).row_count == 2
    out = io.StringIO()
    Console(stream=out).table(rows)
    text = out.getvalue()
    columns = (
        ("", "", "", "", "kept", "train", "val", "", "", "", "test"),
        (*("phase", "epochs", "seconds", "images/s", "epoch", "loss", "loss", "top1", "interval", "looks", "top1"),),
    )
    for words in columns:
        assert re.search(r" *\| *".join(words), text)
    assert re.search(r"pretext *\| +3 *\| +61\.2 *\| +12,346 *\| +- *\| +0\.2500 *\| +- *\| +- ", text.replace("|", " |"))
    assert re.search(r"all +\| +1\.5 *\| +5\.0 *\| +800 *\| +4 *\| +0\.1000 *\| +0\.2000 *\| +97\.65% *\| +91\.7-98\.2 *\| +10 *\| +96\.12%", text)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
