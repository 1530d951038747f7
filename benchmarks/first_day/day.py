"""What the sections share: the machine's devices and what fits them, runs on them, pass marks, and the report that is written after each section."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import harness
import recipes

from benchmarks.first_day.photos import num_validation, packed_photos
from benchmarks.measure import machine, show_machine


@dataclass
class Mark:
    what: str
    ok: bool
    found: str


@dataclass
class Section:
    name: str
    title: str
    lines: list[str] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    fault: str = ""

    def mark(self, what: str, ok: bool, found: object) -> None:
        self.marks.append(Mark(what, bool(ok), str(found)))


@dataclass
class Day:
    """`small`: no GPU is there, or it is simulated: everything is made small, and speeds mean nothing."""

    out: Path
    device: str
    steps: int
    rounds: int
    num_photos: int
    seed: int = 0
    sections: list[Section] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.out / "work", ignore_errors=True)  # of the day before
        self.facts = machine() if self.small else {}
        self._jobs = 0

    @property
    def small(self) -> bool:
        return self.device != "cuda"

    @cached_property
    def num_gpus(self) -> int:
        """Asked in another process: this one stays without a context."""
        return 2 if self.small else int(self.call("benchmarks.first_day.on_gpus:count")[0])

    @cached_property
    def precision(self) -> str:
        """What speed is measured in."""
        return "no" if self.small else self.call("benchmarks.first_day.on_gpus:half")[0]

    @property
    def worlds(self) -> list[int]:
        return [*(world for world in (1, 2, 4, 8) if world < self.num_gpus), self.num_gpus]

    @property
    def most(self) -> int:
        return self.worlds[-1]

    @property
    def global_batch_size(self) -> int:
        return 16 if self.small else 64 * self.most

    @property
    def num_train(self) -> int:
        return self.num_photos - num_validation(self.num_photos)

    # ---- runs

    def folder(self) -> Path:
        self._jobs += 1
        made = self.out / "work" / str(self._jobs)
        made.mkdir(parents=True)
        return made

    def start(self, recipe: Path, *options: str, world: int = 1, command: str = "train", device: str | None = None, **more: Any) -> harness.Job:
        """A command with this recipe, in the recipe's folder."""
        words = ["--config", str(recipe), *options]
        return harness.start(words, cwd=recipe.parent, world=world, command=command, device=device or self.device, **more)

    def run(self, command: str, *words: str, folder: Path, world: int = 1, timeout: float = 900.0) -> harness.Job:
        """A command in this folder."""
        return harness.start(words, cwd=folder, world=world, command=command, device=self.device).wait(timeout).check()

    def train(self, recipe: Path, *options: str, timeout: float = 900.0, **more: Any) -> harness.Job:
        return self.start(recipe, *options, **more).wait(timeout).check()

    def call(self, function: str, *arguments: Any, world: int = 1, device: str | None = None, timeout: float = 900.0, **more: Any) -> list[Any]:
        """What MODULE:FUNCTION returns on each rank, by way of JSON."""
        words = [function, json.dumps(arguments)]
        command = "benchmarks.first_day.on_gpus:printed"
        job = harness.start(words, cwd=self.folder(), world=world, command=command, device=device or self.device, **more).wait(timeout).check()
        return [json.loads(job.out(rank).splitlines()[-1]) for rank in range(world)]

    @cached_property
    def photos(self) -> Path:
        return packed_photos(self.out / "photos", self.num_photos)

    def recipe(self, **sections: Any) -> Path:
        """A short run on the photos, in a new folder; what `sections` say goes before."""
        data = {"train": str(self.photos / "train"), "val": str(self.photos / "val"), "augment": {"preset": "imagenet"}, **sections.pop("data", {})}
        data = {
            "image_size": 32 if self.small else 224,
            "global_batch_size": self.global_batch_size,
            "workers": 1 if self.small else "auto",
            **data,
        }
        model = {"name": "networks:small" if self.small else "torchvision/resnet50", **sections.pop("model", {})}
        phases = sections.pop("phases", {"all": {"train": "all", "steps": self.steps, "lr": 0.01}})
        tracking = {"wandb": "off", "report": False, "log_every": 1, **sections.pop("tracking", {})}
        checkpoint = {"every_steps": None, **sections.pop("checkpoint", {})}  # those of the tests have one at each third step
        run = {"seed": self.seed, **sections.pop("run", {})}
        return recipes.write_recipe(
            self.folder(), data=data, model=model, phases=phases, tracking=tracking, checkpoint=checkpoint, run=run, **{"precision": "auto", **sections}
        )

    # ---- the report

    def work_on(self, section: Section, do: Callable[[Day, Section], None]) -> None:
        """One section. What goes wrong in it is written down, and the others come after it."""
        print(f"== {section.name}: {section.title}", flush=True)
        self.sections.append(section)
        started = time.perf_counter()
        try:
            do(self, section)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever it is: the day goes on
            section.fault = f"{type(error).__name__}: {error}"
        finally:
            section.seconds = time.perf_counter() - started
            while harness.started:
                harness.started.pop().end()
            self.write()
        if not section.fault and all(mark.ok for mark in section.marks):
            shutil.rmtree(self.out / "work", ignore_errors=True)  # some 10 GB in all; what failed can be looked at
        for mark in section.marks:
            print(f"{'pass' if mark.ok else 'FAIL'}  {mark.what}: {mark.found}", flush=True)
        if section.fault:
            print(f"FAIL  {section.fault}"[:2000], flush=True)

    @property
    def passed(self) -> bool:
        return not any(section.fault or not all(mark.ok for mark in section.marks) for section in self.sections)

    def write(self) -> None:
        lines = ["# The first day on GPUs", ""]
        if self.device == "sim":
            lines += ["**On simulated GPUs**: it shows that this benchmark runs. Times mean nothing.", ""]
        lines += [show_machine(self.facts), ""] if self.facts else []
        lines += ["| section | seconds | pass marks |", "| --- | --- | --- |"]
        for section in self.sections:
            held = sum(mark.ok for mark in section.marks)
            lines.append(
                f"| {section.name}: {section.title} | {section.seconds:.0f} | {'did not end' if section.fault else f'{held} of {len(section.marks)}'} |"
            )
        for section in self.sections:
            lines += ["", f"## {section.name}: {section.title}", "", *section.lines]
            lines += [""] if section.lines and section.marks else []
            lines += [f"- {'pass' if mark.ok else '**FAIL**'}: {mark.what}: {mark.found}" for mark in section.marks]
            lines += ["", "It did not end:", "", "```text", section.fault[-4000:], "```"] if section.fault else []
        (self.out / "report.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
        data = {section.name: {"seconds": section.seconds, "fault": section.fault, "marks": [vars(mark) for mark in section.marks], **section.data}
                for section in self.sections}  # fmt: skip
        (self.out / "report.json").write_text(json.dumps({"machine": self.facts, "sections": data}, indent=1) + "\n", encoding="utf-8")
