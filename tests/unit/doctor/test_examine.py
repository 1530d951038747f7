"""`dtl doctor` on this machine: it ends, says what it found, and no probe can take it down."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from dtl import machine
from dtl.cli import main
from dtl.doctor import examine, probe
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


def test_two_real_processes_add_their_numbers() -> None:
    results, seconds, problem = probe.two_process_sum("gloo")
    assert problem == ""
    assert results is not None
    assert [result["sum"] for result in results] == [3.0, 3.0]
    assert seconds < 60


def test_decoding_is_measured_on_ones_own_images(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / name / f"{number}.jpg")
    from dtl.doctor.measure import decode

    facts = decode({"image_size": 32, "data": str(tmp_path), "seconds": 0.05})
    assert facts["what"].startswith("6 images of")
    assert 0 < facts["ms_per_image"] < 1000
    with pytest.raises(ValueError, match="holds no images"):
        decode({"image_size": 32, "data": str(tmp_path / "nothing"), "seconds": 0.05})


def test_a_measurement_that_hangs_is_ended_and_one_that_fails_says_why() -> None:
    hanging = probe.Measurement("reduce", {"rank": 0, "backend": "gloo", "store": "/nonexistent/store", "seconds": 30}, seconds=0.3)
    with pytest.raises(probe.Unanswered, match=r"no answer within 0 s"):
        hanging.result()
    failing = probe.Measurement("nothing", {}, seconds=60)
    with pytest.raises(probe.Unanswered, match="KeyError: 'nothing'"):
        failing.result()


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


def test_the_recipe_says_what_is_needed(tmp_path: Path) -> None:
    from dtl.commands.doctor import _parser, _wanted

    file = tmp_path / "mine.yaml"
    data = "data: {image_size: 96, global_batch_size: 32, workers: 5, cache_dir: here}"
    file.write_text(f"{data}\nmodel: {{name: torchvision/resnet50}}\nphases: {{all: {{epochs: 1}}}}\n")
    wanted = _wanted(_parser().parse_args(["--config", str(file)]))
    assert wanted["model"] == "torchvision/resnet50"
    assert wanted["cache_dir"] == Path("here")
    assert (wanted["need"].image_size, wanted["need"].batch_size, wanted["need"].workers) == (96, 32, 5)
    # As the repository's own recipes are.
    _wanted(_parser().parse_args(["--config", "digits"]))
    _wanted(_parser().parse_args(["--config", "finetune", "--data", "photos"]))


def test_cores_are_those_that_this_process_may_use() -> None:
    assert 0 < machine.core_share() <= len(os.sched_getaffinity(0))
