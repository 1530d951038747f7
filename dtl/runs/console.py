"""What a person sees while a run works: a bar on a terminal, plain lines at a bounded rate in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from dtl.credentials import redacted_line
from dtl.text import printable, rate

if TYPE_CHECKING:
    import rich.console
    import rich.progress
    from rich.table import Table

_REFRESH_SECONDS = 0.25
_COLUMNS = ("phase", "epochs", "seconds", "images/s", "kept epoch", "train loss", "val loss", "top1", "interval", "looks", "test top1")


class Console:
    """Lines and progress on `stream` (stderr); silent in every process but the main one.

    On a terminal one bar shows the phase at work. Elsewhere progress becomes a line at most every `plain_seconds`, and at a
    phase's end. The bar is drawn by whoever reports progress, never by a thread: a thread's lock, held while loader workers are
    forked, would hang them.
    """

    def __init__(self, *, is_main: bool = True, stream: TextIO | None = None, plain_seconds: float = 10.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_main, self._plain_seconds = is_main, plain_seconds
        self._live = is_main and self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._terminal: rich.console.Console | None = None
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._phase, self._first_step, self._num_steps = "", 0, 0
        self._shown = self._moved = 0.0

    @property
    def has_bar(self) -> bool:
        """On a terminal, in the main process."""
        return self._live

    def print(self, message: str) -> None:
        """Print one plain line; a bar stays whole below it. May be called from any thread."""
        if not self._is_main:
            return
        message = printable(redacted_line(message))
        if self._live:
            self._rich().print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self._stream, flush=True)

    def start_phase(self, phase: str, *, first_step: int, num_steps: int, step: int | None = None) -> None:
        """Show the bar of a phase that does steps `first_step + 1` to `first_step + num_steps`; it stands at `step`."""
        self.end_phase()
        self._phase, self._first_step, self._num_steps, self._shown = phase, first_step, num_steps, 0.0
        if not self._live:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._rich(), auto_refresh=False, expand=True, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(printable(phase), total=num_steps, completed=(step or first_step) - first_step, facts="")
        self._bar.start()

    def progress(self, *, step: int, epoch: int, loss: float, lr: float, images_per_second: float, data_wait: float = 0.0) -> None:
        """Move the phase's bar to `step`, or print a line about it when one is due."""
        if not self._is_main:
            return
        now, last = time.monotonic(), step >= self._first_step + self._num_steps
        due = _REFRESH_SECONDS if self._bar else self._plain_seconds
        if now - self._shown < due and not last:
            return
        self._shown = now
        facts = f"epoch {epoch}  loss {loss:.4f}  lr {lr:.3g}  {rate(images_per_second)} images/s"
        if data_wait >= 0.2:
            facts += f"  waiting for data {data_wait:.0%}"
        done = step - self._first_step
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, facts=facts)
            self._bar.refresh()
        elif not self._live:
            self.print(f"{self._phase}  step {step}/{self._first_step + self._num_steps}  {facts}")

    def move(self, step: int) -> None:
        """Move the phase's bar to `step`; plain lines come from `progress` alone. Costs a look at the clock where nothing is due."""
        if self._bar is None or self._task is None or time.monotonic() - self._moved < _REFRESH_SECONDS:
            return
        self._moved = time.monotonic()
        self._bar.update(self._task, completed=step - self._first_step)
        self._bar.refresh()

    def end_phase(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the closing table."""
        self.end_phase()
        if self._is_main:
            self._rich().print(summary_table(rows))

    def close(self) -> None:
        self.end_phase()

    def _rich(self) -> rich.console.Console:
        if self._terminal is None:
            from rich.console import Console as Terminal

            self._terminal = Terminal(file=self._stream, width=None if self._live else 120)
        return self._terminal


def summary_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table that closes a run. Each row: phase, epochs, seconds, images_per_second, kept_epoch (whose weights it keeps), train_loss,
    val_loss, top1 (0..1) and its 95 % interval of these, looks (the number of evaluations that these were chosen of);
    what a phase does not have (None or absent, for instance no validation) is shown as a dash. test_top1 has a column where a row has it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ASCII2, padding=(0, 0, 0, 1))  # with all columns, and a name of 12 letters, 100 characters wide
    formats: dict[str, Callable[[Any], str]] = {
        "epochs": "{:g}".format,
        "seconds": "{:.1f}".format,
        "images/s": rate,
        "train loss": "{:.4f}".format,
        "val loss": "{:.4f}".format,
        "top1": "{:.2%}".format,
        "test top1": "{:.2%}".format,
    }
    columns = _COLUMNS if any(row.get("test_top1") is not None for row in rows) else _COLUMNS[:-1]
    for column in columns:
        # Only the words of narrow columns stand below each other.
        header = column if column in ("images/s", "interval") else column.replace(" ", "\n")
        table.add_column(header, justify="left" if column == "phase" else "right")
    for row in rows:
        values = [row.get(column.replace("images/s", "images_per_second").replace(" ", "_")) for column in columns]
        table.add_row(*(Text("-" if value is None else printable(formats.get(column, str)(value))) for column, value in zip(columns, values, strict=True)))
    return table
