"""dtl's defaults against fastai, timm, a plain loop and logistic regression: same network, weights and images; accuracy, CPU seconds, memory.

    DTL_DATA=FOLDER python -m benchmarks.against --weights FILE [--python OTHER/bin/python] [--sets ants_bees,twenty] [--sizes 128,224] [--seeds 3]
        [--folder RUNS] [--out FILE]

FOLDER and FILE as for benchmarks.held_out; sets, seeds and the rule of the judging sets (`--judge WHY`) as for benchmarks.judging. Each run is a command of
its own, one at a time, on `--threads` threads: `dtl train` as it is called, with empty caches, and the others in benchmarks/others.py, which says what they
follow. CPU seconds (user and system) and peak memory (proportional set size, summed) are those of all processes of a command, imports and report included,
without the test images: dtl's are measured by a `dtl evaluate` afterwards, the others' in their command, whose count leaves that out. The accuracy is that of
the test images by the weights that a way delivers; nothing has chosen by these images.

fastai lies in an environment of its own, which `--python` names. It takes the torch that is installed here (fastai 2.8.12 asks for torch below 3), nothing
is forced; a .pth file shows it this environment's packages:

    python -m venv OTHER
    python -c 'import site; print(site.getsitepackages()[0])' > OTHER/lib/python3.11/site-packages/here.pth
    OTHER/bin/pip install fastai==2.8.12

"Times faster" compares the CPU seconds to an accuracy that both reach: the lower one of both at their ends. The others' count to the first epoch that reached
it, without the tests after each epoch that show it. dtl's count to the end of the command, report included; where the first phase of `finetune` has
the validation loss of `features`, digit for digit, it is that network, so the end of that command is a point of finetune's way: where the solved head is that
accurate already, the time is that of `features`. "All in" compares the whole commands, whatever they reach. Batches of the others: 16
images for sets under 500, else 64.
With `--folder`, runs that lie there are not repeated. `--way NAME=RECIPE[,key=value...]` takes other recipes of dtl, as in benchmarks.judging.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.held_out import prepare
from benchmarks.judging import CHOOSING, JUDGING, Way, difference, draw, low_end, named, note_look
from benchmarks.measure import machine, report, spent, table
from benchmarks.measure import parser as benchmark_parser

OURS = "features=features", "finetune=finetune", "budget=finetune,budget=4"
OTHERS = {
    "fastai": "fastai's fine_tune",
    "timm": "timm's parts as in its train.py",
    "loop": "a plain loop",
    "logistic": "logistic regression on features",
}
KEPT = "against.jsonl"
"""The rows so far."""
SMALL, BATCHES = 500, (16, 64)
POINTS, TIMES_FASTER, TIMES_LOGISTIC = -1.0, 3.0, 1.2
"""The marks: lower end of the difference in points; to the same accuracy; all in, of logistic regression's CPU seconds."""


def linked(folder: Path, name: str, seed: int) -> tuple[Path, int]:
    """The images of a set as folders of links, and the number for training."""
    found, num_train = folder / f"{name}-{seed}-images", 0
    for split in ("train", "val", "test"):
        with (folder / f"{name}-{seed}-{split}.csv").open(encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file)):
                link = found / split / row["label"] / f"{number}{Path(row['path']).suffix}"
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to((folder / row["path"]).resolve())
                num_train += split == "train"
    return found, num_train


def with_dtl(folder: Path, name: str, seed: int, size: int, way: Way, weights: Path, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary)
        given: dict[str, Any] = {f"data.{split}": folder / f"{name}-{seed}-{split}.csv" for split in ("train", "val")}
        given |= {"data.image-size": size, "model.name": "torchvision/mobilenet_v2", "transfer.source": weights, "transfer.by": "order"}
        given |= {"run.name": "run", "run.seed": seed, "run.device": "cpu", **way.options}
        dtl, words = [sys.executable, "-m", "dtl"], [str(word) for key, value in given.items() for word in (f"--{key}", value)]
        used = spent([*dtl, "train", "--config", way.recipe, *words], run, threads=threads)
        delivered, head = run / "runs/run", None
        if "budget" in way.options:
            searched = run / "runs/run-search"
            delivered = searched / f"trial-{json.loads((searched / 'results.json').read_text())['winner']}"
        else:
            events = map(json.loads, (delivered / "history.jsonl").read_text().splitlines())
            head = next(event["loss"] for event in events if event["event"] == "val" and event["phase"] == "head" and event["step"])
        measure = [*dtl, "evaluate", str(delivered / "model"), "--data.val", str(folder / f"{name}-{seed}-test.csv"), "--device", "cpu", "--json", "-"]
        test = json.loads(spent(measure, run, threads=threads).output)
        return {"top1": test["top1"], "loss": test["loss"], "cpu_seconds": used.cpu_seconds, "memory_mib": used.memory_mib, "curve": [], "head": head}


def with_other(folder: Path, name: str, seed: int, size: int, way: str, weights: Path, threads: int, python: str, epochs: int) -> dict[str, Any]:
    images, num_train = linked(folder, name, seed)
    with tempfile.TemporaryDirectory() as temporary:
        given = {"images": images, "weights": weights, "image-size": size, "batch": BATCHES[num_train >= SMALL], "epochs": epochs, "seed": seed}
        command = [python, "-m", "benchmarks.others", way, *(str(word) for key, value in given.items() for word in (f"--{key}", value))]
        used = spent(command, Path(temporary), threads=threads)
    shutil.rmtree(images)
    found = json.loads(used.output.splitlines()[-1])
    counted = used.cpu_seconds - found.pop("not_counted")
    return {**found, "cpu_seconds": counted, "memory_mib": used.memory_mib}


# ---- the tables


def per_set(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    lines = []
    for key in dict.fromkeys((row["set"], row["size"], row["way"]) for row in found):
        some = [row for row in found if (row["set"], row["size"], row["way"]) == key]
        means = {of: statistics.mean(row[of] for row in some) for of in ("top1", "loss", "cpu_seconds", "memory_mib")}
        lines.append([
            f"{key[0]}, {key[1]} px, {len(some)} runs", OTHERS.get(key[2], f"dtl: {key[2]}"), f"{100 * means['top1']:.1f} %", f"{means['loss']:.3f}",
            f"{means['cpu_seconds']:.0f}", f"{means['memory_mib']:,.0f}",
        ])  # fmt: skip
    return lines


def faster(ours: Mapping[str, Any], other: Mapping[str, Any], *, head: Mapping[str, Any] | None = None) -> float:
    """How many times less CPU time to the accuracy that both end with at least. `head`: the run of `features` on the same images, a point of our way where it
    has the same head."""
    target = min(ours["top1"], other["top1"])
    same = head is not None and head.get("head") is not None and head["head"] == ours.get("head")
    curve = [[head["cpu_seconds"], head["top1"]]] if same and head is not None else []

    def reached(row: Mapping[str, Any], curve: Sequence[Sequence[float]]) -> float:
        return next((seconds for seconds, top1 in curve if top1 >= target), float(row["cpu_seconds"]))

    return reached(other, other["curve"]) / reached(ours, curve)


def marks(found: Sequence[Mapping[str, Any]], ours: Sequence[str]) -> list[list[str]]:
    """Each way of dtl against each other one, pooled: a set's seeds and sizes count alike."""
    by = {(row["set"], row["size"], row["seed"], row["way"]): row for row in found}
    lines = []
    for mine in ours:
        for other, name in OTHERS.items():
            pairs = [(row, by[(*place, other)]) for (*place, way), row in by.items() if way == mine and (*place, other) in by]
            heads = [by.get((*place, "features")) for (*place, way) in by if way == mine and (*place, other) in by]
            if not pairs:
                continue
            points = [row["top1"] - theirs["top1"] for row, theirs in pairs]
            cells = [
                f"dtl: {mine}",
                name,
                str(len(pairs)),
                difference(points, 100, 1),
                difference([row["loss"] - theirs["loss"] for row, theirs in pairs], 1, 3),
            ]
            passed = [len(points) > 1 and low_end(points, 100) > POINTS]
            whole = statistics.median(row["cpu_seconds"] / theirs["cpu_seconds"] for row, theirs in pairs)
            if other == "logistic":
                cells += [f"{whole:.2f} of its", ""]
                passed.append(whole <= TIMES_LOGISTIC)
            else:
                ratio = statistics.median(faster(row, theirs, head=head) for (row, theirs), head in zip(pairs, heads))
                cells += [f"{whole:.2f} of its", f"{ratio:.1f} times faster"]
                passed.append(ratio >= TIMES_FASTER)
            lines.append([*cells, ", ".join("yes" if one else "no" for one in passed)])
    return lines


SET_COLUMNS = ("set", "way", "test top1", "test loss", "CPU seconds", "peak memory, MiB")
MARK_COLUMNS = (
    "way", "against", "runs", "top1 in points (95 %)", "loss (95 %)", "CPU seconds, all in (median)", "to the same accuracy (median)",
    "marks: accuracy, time",
)  # fmt: skip


def main() -> None:
    made = benchmark_parser(__doc__)
    add = made.add_argument
    add("--weights", type=Path, required=True, help="ImageNet MobileNetV2 (configs/transfer_by_order.yaml says where it is from)")
    add("--way", type=Way.parse, action="append", dest="ways", help=f"NAME=RECIPE[,key=value...] of dtl (default: {'; '.join(OURS)})")
    add("--others", default=",".join(OTHERS), help="some of %(default)s")
    add("--python", default=sys.executable, help="the interpreter that has fastai, timm and scikit-learn (default: this one)")
    add("--sets", help=f"some of {','.join(CHOOSING)}; with --judge of {','.join(JUDGING)}")
    add("--judge", default="", metavar="WHY", help="measure on the judging sets; WHY is written down")
    add("--sizes", default="128,224")
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=10, help="of the others, beside one for the head alone")
    add("--threads", type=int, default=1)
    add("--folder", type=Path, help="where images and results lie; what lies there is not repeated (default: a temporary folder)")
    options = made.parse_args()
    ways = options.ways or [Way.parse(text) for text in OURS]
    others = [name for name in options.others.split(",") if name]
    names = named(options.sets, judge=options.judge)
    if options.judge:
        looks = [f"{name}, {size} px" for name in names for size in options.sizes.split(",")]
        goes_on = options.folder is not None and (options.folder / KEPT).exists()
        note_look(options.judge, [*ways, *(Way(name, "others", {}) for name in others)], looks, goes_on=goes_on)
    facts, weights, threads = machine(), options.weights.absolute(), options.threads
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        prepare(folder)
        kept = folder / KEPT
        found = [json.loads(text) for text in kept.read_text().splitlines()] if kept.exists() else []
        for name in names:
            for number in range(options.seeds):
                seed = draw(folder, name, number, judge=options.judge)
                for size in map(int, options.sizes.split(",")):
                    for way in (*ways, *others):
                        place = {"set": name, "seed": seed, "size": size, "way": way if isinstance(way, str) else way.name}
                        if any(place.items() <= row.items() for row in found):
                            continue
                        if isinstance(way, str):
                            row = with_other(folder, name, seed, size, way, weights, threads, options.python, options.epochs)
                        else:
                            row = with_dtl(folder, name, seed, size, way, weights, threads)
                        found.append({**place, **row})
                        print(json.dumps({key: value for key, value in found[-1].items() if key != "curve"}), flush=True)
                        with kept.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(found[-1]) + "\n")
    lines = [*table(MARK_COLUMNS, marks(found, [way.name for way in ways])), "", *table(SET_COLUMNS, per_set(found))]
    title = "Judged" if options.judge else "On the choosing sets"
    report(f"{title}: dtl against others, MobileNetV2, {threads} thread{'s' * (threads > 1)}, load {os.getloadavg()[0]:.0f}", lines, found, facts, options.out)


if __name__ == "__main__":
    main()
