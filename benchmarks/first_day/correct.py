"""Is it right? Sections b (what GPUs compute), c (the same bits twice) and d (ranks that fail)."""

from __future__ import annotations

import csv
import json
import os
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
        threads = 1 if day.small else min(16, len(os.sched_getaffinity(0)))
        (there,), (here,) = (day.call("benchmarks.first_day.on_gpus:family", name, size, device, 3, threads=threads) for device in ("cuda", "cpu"))
        found = {kind: largest(there[kind], here[kind]) for kind in ("logits", "losses")}
        rows.append([name, f"{found['logits']:.1e}", f"{found['losses']:.1e}"])
        section.mark(f"{name} in float32 computes what the CPU computes", max(found.values()) < 1e-3, f"{max(found.values()):.1e}, at most 1e-3")
    section.lines += [*table(("network", "logits, relative to the CPU's", "losses of three steps"), rows), ""]

    curves = {}
    for world in day.worlds:
        recipe = day.recipe(**WITHOUT_NORMS, data={"global_batch_size": 16 if day.small else 64})
        day.train(recipe, world=world, env={"NVIDIA_TF32_OVERRIDE": "0"})  # its products have 10 bits, and kernels are chosen by the batch
        curves[world] = losses(recipe.parent / "runs/tiny")
    for world in day.worlds[1:]:
        difference = largest(curves[world], curves[1])
        section.mark(f"{world} GPUs train as one does", difference < 1e-4, f"{difference:.1e}, at most 1e-4")

    steps = {"all": {"train": "all", "epochs": 1 if day.small else 3, "lr": 0.05}}
    for precision in ("bf16", "fp16") if day.precision != "fp16" else ("fp16",):
        recipe = day.recipe(phases=steps, precision=precision, data={"train": "digits", "val": None, "image_size": 16, "global_batch_size": 120,
                                                                      "augment": {"preset": "cifar"}}, model={"name": "networks:small"})  # fmt: skip
        day.train(recipe, world=day.most)
        first, last = (losses(recipe.parent / "runs/tiny")[number] for number in (0, -1))
        section.mark(f"{precision} learns on {day.most} GPUs", last < first, f"loss {first:.3f} to {last:.3f}")
    for world in [day.most] if day.small else sorted({1, day.most}):
        _end_to_end(day, section, world)


def _end_to_end(day: Day, section: Section, world: int) -> None:
    """The built-in recipe and what comes after it. Its top1 on CPUs is 98.3 to 99.2 %, by seed and number of processes."""
    folder = day.folder()
    shorter = [word for phase in ("pretext", "head", "all") for word in (f"--phases.{phase}.epochs", "0.1")]
    smaller = [*shorter, "--data.image-size", "16", "--tracking.report", "false"] if day.small else []
    day.run("train", "--config", "digits", *smaller, "--tracking.wandb", "off", folder=folder, world=world)
    where = f"the recipe digits on {world} GPU{'s' * (world > 1)}"
    run = folder / "runs/digits"
    if day.small:  # a few steps: how accurate they are says nothing
        section.mark(f"{where} ends", harness.status(run)["state"] == "done", harness.status(run)["state"])
        return
    top1 = check_commands(day, section, run, where)
    section.mark(f"{where} is as accurate as on CPUs", top1 >= 0.97, f"top1 {100 * top1:.1f} %, at least 97")


def check_commands(day: Day, section: Section, run: Path, where: str, images: Path | None = None) -> float:
    """dtl evaluate, predict (of a folder of class folders) and export of a finished run; its top1."""
    folder = run.parents[1]
    validated = [event["top1"] for event in harness.history(run) if event["event"] == "val"]
    day.run("evaluate", str(run), "--json", "found.json", folder=folder)
    found = json.loads((folder / "found.json").read_text())
    same = min(abs(found["top1"] - top1) for top1 in validated) < 2 / found["num_samples"]
    section.mark(f"{where}: dtl evaluate says what training said", same, f"top1 {100 * found['top1']:.1f} %")
    if images is not None:
        day.run("predict", str(run), str(images), "--out", "labels.csv", folder=folder)
        rows = list(csv.DictReader((folder / "labels.csv").read_text().splitlines()))
        right = sum(Path(row["path"]).parent.name == row["name"] for row in rows) / len(rows)
        section.mark(f"{where}: dtl predict labels them alike", abs(right - found["top1"]) < 0.01, f"{100 * right:.1f} % right of {len(rows)}")
    day.run("export", str(run), "--to", "torch-export", "--out", "model.pt2", folder=folder)
    section.mark(f"{where}: dtl export", (folder / "model.pt2").is_file(), "model.pt2")
    return float(found["top1"])


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
        for deterministic in (False, True):
            recipe = day.recipe(phases={"all": {"train": "all", "steps": 40, "lr": 0.01}}, checkpoint={"every_steps": 7})
            options = ["--kills", "4" if deterministic else "2", "--processes", str(world), "--run.deterministic", str(deterministic).lower()]
            job = day.start(recipe, *options, command="verify-resume").wait(900)
            lines = (job.out().strip() or job.err().strip()).splitlines()
            what, said = f"dtl verify-resume on {world} GPU{'s' * (world > 1)}", lines[-1] if lines else "nothing"
            if deterministic:
                section.mark(f"{what} with run.deterministic", job.codes == [0], said)
            else:
                section.lines.append(f"- {what} without run.deterministic: {said}")


# ---- a rank that fails

KILLED, STOPPED, FAILED, NO_MEMORY, TERMINATED = "kill -9", "SIGSTOP", "an exception", "out of memory", "SIGTERM"
LIMIT = 30.0
"""run.timeout_minutes in seconds, for the rank that stands still: only that time ends the wait for it. Eight ranks start their loader processes within it."""


def faults(day: Day, section: Section) -> None:
    """Something happens to the last rank: how long until all have left, what is said, and what status.json has."""
    world, rows = max(2, day.most), []
    if day.num_gpus < 2:
        section.lines.append("One GPU: there is no other rank that could be lost.")
        return
    for what in (KILLED, STOPPED, FAILED, NO_MEMORY, TERMINATED):
        seconds, job, folder = _fault(day, what, world)
        told = harness.status(folder / "runs/tiny")
        lines = [line for line in job.err().splitlines() if line.startswith("dtl: ")]
        line = (lines or ["nothing"])[-1]
        rows.append([what, f"{seconds:.1f}", " ".join(map(str, job.codes)), told["state"], line.replace("|", "/")])
        limit = 15 + _limit(day) * (what == STOPPED)
        section.mark(f"{what}: all ranks have left", seconds < limit, f"after {seconds:.1f} s, at most {limit:.0f}")
        expected = "stopped" if what == TERMINATED else "failed"
        section.mark(f"{what}: status.json", told["state"] == expected, told["state"])
        if what != TERMINATED:
            section.mark(f"{what}: the line names the rank", f"rank {world - 1} (" in line, line[:100])
    section.lines += table((f"on rank {world - 1} of {world}", "seconds", "exit statuses", "status.json", "the line"), rows)


def _limit(day: Day) -> float:
    return 6.0 if day.small else LIMIT


def _fault(day: Day, what: str, world: int) -> tuple[float, harness.Job, Path]:
    rank = world - 1
    recipe = day.recipe(phases={"all": {"train": "all", "epochs": 500, "lr": 0.01}}, data={"micro_batch_size": 8})
    options = ["--run.timeout-minutes", str(_limit(day) / 60)] if what == STOPPED else []
    before = {FAILED: "obstacles:failing_step", NO_MEMORY: "gpu.hooks:memory_ends"}.get(what)
    job = day.start(recipe, *options, world=world, by_rank={rank: {"before": before}} if before else None)
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
    for precision in ("fp16",) if day.small else dict.fromkeys(("no", day.precision, "fp16")):
        recipe = day.recipe(precision=precision)
        job = day.train(recipe, world=day.most, by_rank={rank: {"before": "gpu.hooks:waits_and_contexts"} for rank in range(day.most)})
        steps = len(re.findall("a step with 0 waits", job.err(0)))
        scalers = ", but for one of the scaler in each" if precision == "fp16" else ""
        section.mark(f"host waits in a step, precision {precision}", steps > 0, f"0 in {steps} steps{scalers}")
        contexts = [re.findall(r"contexts \[(.*)\]", job.err(rank)) for rank in range(day.most)]
        ok = all(len(found) == 1 and len(found[0].split(",")) == 1 for found in contexts)
        section.mark(
            "a process has a context on one GPU", ok, "; ".join(f"rank {rank}: {', '.join(found) or 'unknown'}" for rank, found in enumerate(contexts))
        )
