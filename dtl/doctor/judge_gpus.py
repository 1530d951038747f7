"""GPUs, driver, CUDA and links, judged from the answers of PyTorch and `nvidia-smi`. Pure: texts and numbers in, findings out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtl.doctor.finding import Finding
from dtl.text import counted

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# From near to far, as `nvidia-smi topo -m` explains them; NV# is NVLink.
LINKS = {
    "NV": "NVLink",
    "PIX": "one PCIe bridge",
    "PXB": "several PCIe bridges",
    "PHB": "the CPU's PCIe host bridge",
    "NODE": "several host bridges of one NUMA node",
    "SYS": "the link between CPU sockets",
}
BUSY_MIB = 1024


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    total_mib: int
    used_mib: int
    driver: str
    compute_mode: str = "Default"


QUERY = "index,name,memory.total,memory.used,driver_version,compute_mode"


def read_gpus(text: str) -> list[Gpu]:
    """The answer to `nvidia-smi --query-gpu=QUERY --format=csv,noheader,nounits`. Other lines are ignored."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 6 and cells[0].isdigit():
            found.append(Gpu(int(cells[0]), cells[1], _number(cells[2]), _number(cells[3]), cells[4], cells[5]))
    return found


def driver_cuda(text: str) -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports, from the head of plain `nvidia-smi`."""
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def read_links(text: str) -> dict[tuple[int, int], str]:
    """{(i, j): link} for i < j of `nvidia-smi topo -m`; links are keys of LINKS, an unknown word stays as it is."""
    lines = [_COLOURS.sub("", line) for line in text.splitlines()]
    head = next((line.split() for line in lines if "GPU1" in line.split()), [])
    columns = [name for name in head if re.fullmatch(r"GPU\d+", name)]
    links: dict[tuple[int, int], str] = {}
    for line in lines:
        words = line.split()
        if not words or words[0] not in columns or len(words) <= len(columns):
            continue
        for name, word in zip(columns, words[1:]):
            i, j = int(words[0][3:]), int(name[3:])
            if i < j:
                links[i, j] = "NV" if re.fullmatch(r"NV\d+", word) else word
    return links


def judge_links(links: Mapping[tuple[int, int], str]) -> list[Finding]:
    """How the GPUs are connected: the slowest link limits every all-reduce."""
    if not links:
        return []
    order = list(LINKS)
    far = max(links.values(), key=lambda link: order.index(link) if link in order else len(order))
    pairs = [pair for pair, link in links.items() if link == far]
    what = f"{len({i for pair in links for i in pair})} GPUs; the slowest link (GPU {pairs[0][0]} to GPU {pairs[0][1]}) goes over {LINKS.get(far, far)} ({far})"
    if far != "SYS":
        return [Finding("links", "ok", what)]
    near = _largest_near_group(links)
    fix = (
        f"CUDA_VISIBLE_DEVICES={','.join(map(str, near))} keeps a run of {len(near)} GPUs on one socket"
        if len(near) > 1
        else "all-reduces are slower here; a larger data.global_batch_size means fewer of them per epoch"
    )
    return [Finding("links", "warn", what, fix)]


def _largest_near_group(links: Mapping[tuple[int, int], str]) -> list[int]:
    gpus = sorted({i for pair in links for i in pair})
    groups = []
    for start in gpus:
        group = [start]
        for other in gpus:
            if other != start and all(links.get((min(other, g), max(other, g))) not in ("SYS", None) for g in group):
                group.append(other)
        groups.append(sorted(group))
    return max(groups, key=len, default=[])


def judge_cuda(facts: Mapping[str, Any], gpus: Sequence[Gpu], driver_knows: tuple[int, int] | None) -> list[Finding]:
    """Does this PyTorch see the GPUs that the machine has, and was it built for them?

    `facts`: {torch, cuda (what it was built for, or None), available, count, error, capabilities ["9.0", ...], arch_list, nccl}.
    """
    built, count = facts.get("cuda"), int(facts.get("count") or 0)
    if not gpus and not count:
        kind = f"built for CUDA {built}" if built else "built for CPUs"
        return [Finding("gpu", "ok", f"no GPU found; torch is {kind}, runs use the CPU")]
    if gpus and not built:
        fix = "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cuNNN (NNN: the driver's CUDA)"
        return [Finding("gpu", "fail", f"{counted(len(gpus), 'GPU')} found, but torch {facts.get('torch')} is built for CPUs only", fix)]
    if gpus and not count:
        return [_unseen(facts, gpus, driver_knows)]
    driver = f", driver {gpus[0].driver}" if gpus else ""
    found = [Finding("gpu", "ok", f"{counted(count, 'GPU')}, {_names(facts, gpus)}, torch built for CUDA {built}{driver}")]
    arch = [str(name) for name in facts.get("arch_list", [])]
    for number, capability in enumerate(facts.get("capabilities", [])):
        if arch and not _runs_on(str(capability), arch):
            what = f"GPU {number} has compute capability {capability}, for which torch has no kernels ({', '.join(arch)})"
            found.append(Finding("gpu", "fail", what, "install a torch build that supports it (pytorch.org/get-started), or use --run.device cpu"))
    if count > 1 and not facts.get("nccl"):
        fix = "install torch for Linux from pytorch.org: its CUDA builds include NCCL"
        found.append(Finding("nccl", "fail", "several GPUs, but torch is built without NCCL", fix))
    elif facts.get("nccl"):
        found.append(Finding("nccl", "ok", f"NCCL {facts['nccl']}"))
    return found + judge_use(gpus)


def judge_use(gpus: Sequence[Gpu]) -> list[Finding]:
    """Memory that other processes use, and compute modes that forbid a process."""
    found = []
    for gpu in gpus:
        if gpu.used_mib > BUSY_MIB:
            fix = "nvidia-smi shows the processes that use it; CUDA_VISIBLE_DEVICES selects other GPUs"
            found.append(Finding("gpu", "warn", f"GPU {gpu.index}: {gpu.used_mib:,} of {gpu.total_mib:,} MiB are already in use", fix))
        if gpu.compute_mode == "Prohibited":
            what = f"GPU {gpu.index} is in compute mode Prohibited: no process may use it"
            found.append(Finding("gpu", "fail", what, "ask an administrator to run nvidia-smi -c DEFAULT"))
    return found


def _unseen(facts: Mapping[str, Any], gpus: Sequence[Gpu], driver_knows: tuple[int, int] | None) -> Finding:
    built = tuple(int(part) for part in str(facts["cuda"]).split(".")[:2])
    visible = facts.get("visible_devices")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return Finding("gpu", "fail", f"{counted(len(gpus), 'GPU')} found, but CUDA_VISIBLE_DEVICES={visible!r} hides them", "unset CUDA_VISIBLE_DEVICES")
    if driver_knows is not None and driver_knows[0] < built[0]:
        fix = f"install a driver for CUDA {built[0]} or newer, or a torch built for CUDA {driver_knows[0]} (pytorch.org/get-started)"
        what = f"driver {gpus[0].driver} supports CUDA {driver_knows[0]}.{driver_knows[1]} at most, but torch is built for CUDA {facts['cuda']}"
        return Finding("gpu", "fail", what, fix)
    reason = f": {facts['error']}" if facts.get("error") else ""
    fix = "python -c 'import torch; torch.cuda.init()' shows why; in a container: docker run --gpus all"
    return Finding("gpu", "fail", f"nvidia-smi shows {counted(len(gpus), 'GPU')}, PyTorch finds none{reason}", fix)


def _runs_on(capability: str, arch_list: Sequence[str]) -> bool:
    """Machine code of the same major and no newer minor version, or PTX (compute_) of any older one, runs."""
    major, minor = (int(part) for part in capability.split("."))
    for name in arch_list:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if not found:
            continue
        of = int(found[2]), int(found[3])
        if (found[1] == "sm" and of[0] == major and of[1] <= minor) or (found[1] == "compute" and of <= (major, minor)):
            return True
    return False


def _names(facts: Mapping[str, Any], gpus: Sequence[Gpu]) -> str:
    names = list(facts.get("names") or [gpu.name for gpu in gpus])
    return ", ".join(dict.fromkeys(str(name) for name in names)) or "unnamed"


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
