"""The sets that choose defaults, the sets that judge them, and a table of ways to train on them: test accuracy, paired by seed.

    DTL_DATA=FOLDER python -m benchmarks.judging --weights FILE --way NAME=RECIPE[,key=value...] [--way ...] [--sets ants_bees,twenty] [--seeds 3] [--out FILE]

FOLDER and FILE as for benchmarks.held_out. RECIPE is a name in configs/. Each further way is compared with the first one, on the same images with the same
seed. With `start=NAME` among its keys a way goes on from the weights that the way NAME delivered, all but its last phase left out.

A default is chosen on CHOOSING only: their training, validation and test images come out of the training folders. JUDGING are other classes, seeds and
splits: their test images come out of the other folders, which no set of CHOOSING opens. They are for the end: a run on them needs `--judge WHY`, a
checkout without changes, and first adds a line to benchmarks/results/judged.jsonl, which stays in the repository; a commit judges the same ways on a set once.
(Older benchmarks, held_out and recipes, measured on these test images too: they are new to the defaults chosen here, not to dtl.)
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.held_out import ENDINGS, prepare
from benchmarks.measure import cpu_seconds, machine, report, table
from benchmarks.measure import parser as benchmark_parser

if TYPE_CHECKING:
    from dtl.api import Run

ROOT = Path(__file__).resolve().parents[1]
JUDGED = ROOT / "benchmarks/results/judged.jsonl"
EVEN = ("101", "17", "37", "43", "51", "60", "77", "95")
ODD = ("11", "2", "41", "46", "58", "73", "8", "88")
"""The 16 flowers, every other one by the order of their names."""


@dataclass(frozen=True)
class Set:
    """Images by class. For each seed, those of `train` are divided into training, validation and, without a folder `test`, test images."""

    train: str
    num_train: int | tuple[int, ...] | None
    """Training images of each class: one number, or one per class (a long tail); None: all that are left."""
    num_val: int
    num_test: int
    """Test images of each class."""
    test: str | None = None
    classes: tuple[str, ...] | None = None
    first_seed: int = 0


TAIL = (24, 16, 11, 8, 5, 4, 3, 2)
BIRDS, CARS = ("airplane", "bird", "deer", "frog", "ship"), ("automobile", "cat", "dog", "horse", "truck")
CHOOSING = {
    "ants_bees": Set("hymenoptera_data/train", 50, 12, 58),
    "flowers": Set("flowers/train", 20, 5, 15),
    "cifar": Set("cifar/train", 400, 50, 50),
    "long_tail": Set("flowers/train", TAIL, 4, 12, classes=EVEN),
    "twenty": Set("cifar/train", 20, 10, 100, classes=BIRDS),
}
JUDGING = {
    "ants_bees_judge": Set("hymenoptera_data/train", None, 24, 70, "hymenoptera_data/val", first_seed=1000),
    "flowers_judge": Set("flowers/train", 34, 6, 10, "flowers/valid", first_seed=1000),
    "cifar_judge": Set("cifar/train", 450, 50, 100, "cifar/test", first_seed=1000),
    "long_tail_judge": Set("flowers/train", TAIL, 4, 10, "flowers/valid", ODD, first_seed=1000),
    "twenty_judge": Set("cifar/train", 20, 10, 100, "cifar/test", CARS, first_seed=1000),
}
IMAGE_SIZE = 96


def named(text: str | None, *, judge: str = "") -> list[str]:
    """The sets of `text` (`a,b`; None: all); SystemExit for one that is not of those that choose or, with `judge`, of those that judge."""
    known = list(JUDGING if judge else CHOOSING)
    names = text.split(",") if text else known
    if wrong := [name for name in names if name not in known]:
        raise SystemExit(f"--sets: {', '.join(wrong)} not among the sets that {'judge' if judge else 'choose'}: {', '.join(known)}")
    return names


def draw(folder: Path, name: str, number: int, *, judge: str = "") -> int:
    """NAME-SEED-{train,val,test}.csv in `folder`; the seed of the set's run `number`. A set of JUDGING is drawn only for `judge`, the reason."""
    if name in JUDGING and not judge:
        raise SystemExit(f"{name} judges what was chosen, once, at the end: --judge WHY; these choose: {', '.join(CHOOSING)}")
    one = JUDGING[name] if name in JUDGING else CHOOSING[name]
    seed = one.first_seed + number
    drawn = random.Random(f"{name} {seed}")
    rows: dict[str, list[str]] = {split: ["path,label"] for split in ("train", "val", "test")}
    for place, label in enumerate(one.classes or sorted(path.name for path in (folder / one.train).iterdir() if path.is_dir())):
        files = images(folder / one.train / label)
        drawn.shuffle(files)
        tests = files[: one.num_test] if one.test is None else images(folder / one.test / label)[: one.num_test]
        left = files if one.test is not None else files[one.num_test :]
        count = one.num_train[place] if isinstance(one.num_train, tuple) else one.num_train
        parts = {"test": tests, "val": left[: one.num_val], "train": left[one.num_val :][:count]}
        for split, some in parts.items():
            rows[split] += [f"{file.relative_to(folder)},{label}" for file in some]
    for split, lines in rows.items():
        (folder / f"{name}-{seed}-{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return seed


def images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)


# ---- ways


@dataclass(frozen=True)
class Way:
    """A recipe with options. `start`: the way whose weights its last phase goes on from."""

    name: str
    recipe: str
    options: Mapping[str, str]
    start: str | None = None

    @classmethod
    def parse(cls, text: str) -> Way:
        name, _, rest = text.partition("=")
        recipe, *pairs = rest.split(",")
        options = dict(pair.split("=", 1) for pair in pairs)
        return cls(name, recipe, options, options.pop("start", None))


def train(folder: Path, name: str, seed: int, way: Way, weights: Path) -> Run:
    """One run; nothing where it is finished. Weights are those of the last step, so that no choice among evaluations helps a way."""
    from dtl.api import fit

    recipe = yaml.safe_load((ROOT / f"configs/{way.recipe}.yaml").read_text())
    last = list(recipe["phases"])[-1]
    given: dict[str, Any] = {"run.name": f"{name}-{seed}-{way.name}", "run.seed": seed, "run.dir": str(folder / "runs"), "run.device": "cpu"}
    given |= {f"data.{split}": str(folder / f"{name}-{seed}-{split}.csv") for split in ("train", "val", "test")}
    given |= {"data.workers": 0, "data.cache_dir": str(folder / "cache"), "data.image_size": IMAGE_SIZE}
    given |= {"tracking.wandb": "off", "tracking.report": "false", "model.name": "torchvision/mobilenet_v2", f"phases.{last}.keep": "last"}
    if way.start is None:
        given |= {"transfer.source": str(weights), "transfer.by": "order"}
    else:
        recipe["phases"] = {last: recipe["phases"][last]}
        given |= {"transfer.source": str(folder / "runs" / f"{name}-{seed}-{way.start}"), "transfer.by": "name"}
    run = fit(recipe, {**given, **way.options})
    assert run.state == "done", run.state
    return run


def measured(folder: Path, names: Sequence[str], seeds: int, ways: Sequence[Way], weights: Path, judge: str) -> list[dict[str, Any]]:
    found = []
    for name in names:
        for number in range(seeds):
            seed = draw(folder, name, number, judge=judge)
            for way in ways:
                before = cpu_seconds()
                run = train(folder, name, seed, way, weights)
                test = run.test
                assert test is not None
                numbers = {key: test[key] for key in ("top1", "loss", "num_samples")}
                found.append({"set": name, "seed": seed, "way": way.name, **numbers, "cpu_seconds": cpu_seconds() - before})
                print(json.dumps(found[-1]), flush=True)
    return found


# ---- the table

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 14: 2.14, 19: 2.09, 23: 2.07, 24: 2.06}
"""Student's t, 97.5 %, by degrees of freedom."""


def difference(values: Sequence[float], scale: float, digits: int) -> str:
    """The mean of paired differences and its 95 % interval over seeds."""
    mean = scale * statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.{digits}f}"
    low = low_end(values, scale)
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {2 * mean - low:+.{digits}f})"


def low_end(values: Sequence[float], scale: float) -> float:
    """Of the 95 % interval of the mean."""
    t = T95[max(degrees for degrees in T95 if degrees <= len(values) - 1)]
    return scale * (statistics.mean(values) - t * statistics.stdev(values) / math.sqrt(len(values)))


def rows(found: Sequence[Mapping[str, Any]], ways: Sequence[Way]) -> list[list[str]]:
    """A line for each set and way, and one over all sets, in which each set's seeds count alike."""
    lines, pooled = [], {way.name: {"top1": list[float](), "loss": list[float]()} for way in ways}
    for name in dict.fromkeys(row["set"] for row in found):
        base = {row["seed"]: row for row in found if row["set"] == name and row["way"] == ways[0].name}
        for way in ways:
            some = [row for row in found if row["set"] == name and row["way"] == way.name]
            cells = [f"{name}, {len(some)} x {some[0]['num_samples']}", way.name]
            for key, scale, digits, unit in (("top1", 100, 1, " %"), ("loss", 1, 3, "")):
                paired = [row[key] - base[row["seed"]][key] for row in some]
                pooled[way.name][key] += paired
                cells += [f"{scale * statistics.mean(row[key] for row in some):.{digits}f}{unit}", "" if way is ways[0] else difference(paired, scale, digits)]
            lines.append([*cells, f"{statistics.mean(row['cpu_seconds'] for row in some):.0f}"])
    for way in ways[1:]:
        changes = pooled[way.name]
        lines.append([f"all, {len(changes['top1'])} runs", way.name, "", difference(changes["top1"], 100, 1), "", difference(changes["loss"], 1, 3), ""])
    return lines


COLUMNS = ("set, runs x test images", "way", "test top1", "change in points (95 %)", "test loss", "change (95 %)", "CPU seconds")


def note_look(why: str, ways: Sequence[Way], sets: Sequence[str], *, goes_on: bool = False) -> None:
    """Write a look at the judging sets down, before anything of it is measured; SystemExit where there may be none. `goes_on`: earlier runs lie there, which
    are not repeated, so the line of their start may be there too."""
    git = ["git", "-C", str(ROOT)]
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.splitlines()
    if any(not line.endswith(JUDGED.name) for line in changes):
        raise SystemExit("--judge needs a checkout without changes: what is judged must be a commit")
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    line = {"commit": commit, "ways": [[way.name, way.recipe, dict(way.options), way.start] for way in ways], "why": why}
    earlier = [json.loads(text) for text in JUDGED.read_text().splitlines()] if JUDGED.exists() else []
    same = [old for old in earlier if old["commit"] == commit and old["ways"] == line["ways"] and set(old["sets"]) & set(sets)]
    if same and not goes_on:
        raise SystemExit(f"commit {commit[:12]} has judged these ways already; see {JUDGED.name}")
    if not any(old["sets"] == list(sets) for old in same):
        with JUDGED.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "date": f"{datetime.now(UTC):%Y-%m-%d}", "sets": list(sets)}) + "\n")


def main() -> None:
    made = benchmark_parser(__doc__)
    add = made.add_argument
    add("--weights", type=Path, required=True, help="ImageNet MobileNetV2 (configs/transfer_by_order.yaml says where it is from)")
    add("--way", type=Way.parse, action="append", required=True, dest="ways", help="NAME=RECIPE[,key=value...]; the first is what others are compared with")
    add("--sets", help=f"some of {','.join(CHOOSING)}; with --judge of {','.join(JUDGING)}")
    add("--judge", default="", metavar="WHY", help="measure on the judging sets; WHY is written down")
    add("--seeds", type=int, default=3)
    add("--folder", type=Path, help="where runs lie and are continued (default: a temporary folder)")
    options = made.parse_args()
    names = named(options.sets, judge=options.judge)
    if options.judge:
        note_look(options.judge, options.ways, names, goes_on=options.folder is not None and (options.folder / "runs").is_dir())
    facts = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        prepare(folder)
        found = measured(folder, names, options.seeds, options.ways, options.weights.absolute(), options.judge)
    title = "Judged" if options.judge else "Ways compared on the choosing sets"
    report(f"{title}: weights of the last step, {options.seeds} seeds", table(COLUMNS, rows(found, options.ways)), found, facts, options.out)


if __name__ == "__main__":
    main()
