"""The real launchers start the real entry point; what they did not start is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import free_port, kind, start, status
from launchers import ACCELERATE, ROOT, SCRIPT, launch, port
from recipes import write_recipe

PHASES = {"all": {"train": "all", "steps": 3, "lr": 0.05}}


@pytest.mark.parametrize(
    ("name", "processes", "command"),
    [
        ("file-2", 2, lambda: [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu_2.yaml"), *port(), SCRIPT]),
        ("module-3", 3, lambda: [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu_2.yaml"), "--num_processes", "3", *port(), "-m", "dtl.train"]),
        ("plain", 1, lambda: [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu.yaml"), SCRIPT]),
        ("torchrun", 2, lambda: [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), SCRIPT]),
        ("python", 1, lambda: [sys.executable, SCRIPT]),
        ("package", 1, lambda: [sys.executable, "-m", "dtl", "train"]),
    ],
)
def test_a_launch_trains_in_the_world_that_was_asked_for(tmp_path: Path, name: str, processes: int, command) -> None:  # type: ignore[no-untyped-def]
    recipe = write_recipe(tmp_path, phases=PHASES)
    done = launch([*command(), "--config", str(recipe), "--run.name", name], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(tmp_path / "runs" / name)["state"] == "done"
    device = "cpu" if "--config_file" in command() else kind()
    assert f"{processes} process{'es' if processes > 1 else ''} on {device}" in done.stderr
    assert done.stderr.count("phase all: classify") == 1, "told by one rank only"


def test_a_launch_that_gives_fewer_processes_than_asked_is_refused(tmp_path: Path) -> None:
    """accelerate launch --cpu --num_processes 2 starts one process, in silence."""
    done = launch([*ACCELERATE, "--cpu", "--num_processes", "2", SCRIPT, "--config", str(write_recipe(tmp_path, phases=PHASES))], tmp_path)
    assert done.returncode != 0
    assert "the launcher was asked for 2 processes, but WORLD_SIZE in this process is 1" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_failure_is_told_once_and_stands_in_status_json(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, phases=PHASES)
    command = [*ACCELERATE, "--config_file", str(ROOT / "launch/cpu_2.yaml"), *port(), SCRIPT, "--config", str(recipe)]
    done = launch([*command, "--model.name", "torchvision/resnet19"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("dtl: ") == 1, done.stderr
    assert status(tmp_path / "runs/tiny")["why"].startswith("input: ")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "0"}, "the environment has LOCAL_RANK=0, but no RANK"),
        ({"RANK": "3"}, None),
        ({"SLURM_GPUS_ON_NODE": "2"}, "Slurm gave this job GPUs (SLURM_GPUS_ON_NODE=2), but PyTorch sees none"),
        ({"SLURM_GPUS_ON_NODE": "2", "RUN": "--run.device=cpu"}, None),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, "warning: NVIDIA_VISIBLE_DEVICES=all, but PyTorch sees no GPU"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "the launch asks for gradient accumulation"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "the launch asks for mixed precision in this type (ACCELERATE_MIXED_PRECISION=fp8)"),
    ],
)
def test_variables_that_a_shell_or_a_job_has_set(tmp_path: Path, variables: dict[str, str], message: str | None) -> None:
    if kind() != "cpu" and message and "PyTorch sees no" in message:
        pytest.skip("PyTorch sees GPUs here, so nothing has to say that it sees none; the run on CPUs covers this")
    recipe, more = write_recipe(tmp_path, phases=PHASES), [variables["RUN"]] if "RUN" in variables else []
    job = start(["--config", str(recipe), *more], cwd=tmp_path, env={"ACCELERATE_USE_CPU": "false", **variables}).wait()
    assert "Traceback" not in job.err()
    assert message is None or job.err().count(message) == 1, job.err()
    refused = message is not None and not message.startswith("warning")
    job.check(2 if refused else 0)
    if not refused:
        assert status(tmp_path / "runs/tiny")["launch"].keys() <= {
            "ACCELERATE_USE_CPU",
            "OMP_NUM_THREADS",
            "GLOO_SOCKET_IFNAME",
            "CUDA_VISIBLE_DEVICES",
            "NCCL_DEBUG",
        }


def test_a_launch_file_for_what_dtl_does_not_do(tmp_path: Path) -> None:
    settings = "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}\nuse_cpu: true\nnum_machines: 1\nmixed_precision: 'no'"
    (tmp_path / "launch.yaml").write_text(f"compute_environment: LOCAL_MACHINE\n{settings}\n")
    recipe = write_recipe(tmp_path, phases=PHASES)
    done = launch([*ACCELERATE, "--config_file", str(tmp_path / "launch.yaml"), *port(), SCRIPT, "--config", str(recipe)], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("dtl: ") == 1, done.stderr
    assert "dtl: the launch asks for FSDP (ACCELERATE_USE_FSDP=true)" in done.stderr
