"""Is it fast? Sections a (the machine), e (one GPU), f (what overlaps), g (scaling), h (decoding on the device) and i (a whole fine-tune)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness

from benchmarks import scaling
from benchmarks.first_day import ROOT
from benchmarks.first_day.correct import check_commands, host_waits
from benchmarks.first_day.day import Day, Section
from benchmarks.measure import Spread, table, with_interval
from benchmarks.side_by_side import BARE, DTL, LOOPS, STATIC, Case
from dtl.text import counted

NETWORKS = ("torchvision/resnet50", "torchvision/vit_b_16", "torchvision/convnext_tiny", "torchvision/efficientnet_b0")


def facts(day: Day, section: Section) -> None:
    """Versions, links, all-reduce by size, copies to the device, images/s of one core."""
    (found,) = day.call("benchmarks.first_day.on_gpus:machine_facts")
    day.facts = found
    section.lines += [f"- {name.replace('_', ' ')}: {found[name]}" for name in ("cuda", "cudnn", "nccl", "capability", "memory_gib_of_a_gpu")]
    section.data["facts"] = found
    (copies,) = day.call("benchmarks.first_day.on_gpus:host_to_device", 1 if day.small else 256, 2 if day.small else 20)
    section.lines += [f"- host to device, {name} memory: {speed:.1f} GB/s" for name, speed in copies.items()]
    images = 32 if day.small else 2000
    (speed,) = day.call(
        "benchmarks.first_day.on_gpus:loader", str(day.photos / "train"), 224, 8 if day.small else 50, 0, images // (8 if day.small else 50), False
    )
    section.lines.append(f"- dtl's loader, one core: {speed['images_s']:.0f} images/s of 224 pixels")
    section.data |= {"host_to_device": copies, "loader_one_core": speed["images_s"]}
    if day.num_gpus > 1:
        sizes = [0.25, 1.0] if day.small else [0.25, 1.0, 8.0, 64.0, 256.0]
        (bus, *_) = day.call("benchmarks.first_day.on_gpus:all_reduce", sizes, 2 if day.small else 20, world=day.most)
        section.data["all_reduce"] = bus
        section.lines += ["", *table(("all-reduce, MiB", f"GB/s of the bus, {day.most} GPUs"), [[size, f"{speed:.2f}"] for size, speed in bus.items()])]
    for words in ([sys.executable, "-m", "dtl", "doctor"], ["nvidia-smi", "topo", "-m"], ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"]):
        if not day.small:
            section.lines += ["", *_output_of(words)]


def _output_of(words: list[str]) -> list[str]:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"`{' '.join(words[-3:])}`: {error}"]
    return [f"`{' '.join(words[-3:])}`:", "", "```text", *(done.stdout + done.stderr).strip().splitlines(), "```"]


def one_gpu(day: Day, section: Section) -> None:
    """dtl's loop, the bare loop, timm's and torchvision's on the same tensors; then by precision, memory format, compilation and batch size."""
    others = tuple(name for name in LOOPS if name != STATIC)
    size, batch = (32, 4) if day.small else (224, 128)
    rows = []

    def measured(case: Case) -> dict[str, Any] | None:
        kind = [case.network, case.batch, case.precision, "yes" if case.channels_last else "no", "yes" if case.compiled else "no"]
        try:
            (found,) = day.call("benchmarks.first_day.on_gpus:loops", asdict(case), str(day.folder()))
        except AssertionError as error:  # no compiler for Triton, say: the others are measured all the same
            section.mark(f"{case.network}, batch {case.batch}, {case.precision}{', compiled' if case.compiled else ''}", False, str(error)[-300:])
            return None
        section.data.setdefault("loops", []).append({"case": asdict(case), **found})
        if "out_of_memory" in found:
            rows.append([*kind, "out of memory", "", "", ""])
            return None
        for name, seconds in found["seconds"].items():
            ratio = "1" if name == BARE else with_interval([bare / one for one, bare in zip(seconds, found["seconds"][BARE])], 3)
            rows.append([*kind, name, f"{case.batch / Spread.of(seconds).median:.0f}", ratio, f"{found['memory'].get(name, 0):.2f}"])
        return found

    try:
        for network in ("networks:small",) if day.small else NETWORKS:
            plain = Case(network, batch, size, day.steps, day.rounds, precision=day.precision, others=others)
            found = measured(plain)
            if found is not None:
                ratio = Spread.of([bare / own for own, bare in zip(found["seconds"][DTL], found["seconds"][BARE])]).median
                if not day.small:
                    section.mark(f"{network}: dtl's speed, of the bare loop's", ratio >= 0.98, f"{ratio:.3f}, at least 0.98")
            few = {"steps": max(2, day.steps // 2), "rounds": max(1, day.rounds // 2), "others": (BARE,)}
            compiled: dict[str, Any] = {"compiled": True}
            variants: list[dict[str, Any]] = [
                *({"precision": kind} for kind in ("no", "fp16") if kind != day.precision), {"channels_last": False}, compiled, {"batch": 32}, {"batch": 512},
            ]  # fmt: skip
            for variant in [] if day.small else variants if network == NETWORKS[0] else [compiled]:
                measured(Case(**{**asdict(plain), **few, **variant}))
    finally:
        head = ("network", "batch", "precision", "channels last", "compiled", "loop", "images/s", "speed against the bare loop", "memory of a step, GiB")
        section.lines += table(head, rows)
    _with_loaders(day, section, size, batch)
    if not day.small:  # Triton has no simulated GPUs
        (found,) = day.call("benchmarks.first_day.on_gpus:evaluating", NETWORKS[0], batch, size, 4 * day.steps)
        section.data["evaluating"] = found
        section.lines += ["", f"Evaluating {NETWORKS[0]}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items())]


def _loading(day: Day) -> tuple[int, int]:
    """Loader processes of one GPU, as many as `data.workers: auto` takes, and steps that show their pace: the first ones use what they have ready."""
    workers = 1 if day.small else max(1, min(16, len(os.sched_getaffinity(0)) // day.num_gpus - 1))
    return workers, 4 if day.small else 10 * workers


def _with_loaders(day: Day, section: Section, size: int, batch: int) -> None:
    network, (workers, steps) = "networks:small" if day.small else NETWORKS[0], _loading(day)
    case = asdict(Case(network, batch, size, 1, 1, precision=day.precision))
    (theirs,) = day.call("benchmarks.first_day.on_gpus:image_folder_loop", str(day.photos / "images/train"), case, workers, steps)
    recipe = day.recipe(data={"global_batch_size": batch, "image_size": size, "workers": workers}, phases=_steps(steps), tracking=_lined(day))
    day.train(recipe)
    ours = _images_per_second(recipe)
    section.data["with_loader"] = {"dtl": ours, "ImageFolder": theirs}
    how = f"{network}, {counted(workers, 'loader process')}"
    section.lines += ["", f"From the photos' files, {how}: dtl train {ours:.0f} images/s; the bare loop on ImageFolder and DataLoader {theirs:.0f}."]


def _steps(number: int) -> dict[str, Any]:
    """A phase of so many steps, without evaluations but the last."""
    return {"all": {"train": "all", "steps": number, "lr": 0.01, "eval_every": 1000}}


def _lined(day: Day) -> dict[str, Any]:
    return {"log_every": 1 if day.small else 10}


def _lines(recipe: Path) -> list[dict[str, Any]]:
    """Of the steps of a run, the second half."""
    events = [event for event in harness.history(recipe.parent / "runs/tiny", times=True) if event["event"] == "train"]
    return events[len(events) // 2 :]


def _images_per_second(recipe: Path) -> float:
    return Spread.of([event["images_per_second"] for event in _lines(recipe)]).median


def overlap(day: Day, section: Section) -> None:
    """torch.profiler over steps in the midst of a run: what the device does while the host works, and the other way about."""
    host_waits(day, section)
    if not day.small:
        first = _loading(day)[1] // 2
        found, recipe = _profiled(day, first=first, steps=20, phases=_steps(first + 40))
        section.data["overlap"] = found
        section.lines += [f"- {name.replace('_', ' ')}: {value:.4g}" for name, value in found.items() if name != "gaps"]
        wait = Spread.of([event["data_wait"] for event in _lines(recipe)]).median
        section.lines.append(f"- waiting for data, by the run's own lines: {100 * wait:.1f} %")
        idle = f"{100 * found['idle']:.1f} %, under 3 %" if found["device_events"] else "the profiler recorded no work of the GPU (CUPTI is missing)"
        section.mark("the GPU's idle time in a run with its loader, from the profiler", found.get("idle", 1.0) < 0.03, idle)
    # An evaluation and a checkpoint among the steps.
    first, steps, evaluated, saved = (1, 2, 2, 3) if day.small else (10, 18, 20, 24)
    per_epoch = -(-day.num_train // day.global_batch_size)
    phases = {"all": {"train": "all", "steps": first + steps + 4, "lr": 0.01, "eval_every": evaluated / per_epoch}}
    found, _ = _profiled(day, first=first, steps=steps, phases=phases, checkpoint={"every_steps": saved}, places="1")
    section.data["gaps"] = found["gaps"]
    rows = [[name, gap["times"], f"{gap['median_ms']:.1f}", f"{gap['longest_ms']:.1f}"] for name, gap in found["gaps"].items()]
    section.lines += ["", *table(("the GPU does nothing at", "times", "ms, median", "ms, longest"), rows)]


def _profiled(day: Day, *, first: int, steps: int, places: str = "", **sections: Any) -> tuple[dict[str, Any], Path]:
    """What benchmarks/first_day/profiled.py found on rank 0 of a run, and its recipe. The trace stays beside the report."""
    recipe = day.recipe(tracking={"log_every": 2 if day.small else 10}, **sections)
    found = day.out / ("gaps.json" if places else "overlap.json")
    day.train(
        recipe,
        world=day.most,
        by_rank={0: {"before": "benchmarks.first_day.profiled:profiled"}},
        env={"OVERLAP": str(found), "OVERLAP_FIRST": str(first), "OVERLAP_STEPS": str(steps), "OVERLAP_PLACES": places},
    )
    return json.loads(found.read_text()), recipe


def scales(day: Day, section: Section) -> None:
    """benchmarks.scaling, weak and strong."""
    for strong in (False,) if day.small else (False, True):
        network, batch, size = ("networks:small", 4, 32) if day.small else (NETWORKS[0], 128, 224)
        results: dict[int, dict[str, list[float]]] = {}
        for world in day.worlds:
            case = Case(network, max(1, batch // world) if strong else batch, size, day.steps, day.rounds, precision=day.precision,
                        others=(BARE,) if world == 1 else (BARE, STATIC))  # fmt: skip
            (found, *_) = day.call("benchmarks.first_day.on_gpus:loops", asdict(case), str(day.folder()), world=world)
            results[world] = found["seconds"]
        section.data["strong" if strong else "weak"] = results
        section.lines += [f"{network}, {batch} images of {size} pixels {'in all' if strong else 'a GPU'} and step:", ""]
        section.lines += [*scaling.rows_of(results, batch=batch, strong=strong), ""]
        if not day.small and not strong:
            ratio = Spread.of([bare / own for own, bare in zip(results[day.most][DTL], results[day.most][BARE])]).median
            section.mark(f"dtl's speed on {day.most} GPUs, of raw DDP's", ratio >= 0.98, f"{ratio:.3f}, at least 0.98")
    _bound(day, section)


def _bound(day: Day, section: Section) -> None:
    """With the loader, each rank and its loader processes on any core, and on the cores beside its GPU: what binding ranks to cores would gain."""
    rates = {}
    for bound in (True,) if day.small else (False, True):
        recipe = day.recipe(phases=_steps(_loading(day)[1]), tracking=_lined(day))
        before = {rank: {"before": "benchmarks.first_day.on_gpus:beside_its_gpu"} for rank in range(day.most)} if bound else None
        job = day.train(recipe, world=day.most, by_rank=before)
        rates["bound" if bound else "free"] = _images_per_second(recipe)
    cores = sorted(set(re.findall(r"cores beside its GPU: (.*)", job.err())))
    section.data["binding"] = {**rates, "cores": cores}
    section.lines += [f"With the loader on {counted(day.most, 'GPU')}: " + ", ".join(f"{name} {rate:.0f} images/s" for name, rate in rates.items())
                      + f" (each rank bound to the cores beside its GPU: {'; '.join(cores)})"]  # fmt: skip


def device_decoding(day: Day, section: Section) -> None:
    """The loader with its processes, and with decoding on the device."""
    if importlib.util.find_spec("torchcodec") is None:
        section.lines.append("torchcodec is not installed: `pip install -e '.[device-decode]'`")
        return
    (batch, size), (workers, batches) = (4, 64) if day.small else (128, 224), _loading(day)
    for on_device in (False, True):
        (found,) = day.call("benchmarks.first_day.on_gpus:loader", str(day.photos / "train"), size, batch, workers, batches, on_device)
        place = (
            f"on the device, {1e6 * found['host_seconds_an_image']:.0f} us of host time an image for crop and resize" if on_device else "in loader processes"
        )
        section.lines.append(f"- {found['images_s']:.0f} images/s {place}")
        section.data["device" if on_device else "workers"] = found


def whole(day: Day, section: Section) -> None:
    """A whole fine-tune, and where its time goes."""
    phases = {
        "head": {"train": "head", "steps": 2 if day.small else 100, "lr": 0.05},
        "all": {"train": "all", "epochs": 1 if day.small else 8, "lr": 0.01 * day.most, "warmup": 0.5},
    }
    network = "networks:small" if day.small else "torchvision/resnet18"
    recipe = day.recipe(phases=phases, model={"name": network}, tracking={"log_every": 10})
    started = time.perf_counter()
    day.train(recipe, world=day.most, timeout=1800)
    total = time.perf_counter() - started
    events = harness.history(recipe.parent / "runs/tiny", times=True)
    epochs = [event for event in events if event["event"] == "epoch"]
    in_epochs = [event["seen"] / event["images_per_second"] for event in epochs]
    waited = sum(seconds * event["data_wait"] for seconds, event in zip(in_epochs, epochs))
    split = {
        "all": total,
        "training": sum(in_epochs) - waited,
        "waiting for data": waited,
        "blocked by checkpoints": sum(event["checkpoint_stall_seconds"] for event in events if event["event"] == "train"),
        "start, evaluations and the end": total - sum(in_epochs),
    }
    top1, seen = [event["top1"] for event in events if event["event"] == "val"], sum(event["seen"] for event in epochs)
    section.data |= {"seconds": split, "top1": top1, "images": seen}
    section.lines += table(("seconds", "of"), [[f"{seconds:.1f}", what] for what, seconds in split.items()])
    accuracy = f"top1 {100 * top1[-1]:.1f} % after {seen:,} images"
    if day.small:
        section.lines += ["", f"- {accuracy}"]
    else:
        section.mark("the fine-tune learns the made-up classes", top1[-1] >= 0.9, accuracy)
    check_commands(day, section, recipe.parent / "runs/tiny", "the fine-tune", day.photos / "images/val")
