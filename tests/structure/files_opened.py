"""`python files_opened.py step|sample|resume|load`: the files of dtl whose functions run in one of these, as a JSON list.

This is what a reader has to open to follow one of them from its beginning to its end. Counted by running it, in a process of its own, on its
main thread (the threads beside it only keep a heartbeat).

step: one optimizer step of the trainer, from the end of one to the end of the next: take a batch from the loader processes, forward, loss, backward,
    update, count. Nothing is due beside it (no log line, evaluation or checkpoint), and no option of a phase is on; mixup would add one file.
sample: what a loader process does for the images of a micro-batch: read, check, decode, augment.
resume: all that runs because there is a checkpoint: claim the folder from the start before, find and check the checkpoint, compare the settings,
    take up the history and the list of damaged samples, load the weights, and restore the phase. What a first start does as well (data, network) is
    not part of it.
load: `dtl.load_pretrained` of a file with renamed layers into a ResNet-18 with another number of classes, report included.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(ROOT / "dtl") + os.sep


class Recorder:
    """The files of dtl that functions run in, while `on`. Bodies of modules and classes, which run once at an import, do not count."""

    def __init__(self) -> None:
        self._on = False
        self.files: set[str] = set()

    @property
    def on(self) -> bool:
        return self._on

    @on.setter
    def on(self, on: bool) -> None:
        """While it is off, Python does not call it: a run would take three times as long."""
        self._on = on
        sys.setprofile(self if on else None)

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_flags & inspect.CO_NEWLOCALS:
            self.files.add(os.path.relpath(code.co_filename, ROOT))


def recorded(work: Callable[[Recorder], Any]) -> list[str]:
    recorder = Recorder()
    try:
        work(recorder)
    finally:
        recorder.on = False
    return sorted(recorder.files)


def train(*arguments: str, workers: int = 0) -> None:
    from dtl.commands.train import run

    phases = ["--phases", "{pretext: null, head: null, all: {train: all, steps: 12, eval_every: 12, lr: 0.01}}"]
    quiet = ["--tracking.log-every", "50", "--tracking.wandb", "off", "--tracking.report", "false", "--run.device", "cpu", "--checkpoint.every-steps", "6"]
    small = ["--model.name", "torchvision/resnet18", "--data.image-size", "32", "--data.global-batch-size", "16", "--data.workers", str(workers)]
    with contextlib.redirect_stdout(sys.stderr):
        assert run([*quiet, *small, *phases, *arguments]) == 0


def one_step(recorder: Recorder) -> None:
    from dtl.training.step import Stepper

    real, calls = Stepper.step, [0]

    def counted(self: Stepper, *given: Any, **named: Any) -> Any:
        calls[0] += 1
        try:
            return real(self, *given, **named)
        finally:
            recorder.on = calls[0] == 3  # from the end of the third step to the end of the fourth

    Stepper.step = counted  # type: ignore[method-assign]
    train(workers=1)
    assert calls[0] == 12, calls


def while_in(recorder: Recorder, owner: Any, name: str) -> None:
    """Record whatever runs in this function."""
    real = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        before, recorder.on = recorder.on, True
        try:
            return real(*given, **named)
        finally:
            recorder.on = before

    setattr(owner, name, wrapped)


def one_sample(recorder: Recorder) -> None:
    from dtl.data.loading.loader import BatchDataset

    while_in(recorder, BatchDataset, "__getitems__")
    train(workers=0)


def one_resume(recorder: Recorder) -> None:
    from dtl.runs.bad_samples import BadSamples
    from dtl.runs.folder import RunFolder
    from dtl.training import build, loop, run
    from dtl.training.active import ActivePhase
    from dtl.training.session import Session
    from dtl.training.throughput import StepLog

    train("--phases", "{pretext: null, head: null, all: {train: all, steps: 6, eval_every: 12, lr: 0.01}}")
    because_of_a_checkpoint = (
        *((RunFolder, "acquire"), (build, "find_checkpoint"), (run, "note_changes"), (Session, "open_tracker"), (BadSamples, "__init__")),
        *((loop, "strict_load"), (ActivePhase, "restore"), (StepLog, "restore")),
    )
    for owner, name in because_of_a_checkpoint:
        while_in(recorder, owner, name)
    train()


def one_load(recorder: Recorder) -> None:
    import torch
    from torchvision.models import resnet18

    import dtl

    source, target = resnet18(num_classes=7), resnet18(num_classes=3)
    renamed = {name.replace("layer", "stage").replace("downsample", "shortcut"): tensor for name, tensor in source.state_dict().items()}
    torch.save(renamed, "weights.pt")
    dtl.load_pretrained(resnet18(num_classes=3), "weights.pt")  # what an import calls does not count
    recorder.on = True
    report = dtl.load_pretrained(target, "weights.pt")
    recorder.on = False
    assert report.coverage == 1


def main(what: str) -> int:
    """In the folder that one is in."""
    os.environ |= {"WANDB_MODE": "disabled", "DTL_CACHE": "cache"}
    print(json.dumps(recorded({"step": one_step, "sample": one_sample, "resume": one_resume, "load": one_load}[what])))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        main(sys.argv[1])
