"""Findings about a cluster: network, Slurm, wandb, sums of two processes."""

from __future__ import annotations

import pytest

from dtl.doctor.finding import worst
from dtl.doctor.judge_cluster import Interface, choose_interface, judge_network, judge_reduce, judge_slurm, judge_wandb
from dtl.doctor.judge_machine import judge_decode

LO, ETH, IB, DOCKER = Interface("lo", "127.0.0.1"), Interface("eth0", "10.0.0.5"), Interface("ib0", "10.1.0.5"), Interface("docker0", "172.17.0.1")


def test_the_interface_that_nccl_would_take() -> None:
    every = [LO, DOCKER, ETH, IB]
    assert choose_interface(every, None) == IB
    assert choose_interface([LO, DOCKER, ETH], None) == ETH
    assert choose_interface([LO, DOCKER], None) == DOCKER
    assert choose_interface(every, "eth") == ETH
    assert choose_interface(every, "^ib,lo,docker") == ETH
    assert choose_interface(every, "=eth") is None
    assert choose_interface([Interface("eth0", None), Interface("eth1", "10.0.0.6", up=False)], None) is None


@pytest.mark.parametrize(
    ("environ", "address", "status", "said"),
    [
        ({}, "10.0.0.5", "ok", "gloo uses eth0, NCCL eth0"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.1.1", "ok", "gloo uses lo"),
        (
            {"NCCL_SOCKET_IFNAME": "bond0"},
            "10.0.0.5",
            "fail",
            "NCCL_SOCKET_IFNAME=bond0, but no such interface has an address here; interfaces: docker0, eth0, lo",
        ),
        ({}, None, "warn", "cannot be resolved here"),
        ({}, "127.0.1.1", "warn", "works on one machine, but not on several"),
    ],
)
def test_network(environ: dict[str, str], address: str | None, status: str, said: str) -> None:
    found = judge_network([LO, DOCKER, ETH], environ, hostname="node1", resolves_to=address)
    assert worst(found) == status
    assert any(said in one.summary for one in found)
    if status != "ok":
        assert any("eth0" in one.fix for one in found)


@pytest.mark.parametrize(
    ("environ", "job", "said"),
    [
        ({}, None, "not installed"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, "JobId=7 Requeue=1 TimeLimit=01:00:00", "time limit 01:00:00"),
        ({"SLURM_JOB_ID": "7"}, "JobId=7 Requeue=0 TimeLimit=01:00:00", "is not requeued after a preemption"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None, "8 separate runs"),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}, None, "1 CPU(s) per task: too few"),
    ],
)
def test_slurm(environ: dict[str, str], job: str | None, said: str) -> None:
    found = judge_slurm(environ, has_sbatch=False, job=job, workers=2, gpus=0)
    assert any(said in one.summary for one in found)
    assert all(one.fix for one in found if one.status != "ok")


@pytest.mark.parametrize(
    ("variables", "status"), [({"SLURM_GPUS_ON_NODE": "2"}, "fail"), ({"SLURM_JOB_GPUS": "0"}, "fail"), ({"SLURM_GPUS_ON_NODE": "0"}, "ok")]
)
def test_gpus_that_slurm_gave_and_torch_does_not_see_are_a_fault(variables: dict[str, str], status: str) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", **variables}
    assert judge_slurm(environ, has_sbatch=True, job=None, workers=2, gpus=0)[0].status == status
    assert judge_slurm(environ, has_sbatch=True, job=None, workers=2, gpus=2)[0].status == "ok"


def test_wandb_and_the_sum_over_two_processes() -> None:
    assert judge_wandb("offline", "", installed=True, reachable=None).fix.startswith("wandb login")
    assert judge_wandb("online", "", installed=True, reachable=False).status == "warn"
    assert judge_wandb("off", "", installed=False, reachable=None).status == "ok"
    right = [{"sum": 3.0, "mib_s": 100.0}, {"sum": 3.0, "mib_s": 90.0}]
    assert judge_reduce(right, backend="gloo", seconds=1.0, problem="").status == "ok"
    assert judge_reduce([right[0], {"sum": 2.5, "mib_s": 1}], backend="nccl", seconds=1.0, problem="").status == "fail"
    silent = judge_reduce(None, backend="nccl", seconds=60.0, problem="no answer within 60 s")
    assert silent.status == "fail"
    assert "NCCL_DEBUG=INFO" in silent.fix


@pytest.mark.parametrize(
    ("ms", "images_s", "cores", "workers", "device", "status", "fix"),
    [
        (2.0, 1000.0, 16.0, 4, "GPU", "ok", ""),
        (2.0, 3000.0, 16.0, 2, "GPU", "warn", "--data.workers 6"),
        (2.0, 3000.0, 4.0, 2, "GPU", "warn", "--short-side"),
        (2.0, 30.0, 2.0, 2, "cpu", "ok", ""),
        (2.0, None, 2.0, 2, "GPU", "ok", ""),
        (None, 30.0, 2.0, 2, "GPU", "warn", ""),
    ],
)
def test_decoding_against_what_the_network_takes(
    ms: float | None, images_s: float | None, cores: float, workers: int, device: str, status: str, fix: str
) -> None:
    found = judge_decode(ms, cores, images_s, model="resnet18", device=device, ranks=1, workers=workers, what="photos")
    assert found.status == status
    assert ("with 2 loader processes the GPUs would wait 67% of the time for data" in found.summary) == (fix == "--data.workers 6")
    assert fix in found.fix
