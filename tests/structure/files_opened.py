"""`python files_opened.py step|resume|load`: the files of dtl whose functions run in one training step, one resume, one weight load, as a JSON list.

This is what a reader has to open to follow one of them from its beginning to its end. Counted by running it, in a process of its own.

step: from the end of one optimizer step to the end of the next, where nothing is due beside it (no log line, evaluation or checkpoint): plan, read,
    decode, augment, forward, backward, update. In the process itself, without loader processes.
resume: from `find_checkpoint` to the first step of the run that goes on, its data and network aside.
load: `dtl.load_pretrained` of a file with renamed layers into a ResNet-18 with another number of classes, refusal and report included.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(ROOT / "dtl") + os.sep


class Recorder:
    """The files of dtl that functions run in, while `on`. Bodies of modules and classes, which run once at an import, do not count."""

    def __init__(self) -> None:
        self.on = False
        self.files: set[str] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if self.on and event == "call" and code.co_filename.startswith(PACKAGE) and code.co_flags & inspect.CO_NEWLOCALS:
            self.files.add(os.path.relpath(code.co_filename, ROOT))


def recorded(work: Callable[[Recorder], Any]) -> list[str]:
    recorder = Recorder()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    try:
        work(recorder)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return sorted(recorder.files)


def train(*arguments: str) -> None:
    from dtl.commands.train import run

    phases = ["--phases.all.train", "all", "--phases.all.steps", "12", "--phases.all.eval-every", "12", "--model.name", "dtl/resnet_tiny"]
    run(
        [
            "--data.workers",
            "0",
            "--tracking.log-every",
            "50",
            "--tracking.wandb",
            "off",
            "--tracking.report",
            "false",
            "--run.device",
            "cpu",
            *phases,
            *arguments,
        ]
    )


def one_step(recorder: Recorder) -> None:
    from dtl.training.step import Stepper

    real, calls = Stepper.step, [0]

    def counted(self: Stepper, *given: Any, **named: Any) -> Any:
        calls[0] += 1
        try:
            return real(self, *given, **named)
        finally:
            recorder.on = calls[0] == 4  # from the end of the fourth step to the end of the fifth

    Stepper.step = counted  # type: ignore[method-assign]
    train()
    assert calls[0] > 5, calls


def one_resume(recorder: Recorder) -> None:
    from dtl.checkpoint.resume import resume
    from dtl.training.step import Stepper

    train("--checkpoint.every-steps", "6", "--phases.all.steps", "6")
    find, step = resume.find_checkpoint, Stepper.step

    def found(*given: Any, **named: Any) -> Any:
        recorder.on = True
        return find(*given, **named)

    def stepped(self: Stepper, *given: Any, **named: Any) -> Any:
        recorder.on = False
        return step(self, *given, **named)

    for module in [module for module in sys.modules.values() if getattr(module, "find_checkpoint", None) is find]:
        module.find_checkpoint = found  # type: ignore[attr-defined]
    Stepper.step = stepped  # type: ignore[method-assign]
    train("--checkpoint.every-steps", "6")


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


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["DTL_CACHE"] = folder
        out, sys.stdout = sys.stdout, sys.stderr
        found = recorded({"step": one_step, "resume": one_resume, "load": one_load}[sys.argv[1]])
        os.chdir("/")
    print(json.dumps(found), file=out)
