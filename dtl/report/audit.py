"""The page of an audit: twins side by side, and images whose label is probably wrong with the class that is more probable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dtl.report import html
from dtl.report.examples import Tile
from dtl.report.single import footer, prepare_folder, write_page
from dtl.report.style import percent
from dtl.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_SHOWN = 48
"""Pairs or images of a kind; all are in audit.csv."""
TILE_SIDE = 256
_ABOUT = {
    "two labels": "The same photo with different labels. One of them is wrong: relabel it, or drop it.",
    "same photo": "Equal, or recompressed, resized, cropped a little, mirrored, or of other brightness: the details agree.",
    "same scene": "Features agree, details do not: the next shot, or two images that are very much alike. The action group keeps them in one split.",
    "label": "Predicted by classifiers that were not fitted to the image or its twins. The surest first.",
}


class Shown:
    """One image on the page: where it is, its label and its pixels."""

    def __init__(self, split: str, name: str, label: str, pixels: npt.NDArray[np.uint8] | None) -> None:
        self.split, self.name, self.label = split, name, label
        self.pixels = np.full((TILE_SIDE, TILE_SIDE, 3), 128, np.uint8) if pixels is None else pixels


def make_audit_page(
    out: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    kinds: Sequence[tuple[str, str, int, Sequence[tuple[int, int, float, str]]]],
    shown: Callable[[int], Shown],
    notes: Sequence[str],
) -> Path:
    """Write index.html into the folder `out`; returns it. `kinds`: kind, heading, how many there are, and those to show: image, other (or -1), score and what
    is more probable. UserError where it cannot be written."""
    sections = [_section(kind, heading, count, some_of, shown) for kind, heading, count, some_of in kinds if count]
    lead: list[html.Block] = [html.Headline([(f"{count:,}", heading) for _, heading, count, _ in kinds]), html.Facts(list(facts))]
    if notes:
        sections.append(html.section("Notes", html.Bullets(list(notes))))
    return write_page(prepare_folder(out), html.page(f"Audit of {title}", lead, sections, footer=footer()))


def _section(kind: str, heading: str, count: int, some_of: Sequence[tuple[int, int, float, str]], shown: Callable[[int], Shown]) -> html.Section:
    tiles, pairs = list[Tile](), list[tuple[str, Tile, Tile]]()
    for image, other, score, more_probable in some_of:
        one = shown(image)
        if other < 0:
            words = f"labelled {one.label}, a probability of {percent(score)}"
            tiles.append(Tile(one.pixels, more_probable, note=words, file=f"{one.split}: {one.name}"))
        else:
            first, second = (Tile(half.pixels, half.label, note=half.split, file=half.name) for half in (one, shown(other)))
            pairs.append((f"{'cosine' if kind == 'same scene' else 'agreement'} {score:.3f}", first, second))
    more = f" The first {len(some_of):,} of {counted(count, 'finding')}; all are in audit.csv." if len(some_of) < count else ""
    heading = heading[0].upper() + heading[1:]
    return html.section(heading, html.Text(_ABOUT[kind] + more, soft=True), html.Pairs(pairs) if pairs else html.Tiles(tiles, large=True))
