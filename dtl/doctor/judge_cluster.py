"""Network, SLURM and accounts, judged from the environment and the answers of the system. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtl.distributed.launch import gpus_of_slurm
from dtl.doctor.finding import Finding

# Interfaces that NCCL avoids when it chooses by itself (besides lo): it uses them only if there is no other.
_VIRTUAL = ("docker", "veth", "virbr", "br-", "cni", "flannel", "tailscale")


@dataclass(frozen=True)
class Interface:
    name: str
    address: str | None
    """IPv4"""
    up: bool = True


def choose_interface(interfaces: Sequence[Interface], wanted: str | None) -> Interface | None:
    """The interface that NCCL uses: an InfiniBand one first, then the first that is neither lo nor docker, then docker, then lo.

    `wanted`: NCCL_SOCKET_IFNAME, a list of prefixes; ^ excludes, = asks for the exact name.
    """
    usable = [interface for interface in interfaces if interface.up and interface.address]
    if wanted:
        exclude, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
        names = wanted.lstrip("^=").split(",")
        fits = [i for i in usable if any(i.name == name if exact else i.name.startswith(name) for name in names) != exclude]
        return fits[0] if fits else None

    def rank(interface: Interface) -> int:
        if interface.name.startswith("ib"):
            return 0
        return 3 if interface.name == "lo" else 2 if interface.name.startswith("docker") else 1

    return min(usable, key=rank, default=None)


def judge_network(interfaces: Sequence[Interface], environ: Mapping[str, str], *, hostname: str, resolves_to: str | None) -> list[Finding]:
    """Which interface ranks on several machines would use. One machine alone always has lo."""
    found = []
    names = {interface.name for interface in interfaces}
    real = next((i for i in interfaces if i.up and i.address and i.name != "lo" and not i.name.startswith(_VIRTUAL)), None)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environ.get(variable)
        if not value:
            continue
        chosen = choose_interface(interfaces, value if variable.startswith("NCCL") else f"={value}")
        if chosen is None:
            what = f"{variable}={value}, but no such interface has an address here; interfaces: {', '.join(sorted(names)) or 'none'}"
            found.append(Finding("network", "fail", what, f"export {variable}={real.name if real else 'lo'}"))
    nccl = choose_interface(interfaces, environ.get("NCCL_SOCKET_IFNAME"))
    gloo = environ.get("GLOO_SOCKET_IFNAME") or next((i.name for i in interfaces if i.address == resolves_to), None)
    name = real.name if real else "NAME"
    fix = f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}" + ("" if real else " (`ip addr` lists the names)")
    if resolves_to is None and not environ.get("GLOO_SOCKET_IFNAME"):
        what = f"the host name {hostname} cannot be resolved here: gloo uses lo, which ranks on other machines cannot reach"
        found.append(Finding("network", "warn", what, fix))
    elif real and resolves_to is not None and resolves_to.startswith("127.") and not environ.get("GLOO_SOCKET_IFNAME"):
        what = f"the host name {hostname} resolves to {resolves_to}, so gloo uses lo: this works on one machine, but not on several"
        found.append(Finding("network", "warn", what, fix))
    if nccl is not None and nccl.name.startswith(_VIRTUAL):
        what = f"NCCL would use {nccl.name} ({nccl.address}), which other machines cannot reach"
        found.append(Finding("network", "warn", what, fix))
    if not found:
        over = f"{nccl.name} ({nccl.address})" if nccl else "none"
        found.append(Finding("network", "ok", f"gloo uses {gloo or 'lo'}, NCCL {over}"))
    return found


def judge_slurm(environ: Mapping[str, str], *, has_sbatch: bool, job: str | None, workers: int, gpus: int) -> list[Finding]:
    """Inside a job: its shape. `job`: the answer of `scontrol show job ID`; `gpus`: how many PyTorch sees."""
    number = environ.get("SLURM_JOB_ID")
    if not number:
        return [Finding("slurm", "ok", "sbatch is installed; this is not a job" if has_sbatch else "not installed")]
    found = []
    tasks, nodes = int(environ.get("SLURM_NTASKS") or 1), int(environ.get("SLURM_NNODES") or 1)
    what = f"job {number}: {nodes} node(s), {tasks} task(s)"
    if tasks > 1 and "SLURM_PROCID" in environ and not environ.get("WORLD_SIZE"):
        lone = f"{what}, but WORLD_SIZE is not set: `srun dtl train` would start {tasks} separate runs"
        found.append(Finding("slurm", "warn", lone, "sbatch slurm/multi_node.sbatch CONFIG starts the ranks together"))
    if not gpus and (given := gpus_of_slurm(environ)):
        unseen = f"{what}, and Slurm gave it GPUs ({given}), but PyTorch sees none: runs are refused here unless they ask for the CPU"
        found.append(Finding("slurm", "fail", unseen, "see the check gpu; nvidia-smi in the job; a torch built for CUDA (pytorch.org/get-started)"))
    cpus = environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE")
    if cpus and cpus.isdigit() and int(cpus) < workers + 1:
        few = f"{what}, {cpus} CPU(s) per task: too few for a training process and {workers} loader processes"
        found.append(Finding("slurm", "warn", few, f"#SBATCH --cpus-per-task={workers + 1}"))
    if job:
        facts = dict(re.findall(r"(\w+)=(\S+)", job))
        if facts.get("Requeue") == "0":
            found.append(Finding("slurm", "warn", f"{what} is not requeued after a preemption", "#SBATCH --requeue"))
        what += f", time limit {facts.get('TimeLimit', 'unknown')}"
    return found or [Finding("slurm", "ok", what)]


def judge_wandb(mode: str, why: str, *, installed: bool, reachable: bool | None) -> Finding:
    """`mode`: what `tracking.wandb: auto` would do."""
    if mode == "off":
        return Finding("wandb", "ok", "off (by WANDB_MODE or WANDB_DISABLED)")
    if not installed:
        return Finding("wandb", "warn", "not installed: runs are not tracked with it", "pip install wandb")
    if mode == "offline":
        fix = "wandb login (for online tracking), or wandb sync runs/NAME/wandb/offline-run-* later"
        return Finding("wandb", "ok", why or "no API key found: runs are tracked offline, in runs/NAME/wandb", fix)
    if reachable is False:
        what = "an API key was found, but the wandb server cannot be reached from here: each run would wait 20 s for it"
        return Finding("wandb", "warn", what, "export WANDB_MODE=offline")
    return Finding("wandb", "ok", "API key found: runs are tracked online")


def judge_reduce(results: Sequence[Mapping[str, object]] | None, *, backend: str, seconds: float, problem: str) -> Finding:
    """An all-reduce between two real processes on this machine."""
    if problem or results is None:
        fix = "export GLOO_SOCKET_IFNAME=lo (one machine); a firewall or a stale network interface is the usual cause"
        if backend == "nccl":
            fix = "NCCL_DEBUG=INFO dtl doctor shows where it stops; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 show which path is broken"
        return Finding("all-reduce", "fail", f"an all-reduce between two processes over {backend} failed: {problem or 'no answer'}", fix)
    wrong = [result for result in results if result.get("sum") != 3.0]
    if wrong:
        fix = "the network or the GPUs of this machine corrupt data; try NCCL_P2P_DISABLE=1"
        return Finding("all-reduce", "fail", f"the all-reduce of 1 and 2 over {backend} gave {wrong[0].get('sum')}", fix)
    rate = min(float(str(result["mib_s"])) for result in results)
    return Finding("all-reduce", "ok", f"correct between two processes over {backend}, {rate:,.0f} MiB/s ({seconds:.1f} s with their start)")
