"""Text for people: counted things, and suggestions for a mistyped name, path or option. No heavy imports in here."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Literal, NoReturn

from dtl.credentials import redacted_line
from dtl.errors import UserError
from dtl.errors import printable as printable

_NO_WRAPPING = 100_000
_MOST_NAMES = 10_000  # compared with a mistyped one; a folder may hold millions
# Apostrophes before such a character count too: else an added one could not be distinguished from one that was there.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_QUOTED = re.compile('[,;|\t\r\n"]|^ | $')
_CONTROLS = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
_PLURALS = {"process": "processes", "class": "classes", "is": "are"}


TRUST = "allow the Python function that a model.json of somebody else names as its network (remembered for this function and this file)"
"""The help of `--trust`, for each command that can meet one."""
Log = Callable[[str], None]
"""Takes one line for people, such as `to_stderr`."""


def counted(number: float, what: str) -> str:
    """`1 epoch`, `1,437 images`, `2 loader processes`: the last word of `what` is put into the plural."""
    first, space, last = what.rpartition(" ")
    word = last if number == 1 else _PLURALS.get(last, f"{last}s")
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {first}{space}{word}"


def rate(images_per_second: float) -> str:
    """1,234; under ten with two digits, so that a slow network does not show as 0."""
    return f"{images_per_second:,.0f}" if images_per_second >= 9.95 else f"{images_per_second:.2g}"


def some(names: Sequence[str], *, limit: int = 5, quoted: bool = False) -> str:
    """`a, b, c and 7 more`."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" if quoted else name for name in names[:limit]) + more


@dataclass(frozen=True)
class Column:
    """A column of `table`: `right` sets it flush right; it takes `least` characters or more, and cells over `most` are cut."""

    title: str = ""
    right: bool = False
    least: int = 0
    most: int | None = None


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """Lines without colours and frames, for a terminal or a log file. Long cells are wrapped at the terminal's width, elsewhere never."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(column.title for column in columns))
    for column in columns:
        cut = column.most is not None
        side: Literal["right", "left"] = "right" if column.right else "left"
        made.add_column(
            Text(printable(column.title)), justify=side, min_width=column.least, max_width=column.most, no_wrap=cut, overflow="ellipsis" if cut else "fold"
        )
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    lines = io.StringIO()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NO_WRAPPING
    Console(file=lines, width=width, force_terminal=False, color_system=None).print(made)
    return "\n".join(line.rstrip() for line in lines.getvalue().splitlines())


def to_stderr(line: str) -> None:
    """A line about the work; results go to standard output."""
    print(printable(redacted_line(line)), file=sys.stderr, flush=True)


def to_stdout(*lines: str) -> None:
    """Results. Text of several lines is given line by line, so that no name within it can begin another one."""
    for line in lines:
        print(printable(redacted_line(line)), flush=True)


def printable_lines(text: str) -> str:
    """`printable`, for text whose line breaks are meant."""
    return "\n".join(map(printable, text.split("\n")))


def json_line(value: object) -> str:
    """JSON of one line that can be read on a terminal: letters of all languages as they are, whatever `printable` escapes as \\u202e."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def csv_line(cells: Iterable[object]) -> str:
    """One line of a CSV file. Text that a spreadsheet would compute (it begins with = + - @, a tab or a line break) gets an apostrophe.

    A reader takes the first apostrophe away from cells that begin with apostrophes and one of these characters: `from_csv_cell`. Numbers
    stay as they are; None is an empty cell. Also quoted: cells with the separators of other languages' spreadsheets.
    """
    return ",".join("" if cell is None else str(cell) if isinstance(cell, int | float | Decimal) else _csv_text(str(cell)) for cell in cells) + "\n"


def _csv_text(text: str) -> str:
    guarded = f"'{text}" if _FORMULA.match(text) else text
    return '"' + guarded.replace('"', '""') + '"' if _QUOTED.search(guarded) else guarded


def from_csv_cell(text: str) -> str:
    """What `csv_line` was given for this cell."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def to_nobody(line: str) -> None:
    """Prints nothing: for ranks other than the main process."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def near_path(path: Path, *, others: Sequence[str] = ()) -> str:
    """`; did you mean 'x'?` with the whole path to type, for a path that does not exist; nothing where no name is near.

    Each part that does not exist is replaced by its nearest neighbour, as long as there is one. `others` are words that go as well.
    """
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        if part == ".." or (found / part).exists():
            found = found / part
            continue
        try:
            names = [entry.name for entry in islice(found.iterdir(), _MOST_NAMES)]
        except OSError:
            names = []
        close = difflib.get_close_matches(part, [*names, *others] if len(path.parts) == 1 else names, n=1, cutoff=0.6)
        if not close:
            return ""
        found = found / close[0]
    return f"; did you mean '{found}'?"


def near_run(path: Path) -> str:
    """As `near_path`, for a run or a model folder: one under runs/ may have been named without it."""
    inside = Path("runs") / path
    if not path.is_absolute() and inside.is_dir():
        return f"; did you mean '{inside}'?"
    return near_path(path) or (near_path(inside) if not path.is_absolute() else "")


class OptionParser(argparse.ArgumentParser):
    """argparse, whose complaints are one line like all of ours, with the nearest option for a mistyped one."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
            message = f"unknown option {word}" if word.startswith("-") else f"{word} is not expected here"
            hint = self._meant(word)
        raise UserError(f"{message}{hint} ({self.prog} --help lists the options)")

    def refuse_unknown(self, rest: Sequence[str], sections: Container[str]) -> None:
        """Of the words that are no options of the command, those must be a config's: with a dot, or the name of one of its `sections`."""
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--") and "." not in name and name[2:] not in sections:
                self.error(f"unrecognized arguments: {word}")

    def _meant(self, word: str) -> str:
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        # `--data` for `--data.val`: what it begins is nearer than what it resembles.
        begun = [option for option in known if option.startswith((f"{word}.", f"{word}-"))] if word.startswith("--") else []
        return f"; did you mean {begun[0]}?" if begun else nearest(word, known).replace("'", "") if word.startswith("--") else ""


def at_least(least: int) -> Callable[[str], int]:
    """For argparse's `type=`: a whole number that is not smaller."""

    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise ValueError
        return number

    parse.__name__ = f"number of {least} or more"
    return parse
