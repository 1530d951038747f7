"""What the launcher was asked for, from its command line and its config file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtl.distributed.launch import Launch, Place, check_own_gpus, check_supported, gpus_of_slurm, launch_variables, read_launch
from dtl.errors import UserError
from dtl.machine import Process

ACCELERATE = ["python", "/venv/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("command", "asked_for"),
    [
        ([*ACCELERATE, "--cpu", "--num_processes", "2", "dtl/train.py", "--data.workers", "0"], 2),
        ([*ACCELERATE, "--num_processes=3", "--multi_gpu", "-m", "dtl", "train"], 3),
        ([*ACCELERATE, "dtl/train.py", "--num_processes", "7"], None),
        (["/venv/bin/accelerate-launch", "--quiet", "--num-processes", "4", "x.py"], 4),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "5", "x.py"], 5),
        (["bash", "run.sh", "--num_processes", "2"], None),
        ([], None),
    ],
)
def test_the_number_of_processes_on_the_command_line(command: list[str], asked_for: int | None) -> None:
    assert read_launch({"HF_HOME": "/nowhere"}, command).asked_for == asked_for


def test_a_config_file_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text("distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\nmixed_precision: bf16\n")
    launch = read_launch({}, [*ACCELERATE, "--config_file", str(file), "x.py"])
    assert (launch.asked_for, launch.use_cpu, launch.precision) == (2, True, "bf16")
    launch = read_launch({}, [*ACCELERATE, "--config_file", str(file), "--num_processes", "3", "--mixed_precision", "no", "x.py"])
    assert (launch.asked_for, launch.use_cpu, launch.precision) == (3, True, "no")


def test_a_bare_no_in_yaml_is_a_precision_too(tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text("mixed_precision: no\n")
    assert read_launch({}, [*ACCELERATE, "--config_file", str(file), "x.py"]).precision == "no"


def test_the_precision_that_accelerate_exports_by_itself_is_nobodys_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.delenv("ACCELERATE_CONFIG_FILE", raising=False)
    assert read_launch({"ACCELERATE_MIXED_PRECISION": "no"}, [*ACCELERATE, "x.py"]).precision is None
    assert read_launch({"ACCELERATE_MIXED_PRECISION": "bf16"}, ["bash"]).precision == "bf16"


def test_the_environment_of_a_distributed_launcher() -> None:
    launch = read_launch({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, [])
    assert launch == Launch(world_size=4, local_world_size=2, asked_for=None, use_cpu=True, precision=None)
    assert read_launch({"WORLD_SIZE": "4", "LOCAL_RANK": "3"}, []).local_rank == 3


class TestPrecision:
    def test_auto_takes_the_launch(self) -> None:
        from dtl.distributed.runtime import resolve_precision

        assert resolve_precision("auto", launch("no"), use_cpu=True) == "no"
        assert resolve_precision("auto", launch(None), use_cpu=True) in ("no", "bf16")
        assert resolve_precision("bf16", launch(None), use_cpu=True) == "bf16"

    @pytest.mark.parametrize(
        ("wanted", "given", "trained_in", "has_bf16", "taken"),
        [
            ("auto", None, "no", True, "no"),
            ("auto", None, "bf16", True, "bf16"),
            ("auto", None, "bf16", False, "no"),  # this machine does not have it
            ("auto", None, "fp16", True, "bf16"),  # nor has any CPU
            ("auto", "no", "bf16", True, "no"),  # the launch was asked for
            ("bf16", None, "no", False, "bf16"),  # so was this
            ("auto", None, None, True, "bf16"),
        ],
    )
    def test_a_model_computes_as_it_was_trained_where_it_can(
        self, monkeypatch: pytest.MonkeyPatch, wanted: str, given: str | None, trained_in: str | None, has_bf16: bool, taken: str
    ) -> None:
        from dtl.distributed import runtime

        monkeypatch.setattr(runtime, "_cpu_has_bf16", lambda: has_bf16)
        assert runtime.resolve_precision(wanted, launch(given), True, trained_in) == taken

    @pytest.mark.parametrize(("wanted", "given", "message"), [("bf16", "no", "mixed_precision of the launch is no"), ("fp16", None, "needs a GPU")])
    def test_contradictions_are_refused(self, wanted: str, given: str | None, message: str) -> None:
        from dtl.distributed.runtime import resolve_precision

        with pytest.raises(UserError, match=message):
            resolve_precision(wanted, launch(given), use_cpu=True)

    @pytest.mark.parametrize(
        ("wanted", "given", "device", "major", "hip", "named"),
        [
            ("auto", None, "cuda", 7, None, True),
            ("auto", None, "cuda", 6, None, False),  # no tensor cores
            ("no", None, "cuda", 7, None, False),  # asked for
            ("auto", "no", "cuda", 7, None, False),  # so was this
            ("auto", None, "cuda", 7, "6.2", False),
            ("auto", None, "cpu", 7, None, False),
        ],
    )
    def test_float32_on_a_gpu_that_has_only_fp16_is_not_taken_in_silence(
        self, monkeypatch: pytest.MonkeyPatch, wanted: str, given: str | None, device: str, major: int, hip: str | None, named: bool
    ) -> None:
        import torch

        from dtl.distributed.runtime import fp16_instead

        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Tesla V100", major=major))
        monkeypatch.setattr(torch.version, "hip", hip)
        runtime: Any = SimpleNamespace(precision="no", launch=launch(given), device=torch.device(device))
        line = "Tesla V100 has no bf16, so precision auto computes in float32: --precision fp16 is usually several times faster on it"
        assert fp16_instead(wanted, runtime) == [line] * named


def launch(precision: str | None) -> Launch:
    return Launch(world_size=None, local_world_size=1, asked_for=None, use_cpu=True, precision=precision)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "ACCELERATE_USE_FSDP",
            "true",
            r"the launch asks for FSDP \(ACCELERATE_USE_FSDP=true\), but dtl trains data-parallel with DDP; launch with launch/gpus.yaml",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "True", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "use --mixed_precision bf16, fp16 or no"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use --model.compile"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "data.micro_batch_size decides it"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1", "use --run.device"),
    ],
)
def test_what_dtl_does_not_do_is_refused_and_not_passed_over(name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_supported({name: value})


def test_what_accelerate_sets_by_itself_is_fine() -> None:
    check_supported({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_USE_CPU": "true", "ACCELERATE_CPU_AFFINITY": "1"})
    assert launch_variables({"ACCELERATE_USE_CPU": "true", "NCCL_DEBUG": "INFO", "HOME": "/h", "WANDB_API_KEY": "k", "WORLD_SIZE": "2"}) == {
        "ACCELERATE_USE_CPU": "true", "NCCL_DEBUG": "INFO", "WORLD_SIZE": "2"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({"SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_JOB_ID": "5", "SLURM_JOB_GPUS": ""}, None),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, None),
    ],
)
def test_the_gpus_that_slurm_gave(variables: dict[str, str], given: str | None) -> None:
    assert gpus_of_slurm(variables) == given


def place(host: str, uuid: str, bus: str) -> Place:
    return Place(host, 0, Process.this(), (f"GPU-{uuid}", f"{host} {bus}"))


def test_each_rank_has_a_gpu_of_its_own() -> None:
    check_own_gpus([place("a", "1", "0000:01:00"), place("a", "2", "0000:02:00"), place("b", "3", "0000:01:00")])
    check_own_gpus([Place("a", rank, Process.this()) for rank in range(4)])  # on CPUs


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            [place("a", "1", "01"), place("a", "2", "02"), place("a", "1", "01"), place("a", "2", "02")],
            r"^rank 0 and rank 2 have the same GPU \(GPU-1, host a\): 4 processes on 2 GPUs; launch one process per GPU, or use --run.device cpu$",
        ),
        ([place("a", "MIG-1", "01"), place("a", "MIG-2", "01")], r"^rank 0 and rank 1 have the same GPU \(a 01, host a\): 2 processes on 1 GPU;"),
        ([place("pod-0", "1", "01"), place("pod-1", "1", "01")], r"^rank 0 and rank 1 have the same GPU \(GPU-1, host pod-1\)"),
    ],
    ids=["more ranks than GPUs", "two MIG slices of one GPU", "two containers"],
)
def test_two_ranks_on_one_gpu_are_refused(places: list[Place], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_own_gpus(places)


@pytest.mark.parametrize("file", ["gpu.yaml", "gpus.yaml"])
def test_a_launch_file_chooses_among_the_gpus_that_this_shell_sees(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """CUDA_VISIBLE_DEVICES=3 with `gpu_ids: '0'` took GPU 0, which may be somebody else's."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    path = Path(__file__).parents[3] / "launch" / file
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "train.py"]))
    environment = prepare_simple_launcher_cmd_env(arguments)[1] if file == "gpu.yaml" else prepare_multi_gpu_env(arguments)
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
