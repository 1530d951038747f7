"""Where a run logs to: history.jsonl (always), the console, and copies for wandb and TensorBoard.

Only the main process logs; in the others every call of a Tracker does nothing. No call ends a run: a full disk or a dead service is
printed once, and training continues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtl.errors import UserError
from dtl.runs.console import Console
from dtl.runs.history import History
from dtl.runs.wandb import WandbRun, choose_mode, new_id
from dtl.text import counted, rate


class Tracker:
    """Everything that a run logs goes through here.

    `wandb`: auto, online, offline or off (see `choose_mode`). `tensorboard`: write its files too; UserError without the package.
    `resume_step`, `history_offset`: where the checkpoint stands that the run resumes from (0 and 0: from nothing); what was logged
    after it is cut off, because it will be logged again. Without them the history continues where it ends.
    `new_run`: a fresh start in an old folder, which takes a new wandb run.
    `before_write`: called before each line; raises when this process may write nothing any more (a newer start has taken over).
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        is_main: bool,
        wandb: str = "auto",
        tensorboard: bool = False,
        config: Mapping[str, Any] | None = None,
        name: str = "",
        wandb_id: str | None = None,
        console: Console | None = None,
        resume_step: int | None = None,
        history_offset: int = 0,
        new_run: bool = False,
        before_write: Callable[[], None] = lambda: None,
    ) -> None:
        self.console = Console(is_main=is_main) if console is None else console
        self.history: History | None = None
        self._wandb: WandbRun | None = None
        self._board: Any = None
        self._failed: set[str] = set()
        self._advised: set[str] = set()
        self._before_write = before_write
        if not is_main:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._board = _open_board(run_dir, resume_step)
        self.history = History(run_dir / "history.jsonl")
        last_step = self.history.last_step
        if resume_step is not None:
            missing = self.history.resume_at(history_offset, step=resume_step)
            if missing:
                self.print(f"{self.history.path} lost its last {missing} bytes before step {resume_step}: rows are missing there")
        mode, why = choose_mode(wandb, os.environ)
        if why:
            self.print(why)
        if mode != "off":
            self._wandb = WandbRun(
                run_dir,
                mode=mode,
                name=name or run_dir.name,
                run_id=new_id() if new_run else wandb_id,
                config=config or {},
                first_step=0 if new_run or not last_step else last_step + 1,
                log=self.print,
            )

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.id if self._wandb is not None else None

    @property
    def history_offset(self) -> int:
        """Bytes of history written so far: what a checkpoint must remember."""
        return self.history.offset if self.history is not None else 0

    def print(self, message: str) -> None:
        """Print one line for the person who watches."""
        self.console.print(message)

    def start_phase(self, phase: str, *, first_step: int, num_steps: int, step: int | None = None) -> None:
        """A phase begins, or resumes at `step`: it does steps `first_step + 1` to `first_step + num_steps`."""
        self.console.start_phase(phase, first_step=first_step, num_steps=num_steps, step=step)

    def end_phase(self) -> None:
        self.console.end_phase()

    def train(self, *, phase: str, epoch: int, step: int, loss: float, lr: float, images_per_second: float, data_wait: float, **more: Any) -> None:
        """Progress of training: the means of the steps since the last such line. `data_wait` is a share of the time, 0..1."""
        facts = {"loss": loss, "lr": lr, "images_per_second": images_per_second, "data_wait": data_wait, **more}
        self._write({"event": "train", "phase": phase, "epoch": epoch, "step": step, **facts})
        self._copy("train", phase, epoch, step, facts)
        self.console.progress(step=step, epoch=epoch, loss=loss, lr=lr, images_per_second=images_per_second, data_wait=data_wait)

    def solve(self, *, phase: str, epoch: int, step: int, loss: float, strength: float, seconds: float, converged: bool, **more: Any) -> None:
        """A head that was solved. `loss`: of the training samples; `strength`: of the penalty; `more`: how it was found."""
        facts = {"loss": loss, "strength": strength, "seconds": seconds, "converged": converged}
        self._write({"event": "solve", "phase": phase, "epoch": epoch, "step": step, **facts, **more})
        self._copy("solve", phase, epoch, step, facts)
        doubt = "" if converged else "; it has not converged: features may be degenerate"
        self.print(f"{phase}  solved in {seconds:.1f} s  loss {loss:.4f}  strength {strength:.1e} (of {counted(len(more['path']), 'tried strength')}){doubt}")

    def val(
        self,
        *,
        phase: str,
        epoch: int,
        step: int,
        loss: float,
        top1: float | None,
        top5: float | None,
        num_samples: int,
        kept: bool = False,
        entering: bool = False,
        blend: float | None = None,
        **more: Any,
    ) -> None:
        """One evaluation. `kept`: the phase keeps its weights, until another is kept. `entering`: before the phase's first step; `blend`: of the weights so far
        on the way from there to its end, 0..1. History alone has these two."""
        facts = {"loss": loss, "top1": top1, "top5": top5, "num_samples": num_samples, **more}
        what = {"entering": True} if entering else {} if blend is None else {"blend": blend}
        self._write({"event": "val", "phase": phase, "epoch": epoch, "step": step, **facts, "kept": kept} | what)
        if not what:  # trackers have had a row of this step
            self._copy("val", phase, epoch, step, facts)
        shown = "" if top1 is None else f"  top1 {top1:.2%}"
        shown += "".join(f"  {name} {value:.2%}" for name, value in more.items() if isinstance(value, float))
        when = "before its first step" if entering else f"epoch {epoch}  step {step}" if blend is None else f"blend {blend:g}"
        self.print(f"{phase}  {when}  validation loss {loss:.4f}{shown}  ({counted(num_samples, 'sample')})")

    def test(self, *, phase: str, epoch: int, step: int, loss: float, top1: float | None, top5: float | None, num_samples: int, **more: Any) -> None:
        """The one evaluation on the test set, of the weights that the run delivers."""
        facts = {"loss": loss, "top1": top1, "top5": top5, "num_samples": num_samples, **more}
        self._write({"event": "test", "phase": phase, "epoch": epoch, "step": step, **facts})
        self._copy("test", phase, epoch, step, facts)

    def epoch(
        self,
        *,
        phase: str,
        epoch: int,
        step: int,
        expected: int,
        seen: int,
        damaged: int,
        loss: float | None,
        images_per_second: float,
        data_wait: float,
        memory_gib: float,
    ) -> None:
        """The end of an epoch (or of the part of it that a phase took): the samples that it should have, and those trained on.

        `damaged` ones are among the seen, at weight 0. `loss`: the mean training loss of the epoch. `data_wait` is a share of the time, 0..1;
        `memory_gib` the most so far.
        """
        speed = {"images_per_second": images_per_second, "data_wait": data_wait, "memory_gib": memory_gib}
        facts = {"expected": expected, "seen": seen, "damaged": damaged, "loss": loss, **speed}
        self._write({"event": "epoch", "phase": phase, "epoch": epoch, "step": step, **facts})
        self._copy("epoch", phase, epoch, step, speed | {"loss": loss})
        line = f"{phase}  epoch {epoch}  step {step}  {seen:,} of {expected:,} samples seen"
        line += f", {damaged:,} of them damaged and masked with weight 0 (bad_samples.jsonl)" if damaged else ""
        line += "" if loss is None else f", training loss {loss:.4f}"
        self.print(f"{line}, {rate(images_per_second)} images/s, waiting for data {data_wait:.0%}, memory {memory_gib:.1f} GiB")
        if seen != expected:
            self.print(f"epoch {epoch} of phase {phase} trained on {seen:,} samples instead of {expected:,}: please report this bug")

    def advise(self, phase: str, advice: str, *, step: int) -> None:
        """What limits the phase, and what to change; printed once a phase."""
        if phase not in self._advised:
            self._advised.add(phase)
            self.note("limit", step=step, phase=phase, advice=advice)
            self.print(f"{phase}: {advice}")

    def note(self, note: str, *, step: int | None = None, **facts: Any) -> None:
        """Anything else worth keeping, under a short name: a resume, a save, a summary."""
        self._write({"event": "note", "note": note} | ({} if step is None else {"step": step}) | facts)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the closing table; `summary_table` says what a row holds."""
        self.console.table(rows)

    def attach(self, report: Path | None, model: Path | None, *, step: int) -> None:
        """At a run's end: the report's pictures, and the model folder as an artifact, for those trackers that keep such things."""
        pictures = {} if report is None else {f"report/{path.stem}": path for path in sorted(report.glob("*.png"))}
        if self._wandb is not None:
            self._wandb.attach(pictures, model, step)
        if self._board is not None:
            for name, path in pictures.items():
                self._guard("TensorBoard", lambda name=name, path=path: self._board.add_image(name, _pixels(path), step, dataformats="HWC"))  # type: ignore[misc]

    def sync(self) -> None:
        """Put the history on the disk for certain."""
        if self.history is not None:
            self._guard("history.jsonl", self.history.sync)

    def close(self, state: str = "done") -> None:
        """End everything; `state` as in status.json (done, stopped, failed)."""
        self.console.close()
        if self._wandb is not None:
            self._wandb.finish(state)
        if self._board is not None:
            self._guard("TensorBoard", self._board.close)
            self._board = None

    def _write(self, event: Mapping[str, Any]) -> None:
        history = self.history
        if history is not None:
            self._before_write()
            self._guard("history.jsonl", lambda: history.append(event))

    def _copy(self, kind: str, phase: str, epoch: int, step: int, facts: Mapping[str, Any]) -> None:
        numbers = {key: float(value) for key, value in facts.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        row: dict[str, float | str] = {f"{kind}/{key}": value for key, value in numbers.items()}
        if self._wandb is not None:
            self._wandb.log(row | {"epoch": epoch, "phase": phase}, step)
            if kind in ("val", "test"):
                self._wandb.summarize({f"{phase if kind == 'val' else kind}/{key}": value for key, value in numbers.items()})
        if self._board is not None:
            for key, value in numbers.items():
                self._guard("TensorBoard", lambda key=key, value=value: self._board.add_scalar(f"{kind}/{key}", value, step))  # type: ignore[misc]

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        """Do it; what the disk refuses is printed once, not raised."""
        try:
            action()
            self._failed.discard(what)
        except OSError as error:
            if what not in self._failed:
                self._failed.add(what)
                self.print(f"{what} cannot be written ({error.strerror or error}): training continues, and the next write tries again")


def _pixels(picture: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def _open_board(run_dir: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("tracking.tensorboard needs the package tensorboard: pip install tensorboard") from error
    # From this step on, what an earlier start has logged is hidden.
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1)
