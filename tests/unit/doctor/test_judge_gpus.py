"""GPU findings from recorded answers of nvidia-smi: no GPU is needed to judge one."""

from __future__ import annotations

from typing import Any

import pytest

from dtl.doctor.judge_gpus import driver_cuda, judge_cuda, judge_links, read_gpus, read_links

# The format of driver 535 to 570: tabs, an underlined head in newer ones, network cards behind the GPUs.
EIGHT = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tGPU4\tGPU5\tGPU6\tGPU7\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    + "".join(
        f"GPU{i}\t" + "\t".join(" X " if i == j else "NV18" for j in range(8)) + f"\t{'PIX' if i < 4 else 'SYS'}\tSYS\t0-47\t0\t\tN/A\n" for i in range(8)
    )
    + "NIC0\tPIX\tPIX\tPIX\tPIX\tSYS\tSYS\tSYS\tSYS\t X \tSYS\nNIC1\tSYS\tSYS\tSYS\tSYS\tPIX\tPIX\tPIX\tPIX\tSYS\t X \n"
    + "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)\n"
)
TWO_SOCKETS = """\
        GPU0    GPU1    GPU2    GPU3    CPU Affinity    NUMA Affinity
GPU0     X      PHB     SYS     SYS     0-11            0
GPU1    PHB      X      SYS     SYS     0-11            0
GPU2    SYS     SYS      X      PXB     12-23           1
GPU3    SYS     SYS     PXB      X      12-23           1
"""
PLAIN = "| NVIDIA-SMI 535.104.05             Driver Version: 535.104.05   CUDA Version: 12.2     |"
SEEN: dict[str, Any] = {
    "torch": "2.9.1+cu126", "cuda": "12.6", "count": 2, "nccl": "2.27.5", "capabilities": ["9.0", "9.0"], "arch_list": ["sm_80", "sm_86", "sm_90"],
    "names": ["NVIDIA H100", "NVIDIA H100"],
}  # fmt: skip
IDLE = "0, NVIDIA H100 80GB HBM3, 81559, 4, 550.54.15, Default\n1, NVIDIA H100 80GB HBM3, 81559, 4, 550.54.15, Default\n"


def test_links_of_eight_gpus_over_nvlink() -> None:
    links = read_links(EIGHT)
    assert len(links) == 28
    assert set(links.values()) == {"NV"}
    (found,) = judge_links(links)
    assert found.status == "ok"
    assert "8 GPUs" in found.summary
    assert "NVLink" in found.summary


def test_two_sockets_are_told_with_the_gpus_of_one() -> None:
    links = read_links(TWO_SOCKETS)
    assert links == {(0, 1): "PHB", (0, 2): "SYS", (0, 3): "SYS", (1, 2): "SYS", (1, 3): "SYS", (2, 3): "PXB"}
    (found,) = judge_links(links)
    assert found.status == "warn"
    assert "CPU sockets" in found.summary
    assert found.fix.startswith("CUDA_VISIBLE_DEVICES=0,1 ")


@pytest.mark.parametrize("text", ["", "nothing", "GPU0\nGPU0  X\n", "Failed to initialize NVML: Driver/library version mismatch\n"])
def test_an_answer_that_says_nothing_gives_no_links(text: str) -> None:
    assert read_links(text) == {}
    assert judge_links({}) == []


def test_gpus_and_the_drivers_cuda_are_read() -> None:
    gpus = read_gpus(IDLE + "No devices were found\n")
    assert [(gpu.index, gpu.total_mib, gpu.driver) for gpu in gpus] == [(0, 81559, "550.54.15"), (1, 81559, "550.54.15")]
    assert driver_cuda(PLAIN) == (12, 2)
    assert driver_cuda("NVIDIA-SMI has failed") is None


def test_a_sound_machine_is_ok() -> None:
    found = judge_cuda(SEEN, read_gpus(IDLE), (12, 4))
    assert {one.status for one in found} == {"ok"}
    assert any("NCCL 2.27.5" in one.summary for one in found)


def test_no_gpu_is_no_fault() -> None:
    (found,) = judge_cuda({"torch": "2.9", "cuda": "13.0", "count": 0}, [], None)
    assert found.status == "ok"


@pytest.mark.parametrize(
    ("changes", "smi", "knows", "said", "fix"),
    [
        ({"cuda": None, "count": 0}, IDLE, (12, 4), "built for CPUs only", "pip install"),
        ({"cuda": "13.0", "count": 0}, IDLE, (12, 4), "supports CUDA 12.4 at most, but torch is built for CUDA 13.0", "install a driver for CUDA 13"),
        ({"count": 0, "error": "CUDA unknown error"}, IDLE, (12, 6), "PyTorch finds none: CUDA unknown error", "docker run --gpus all"),
        ({"count": 0, "visible_devices": ""}, IDLE, (12, 6), "CUDA_VISIBLE_DEVICES='' hides them", "unset"),
        ({"capabilities": ["6.1", "9.0"]}, IDLE, (12, 6), "GPU 0 has compute capability 6.1", "pytorch.org"),
        ({"nccl": ""}, IDLE, (12, 6), "without NCCL", "pytorch.org"),
        ({}, IDLE.replace(" 4,", " 60000,", 1), (12, 6), "GPU 0: 60,000 of 81,559 MiB are already in use", "CUDA_VISIBLE_DEVICES"),
        ({}, IDLE.replace("Default", "Prohibited", 1), (12, 6), "compute mode Prohibited", "nvidia-smi -c"),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(changes: dict[str, Any], smi: str, knows: tuple[int, int], said: str, fix: str) -> None:
    bad = [one for one in judge_cuda({**SEEN, **changes}, read_gpus(smi), knows) if one.status != "ok"]
    assert len(bad) == 1
    assert said in bad[0].summary
    assert fix in bad[0].fix


@pytest.mark.parametrize(
    ("capability", "arch_list", "runs"),
    [
        ("8.6", ["sm_80"], True),
        ("8.0", ["sm_86"], False),
        ("12.0", ["sm_90", "compute_90"], True),
        ("7.5", ["sm_80", "compute_80"], False),
        ("10.0", ["sm_100a"], True),
    ],
)
def test_which_kernels_run_where(capability: str, arch_list: list[str], runs: bool) -> None:
    found = judge_cuda({**SEEN, "count": 1, "capabilities": [capability], "arch_list": arch_list}, read_gpus(IDLE), None)
    assert (not any(one.status == "fail" for one in found)) == runs
