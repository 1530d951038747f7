"""Five sets, several seeds, and test images that chose nothing: the rule of kept weights, old and new, and what calibration does.

    DTL_DATA=FOLDER python -m benchmarks.held_out --weights FILE [--seeds 5] [--sets ants_bees,flowers,digits,cifar_30,cifar_500] [--folder RUNS] [--out FILE]
    DTL_DATA=FOLDER python -m benchmarks.held_out --weights FILE --tune [--seeds 3] [--sets ants_bees,cifar_30]

FOLDER holds hymenoptera_data/{train,val}, flowers/{train,valid} and cifar10_small.tar; the digits are dtl's own. FILE is an ImageNet MobileNetV2 by the
names of configs/transfer_by_order.yaml. Each seed draws its own validation images out of the training images (of cifar_30 also these), shuffles and
initialises the head otherwise; the test images are the same for all seeds. A head is trained on frozen, cached features with the settings of
configs/features.yaml (10 epochs, ten evaluations). With --tune, a head is trained for 3 epochs and then everything for 6, in batches of 32, and the rules
choose among the evaluations of the second phase.

The runs are made with `keep: one_se`. Where the best metric was seen at another step than the kept one, the run is repeated with `keep: best`; its evaluations
must be the same to the last digit. So both rules choose from one training. A temperature is fitted on the validation images of the kept weights,
as `dtl calibrate` does, and measured on the test images.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import cpu_seconds, data_folder, machine, report, table
from benchmarks.measure import parser as benchmark_parser
from dtl.api import Run, fit
from dtl.inference.calibrate import Seen
from dtl.intervals import DRAWS, Bootstrap, shown, wilson


@dataclass(frozen=True)
class Set:
    """Images by class, and how they are used."""

    train: str
    test: str
    image_size: int
    val_share: float
    per_class: int | None = None
    """So many training images of each class, drawn for each seed."""


SETS = {
    "ants_bees": Set("hymenoptera_data/train", "hymenoptera_data/val", 160, 0.2),
    "flowers": Set("flowers/train", "flowers/valid", 128, 0.15),
    "digits": Set("digits/train", "digits/test", 64, 0.2),
    "cifar_30": Set("cifar/train", "cifar/test", 64, 0.2, per_class=30),
    "cifar_500": Set("cifar/train", "cifar/test", 64, 0.1),
}
ENDINGS = (".jpg", ".jpeg", ".png")
TUNED = {
    "head": {"train": "head", "epochs": 3, "lr": 0.05, "keep": "last"},
    "all": {"train": "all", "epochs": 6, "lr": 0.001, "head_lr_scale": 10, "warmup": 0.5},
}


def prepare(folder: Path) -> None:
    """The sets as folders of images beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("hymenoptera_data", "flowers"):
        if not (folder / name).exists():
            (folder / name).symlink_to(data_folder().absolute() / name)
    if not (folder / "cifar").exists():
        with tarfile.open(data_folder() / "cifar10_small.tar") as tar:
            tar.extractall(folder / "cifar", filter="data")
    if not (folder / "digits").exists():
        from dtl.data.sources.digits import read_digits

        images, labels = read_digits()
        tests = set(random.Random("test").sample(range(len(labels)), 432))
        for number, (pixels, label) in enumerate(zip(images, labels)):
            file = folder / "digits" / ("test" if number in tests else "train") / str(label) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def draw(folder: Path, name: str, seed: int) -> None:
    """NAME-SEED-{train,val}.csv: every class is divided by the seed."""
    one, drawn = SETS[name], random.Random(f"{name} {seed}")
    rows: dict[str, list[str]] = {"train": ["path,label"], "val": ["path,label"]}
    for place in sorted(path for path in (folder / one.train).iterdir() if path.is_dir()):
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in ENDINGS)
        drawn.shuffle(files)
        files = files[: one.per_class]
        num_val = round(one.val_share * len(files))
        for split, some in (("val", files[:num_val]), ("train", files[num_val:])):
            rows[split] += [f"{one.train}/{place.name}/{file.name},{place.name}" for file in some]
    for split, lines in rows.items():
        (folder / f"{name}-{seed}-{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(folder: Path, name: str, seed: int, keep: str, weights: Path, *, tune: bool) -> Run:
    """One run; nothing where it is finished."""
    recipe: dict[str, Any] = {
        "run": {"name": f"{name}-{seed}-{keep}", "seed": seed, "dir": str(folder / ("tuned" if tune else "runs")), "device": "cpu"},
        "data": {split: str(folder / f"{name}-{seed}-{split}.csv") for split in ("train", "val")},
        "model": {"name": "torchvision/mobilenet_v2"},
        "transfer": {"source": str(weights), "by": "order"},
        "phases": TUNED if tune else {"head": {"train": "head", "epochs": 10, "lr": 0.05}},
        "tracking": {"wandb": "off", "report": False},
    }
    recipe["data"] |= {"test": str(folder / SETS[name].test), "image_size": SETS[name].image_size, "workers": 0, "cache_dir": str(folder / "cache")}
    recipe["data"] |= {"global_batch_size": 32 if tune else 64, "augment": {"preset": "light" if tune else "none"}}
    recipe["phases"] = {**recipe["phases"], "all" if tune else "head": {**recipe["phases"]["all" if tune else "head"], "keep": keep}}
    run = fit(recipe)
    assert run.state == "done", run.state
    return run


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Of the last phase, without what depends on the rule."""
    events = [json.loads(line) for line in (run.folder / "history.jsonl").read_text().splitlines()]
    vals = [event for event in events if event["event"] == "val" and not event.get("entering")]
    return [{key: event[key] for key in ("phase", "step", "loss", "top1")} for event in vals]


def by_both_rules(folder: Path, name: str, seed: int, weights: Path, *, tune: bool) -> dict[str, Any]:
    """What each rule keeps, measured on the test images, and the calibration of what the new one keeps."""
    new = train(folder, name, seed, "one_se", weights, tune=tune)
    found: dict[str, Any] = {"set": name, "seed": seed, "one_se": kept(new), "calibration": calibration(new)}
    if new.phases[-1]["kept_step"] == new.phases[-1]["best"]["step"]:
        found["best"] = found["one_se"]
    else:
        old = train(folder, name, seed, "best", weights, tune=tune)
        assert evaluations(old) == evaluations(new), "both rules must choose from one training"
        assert old.phases[-1]["kept_step"] == new.phases[-1]["best"]["step"]
        found["best"] = kept(old)
    return found


def kept(run: Run) -> dict[str, Any]:
    val, test, step = run.phases[-1]["val"], run.test, run.phases[-1]["kept_step"]
    assert test is not None
    return {"step": step, **{f"{split}_{key}": of[key] for split, of in (("val", val), ("test", test)) for key in ("top1", "loss", "num_samples")}}


def calibration(run: Run) -> dict[str, Any]:
    """The test images before and after: at the temperature that the validation images give, and each half of them at that of the other half."""
    from dtl.inference.calibrate import answers, crossed, fit_temperature, halves_of
    from dtl.inference.evaluate import Split, open_images
    from dtl.inference.model import running_model
    from dtl.text import to_nobody

    splits: tuple[Split, ...] = ("val", "test")
    with running_model(run.folder, device="cpu", log=to_nobody) as model:
        found = []
        for split in splits:
            shards, _ = open_images(model, None, split, batch_size=64, workers=0, on_error="fail", allow_pipe=False, log=to_nobody)
            found.append(answers(model, shards, batch_size=64, workers=0, skip_damaged=False))
    val, test = found
    temperature = fit_temperature(val)
    before, halves, rows = test.seen(), crossed(test), halves_of(test)
    assert halves is not None
    assert rows is not None
    found_by = [fit_temperature(test.part(other)) for other in reversed(rows)]
    each = [{"temperature": one, "before": test.part(mine).seen(), "after": test.part(mine).seen(one)} for mine, one in zip(rows, found_by)]
    pairs = {"test": (before, test.seen(temperature)), "halves": (before, halves)}
    return {"temperature": temperature, "num_val": len(val.labels), "each_half": each, **pairs}


def with_error(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """Mean and standard error over runs."""
    if len(values) < 2:
        return f"{scale * statistics.mean(values):+.{digits}f}"
    return f"{scale * statistics.mean(values):+.{digits}f} ± {scale * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def rule_row(name: str, runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A line of the table of the rules."""
    cells = []
    for run in runs:
        old, new = (100 * run[rule]["test_top1"] for rule in ("best", "one_se"))
        cells.append(f"{old:.1f} =" if run["best"]["step"] == run["one_se"]["step"] else f"{old:.1f} -> {new:.1f}")
    num_val, num_test = runs[0]["one_se"]["val_num_samples"], runs[0]["one_se"]["test_num_samples"]
    means = [statistics.mean(run[rule]["test_top1"] for run in runs) for rule in ("best", "one_se")]
    return (
        f"{name}, {num_val:,} / {num_test:,}",
        "; ".join(cells),
        *(f"{100 * mean:.1f} % ({shown(wilson(mean, num_test))})" for mean in means),
        with_error([run["one_se"]["test_top1"] - run["best"]["test_top1"] for run in runs], 100, 2),
        *(f"{statistics.mean(run[rule]['test_loss'] for run in runs):.3f}" for rule in ("best", "one_se")),
        with_error([run["one_se"]["test_loss"] - run["best"]["test_loss"] for run in runs], 1, 3),
        *(f"{100 * statistics.mean(run[rule]['val_top1'] - run[rule]['test_top1'] for run in runs):+.1f}" for rule in ("best", "one_se")),
    )


RULE_COLUMNS = (
    "set, val / test images",
    "test top1, `best` -> `one_se` (= : the same weights)",
    "mean, `best`",
    "mean, `one_se`",
    "change of top1, points",
    "test loss, `best`",
    "`one_se`",
    "change of the loss",
    "val top1 over test top1, `best`",
    "`one_se`",
)


def rule_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """What all runs together say."""
    others = [run for run in found if run["best"]["step"] != run["one_se"]["step"]]
    lines = [f"The same weights in {len(found) - len(others)} of {len(found)} runs."]
    for key, word in (("test_top1", "top1"), ("test_loss", "loss")):
        changes = [run["one_se"][key] - run["best"][key] for run in found]
        mean = with_error(changes, 100 if word == "top1" else 1, 2 if word == "top1" else 3)
        signs = [sum(change > 0 for change in changes), sum(change < 0 for change in changes)]
        lines.append(f"Test {word}, {'points, ' if word == 'top1' else ''}over all runs: {mean} (standard error); higher in {signs[0]}, lower in {signs[1]}.")
    return lines


def calibration_row(name: str, runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A line of the table of temperatures: means over seeds, and the interval of their mean change by a bootstrap of the test images that all seeds share."""
    found = [run["calibration"] for run in runs]
    num_test, temperatures = len(found[0]["test"][0].loss), [one["temperature"] for one in found]
    cells = [f"{name}, {found[0]['num_val']:,} / {num_test:,}", f"{min(temperatures):.2f} to {max(temperatures):.2f}"]
    for which in ("test", "halves"):
        pairs = [one[which] for one in found]
        changes = mean_change(pairs)
        for measure, scale, digits, unit in (("loss", 1, 3, ""), ("calibration_error", 100, 1, " %")):
            before, after = (scale * statistics.mean(pair[when].measured()[measure] for pair in pairs) for when in (0, 1))
            low, high = (scale * end for end in changes[measure])
            cells.append(f"{before:.{digits}f} -> {after:.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f})")
    each = [half for one in found for half in one["each_half"]]
    lower = [sum(half["after"].measured()[key] < half["before"].measured()[key] for half in each) for key in ("loss", "calibration_error")]
    found_by = [half["temperature"] for half in each]
    cells.append(f"{min(found_by):.2f} to {max(found_by):.2f}; {lower[0]}, {lower[1]} of {len(each)}")
    cells.insert(4, f"{100 * statistics.mean(one['test'][1].by_chance() for one in found):.1f} %")
    return tuple(cells)


def mean_change(pairs: Sequence[tuple[Seen, Seen]]) -> dict[str, tuple[float, float]]:
    """The 95 % interval of the change from the first to the second of each pair, averaged over seeds."""
    bootstrap = Bootstrap(len(pairs[0][0].loss))
    counts = np.concatenate(list(bootstrap.counts(DRAWS)))
    result = {}
    for measure in pairs[0][0].measured():
        change = statistics.mean(after.measured()[measure] - before.measured()[measure] for before, after in pairs)
        drawn = np.mean([after.drawn(measure, counts) - before.drawn(measure, counts) for before, after in pairs], axis=0)
        half = 1.96 * float(drawn.std(ddof=1))
        result[measure] = (change - half, change + half)
    return result


CALIBRATION_COLUMNS = (
    "set, val / test images",
    "temperature of val",
    "test loss (95 % of the change)",
    "test calibration error (95 % of the change)",
    "by chance",
    "each half of test at the other's temperature: loss",
    "calibration error",
    "temperature of the halves; loss, error lower in",
)


def measured(folder: Path, names: Sequence[str], seeds: int, weights: Path, *, tune: bool) -> list[dict[str, Any]]:
    found = []
    for name in names:
        for seed in range(seeds):
            before = cpu_seconds()
            draw(folder, name, seed)
            found.append(by_both_rules(folder, name, seed, weights, tune=tune))
            print(f"{name} {seed}: {cpu_seconds() - before:.0f} CPU seconds", flush=True)
    return found


def main() -> None:
    made = benchmark_parser(__doc__)
    add = made.add_argument
    add("--weights", type=Path, required=True, help="ImageNet MobileNetV2 (configs/transfer_by_order.yaml says where it is from)")
    add("--sets", help=f"some of {','.join(SETS)}")
    add("--seeds", type=int, help="5; with --tune 3")
    add("--tune", action="store_true", help="train everything after the head")
    add("--folder", type=Path, help="where runs lie and are continued (default: a temporary folder)")
    options = made.parse_args()
    names = options.sets.split(",") if options.sets else ["ants_bees", "cifar_30"] if options.tune else list(SETS)
    seeds, weights = options.seeds or (3 if options.tune else 5), options.weights.absolute()
    facts, began = machine(), cpu_seconds()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        prepare(folder)
        found = measured(folder, names, seeds, weights, tune=options.tune)
    runs = {name: [run for run in found if run["set"] == name] for name in names}
    lines = table(RULE_COLUMNS, [rule_row(name, some) for name, some in runs.items()])
    lines += ["", *rule_lines(found), "", *table(CALIBRATION_COLUMNS, [calibration_row(name, some) for name, some in runs.items()])]
    lines += ["", f"{cpu_seconds() - began:.0f} CPU seconds"]
    data = [{key: value for key, value in run.items() if key != "calibration"} | {"temperature": run["calibration"]["temperature"]} for run in found]
    title = "Everything trained after the head" if options.tune else "A head on frozen features"
    report(f"{title}: {seeds} seeds, test images that chose nothing", lines, data, facts, options.out)


if __name__ == "__main__":
    main()
