"""All checks of `dtl doctor`, in order: each probes, then judges. A check that breaks or does not answer is itself a finding."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from dtl import machine
from dtl.config.models import ModelConfig, num_pixels
from dtl.doctor import judge_cluster, judge_gpus, judge_machine, probe
from dtl.doctor.finding import Finding
from dtl.doctor.judge_machine import Need
from dtl.doctor.probe import Measurement, Unanswered
from dtl.optim.batch_size import advise_batch

PATIENCE = 20.0
_WITHOUT = "fix that, or skip the measurements with dtl doctor --quick"


@dataclass
class Doctor:
    """What a run needs, and what has been found so far."""

    run_dir: Path
    cache_dir: Path
    need: Need = field(default_factory=Need)
    model: ModelConfig = field(default_factory=ModelConfig)
    precision: str = "auto"
    global_batch_size: int | None = None
    """Divided among the GPUs, once they are known; None: `need` has the batch of a rank."""
    data: str | None = None
    measure: bool = True
    """Run the measurements that take seconds: the all-reduce of two processes, decoding, the network."""
    keep: int = 3
    auto_workers: bool = False
    """`data.workers: auto`: what it comes to is decided when the GPUs are known."""
    torch: dict[str, Any] = field(default_factory=dict)
    gpus: list[judge_gpus.Gpu] = field(default_factory=list)

    def findings(self) -> Iterator[Finding]:
        checks: list[tuple[str, Callable[[], Iterable[Finding]], float]] = [
            ("versions", lambda: judge_machine.judge_versions(tuple(sys.version_info[:3]), probe.versions()), PATIENCE),
            ("gpu", self._gpus, 100.0),
            ("shm", lambda: [judge_machine.judge_shm(*probe.shm(), self.need)], PATIENCE),
            ("memory", lambda: [judge_machine.judge_memory(*machine.memory_left(), self.need)], PATIENCE),
            ("files", lambda: [judge_machine.judge_open_files(*probe.open_files(), self.need)], PATIENCE),
            ("run", lambda: self._disk("run", self.run_dir), PATIENCE),
            ("cache", lambda: self._disk("cache", self.cache_dir), PATIENCE),
            ("network", self._network, PATIENCE),
            ("native", self._native, PATIENCE),
        ]
        if self.measure:
            checks += [("all-reduce", self._reduce, 80.0), ("decode", self._decode, 160.0)]
        checks += [("wandb", self._wandb, PATIENCE), ("slurm", self._slurm, PATIENCE)]
        for name, check, seconds in checks:
            yield from _guarded(name, check, seconds)

    def _gpus(self) -> list[Finding]:
        smi = ["nvidia-smi", f"--query-gpu={judge_gpus.QUERY}", "--format=csv,noheader,nounits"]
        looking = Measurement("torch", {}, seconds=60.0)
        self.gpus = judge_gpus.read_gpus(probe.answer_of(smi))
        knows = judge_gpus.driver_cuda(probe.answer_of(["nvidia-smi"])) if self.gpus else None
        links = judge_gpus.read_links(probe.answer_of(["nvidia-smi", "topo", "-m"])) if len(self.gpus) > 1 else {}
        try:
            self.torch = looking.result()
        except Unanswered as error:
            fix = "python -c 'import torch; print(torch.cuda.is_available())' shows why; nvidia-smi shows whether the driver answers"
            return [Finding("gpu", "fail", f"PyTorch could not query the GPUs: {error}", fix)]
        if self.global_batch_size is not None:
            self.need = replace(self.need, batch_size=-(-self.global_batch_size // max(1, int(self.torch.get("count") or 0), self.need.ranks)))
        self._choose_workers()
        return [*judge_gpus.judge_cuda(self.torch, self.gpus, knows), *judge_gpus.judge_links(links)]

    def _choose_workers(self) -> None:
        """What `data.workers: auto` comes to, for a process on each GPU."""
        if self.auto_workers:
            gpus, left = int(self.torch.get("count") or 0), [one for one in machine.memory_left() if one is not None]
            cores, memory = machine.core_share() / max(1, gpus, self.need.ranks), min(left) // (2 * max(1, gpus, self.need.ranks)) if left else None
            batch_bytes = 3 * num_pixels(self.need.image_size) * self.need.batch_size
            self.need = replace(self.need, workers=machine.loader_processes(cores, memory, on_cpu=not gpus, batch_bytes=batch_bytes))

    def _disk(self, name: str, folder: Path) -> list[Finding]:
        return judge_machine.judge_disk(name, str(folder), **probe.disk_of(folder), need=self.need, keep=self.keep)

    def _network(self) -> list[Finding]:
        hostname, address = probe.own_address()
        return judge_cluster.judge_network(probe.interfaces(), os.environ, hostname=hostname, resolves_to=address)

    def _native(self) -> list[Finding]:
        from dtl.data.decoding.decode import native

        found = native()
        return [judge_machine.judge_native(found.summary, found.fault)]

    def _reduce(self) -> list[Finding]:
        backend = "nccl" if int(self.torch.get("count") or 0) > 1 else "gloo"
        results, seconds, problem = probe.two_process_sum(backend)
        return [judge_cluster.judge_reduce(results, backend=backend, seconds=seconds, problem=problem)]

    def _decode(self) -> list[Finding]:
        device = "cuda" if int(self.torch.get("count") or 0) else "cpu"
        size = self.need.image_size
        # One after the other: at the same time they would compete for cores.
        decoding = Measurement("decode", {"image_size": size, "data": self.data, "seconds": 1.5}, seconds=60.0).result()
        batch = self.need.batch_size if device == "cuda" else min(self.need.batch_size, 8)
        given = {
            "model": self.model.name, "options": self.model.options, "channels_last": self.model.channels_last, "precision": self.precision,
            "image_size": size, "batch_size": batch, "device": device, "seconds": 5.0,
        }  # fmt: skip
        images_s, model = None, self.model.name
        found = []
        try:
            trained = Measurement("model", given, seconds=90.0).result()
            images_s, model = float(trained["images_s"]), f"{model} in precision {trained['precision']}{', not compiled,' if self.model.compile else ''}"
            self.need = replace(self.need, parameters=int(trained["parameters"]))
            gpus = max(1, int(self.torch.get("count") or 0))
            if line := advise_batch(batch, gpus, used=int(trained.get("used") or 0), total=int(trained.get("total") or 0)):
                found.append(Finding("batch", "warn", *line.split("; ", 1)))
        except Unanswered as error:
            found.append(Finding("model", "warn", f"{self.model.name} could not be run: {error}", "use a smaller --data.micro-batch-size, or another --model"))
        judged = judge_machine.judge_decode(
            float(decoding["ms_per_image"]),
            machine.core_share(),
            images_s,
            model=model,
            device="GPU" if device == "cuda" else "cpu",
            ranks=max(1, int(self.torch.get("count") or 0)),
            workers=self.need.workers,
            what=str(decoding["what"]),
        )
        return [*found, judged]

    def _wandb(self) -> list[Finding]:
        from dtl.runs.wandb import choose_mode

        mode, why = choose_mode("auto", os.environ)
        reachable = None
        if mode == "online":
            address = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
            reachable = probe.reaches(address.hostname or "", address.port or (80 if address.scheme == "http" else 443))
        return [judge_cluster.judge_wandb(mode, why, installed=find_spec("wandb") is not None, reachable=reachable)]

    def _slurm(self) -> list[Finding]:
        number = os.environ.get("SLURM_JOB_ID")
        job = probe.answer_of(["scontrol", "show", "job", "-o", number], seconds=8.0) if number else None
        return judge_cluster.judge_slurm(
            os.environ, has_sbatch=shutil.which("sbatch") is not None, job=job, workers=self.need.workers, gpus=int(self.torch.get("count") or 0)
        )


def _guarded(name: str, check: Callable[[], Iterable[Finding]], seconds: float) -> list[Finding]:
    """In a thread of its own: a disk that does not answer must not take the doctor with it."""

    def work() -> list[Finding]:
        try:
            return list(check())
        except Unanswered as error:
            return [Finding(name, "warn", f"could not be measured: {error}", _WITHOUT)]
        except Exception as error:
            return [Finding(name, "warn", f"could not be checked ({type(error).__name__}: {error})", _WITHOUT)]

    try:
        return machine.within(seconds, work)
    except machine.NoAnswer as error:
        return [Finding(name, "fail", str(error), "a hanging network disk or driver is the usual cause; see dmesg")]
