"""Network, SLURM and accounts, judged from the environment and the answers of the system. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtl.doctor.finding import Finding

# What NCCL passes over when it chooses by itself (besides lo); taken only where nothing else is there.
_VIRTUAL = ("docker", "veth", "virbr", "br-", "cni", "flannel", "tailscale")


@dataclass(frozen=True)
class Interface:
    name: str
    address: str | None
    """IPv4"""
    up: bool = True


def choose_interface(interfaces: Sequence[Interface], wanted: str | None) -> Interface | None:
    """What NCCL takes: an InfiniBand one first, then the first that is neither lo nor docker, then docker, then lo.

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
    """Which interface the ranks of several machines would meet over. One machine alone always has lo."""
    found = []
    names = {interface.name for interface in interfaces}
    real = next((i for i in interfaces if i.up and i.address and i.name != "lo" and not i.name.startswith(_VIRTUAL)), None)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environ.get(variable)
        if not value:
            continue
        chosen = choose_interface(interfaces, value if variable.startswith("NCCL") else f"={value}")
        if chosen is None:
            what = f"{variable}={value}, but this machine has {', '.join(sorted(names)) or 'no interfaces'} (or it has no address)"
            found.append(Finding("network", "fail", what, f"export {variable}={real.name if real else 'lo'}"))
    nccl = choose_interface(interfaces, environ.get("NCCL_SOCKET_IFNAME"))
    gloo = environ.get("GLOO_SOCKET_IFNAME") or next((i.name for i in interfaces if i.address == resolves_to), None)
    name = real.name if real else "NAME"
    fix = f"export GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}" + ("" if real else " (`ip addr` lists the names)")
    if resolves_to is None and not environ.get("GLOO_SOCKET_IFNAME"):
        what = f"the host name {hostname} has no address here: gloo takes lo, and ranks on other machines cannot reach it"
        found.append(Finding("network", "warn", what, fix))
    elif real and resolves_to is not None and resolves_to.startswith("127.") and not environ.get("GLOO_SOCKET_IFNAME"):
        what = f"the host name {hostname} means {resolves_to}, so gloo takes lo: fine on one machine, not on several"
        found.append(Finding("network", "warn", what, fix))
    if nccl is not None and nccl.name.startswith(_VIRTUAL):
        what = f"NCCL would take {nccl.name} ({nccl.address}), which other machines cannot reach"
        found.append(Finding("network", "warn", what, fix))
    if not found:
        over = f"{nccl.name} ({nccl.address})" if nccl else "none"
        found.append(Finding("network", "ok", f"gloo takes {gloo or 'lo'}, NCCL {over}"))
    return found


def judge_slurm(environ: Mapping[str, str], *, has_sbatch: bool, job: str | None, workers: int) -> list[Finding]:
    """Inside a job: its shape. `job`: the answer of `scontrol show job ID`."""
    number = environ.get("SLURM_JOB_ID")
    if not number:
        return [Finding("slurm", "ok", "sbatch is here, this is no job" if has_sbatch else "no SLURM here")]
    found = []
    tasks, nodes = int(environ.get("SLURM_NTASKS") or 1), int(environ.get("SLURM_NNODES") or 1)
    what = f"job {number}: {nodes} node(s), {tasks} task(s)"
    if tasks > 1 and "SLURM_PROCID" in environ and not environ.get("WORLD_SIZE"):
        lone = f"{what}, and this process is one of them without WORLD_SIZE: `srun dtl train` would be {tasks} separate runs"
        found.append(Finding("slurm", "warn", lone, "sbatch slurm/multi_node.sbatch CONFIG starts the ranks together"))
    cpus = environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE")
    if cpus and cpus.isdigit() and int(cpus) < workers + 1:
        few = f"{what}, {cpus} CPU(s) each for a training process and {workers} loader processes"
        found.append(Finding("slurm", "warn", few, f"#SBATCH --cpus-per-task={workers + 1}"))
    if job:
        facts = dict(re.findall(r"(\w+)=(\S+)", job))
        if facts.get("Requeue") == "0":
            found.append(Finding("slurm", "warn", f"{what} is not put back into the queue after a preemption", "#SBATCH --requeue"))
        what += f", time limit {facts.get('TimeLimit', 'unknown')}"
    return found or [Finding("slurm", "ok", what)]


def judge_wandb(mode: str, why: str, *, installed: bool, reachable: bool | None) -> Finding:
    """`mode`: what `tracking.wandb: auto` would do."""
    if mode == "off":
        return Finding("wandb", "ok", "off (by WANDB_MODE or WANDB_DISABLED)")
    if not installed:
        return Finding("wandb", "warn", "not installed: runs continue without it", "pip install wandb")
    if mode == "offline":
        fix = "wandb login (for online tracking), or wandb sync runs/NAME/wandb/offline-run-* later"
        return Finding("wandb", "ok", why or "no key is known: runs are tracked offline, in runs/NAME/wandb", fix)
    if reachable is False:
        what = "a key is known, but its server cannot be reached from here: starting online would wait 20 s"
        return Finding("wandb", "warn", what, "export WANDB_MODE=offline")
    return Finding("wandb", "ok", "a key is known: runs are tracked online")


def judge_reduce(results: Sequence[Mapping[str, object]] | None, *, backend: str, seconds: float, problem: str) -> Finding:
    """A sum over two real processes on this machine."""
    if problem or results is None:
        fix = "export GLOO_SOCKET_IFNAME=lo (one machine); a firewall or a stale network interface is the usual cause"
        if backend == "nccl":
            fix = "NCCL_DEBUG=INFO dtl doctor shows where it stops; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 show which path is broken"
        return Finding("all-reduce", "fail", f"two processes could not add numbers over {backend}: {problem or 'no answer'}", fix)
    wrong = [result for result in results if result.get("sum") != 3.0]
    if wrong:
        fix = "this machine's network or GPUs compute wrongly; NCCL_P2P_DISABLE=1 is worth a try"
        return Finding("all-reduce", "fail", f"1 + 2 over {backend} gave {wrong[0].get('sum')}", fix)
    rate = min(float(str(result["mib_s"])) for result in results)
    return Finding("all-reduce", "ok", f"two processes over {backend}: right, {rate:,.0f} MiB/s ({seconds:.1f} s with starting them)")
