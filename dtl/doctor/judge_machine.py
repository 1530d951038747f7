"""The machine without its GPUs, judged from plain numbers: versions, memory, files, disks, speed. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from dtl.config.models import ImageSize, num_pixels
from dtl.data.loading.shared_memory import bytes_needed
from dtl.doctor.finding import Finding
from dtl.text import counted, rate

MIB, GIB = 2**20, 2**30
# torchvision 0.N belongs to torch 2.(N - 15), since torch 2.0 and torchvision 0.15.
TORCHVISION_BEHIND = 15
SLOW_DISK = 50.0


@dataclass(frozen=True)
class Need:
    """What a run needs of the machine."""

    image_size: ImageSize = 224
    batch_size: int = 64
    """Samples of one micro-batch of one rank."""
    workers: int = 2
    ranks: int = 1
    prefetch: int = 2
    parameters: int = 12_000_000

    own_buffers: bool = sys.platform == "linux"
    """Batches are passed in shared buffers of the loader, not through /dev/shm."""

    @property
    def shm_bytes(self) -> int:
        """What the loaders of training and validation of all ranks take of /dev/shm, as a run computes it before its first step."""
        return (
            2
            * self.ranks
            * bytes_needed(
                micro_batch_size=self.batch_size,
                image_size=self.image_size,
                accumulation_steps=1,
                workers=self.workers,
                prefetch=self.prefetch,
                own_buffers=self.own_buffers,
            )
        )

    @property
    def batch_bytes(self) -> int:
        """Batches in memory at once: what every worker has ready, what it makes, and the one in use."""
        return self.ranks * (self.workers * (self.prefetch + 1) + 1) * 3 * num_pixels(self.image_size) * self.batch_size

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, best weights, moving average and two moments of Adam, in float32."""
        return 5 * 4 * self.parameters


def judge_versions(python: tuple[int, ...], versions: Mapping[str, str | None]) -> list[Finding]:
    """`versions`: of the installed packages, None where one is missing."""
    found = []
    if python < (3, 11) or python == (3, 13, 0):
        wanted = "3.11 or newer" if python < (3, 11) else "3.13.1 or newer"
        found.append(Finding("python", "fail", f"Python {'.'.join(map(str, python))}; dtl needs {wanted}", "python3.11 -m venv .venv"))
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        found.append(Finding("packages", "fail", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}"))
    torch, vision = _parts(versions.get("torch")), _parts(versions.get("torchvision"))
    if torch and vision and torch[0] == 2 and vision[0] == 0 and vision[1] != torch[1] + TORCHVISION_BEHIND:
        wanted = f"0.{torch[1] + TORCHVISION_BEHIND}"
        what = f"torchvision {versions['torchvision']} does not match torch {versions['torch']}, which needs torchvision {wanted}: operators will be missing"
        found.append(Finding("versions", "fail", what, f"pip install 'torchvision=={wanted}.*'"))
    if torch and torch < (2, 9):
        found.append(Finding("versions", "fail", f"torch {versions['torch']}; dtl needs 2.9 or newer", "pip install -U torch torchvision"))
    if not found:
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        found.append(Finding("versions", "ok", f"Python {'.'.join(map(str, python[:3]))}, {shown}"))
    return found


def judge_shm(free: int | None, total: int | None, need: Need) -> Finding:
    """/dev/shm: the queues of loader processes are there, and off Linux their batches; Docker gives 64 MiB by default."""
    if free is None or total is None:
        fix = "--data.workers 0" if need.workers else ""
        return Finding("shm", "warn" if need.workers else "ok", "/dev/shm cannot be read; loader processes need it", fix)
    what = f"/dev/shm has {_size(free)} free of {_size(total)}; {counted(need.ranks, 'process')} with {counted(need.workers, 'loader process')} "
    what += f"use up to {_size(need.shm_bytes)} of it"
    wanted = max(1, -(-2 * need.shm_bytes // GIB))
    fix = f"docker run --shm-size={wanted}g ... (or --ipc=host); on a machine of your own: mount -o remount,size={wanted}G /dev/shm; or --data.workers 0"
    if free < need.shm_bytes:
        return Finding("shm", "fail", what + ": they could not start, or would be killed by a bus error", fix)
    if free < 2 * need.shm_bytes:
        return Finding("shm", "warn", what, fix)
    return Finding("shm", "ok", what)


def judge_open_files(soft: int, hard: int, need: Need) -> Finding:
    """Each tensor on its way from a worker holds a descriptor (several a batch), each reader up to 128 shards."""
    wanted = 256 + 128 + need.workers * (need.prefetch + 1) * 8
    what = f"limit of {soft:,} open files (hard limit {'none' if hard < 0 else f'{hard:,}'}); a run opens up to about {wanted}"
    if 0 <= soft < wanted:
        fix = f"ulimit -n {4096 if hard < 0 or hard >= 4096 else hard}"
        return Finding("files", "fail" if soft < wanted // 2 else "warn", what, fix)
    return Finding("files", "ok", what)


def judge_disk(
    name: str, folder: str, *, free: int, total: int, filesystem: str, write_mib_s: float | None, problem: str | None, need: Need, keep: int = 3
) -> list[Finding]:
    """`name`: run or cache; `problem`: why nothing could be written there."""
    option = {"run": "--run.dir FOLDER", "cache": "export DTL_CACHE=FOLDER"}[name]
    if problem is not None:
        return [Finding(name, "fail", f"{folder} is not writable ({problem})", f"choose another folder: {option}")]
    least = (keep + 2) * need.checkpoint_bytes if name == "run" else GIB
    speed = "" if write_mib_s is None else f", writes {write_mib_s:,.0f} MiB/s"
    what = f"{folder} ({filesystem}): {_size(free)} free of {_size(total)}{speed}"
    if free < least // 4:
        return [Finding(name, "fail", f"{what}; a run needs about {_size(least)}", f"free some space, or choose another disk: {option}")]
    found = []
    if free < least:
        found.append(Finding(name, "warn", f"{what}; a run needs about {_size(least)}", f"free some space, or choose another disk: {option}"))
    if write_mib_s is not None and write_mib_s < SLOW_DISK:
        seconds = need.checkpoint_bytes / MIB / max(write_mib_s, 0.01)
        fix = f"choose a faster disk: {option}, or save less often: --checkpoint.every-minutes 30"
        found.append(Finding(name, "warn", f"{what}: a checkpoint would take about {seconds:.0f} s", fix))
    if name == "run" and filesystem in ("tmpfs", "ramfs", "overlay"):
        lost = "is deleted when the container ends" if filesystem == "overlay" else "is in memory"
        found.append(Finding(name, "warn", f"{folder} {lost} ({filesystem})", f"choose a disk that outlives the job: {option}"))
    return found or [Finding(name, "ok", what)]


def judge_memory(available: int | None, limit: int | None, need: Need) -> Finding:
    """Host memory: batches, the copy of a checkpoint on its way to the disk, and PyTorch itself in each process."""
    if available is None:
        return Finding("memory", "ok", "this system does not report its free memory")
    free = available if limit is None else min(available, limit)
    wanted = need.ranks * (1500 * MIB + 2 * need.checkpoint_bytes + need.workers * 300 * MIB) + need.batch_bytes
    whose = "" if limit is None or limit > available else " (the limit of this container or job)"
    what = f"{_size(free)} of memory available{whose}; a run needs about {_size(wanted)}"
    if free < wanted:
        return Finding("memory", "warn", what, "use fewer --data.workers or processes, or more memory (SLURM: --mem)")
    return Finding("memory", "ok", what)


def judge_native(summary: str, fault: bool) -> Finding:
    """Is the native extra in use? Without it runs are the same, but slower. So only an installed one that fails is a warning."""
    fix = (
        "pip install --force-reinstall --no-deps . in dtl's source folder (with gcc and libjpeg-turbo's headers), or DTL_NATIVE=0 to leave it out"
        if fault
        else ""
    )
    return Finding("native", "warn" if fault else "ok", summary, fix)


def judge_decode(
    ms_per_image: float | None, cores: float, model_images_s: float | None, *, model: str, device: str, ranks: int, workers: int, what: str
) -> Finding:
    """Can this machine's cores prepare images as fast as the model takes them? Both were measured here."""
    if ms_per_image is None:
        return Finding("decode", "warn", "decoding could not be measured", "dtl doctor --data FOLDER measures it on your own images")
    able = 1000.0 / ms_per_image
    summary = f"one core prepares {able:,.0f} images/s ({what}), {counted(float(cores), 'core')} available"
    if model_images_s is None:
        return Finding("decode", "ok", f"{summary}: {able * cores:,.0f} images/s")
    wanted = model_images_s * ranks
    needed = -(-wanted // able)
    where = counted(ranks, "process" if device == "cpu" else device)
    summary += f"; {model} trains {rate(wanted)} images/s on {where}, which needs {counted(int(needed), 'core')}"
    # On a CPU the network itself takes the same cores, whatever the loader does.
    if needed > cores and device != "cpu":
        fix = "dtl pack SRC DST --short-side 256 (smaller images decode faster), or a machine with more cores per GPU"
        return Finding("decode", "warn", f"{summary}: data loading will be the bottleneck", fix)
    if workers * ranks < needed and device != "cpu":
        wait = 1 - workers * ranks * able / wanted
        few = f"{summary}; with {counted(workers * ranks, 'loader process')} the GPUs would wait {wait:.0%} of the time for data"
        return Finding("decode", "warn", few, f"--data.workers {int(-(-needed // ranks))}")
    return Finding("decode", "ok", summary)


def _parts(version: str | None) -> tuple[int, int] | None:
    numbers = (version or "").split("+")[0].split(".")
    return (int(numbers[0]), int(numbers[1])) if len(numbers) >= 2 and numbers[0].isdigit() and numbers[1].isdigit() else None


def _size(count: int) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.0f} MiB"
