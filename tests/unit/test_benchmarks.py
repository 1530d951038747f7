"""The benchmarks are found and can be asked for, and two of them run; the loop's runs in tests/unit/training/test_loop.py, the first day's in tests/gpu."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
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
import runpy, sys
from benchmarks.__main__ import benchmarks
for name in benchmarks():
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
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


def test_scaling_has_images_for_any_batch(tmp_path: Path) -> None:
    """The digits, which it trained on before, are 1,437."""
    small = ["--network", "dtl/resnet_tiny", "--batch", "2048", "--image-size", "8", "--steps", "1", "--processes", "1"]
    rows = ran("scaling", *small, folder=tmp_path)
    assert [(row["ranks"], row["loop"]) for row in rows] == [("1", "dtl"), ("1", "bare loop")]
    assert all(float(row["images/s"]) > 0 for row in rows)


def test_what_overlaps_on_a_device() -> None:
    from benchmarks.first_day.profiled import shares, union

    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    found = shares({"compute": [(0, 4), (6, 8)], "communication": [(3, 5)], "copies": [(9, 10)]})
    expected = {"device_events": 4, "idle": 0.2, "computing": 0.6, "communication": 0.2, "communication_hidden": 0.5, "copies": 0.1, "copies_hidden": 0.0}
    assert found == pytest.approx({**expected, "longest_gap_ms": 0.001})
    assert shares({"compute": [], "communication": [], "copies": []}) == {"device_events": 0}


def test_a_gap_belongs_to_where_the_host_was() -> None:
    """And annotations, which lie over gaps in the device's part of a trace, are no kernels."""
    from benchmarks.first_day.profiled import gaps, kernels

    def event(cat: str, name: str, first: float, end: float) -> dict[str, object]:
        return {"ph": "X", "cat": cat, "name": name, "ts": first, "dur": end - first}

    events = [
        event("kernel", "sm90_gemm", 0, 1000),
        event("gpu_memcpy", "Memcpy HtoD", 900, 1100),
        event("gpu_user_annotation", "Optimizer.step#SGD.step", 0, 99_000),
        event("kernel", "ncclDevKernel_AllReduce_Sum_f32", 1100, 20_000),  # the host is ahead: no gap at the first line
        event("user_annotation", "dtl: log line", 500, 900),
        event("user_annotation", "dtl: log line", 22_000, 23_000),
        event("kernel", "sm90_gemm", 26_000, 40_000),
        event("user_annotation", "dtl: evaluation", 30_000, 55_000),
        event("kernel", "sm90_gemm", 50_000, 52_000),
        event("kernel", "sm90_gemm", 56_000, 99_000),
        event("cuda_runtime", "cudaLaunchKernel", 0, 1),
        {"ph": "M", "name": "process_name"},
    ]
    assert {kind: len(found) for kind, found in kernels(events).items()} == {"compute": 4, "communication": 1, "copies": 1}
    assert gaps(events) == {
        "log line": {"times": 2, "median_ms": 3.0, "longest_ms": 6.0},
        "evaluation": {"times": 1, "median_ms": 14.0, "longest_ms": 14.0},
        "checkpoint": {"times": 0, "median_ms": 0.0, "longest_ms": 0.0},
    }


def test_mirrored_photos_are_of_no_other_class() -> None:
    """Or nothing that is trained with mirrored images could tell all classes apart. A class is the angle of its stripes and their colour channel."""
    from benchmarks.first_day.photos import CHANNELS, CLASSES, angle

    for one, other in itertools.permutations(range(CLASSES), 2):
        if one % CHANNELS == other % CHANNELS:
            for seen in (angle(one), math.pi - angle(one)):
                apart = abs(seen - angle(other)) % math.pi
                assert min(apart, math.pi - apart) > math.radians(20), (one, other)


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


def test_held_out_divides_each_class_anew_for_each_seed(tmp_path: Path) -> None:
    from benchmarks.held_out import draw

    for name in ("cat", "dog"):
        (tmp_path / "cifar/train" / name).mkdir(parents=True)
        for number in range(50):
            (tmp_path / "cifar/train" / name / f"{number}.png").touch()
    found = {}
    for seed in (0, 1):
        draw(tmp_path, "cifar_30", seed)
        for split, number in (("train", 24), ("val", 6)):
            first, *rows = (tmp_path / f"cifar_30-{seed}-{split}.csv").read_text().splitlines()
            assert first == "path,label"
            assert [row.split(",")[1] for row in rows] == ["cat"] * number + ["dog"] * number
            assert all((tmp_path / row.split(",")[0]).exists() for row in rows)
            found[seed, split] = set(rows)
        assert not found[seed, "train"] & found[seed, "val"]
    assert found[0, "val"] != found[1, "val"]


def test_held_out_compares_both_rules_run_by_run() -> None:
    from benchmarks.held_out import rule_lines, rule_row

    def kept(step: int, top1: float, loss: float) -> dict[str, float]:
        return {"step": step, "val_top1": 0.95, "val_loss": 0.2, "val_num_samples": 20, "test_top1": top1, "test_loss": loss, "test_num_samples": 100}

    runs = [{"best": kept(4, 0.90, 0.30), "one_se": kept(4, 0.90, 0.30)}, {"best": kept(8, 0.92, 0.35), "one_se": kept(2, 0.88, 0.25)}]
    row = rule_row("ants", runs)
    assert row[:5] == ("ants, 20 / 100", "90.0 =; 92.0 -> 88.0", "91.0 % (83.8 to 95.2)", "89.0 % (81.4 to 93.7)", "-2.00 ± 2.00")
    assert row[7:] == ("-0.050 ± 0.050", "+4.0", "+6.0")
    assert rule_lines(runs) == [
        "The same weights in 1 of 2 runs.",
        "Test top1, points, over all runs: -2.00 ± 2.00 (standard error); higher in 0, lower in 1.",
        "Test loss, over all runs: -0.050 ± 0.050 (standard error); higher in 0, lower in 1.",
    ]


def judging_folders(folder: Path) -> None:
    """Empty files where benchmarks.judging looks for images."""
    from benchmarks.judging import BIRDS, CARS, EVEN, ODD

    for place, classes, number in (
        ("hymenoptera_data/train", ("ants", "bees"), 121),
        ("hymenoptera_data/val", ("ants", "bees"), 70),
        ("flowers/train", (*EVEN, *ODD), 40),
        ("flowers/valid", (*EVEN, *ODD), 10),
        ("cifar/train", (*BIRDS, *CARS), 140),
        ("cifar/test", (*BIRDS, *CARS), 10),
    ):
        for name in classes:
            (folder / place / name).mkdir(parents=True)
            for image in range(number):
                (folder / place / name / f"{image}.jpg").touch()


def test_the_sets_that_choose_do_not_open_those_that_judge(tmp_path: Path) -> None:
    from benchmarks.judging import CHOOSING, JUDGING, TAIL, draw

    judging_folders(tmp_path)
    tests: dict[str, set[str]] = {"choosing": set(), "judging": set()}
    opened: set[str] = set()
    for name in (*CHOOSING, *JUDGING):
        first, second = (draw(tmp_path, name, number, judge="a test" if name in JUDGING else "") for number in (0, 1))
        parts = {
            split: [set((tmp_path / f"{name}-{seed}-{split}.csv").read_text().splitlines()[1:]) for seed in (first, second)]
            for split in ("train", "val", "test")
        }
        assert not parts["train"][0] & parts["val"][0]
        assert not (parts["train"][0] | parts["val"][0]) & parts["test"][0]
        assert parts["train"][0] != parts["train"][1], "seeds draw other images"
        tests["judging" if name in JUDGING else "choosing"] |= parts["test"][0] | parts["test"][1]
        if name in CHOOSING:
            opened |= set().union(*(some for pair in parts.values() for some in pair))
    assert not opened & tests["judging"]
    assert all(row.split("/")[1] in ("val", "valid", "test") for row in tests["judging"])
    rows = [row.split(",")[1] for row in (tmp_path / "long_tail-0-train.csv").read_text().splitlines()[1:]]
    assert [rows.count(name) for name in dict.fromkeys(rows)] == list(TAIL)
    with pytest.raises(SystemExit, match=r"twenty_judge judges what was chosen, once, at the end: --judge WHY; these choose: ants_bees, "):
        draw(tmp_path, "twenty_judge", 0)


def test_sets_are_named_among_those_that_choose_or_those_that_judge() -> None:
    """A choosing set beside --judge was measured, and written down as a look at those that judge."""
    from benchmarks.judging import CHOOSING, JUDGING, named

    assert named(None) == list(CHOOSING)
    assert named(None, judge="the end") == list(JUDGING)
    assert named("twenty,flowers") == ["twenty", "flowers"]
    assert named("twenty_judge", judge="the end") == ["twenty_judge"]
    with pytest.raises(SystemExit, match=r"^--sets: twenty not among the sets that judge: ants_bees_judge, .*twenty_judge$"):
        named("twenty,flowers_judge", judge="the end")
    with pytest.raises(SystemExit, match=r"^--sets: twenty_judge, tens not among the sets that choose: ants_bees, .*twenty$"):
        named("twenty_judge,tens")


def test_a_commit_judges_the_same_ways_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import judging

    monkeypatch.setattr(judging, "ROOT", tmp_path)
    for command in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    ways, judged = [judging.Way.parse("start=features,phases.head.lr=0.01"), judging.Way.parse("tuned=finetune,start=start")], tmp_path / "judged.jsonl"
    assert ways[1].start == "start"
    assert not ways[1].options
    monkeypatch.setattr(judging, "JUDGED", judged)
    (tmp_path / "new.py").touch()
    with pytest.raises(SystemExit, match="needs a checkout without changes"):
        judging.note_look("the end", ways, ["a", "b"])
    assert not judged.exists()
    (tmp_path / "new.py").unlink()
    judging.note_look("the end", ways, ["a", "b"])
    before = judged.read_text()
    for sets in (["a", "b"], ["b"], ["b", "c"]):
        with pytest.raises(SystemExit, match="has judged these ways already"):
            judging.note_look("the end", ways, sets)
    judging.note_look("the end", ways, ["a", "b"], goes_on=True)
    assert judged.read_text() == before, "its line was written when it began"
    judging.note_look("the end", ways, ["c"])
    judging.note_look("the end", ways[:1], ["a"])
    assert [json.loads(line)["sets"] for line in judged.read_text().splitlines()] == [["a", "b"], ["c"], ["a"]]


def test_ways_are_compared_seed_by_seed() -> None:
    from benchmarks.judging import Way, rows

    found = [
        {"set": "flowers", "seed": seed, "way": way, "top1": top1, "loss": 0.5, "num_samples": 100, "cpu_seconds": 3.0}
        for seed, (first, second) in enumerate([(0.80, 0.82), (0.90, 0.94)])
        for way, top1 in (("start", first), ("tuned", second))
    ]
    first, second, pooled = rows(found, [Way("start", "features", {}), Way("tuned", "finetune", {}, "start")])
    assert first == ["flowers, 2 x 100", "start", "85.0 %", "", "0.500", "", "3"]
    assert second[2:4] == ["88.0 %", "+3.0 (-9.7 to +15.7)"]
    assert pooled[:4] == ["all, 2 runs", "tuned", "", "+3.0 (-9.7 to +15.7)"]


def test_dtl_is_compared_with_each_other_way_by_runs_of_the_same_images() -> None:
    from benchmarks.against import marks

    def row(seed: int, way: str, top1: float, cpu_seconds: float, *curve: tuple[float, float]) -> dict[str, Any]:
        return {"set": "flowers", "size": 128, "seed": seed, "way": way, "top1": top1, "loss": 0.5, "cpu_seconds": cpu_seconds, "curve": curve}

    found = [
        *(row(seed, "finetune", 0.90, 10.0) for seed in (0, 1)),
        row(0, "fastai", 0.91, 60.0, (20.0, 0.80), (40.0, 0.90), (60.0, 0.95)),  # ends higher: to what dtl ends with
        row(1, "fastai", 0.89, 60.0, (20.0, 0.80), (60.0, 0.89)),  # ends lower: to its own end
        *(row(seed, "logistic", 0.85 + 0.01 * seed, 8.0) for seed in (0, 1)),
    ]
    fine_tune, logistic = marks(found, ["finetune"])
    assert fine_tune[:5] == ["dtl: finetune", "fastai's fine_tune", "2", "+0.0 (-12.7 to +12.7)", "+0.000 (+0.000 to +0.000)"]
    assert fine_tune[5:] == ["0.17 of its", "5.0 times faster", "no, yes"]
    assert logistic[3:] == ["+4.5 (-1.9 to +10.9)", "+0.000 (+0.000 to +0.000)", "1.25 of its", "", "no, no"]
    for one in found:
        one["head"] = 0.3
    heads = [{**row(seed, "features", 0.89, 3.0), "head": 0.3 + seed} for seed in (0, 1)]
    assert marks([*found, *heads], ["finetune"])[0][6] == "5.0 times faster", "the head alone ends lower at seed 0; at seed 1 it is another one"
    heads[1]["head"] = 0.3
    assert marks([*found, *heads], ["finetune"])[0][5:7] == ["0.17 of its", "12.0 times faster"], "4 times, and 20 times"


def test_what_a_command_took_is_that_of_all_its_processes(tmp_path: Path) -> None:
    from benchmarks.measure import spent

    child = "import time; kept = bytearray(60_000_000)\nwhile time.process_time() < 0.5: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    used = spent([sys.executable, "-c", parent], tmp_path, threads=1)
    assert used.output == "done\n"
    assert used.cpu_seconds >= 0.5
    assert used.memory_mib > 60
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        spent([sys.executable, "-c", "1 / 0"], tmp_path, threads=1)


def test_the_picture_of_the_fits_shows_what_dtl_does() -> None:
    """And lies in the documentation, small."""
    from benchmarks.fits import GAP, SIZE, TEXT, draw, photo

    made, whole = np.asarray(draw(photo())), photo().resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    left = made.shape[1] - 2 * (SIZE + GAP) + GAP
    stretched = made[TEXT : TEXT + SIZE, left : left + SIZE].astype(int)
    assert np.abs(stretched - np.asarray(whole)).max() <= 2
    path = Path(__file__).resolve().parents[2] / "docs/images/fits.jpg"
    assert path.stat().st_size < 100_000
    assert np.abs(np.asarray(Image.open(path)).astype(int) - made).mean() < 3
