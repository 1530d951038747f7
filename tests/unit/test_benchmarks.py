"""The benchmarks are found and can be asked for, and two of them run; the loop's runs in tests/unit/training/test_loop.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import write_images

from benchmarks.__main__ import benchmarks, main
from benchmarks.measure import Spread, cpu_seconds, interleaved, table

ROOT = Path(__file__).parents[2]


def test_all_are_listed_with_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    found = benchmarks()
    assert {"loader", "loop", "pack", "start", "checkpoint", "transfer"} <= found.keys()
    for name, line in found.items():
        assert line.strip(), name
        assert f"{name} " in shown
        assert line in shown
    assert main(["nothing"]) == 2


HELPS = """
import importlib, sys
from benchmarks.__main__ import benchmarks
for name in benchmarks():
    sys.argv = [name, "--help"]
    try:
        importlib.import_module(f"benchmarks.{name}").main()
    except SystemExit as end:
        print(f"END {name} {end.code}")
"""


def test_each_can_be_imported_and_has_a_help_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", HELPS], cwd=ROOT, capture_output=True, text=True, check=False)
    helps = re.findall(r"^usage: (.*?)^END (\w+) (\w+)$", done.stdout, flags=re.MULTILINE | re.DOTALL)
    assert [(name, code) for _, name, code in helps] == [(name, "0") for name in benchmarks()], done.stderr
    for text, name, _ in helps:
        assert text.startswith(name), text
        assert " ".join(benchmarks()[name].split()) in " ".join(text.split()), text
        assert text.count("\n  --") >= 2, "its own options, beside --help"


def ran(name: str, *options: str, folder: Path, **variables: str) -> list[dict[str, str]]:
    """The rows of the tables that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "DTL_CACHE": str(folder / "cache"), **variables}
    words = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", "1", *options]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, _, *rows = ([word.strip() for word in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("|"))
    return [dict(zip(head, row)) for row in rows]


def test_the_gpus_runs_without_one(tmp_path: Path) -> None:
    small = ["--models", "networks:small", "--batch", "4", "--image-size", "32", "--workers", "0", "--variants", "110,000"]
    rows = ran("gpu", "--device", "cpu", "--steps", "2", *small, folder=tmp_path)
    assert [(row["bf16"], row["channels last"], row["compile"]) for row in rows if row["model"] == "networks:small"] == [
        ("True", "True", "False"),
        ("False", "False", "False"),
    ]
    assert all(float(row["alone, images/s"].split()[0]) > 0 for row in rows)


def test_the_loaders_run_on_a_few_images(tmp_path: Path) -> None:
    write_images(tmp_path / "data/hymenoptera_data/train", {"ants": 6, "bees": 6})
    options = ["--tiny", "--sets", "small", "--workers", "1", "--systems", "imagefolder,dtl"]
    rows = ran("loader", *options, folder=tmp_path, DTL_DATA=str(tmp_path / "data"))
    assert [row["system"].split(",")[0] for row in rows] == ["torchvision ImageFolder + DataLoader", "dtl"]
    assert all(float(row["CPU ms/image"].split()[0]) > 0 and float(row["images/s"].split()[0]) > 0 for row in rows)


def test_measures() -> None:
    assert Spread.of([3.0, 1.0, 2.0]).show(1) == "2.0 (1.0-3.0)"
    order: list[str] = []
    found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, say=lambda line: None)
    assert order == ["a", "b", "a", "b"]
    assert found == {"a": [None, None], "b": [None, None]}
    assert table(("x", "y"), [(1, 2)]) == ["| x | y |", "| --- | --- |", "| 1 | 2 |"]


def test_cpu_time_counts_children_that_live_and_that_have_ended() -> None:
    work = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(flush=True)\ninput()"
    before = cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout is not None
    child.stdout.readline()
    assert cpu_seconds() - before >= 0.3
    child.communicate(b"\n")
    assert cpu_seconds() - before >= 0.3


def test_few_labels_draws_as_many_of_each_class_and_others_for_each_seed(tmp_path: Path) -> None:
    from benchmarks.few_labels import draw_lists

    for name in ("cat", "dog"):
        (tmp_path / "cifar/train" / name).mkdir(parents=True)
        for number in range(50):
            (tmp_path / "cifar/train" / name / f"{number}.png").touch()
    draw_lists(tmp_path, seeds=2, labels=5)
    first, second = ((tmp_path / f"cifar/few-{seed}.csv").read_text().splitlines() for seed in (0, 1))
    assert first[0] == "path,label"
    for lines in (first[1:], second[1:]):
        assert [line.split(",")[1] for line in lines] == ["cat"] * 5 + ["dog"] * 5
        assert all((tmp_path / "cifar" / line.split(",")[0]).exists() for line in lines)
        assert len(set(lines)) == 10
    assert set(first) != set(second)
