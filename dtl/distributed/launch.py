"""What the launcher was asked for, read before any process group exists.

Seen with accelerate 1.15 on a machine without a GPU: `accelerate launch --cpu --num_processes 2` starts ONE process, and `--multi_gpu
--num_processes 2` starts two that each believe to be alone unless they know that they are on CPUs. Neither passes on to the script what was
asked for, so that the launcher's own command line is looked at as well, where the system shows it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtl.errors import UserError
from dtl.machine import Process
from dtl.text import counted
from dtl.untrusted import read_yaml


@dataclass(frozen=True)
class Launch:
    world_size: int | None
    """WORLD_SIZE of the environment: what a distributed launcher started."""
    local_world_size: int
    """Processes on this node. Without LOCAL_WORLD_SIZE (srun, mpirun) that is known once the ranks have met."""
    asked_for: int | None
    """Number of processes on the launcher's command line or in its config file, where that can be seen."""
    use_cpu: bool
    """The launch says that the processes belong on CPUs."""
    precision: str | None
    """Mixed precision that the launch gives, if any: no, bf16, fp16."""
    local_rank: int = 0
    """Number of this process on its node. Its GPU may have another: some launchers show each process one GPU."""


def read_launch(environment: dict[str, str] | None = None, command: list[str] | None = None) -> Launch:
    """The launch that this process came from. `command` is the launcher's command line (by default that of the parent process)."""
    env = dict(os.environ) if environment is None else environment
    options = _accelerate_options(_parent_command() if command is None else command)
    world_size = int(env["WORLD_SIZE"]) if env.get("WORLD_SIZE") else None
    asked_for = options.get("num_processes")
    return Launch(
        world_size=world_size,
        local_world_size=int(env.get("LOCAL_WORLD_SIZE") or env.get("WORLD_SIZE") or 1),
        asked_for=int(asked_for) if asked_for is not None else None,
        use_cpu=_is_true(env.get("ACCELERATE_USE_CPU")) or _is_true(options.get("use_cpu")) or _is_true(options.get("cpu")),
        precision=_precision(env, options),
        local_rank=int(env.get("LOCAL_RANK") or 0),
    )


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    local_rank: int
    process: Process
    gpu: tuple[str, ...] = ()
    """Names of its GPU: two ranks with one in common share it. None on a CPU."""


def check_own_gpus(places: Sequence[Place]) -> None:
    """UserError where two ranks would compute on one GPU, or on two MIG slices of one, which NCCL cannot join; `places` by rank."""
    owners: dict[str, int] = {}
    for rank, place in enumerate(places):
        for name in place.gpu:
            first = owners.setdefault(name, rank)
            if first != rank:
                number = len({other.gpu[-1] for other in places})
                raise UserError(
                    f"rank {first} and rank {rank} have the same GPU ({name}, host {place.host}): {counted(len(places), 'process')} on "
                    f"{counted(number, 'GPU')}; launch one process per GPU, or use --run.device cpu"
                )


@dataclass(frozen=True)
class _Refused:
    """What a launcher can ask for by an environment variable and dtl does not do."""

    what: str
    instead: str = "launch with launch/gpus.yaml (or cpu_2.yaml, nodes.yaml), or answer `no` in accelerate config"
    fine: tuple[str, ...] = ("", "0", "false", "no")


_REFUSED = {
    "ACCELERATE_USE_FSDP": _Refused("FSDP"),
    "ACCELERATE_USE_DEEPSPEED": _Refused("DeepSpeed"),
    "ACCELERATE_USE_MEGATRON_LM": _Refused("Megatron-LM"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _Refused("tensor, context or hybrid parallelism"),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": _Refused("SageMaker's distributed types"),
    "ACCELERATE_MIXED_PRECISION": _Refused("mixed precision in this type", "use --mixed_precision bf16, fp16 or no", ("", "no", "bf16", "fp16")),
    "ACCELERATE_DYNAMO_BACKEND": _Refused("compilation by the launcher", "use --model.compile of dtl instead", ("", "no")),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _Refused(
        "gradient accumulation by the launcher, which would divide the loss once more", "data.micro_batch_size decides it", ("", "1")
    ),
    "ACCELERATE_TORCH_DEVICE": _Refused("a device chosen by the launcher", "use --run.device cpu or cuda, and CUDA_VISIBLE_DEVICES", ("",)),
}


def check_supported(environment: Mapping[str, str]) -> None:
    """UserError where the launch asks for what dtl does not do: never train as nobody has asked."""
    for name, refused in _REFUSED.items():
        if environment.get(name, "").strip().lower() not in refused.fine:
            raise UserError(f"the launch asks for {refused.what} ({name}={environment[name]}), but dtl trains data-parallel with DDP; {refused.instead}")


def launch_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the environment decides how processes are launched and talk to each other, for the record."""
    kept = re.compile(r"ACCELERATE_.*|NCCL_.*|TORCH_NCCL_.*|GLOO_.*|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT")
    return {name: value[:200] for name, value in sorted(environment.items()) if kept.fullmatch(name)}


def gpus_of_slurm(environment: Mapping[str, str]) -> str | None:
    """The variable in which Slurm says that this job has GPUs on this node, `NAME=VALUE`."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS"):
        value = environment.get(name, "").strip()
        if value and (value != "0" or name != "SLURM_GPUS_ON_NODE"):  # the others list numbers of GPUs: 0 is the first
            return f"{name}={value}"
    return None


# ---- the command line of accelerate


def _precision(env: dict[str, str], options: dict[str, Any]) -> str | None:
    """Only what somebody wrote down: accelerate exports `no` also when nobody gave it."""
    value = options.get("mixed_precision")
    if value is None and not options:
        value = env.get("ACCELERATE_MIXED_PRECISION")
    if value is False:  # YAML reads a bare `no` as false
        return "no"
    return None if value is None else str(value)


def _parent_command() -> list[str]:
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in raw.split(b"\0") if part]


def _accelerate_options(command: list[str]) -> dict[str, Any]:
    """num_processes, mixed_precision, cpu/use_cpu of `accelerate launch`, its config file included; {} for any other parent."""
    start = _launch_arguments(command)
    if start is None:
        return {}
    given: dict[str, Any] = {"launched": True}
    rest = command[start:]
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            break  # the script: what follows belongs to it
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in _SWITCHES:
            given[name] = True
            continue
        given[name] = value if equals else (rest.pop(0) if rest else "")
    file = given.get("config_file") or _default_config_file()
    return {**_read_file(file), **given} if file else given


# Options of accelerate launch that take no value.
_SWITCHES = frozenset(
    (
        "cpu",
        "multi_gpu",
        "tpu",
        "use_mps_device",
        "m",
        "module",
        "no_python",
        "use_deepspeed",
        "use_fsdp",
        "use_megatron_lm",
        "use_xpu",
        "same_network",
        "quiet",
        "q",
        "debug",
        "downcast_bf16",
        "tpu_cluster",
        "no_tpu_cluster",
        "tpu_use_sudo",
        "use_parallelism_config",
        "dynamo_use_dynamic",
        "dynamo_use_fullgraph",
        "dynamo_use_regional_compilation",
        "enable_cpu_affinity",
    )
)


def _launch_arguments(command: list[str]) -> int | None:
    """Where the options of `accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch` begin."""
    for i, word in enumerate(command):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch" or word.endswith("accelerate/commands/launch.py"):
            return i + 1
        if name == "accelerate" and command[i + 1 : i + 2] == ["launch"]:
            return i + 2
    return None


def _default_config_file() -> str | None:
    from_environment = os.environ.get("ACCELERATE_CONFIG_FILE")
    if from_environment:
        return from_environment
    home = Path(os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))).expanduser()
    file = home / "accelerate" / "default_config.yaml"
    return str(file) if file.exists() else None


def _read_file(file: str) -> dict[str, Any]:
    """A config file that cannot be read is accelerate's to complain about."""
    try:
        values = read_yaml(file)
    except (OSError, UserError):
        return {}
    return values if isinstance(values, dict) else {}


def _is_true(value: object) -> bool:
    return str(value).lower() in ("1", "true", "yes", "y", "on")
