"""Is it right? Sections b (what GPUs compute), c (the same bits twice) and d (ranks that fail)."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import harness
import recipes

from benchmarks.first_day.day import Day, Section
from benchmarks.measure import table

FAMILIES = {
    "torchvision/resnet18": 64, "torchvision/mobilenet_v3_small": 64, "torchvision/efficientnet_b0": 64, "torchvision/densenet121": 64,
    "torchvision/vgg11_bn": 64, "torchvision/shufflenet_v2_x0_5": 64, "torchvision/regnet_y_400mf": 64, "torchvision/convnext_tiny": 64,
    "torchvision/swin_t": 224, "torchvision/vit_b_16": 224,
}  # fmt: skip
WITHOUT_NORMS: dict[str, Any] = {"model": {"name": "networks:without_norms"}, "precision": "no"}


def losses(run: Path, kind: str = "train") -> list[float]:
    return [event["loss"] for event in harness.history(run) if event["event"] == kind]


def largest(a: list[float], b: list[float]) -> float:
    """The largest difference, relative to the largest value."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(map(abs, b))


def correctness(day: Day, section: Section) -> None:
    """Families in float32 as on the CPU, 1 = 2 = 8 GPUs, and precisions that learn."""
    rows = []
    for name, size in list(FAMILIES.items())[: 1 if day.small else None]:
        (there,), (here,) = (day.call("benchmarks.first_day.on_gpus:family", name, size, device, 3) for device in ("cuda", "cpu"))
        found = {kind: largest(there[kind], here[kind]) for kind in ("logits", "losses")}
        rows.append([name, f"{found['logits']:.1e}", f"{found['losses']:.1e}"])
        section.mark(f"{name} in float32 computes what the CPU computes", max(found.values()) < 1e-3, f"{max(found.values()):.1e}, at most 1e-3")
    section.lines += [*table(("network", "logits, relative to the CPU's", "losses of three steps"), rows), ""]

    curves = {}
    for world in day.worlds:
        recipe = day.recipe(**WITHOUT_NORMS, data={"global_batch_size": 16 if day.small else 64})
        day.train(recipe, world=world)
        curves[world] = losses(recipe.parent / "runs/tiny")
    for world in day.worlds[1:]:
        difference = largest(curves[world], curves[1])
        section.mark(f"{world} GPUs train as one does", difference < 1e-4, f"{difference:.1e}, at most 1e-4")

    steps = {"all": {"train": "all", "epochs": 1 if day.small else 3, "lr": 0.05}}
    for precision in ("bf16", "fp16"):
        recipe = day.recipe(phases=steps, precision=precision, data={"train": "digits", "val": None, "image_size": 16, "global_batch_size": 120,
                                                                      "augment": {"preset": "cifar"}}, model={"name": "networks:small"})  # fmt: skip
        day.train(recipe, world=day.most)
        first, last = (losses(recipe.parent / "runs/tiny")[number] for number in (0, -1))
        section.mark(f"{precision} learns on {day.most} GPUs", last < first, f"loss {first:.3f} to {last:.3f}")


def bit_identity(day: Day, section: Section) -> None:
    """The same run twice, and killed and resumed, with `run.deterministic` and without."""
    for deterministic in (False, True):
        for world in sorted({1, day.most}):
            hashes = set()
            for _ in range(2):
                recipe = day.recipe(run={"deterministic": deterministic})
                day.train(recipe, world=world)
                hashes.add(recipes.weights_hash(recipe.parent / "runs/tiny"))
            same = "the same bits" if len(hashes) == 1 else "other bits"
            if deterministic:
                section.mark(f"the same run twice on {world} GPU{'s' * (world > 1)} with run.deterministic", len(hashes) == 1, same)
            else:
                section.lines.append(f"- without run.deterministic, twice on {world} GPU{'s' * (world > 1)}: {same}")
    if day.small:
        section.lines.append("- `dtl verify-resume` is for GPUs; tests/unit/commands/test_verify_resume.py runs it")
        return
    for world in sorted({1, day.most}):
        recipe = day.recipe(phases={"all": {"train": "all", "steps": 40, "lr": 0.01}}, checkpoint={"every_steps": 7})
        job = day.start(recipe, "--kills", "5", "--processes", str(world), command="verify-resume").wait(900)
        said = (job.out() + job.err()).strip().splitlines()
        section.mark(f"dtl verify-resume with 5 kills on {world} GPU{'s' * (world > 1)}", job.codes == [0], said[-1] if said else "nothing")


# ---- a rank that fails

KILLED, STOPPED, FAILED, NO_MEMORY, TERMINATED = "kill -9", "SIGSTOP", "an exception", "out of memory", "SIGTERM"
LIMIT = 12.0
"""run.timeout_minutes in seconds, for the rank that stands still: only that time ends the wait for it."""


def faults(day: Day, section: Section) -> None:
    """Something happens to the last rank: how long until all have left, what is said, and what status.json has."""
    world, rows = max(2, day.most), []
    if day.num_gpus < 2:
        section.lines.append("One GPU: there is no other rank that could be lost.")
        return
    for what in (KILLED, FAILED) if day.small else (KILLED, STOPPED, FAILED, NO_MEMORY, TERMINATED):
        seconds, job, folder = _fault(day, what, world)
        told = harness.status(folder / "runs/tiny")
        lines = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
        rows.append([what, f"{seconds:.1f}", " ".join(map(str, job.codes)), told["state"], (lines or ["nothing"])[0].replace("|", "/")])
        limit = 15 + LIMIT * (what == STOPPED)
        section.mark(f"{what}: all ranks have left", seconds < limit, f"after {seconds:.1f} s, at most {limit:.0f}")
        expected = "stopped" if what == TERMINATED else "failed"
        section.mark(f"{what}: status.json", told["state"] == expected, told["state"])
    section.lines += table((f"on rank {world - 1} of {world}", "seconds", "exit statuses", "status.json", "the line"), rows)


def _fault(day: Day, what: str, world: int) -> tuple[float, harness.Job, Path]:
    rank = world - 1
    recipe = day.recipe(phases={"all": {"train": "all", "epochs": 500, "lr": 0.01}}, data={"micro_batch_size": 8})
    options = ["--run.timeout-minutes", str(LIMIT / 60)] if what == STOPPED else []
    before = {FAILED: "obstacles:failing_step", NO_MEMORY: "gpu.hooks:little_memory"}.get(what)
    job = day.start(recipe, *options, world=world, env={"LITTLE_MEMORY": "64"}, by_rank={rank: {"before": before}} if before else None)
    run = recipe.parent / "runs/tiny"
    if before is None:
        harness.wait_for(lambda: not all(process.is_alive() for process in job.processes) or harness.steps_done(run) > 2, what="some steps", seconds=300)
        job.kill(rank, {KILLED: signal.SIGKILL, STOPPED: signal.SIGSTOP, TERMINATED: signal.SIGTERM}[what])
    else:
        harness.wait_for(lambda: not job.processes[rank].is_alive(), what=what, seconds=300)
    happened = time.monotonic()
    others = [process for number, process in enumerate(job.processes) if number != rank]
    for process in others:
        process.join(max(0.1, happened + 120 - time.monotonic()))
    seconds = time.monotonic() - happened
    if what == STOPPED:
        job.kill(rank)
    return seconds, job.wait(300), recipe.parent


def host_waits(day: Day, section: Section) -> None:
    """How often the host waits for its device within a training step, by precision, and on how many devices a process has a context."""
    for precision in ("no",) if day.small else ("no", "bf16"):
        recipe = day.recipe(precision=precision)
        job = day.train(recipe, world=day.most, by_rank={rank: {"before": "gpu.hooks:waits_and_contexts"} for rank in range(day.most)})
        steps = len(re.findall("a step with 0 waits", job.err(0)))
        section.mark(f"host waits in a step, precision {precision}", steps > 0, f"0 in {steps} steps")
        contexts = [re.findall(r"contexts \[(.*)\]", job.err(rank)) for rank in range(day.most)]
        ok = all(len(found) == 1 and len(found[0].split(",")) == 1 for found in contexts)
        section.mark(
            "a process has a context on one GPU", ok, "; ".join(f"rank {rank}: {', '.join(found) or 'unknown'}" for rank, found in enumerate(contexts))
        )
