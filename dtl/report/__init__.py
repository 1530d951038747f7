"""Pictures and one page about a finished run, or about several: see `make_report` and `make_comparison`.

Nothing heavy is imported before one of them is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtl.text import Log, to_nobody

__all__ = ["make_comparison", "make_report"]


def make_report(
    run_folder: str | Path,
    *,
    out: str | Path | None = None,
    device: str = "auto",
    max_images: int = 1000,
    seconds: float = 6.0,
    trust: bool = False,
    log: Log = to_nobody,
) -> Path:
    """Write PNGs and index.html about one run into `out` (default: RUN/report); returns the page.

    Of a run that kept no predictions, at most `max_images` validation images are shown to the model, for about `seconds`. What is missing or fails is
    left out; the page lists it, and so does `log`. `trust`: call the function that a model.json of somebody else names as its network.
    One process, no collectives: rank 0 of a launched world may call it alone. Raises UserError where `run_folder` is no run or `out` cannot be written.
    """
    from dtl.report import single

    return single.make_report(run_folder, out=out, device=device, max_images=max_images, seconds=seconds, trust=trust, log=log)


def report_at_end(run_folder: Path, log: Log) -> Path:
    """`make_report` as `dtl.training.run.run` takes it."""
    return make_report(run_folder, log=log)


def make_comparison(run_folders: Sequence[str | Path], *, out: str | Path | None = None, table_csv: str | Path | None = None, log: Log = to_nobody) -> Path:
    """Write compare.png and index.html about several runs into `out` (default: `comparison` in the working folder); returns the page.

    `table_csv`: write its table there too.

    Needs no data, no model and no torch. Raises UserError where there is nothing to compare.
    """
    from dtl.report import several

    return several.make_comparison(run_folders, out=out, table_csv=table_csv, log=log)
