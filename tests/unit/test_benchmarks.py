"""The benchmarks are found and can be asked for; the loop's runs in tests/unit/engine/test_host_waits.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
