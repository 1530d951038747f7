"""Pictures and one page about a finished run, or about several: see `make_report` and `make_comparison`.

Nothing heavy is imported before one of them is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["make_comparison", "make_report"]


def _quiet(line: str) -> None:
    pass


def make_report(
    run_folder: str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    max_images: int = 1000,
    seconds: float = 6.0,
    say: Callable[[str], None] = _quiet,
) -> Path:
    """Write PNGs and index.html about one run into `out` (default: RUN/report); returns the page.

    At most `max_images` validation images are shown to the model, for about `seconds`. What is missing or fails is left out, said
    on the page and through `say`. One process, no collectives: rank 0 of a launched world may call it alone. Raises UserError where
    `run_folder` is no run or `out` cannot be written.
    """
    from dtl.report import single

    return single.make_report(run_folder, out=out, device=device, max_images=max_images, seconds=seconds, say=say)


def report_at_end(run_folder: Path, log: Callable[[str], None]) -> Path:
    """`make_report` as `dtl.training.run.run` takes it."""
    return make_report(run_folder, say=log)


def make_comparison(run_folders: Sequence[str | Path], *, out: str | Path | None = None, say: Callable[[str], None] = _quiet) -> Path:
    """Write compare.png and index.html about several runs into `out` (default: `comparison` in the working folder); returns the page.

    Needs no data, no model and no torch. Raises UserError where there is nothing to compare.
    """
    from dtl.report import several

    return several.make_comparison(run_folders, out=out, say=say)
