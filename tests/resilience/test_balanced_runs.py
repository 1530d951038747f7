"""`data.balance` in real runs: stopped in the middle and gone on with; changed, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run
from recipes import weights_hash, write_recipe
from tiny_images import image_folder

from dtl.data.packing.pack import pack

PHASE = {"train": "all", "lr": 0.05, "schedule": "constant", "class_weights": "sqrt", "keep": "last", "eval_every": 100}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 90, "bee": 20, "cow": 5})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, val_fraction=0.2, processes=1, progress=False)
    return folder


def arguments(folder: Path, uneven: Path, epochs: float, *more: str) -> list[str]:
    recipe = write_recipe(folder, phases={"all": {**PHASE, "epochs": epochs}}, data={"train": str(uneven), "global_batch_size": 16, "balance": "uniform"})
    return ["--config", str(recipe), *more]


def test_stopped_and_gone_on_with(tmp_path: Path, uneven: Path) -> None:
    for name, durations in (("whole", [2.5]), ("parts", [0.5, 2.5])):
        (tmp_path / name).mkdir()
        for epochs in durations:
            run(arguments(tmp_path / name, uneven, epochs), cwd=tmp_path / name, world=2)
    assert weights_hash(tmp_path / "whole/runs/tiny") == weights_hash(tmp_path / "parts/runs/tiny")
    job = run(arguments(tmp_path / "whole", uneven, 2.5, "--data.balance", "sqrt"), cwd=tmp_path / "whole", code=2)
    assert "was started with data.balance 'uniform', now it is 'sqrt'" in job.err()


def test_rare_classes_are_seen_as_often_as_common_ones(tmp_path: Path, uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dtl.commands import verify_epoch

    counts = json.loads((uneven / "train/manifest.json").read_text())["class_counts"]
    assert verify_epoch.run([str(uneven / "train"), "--balance", "uniform", "--image-size", "8", "--workers", "0", "--world", "2"]) == 0
    out = capsys.readouterr().out
    assert f"expected    {sum(counts)}" in out
    assert f"different samples of {sum(counts)}, data.balance uniform" in out
