"""`dtl doctor` on this machine: it ends, says what it found, and no probe can take it down."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dtl import machine
from dtl.cli import main
from dtl.commands.doctor import _parser, _wanted
from dtl.doctor import examine
from dtl.doctor.finding import Finding


def test_it_answers_in_json_and_an_impossible_run_folder_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "file").write_text("in the way")
    arguments = ["doctor", "--quick", "--json", "--cache-dir", str(tmp_path / "cache")]
    code = main([*arguments, "--run-dir", str(tmp_path / "file" / "runs")])
    answer = json.loads(capsys.readouterr().out)
    assert code == 1
    assert answer["status"] == "fail"
    by_check = {finding["check"]: finding for finding in answer["findings"]}
    assert set(by_check) >= {"gpu", "shm", "memory", "files", "run", "cache", "network", "native", "wandb", "slurm"}
    assert by_check["run"]["status"] == "fail"
    assert by_check["run"]["fix"]
    assert by_check["cache"]["status"] in ("ok", "warn")
    assert not (tmp_path / "cache").exists(), "nothing is made by looking"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_check_that_breaks_or_hangs_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("what a driver may say")

    (found,) = examine._guarded("gpu", broken, 5.0)
    assert (found.check, found.status, found.summary) == ("gpu", "warn", "could not be checked (RuntimeError: what a driver may say)")
    assert "--quick" in found.fix
    with pytest.raises(AssertionError, match="a finding without a fix"):
        Finding("gpu", "warn", "something is wrong")
    start = time.monotonic()
    (found,) = examine._guarded("run", lambda: time.sleep(3) or [], 0.1)  # type: ignore[func-returns-value]
    assert time.monotonic() - start < 2
    assert found.status == "fail"
    assert "no answer" in found.summary


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 0 < machine.core_share() <= len(os.sched_getaffinity(0))


def test_eight_gpus_share_the_recipes_batch_and_are_timed_in_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same advice as a run's first lines, before the run."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    asked = {}
    facts = {
        "torch": {"torch": "2.14", "cuda": "13.0", "count": 8, "nccl": "2.28"},
        "decode": {"ms_per_image": 0.01, "what": "one image"},
        "model": {"images_s": 1000.0, "precision": "fp16", "parameters": 10**6, "used": 2 << 30, "total": 80 << 30},
    }

    class Answered:
        def __init__(self, kind: str, given: dict[str, object], *, seconds: float) -> None:
            self.kind = kind
            asked[kind] = given

        def result(self) -> dict[str, object]:
            return facts[self.kind]

    monkeypatch.setattr(examine, "Measurement", Answered)
    recipe = tmp_path / "recipe.yaml"
    model, phases = "{name: torchvision/resnet50, channels_last: false, compile: true}", "{all: {train: all, epochs: 1}}"
    recipe.write_text(f"precision: fp16\nmodel: {model}\ndata: {{global_batch_size: 60}}\nphases: {phases}\n")
    doctor = examine.Doctor(**_wanted(_parser().parse_args(["--config", str(recipe)])))
    list(doctor._gpus())
    batch, decode = doctor._decode()
    assert batch.summary == "8 images per GPU (2.0 of 80 GiB): a global batch of 512 would fill these 8 GPUs"
    assert batch.fix == "--data.global-batch-size 512, and lr times 8 with sgd, times 2.8 with adam and adamw"
    assert "torchvision/resnet50 in precision fp16, not compiled, trains 8,000 images/s on 8 GPUs" in decode.summary
    assert {key: asked["model"][key] for key in ("model", "precision", "channels_last", "batch_size", "device")} == {
        "model": "torchvision/resnet50", "precision": "fp16", "channels_last": False, "batch_size": 8, "device": "cuda",
    }  # fmt: skip
    doctor = examine.Doctor(**_wanted(_parser().parse_args([])))
    list(doctor._gpus())
    assert doctor.need.batch_size == 8
