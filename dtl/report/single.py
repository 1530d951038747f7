"""The report of one run, part by part. A part that cannot be made is left out, and the page lists it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtl.errors import UserError
from dtl.files import user_path, write_whole
from dtl.intervals import Interval, shown, wilson
from dtl.report import html, style
from dtl.report.confusion import MOST_BARS, MOST_NAMES, ClassNumbers, by_group, by_size, classes_figure, confused_pairs, confusion_figure, hardest_classes
from dtl.report.curves import curves_figure
from dtl.report.fonts import covers, without_font
from dtl.report.grids import save_grid
from dtl.report.html import Cell
from dtl.report.record import PhaseRecord, RunRecord, read_run
from dtl.report.style import NARROW, percent
from dtl.runs.folder import REPORT_FILE
from dtl.runs.looks import describe_look
from dtl.runs.predictions import TWINS_NAME, ImagePredictions, read_predictions, recorded_file
from dtl.text import Log, counted, some
from dtl.untrusted import json_lines, open_regular
from dtl.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dtl.models.model_json import ModelFacts
    from dtl.report.examples import Examples

PAGE = "index.html"
_MOST_NOTES = 30
_PAIRS_SHOWN, _OF_A_PAIR = 3, 8
_WITHOUT_TOP5 = 6  # with fewer classes top5 means nothing


@dataclass
class _Parts:
    """Runs the parts of a report, and keeps what went wrong."""

    out: Path
    log: Log
    left_out: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """What stands in the pictures that others have named."""

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """`work()`, or None after a note. Any exception: the model may be anybody's code, and a run must not fail by its report."""
        try:
            return work()
        except Exception as error:
            words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.leave_out(f"{what}: {' '.join(words.split())}")
            return None

    def leave_out(self, words: str) -> None:
        if words not in self.left_out:
            self.left_out.append(words)
            self.log(f"left out of the report: {words}")

    def plot(
        self,
        name: str,
        draw: Callable[[], Figure | None],
        *,
        alt: str,
        caption: str = "",
        narrow: Callable[[], Figure | None] | None = None,
    ) -> html.Plot | None:
        """Draw, save as NAME.png, and embed, also as drawn for narrow windows; None where there is nothing to draw."""
        return embed_plot(self.out / f"{name}.png", draw, alt=alt, caption=caption, narrow=narrow, names=self.names)


def make_report(run_folder: str | Path, *, out: str | Path | None, device: str, max_images: int, seconds: float, trust: bool, log: Log) -> Path:
    """See `dtl.report.make_report`."""
    record = read_run(run_folder)
    parts = _Parts(prepare_folder(record.path / "report" if out is None else user_path(out)), log)
    for words in record.missing:
        parts.leave_out(words)
    examples = None
    if record.config is not None:
        examples = parts.attempt("the run's images", lambda: _open_examples(record, device, trust, log))
    predictions = parts.attempt("the predictions that the run kept", lambda: _kept_predictions(record))
    if predictions is None and examples is not None and record.model is not None:
        predictions = parts.attempt("predictions", lambda: _new_predictions(record, examples, max_images, seconds))
    parts.names += [] if record.model is None else _shown_names(record.model)
    parts.names += [] if examples is None else examples.names
    sections = [
        parts.attempt("the table of phases", lambda: _phases(record)),
        parts.attempt("the curves", lambda: _curves(parts, record)),
        parts.attempt("the blends", lambda: _blends(record)),
        parts.attempt("training images", lambda: _training(parts, examples)),
        parts.attempt("predictions", lambda: _predictions(parts, predictions, examples)),
        parts.attempt("confusion", lambda: _confusion(parts, predictions, examples)),
        parts.attempt("where it errs", lambda: _errors(record, predictions, examples)),
        parts.attempt("the transfer", lambda: _transfer(record)),
        parts.attempt("the run's notes", lambda: _notes(record)),
    ]
    if scripts := without_font(parts.names):
        parts.leave_out(missing_fonts(scripts))
    if parts.left_out:
        sections.append(html.section("Left out", html.Bullets(parts.left_out)))
    if record.stored is not None:
        sections.append(html.section("Settings", html.Details("config.yaml", record.stored.text)))
    lead = parts.attempt("the headline", lambda: _lead(record, examples)) or []
    document = html.page(record.name, lead, [found for found in sections if found is not None], footer=footer())
    return write_page(parts.out, document)


def embed_plot(
    file: Path, draw: Callable[[], Figure | None], *, alt: str, caption: str = "", narrow: Callable[[], Figure | None] | None = None, names: Iterable[str] = ()
) -> html.Plot | None:
    """Draw into `file`, and embed; with `narrow` beside a second drawing for narrow windows. None where there is nothing to draw.

    `names` are in it, in any script.
    """
    small = file.with_name(f"{file.stem}-narrow.png")
    with style.plain(names):
        figure = draw()
        if figure is None:
            return None
        style.save(figure, file)
        second = narrow() if narrow is not None else None
        if second is not None:
            style.save(second, small)
    return html.plot(file, alt, width=style.page_width(figure), caption=caption, narrow=None if second is None else small)


def prepare_folder(out: Path) -> Path:
    """The folder for a report, without the pictures of an earlier one (a phase may have gone). UserError for a folder that is no report's."""
    try:
        if out.is_symlink():
            raise UserError(f"{out} is a symbolic link, and a report replaces files: give the folder itself with --out")
        out.mkdir(parents=True, exist_ok=True)
        found = {entry.name: entry for entry in out.iterdir() if not entry.name.startswith(".")}
        others = sorted(name for name in found if not REPORT_FILE.fullmatch(name))
        if others and not _is_report(out / PAGE):
            raise UserError(f"{out} is not empty (it contains '{others[0]}') and is not a report made by dtl: choose a new folder with --out")
        if PAGE in found and not _is_report(out / PAGE):
            raise UserError(f"{out / PAGE} was not made by dtl and would be replaced: choose a new folder with --out")
        for name, old in found.items():
            if name != PAGE and REPORT_FILE.fullmatch(name):
                old.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error.strerror or error}; choose another folder with --out") from error
    return out


def _is_report(page: Path) -> bool:
    """Whether a page is one that dtl wrote: each ends with `footer`."""
    try:
        with open_regular(page) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 4096))
            return b"Made by dtl " in file.read()
    except (OSError, UserError):
        return False


def write_page(out: Path, document: str) -> Path:
    """index.html, whole or not at all; returns its path."""
    page = out / PAGE
    try:
        # A class name from an odd file system may hold what UTF-8 cannot: it is shown as "?".
        write_whole(page, lambda file: file.write(document.encode("utf-8", errors="replace")), sync=False)
    except OSError as error:
        raise UserError(f"the report cannot be written to {out}: {error.strerror or error}; choose another folder with --out") from error
    return page


def missing_fonts(scripts: Sequence[str]) -> str:
    return f"names in {', '.join(scripts)} in the pictures: no installed font has these characters (Noto fonts do); the page has the names as text"


def footer() -> str:
    return f"Made by dtl {__version__} on {time.strftime('%Y-%m-%d %H:%M %Z')}."


def _open_examples(record: RunRecord, device: str, trust: bool, log: Log) -> Examples:
    from dtl.report.examples import Examples

    return Examples.open(record, device=device, trust=trust, log=log)


# ---- parts


def _lead(record: RunRecord, examples: Examples | None) -> list[html.Block]:
    numbers: list[tuple[str, str]] = []
    metrics = result(record)
    if metrics:
        numbers.append((percent(metrics["top1"], 2), "top-1"))
        rotated = bool(record.phases) and record.phases[-1].task != "classify"
        own = metrics if record.model is None or not isinstance(record.model.metrics, dict) else {**record.model.metrics, **metrics}
        if interval := shown(top1_interval("rotate" if rotated else "classify", own)):
            numbers.append((f"{interval}\u00a0%".replace(" to ", "\u00a0to\u00a0"), "95\u00a0% interval of top-1"))
        if record.model is not None and len(record.model.classes) >= _WITHOUT_TOP5:
            numbers.append((percent(metrics["top5"], 2), "top-5"))
        numbers.append((f"{metrics['loss']:.4g}", "loss"))
        numbers.append((f"{metrics['num_samples']:,.0f}", "validation images"))
    if record.test is not None:
        numbers.append((percent(record.test["top1"], 2), f"top-1 on {record.test['num_samples']:,.0f} test images"))
        if within := shown(top1_interval("classify", record.test)):
            numbers.append((f"{within}\u00a0%".replace(" to ", "\u00a0to\u00a0"), "95\u00a0% interval on test images"))
    seconds = sum(phase.row.get("seconds") or 0.0 for phase in record.phases)
    if seconds:
        numbers.append((duration(seconds), "training time"))
    facts: list[tuple[str, str]] = []
    if record.config is not None:
        config = record.config
        images = f" ({examples.loaders.train.num_samples:,} images of {examples.loaders.train.num_classes:,} classes)" if examples else ""
        facts = [
            ("Network", config.model.name),
            ("Training data", f"{record.settings['data.train']}{images}"),
            ("Pretrained weights", config.transfer.source if config.transfer else "none"),
            ("Image size", _image_size(record)),
            ("Global batch", counted(record.settings["data.global_batch_size"], "image")),
            ("Seed", str(config.run.seed)),
        ]
    facts += _splits(record)
    if record.test is not None:
        facts.append(("Test set", f"measured once, after the last phase; {describe_look(record.test.get('look'), record.path.parent)}"))
    state = record.status.state
    if state not in ("unknown", "done"):
        why = f" ({record.status.why})" if record.status.why else ""
        facts.append(("State", f"{state} at step {record.last_step:,}{why}"))
    return [*([html.Headline(numbers)] if numbers else []), *([html.Facts(facts)] if facts else [])]


def _splits(record: RunRecord) -> list[tuple[str, str]]:
    """Fold, groups and calibration, where there are any: they say how numbers of the page are meant."""
    facts = []
    fold, model = None if record.config is None else record.config.data.fold, record.model
    if fold is not None:
        facts.append(("Fold", f"{fold.number} of {fold.of}: its images are the test set" if fold.number else f"none: all images of {fold.of} folds"))
    if record.is_grouped:
        given = [f"{key} {value}" for key, value in record.settings.items() if key.startswith("data.group.") and value is not None]
        facts.append(("Groups", f"{', '.join(given)}; intervals of top-1 draw whole groups"))
    if model is not None and model.calibration is not None:
        found = model.calibration
        threshold = "" if found.threshold is None else f", threshold {found.threshold.value:.4f} ({found.threshold.criterion.replace('_', ' ')})"
        images = counted(found.num_samples, "validation image")
        facts.append(("Calibration", f"temperature {found.temperature:.4g}{threshold}, fitted on {images} after training; this page shows the run without it"))
    return facts


def _image_size(record: RunRecord) -> str:
    """Of the model folder, where there is one: the config may leave it to the weights."""
    assert record.config is not None
    found = record.config.data.image_size if record.model is None else record.model.preprocessing["image_size"]
    if found == "auto":
        return "that of the weights or of the network"
    height, width = found if isinstance(found, list | tuple) else (found, found)
    return f"{width} × {height} pixels"


def result(record: RunRecord) -> dict[str, float] | None:
    """The numbers of the run's weights: the model folder's, or those that the last phase would keep."""
    names = ("top1", "top5", "loss", "num_samples")
    metrics = None if record.model is None else record.model.metrics
    if isinstance(metrics, dict) and all(isinstance(metrics.get(name), (int, float)) for name in names):
        return {name: float(metrics[name]) for name in names}
    best = record.phases[-1].kept(record.monitor) if record.phases else None
    return None if best is None else {name: float(record.phases[-1].val[name][best]) for name in names}


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _phases(record: RunRecord) -> html.Section | None:
    if not record.phases:
        return None
    rows = []
    for phase in record.phases:
        rows.append([Cell(phase.name), *_phase_cells(record, phase)])
    columns = [
        "phase",
        "task",
        "trained",
        "epochs",
        "steps",
        "optimizer, lr",
        "kept epoch",
        "train loss",
        "val loss",
        "top-1",
        "95\u00a0% interval",
        "looks",
        "time",
    ]
    chosen = (
        f"Losses and top-1 belong to the weights that each phase keeps. With keep: one_se these have the lowest validation loss within one standard error of "
        f"the best {record.monitor}, with keep: best the best {record.monitor}. Looks: the evaluations that they were chosen of (keep: last: 1)."
    )
    return html.section("Phases", html.Table(columns, rows), html.Text(chosen, soft=True))


def _phase_cells(record: RunRecord, phase: PhaseRecord) -> list[Cell]:
    settings = record.config.phases.get(phase.name) if record.config is not None else None
    per_epoch, best = record.steps_per_epoch, phase.kept(record.monitor)
    trained = "–" if settings is None else settings.train if isinstance(settings.train, str) else ", ".join(settings.train)
    train_loss = None if best is None or phase.is_blend[best] else phase.train_loss_at(phase.val["step"][best])
    seconds = phase.row.get("seconds")
    return [
        Cell(phase.task),
        Cell(trained),
        Cell(f"{round(phase.num_steps / per_epoch, 2):g}" if per_epoch else "–", number=True),
        Cell(f"{phase.num_steps:,}", number=True),
        Cell("–" if settings is None else settings.optimizer if settings.optimizer == "solve" else f"{settings.optimizer}, {settings.lr:g}"),
        Cell("–" if best is None else _kept_epoch(phase, best), number=True),
        Cell("–" if train_loss is None else f"{train_loss:.4f}", number=True),
        Cell("–" if best is None else f"{phase.val['loss'][best]:.4f}", number=True),
        Cell("–" if best is None else percent(float(phase.val["top1"][best]), 2), number=True),
        Cell(_interval(phase, best), number=True),
        Cell("–" if best is None else "1" if phase.keep == "last" else f"{len(phase.val['step']):,}", number=True),
        Cell(duration(seconds) if seconds else "–", number=True),
    ]


def _kept_epoch(phase: PhaseRecord, place: int) -> str:
    if phase.is_blend[place]:
        return f"blend {phase.val['blend'][place]:g}"
    return "before" if phase.val["step"][place] == phase.first_step else f"{phase.val['epoch'][place]:g}"


def _blends(record: RunRecord) -> html.Section | None:
    """The evaluations between the weights that entered a phase and its last ones, these two included."""
    blocks: list[html.Block] = []
    for phase in record.phases:
        if not phase.is_blend.any():
            continue
        first, last = phase.val["step"] == phase.first_step, (phase.val["step"] == phase.last_step) & ~phase.is_blend
        places = [*np.flatnonzero(first), *np.flatnonzero(phase.is_blend), *np.flatnonzero(last)]
        kept = phase.kept(record.monitor)
        rows = [
            [
                Cell("start" if first[at] else "end" if last[at] else f"{phase.val['blend'][at]:g}"),
                Cell(f"{phase.val['loss'][at]:.4f}", number=True),
                Cell(percent(float(phase.val["top1"][at]), 2), number=True),
                Cell("kept" if at == kept else ""),
            ]
            for at in places
        ]
        blocks += [html.Subheading(f"Phase {phase.name}"), html.Table(["share of the way", "val loss", "top-1", ""], rows)]
    about = "Weights on the straight line from those that entered the phase to those at its end (WiSE-FT): candidates of keep: one_se, as its evaluations are."
    return html.section("Between start and end", *blocks, html.Text(about, soft=True)) if blocks else None


def _interval(phase: PhaseRecord, place: int | None) -> str:
    """Of top1. The rotations of one image are not independent: there is none."""
    if place is None:
        return "–"
    val = {name: float(phase.val[name][place]) for name in ("top1", "num_samples")}
    row = phase.row if phase.row.get("kept_step") == phase.val["step"][place] else {}
    return shown(top1_interval(phase.task, {**val, **{key: value for key, value in row.items() if key == "top1_interval"}})) or "–"


def top1_interval(task: str, metrics: Mapping[str, Any]) -> Interval | None:
    """As the run wrote it down, who knows its groups of images; else Wilson's."""
    found = metrics.get("top1_interval")
    if task != "classify":
        return None
    if isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(end, (int, float)) and 0 <= end <= 1 for end in found):
        return float(found[0]), float(found[1])
    return wilson(metrics["top1"], metrics["num_samples"])


def _curves(parts: _Parts, record: RunRecord) -> html.Section | None:
    settings = {} if record.config is None else record.config.phases
    if all(phase.name in settings and settings[phase.name].optimizer == "solve" for phase in record.phases):
        return None  # a solved head has no course, only its end
    names = some([phase.name for phase in record.phases], limit=40)
    alt = f"Loss, top-1 and learning rate over {record.last_step} steps in the phases {names}."
    plot = parts.plot("curves", lambda: curves_figure(record), alt=alt, narrow=lambda: curves_figure(record, NARROW))
    return html.section("Training curves", plot) if plot else None


def _training(parts: _Parts, examples: Examples | None) -> html.Section | None:
    if examples is None:
        return None
    blocks: list[html.Block] = []
    views = examples.training_views()
    for view in views:
        name = f"training-{view.phases[0]}" if len(views) > 1 else "training"
        save_grid(view.tiles, parts.out / f"{name}.png")
        heading = some(view.phases, limit=40) + (f": {view.words}" if view.words else "")
        if len(views) > 1 or view.words:
            blocks.append(html.Subheading(heading))
        blocks.append(html.Tiles(view.tiles, fours=view.words.endswith("rotations")))
    about = "The first training images, exactly as the network gets them after augmentation."
    return html.section("What the network sees", html.Text(about, soft=True), *blocks)


@dataclass(frozen=True)
class _Predictions:
    """What the run's weights predict for validation images."""

    images: ImagePredictions
    names: list[str]
    """Display names of the classes."""
    top1: float
    about: str
    """Who asked the network, and how."""
    data: str | None
    """The dataset id of the images; None: of those that `Examples` has."""

    @property
    def num_seen(self) -> int:
        return len(np.unique(self.images.samples))


def _kept_predictions(record: RunRecord) -> _Predictions | None:
    """Of the evaluation that the headline is of; None for a run that kept none."""
    if record.model is None:
        return None
    facts, metrics = recorded_file(record.model.made_by, str(record.path / "model" / "model.json")), result(record)
    if facts is None or metrics is None:
        return None
    images = read_predictions(record.path, facts, len(record.model.classes))
    if images is None:
        return None
    about = f"The run evaluated these weights (precision {record.model.made_by.get('precision')}) on"
    return _Predictions(images, _shown_names(record.model), metrics["top1"], about, facts.data)


def _new_predictions(record: RunRecord, examples: Examples, max_images: int, seconds: float) -> _Predictions:
    assert record.model is not None
    images, metrics = examples.predict(record.path / "model", max_images=max_images, seconds=seconds)
    about = "There is no predictions.npy of these weights. The model was evaluated on"
    return _Predictions(images, _shown_names(record.model), metrics["top1"], about, None)


def _shown_names(model: ModelFacts) -> list[str]:
    return [model.display_names.get(name, name) for name in model.classes]


def _predictions(parts: _Parts, found: _Predictions | None, examples: Examples | None) -> html.Section | None:
    if found is None:
        return None
    blocks: list[html.Block | None] = [html.Text(_about(found, examples), soft=True)]
    if examples is not None:
        blocks += parts.attempt("the images with their predictions", lambda: _predicted_images(parts, found, examples)) or []
    return html.section("Predictions", *blocks)


def _predicted_images(parts: _Parts, found: _Predictions, examples: Examples) -> list[html.Block]:
    from dtl.report.examples import NUM_TILES, draw_samples

    if found.data not in (None, examples.loaders.val.dataset_id):
        raise UserError("the validation data is no longer what the run was evaluated on")
    images, task = found.images, examples.task_of(found.names)
    some = draw_samples(len(images), NUM_TILES, examples.seed)
    worst = np.flatnonzero(images.wrong)
    worst = worst[np.argsort(-images.probability[worst], kind="stable")][:NUM_TILES]
    tiles = examples.tiles(images, some, found.names, task)
    save_grid(tiles, parts.out / "predictions.png")
    blocks: list[html.Block] = [html.Text("A random selection, with the predicted class and its probability:", soft=True), html.Tiles(tiles)]
    if not len(worst):
        return [*blocks, html.Text("There are no mistakes among them.")]
    mistakes = examples.tiles(images, worst, found.names, task, with_files=True)
    parts.names += [tile.file for tile in mistakes]
    save_grid(mistakes, parts.out / "mistakes.png")
    return [*blocks, html.Subheading("Mistakes, most confident first"), html.Tiles(mistakes)]


def _about(found: _Predictions, examples: Examples | None) -> str:
    """How many images the numbers stand on."""
    seen = found.num_seen
    total = seen if examples is None else examples.loaders.val.num_samples
    which = f"all {total:,} validation images"
    if seen < total:
        which = f"{seen:,} of {total:,} validation images, " + ("drawn at random" if found.data is None else "the others are damaged")
    turned = ", each in four rotations" if len(found.images) > seen else ""
    return f"{found.about} {which}{turned}: top-1 {percent(found.top1, 2)}."


def _confusion(parts: _Parts, found: _Predictions | None, examples: Examples | None) -> html.Section | None:
    if found is None:
        return None
    labels, predicted, names = found.images.labels, found.images.predicted, found.names
    numbers = ClassNumbers.count(labels, predicted, len(names))
    total = found.num_seen if examples is None else examples.loaders.val.num_samples
    counted = f"Counted over {found.num_seen:,} of {total:,} validation images"
    order = hardest_classes(numbers)
    # Boxes would all look the same.
    in_plots = range(len(names)) if len(names) <= MOST_NAMES else sorted(order[:MOST_BARS].tolist())
    numbered = [label for label in in_plots if not covers(names[label])]
    drawn = list(names)
    for label in numbered:
        drawn[label] = f"class {label}"
    matrix = parts.plot(
        "confusion",
        lambda: confusion_figure(labels, predicted, drawn),
        alt=f"Confusion matrix of {len(names)} classes: {percent(float((labels == predicted).mean()))} are on the diagonal.",
        caption=f"{counted}. Each row is normalised by its true class; colours have a square-root scale, so that rare mistakes can be seen.",
    )
    worst = ", ".join(f"{names[c]} {percent(float(numbers.recall[c]), 0)}" for c in order[:3])
    many = f"The {min(30, len(order))} classes with the lowest recall, of {len(order)}. " if len(order) > 30 else ""
    bars = parts.plot(
        "classes",
        lambda: classes_figure(numbers, drawn),
        alt=f"Recall and precision by class; lowest recall: {worst}.",
        caption=f"{many}Recall: share of the images of a class that are predicted as it (number of images in brackets). "
        "Precision: share of the predictions of a class that are right.",
    )
    pairs = confused_pairs(labels, predicted, len(names))
    rows = [
        [Cell(names[true]), Cell(names[taken]), Cell(f"{count:,}", number=True), Cell(f"{numbers.samples[true]:,}", number=True)]
        for true, taken, count in pairs
    ]
    listed = [html.Subheading("Most often confused"), html.Table(["true class", "predicted as", "images", "of"], rows, compact=True)] if rows else []
    if numbered:
        table = html.Table(["in the plots", "class"], [[Cell(drawn[label]), Cell(names[label])] for label in numbered], compact=True)
        listed += [html.Subheading("Classes that the plots number"), table]
    return html.section("Classes", html.Beside([[part for part in column if part is not None] for column in ([matrix], [bars, *listed])]))


def _errors(record: RunRecord, found: _Predictions | None, examples: Examples | None) -> html.Section | None:
    """Accuracy without the images that have a twin in train, by image size and by group; images of the pairs of classes that are confused most."""
    if found is None or examples is None or found.data not in (None, examples.loaders.val.dataset_id) or found.num_seen != len(found.images):
        return None
    from dtl.data.splits_of_run import groups_of

    images, val = found.images, examples.loaders.val
    right, blocks = ~images.wrong, list[html.Block]()
    listed = json_lines(record.path / TWINS_NAME) if (record.path / TWINS_NAME).is_file() else []
    twin = np.isin(images.samples, [line["sample"] for line in listed if line.get("split") == "val" and isinstance(line.get("sample"), int)])
    if twin.any() and not twin.all():
        with_them, without = percent(float(right.mean()), 2), percent(float(right[~twin].mean()), 2)
        what = f"{int(twin.sum()):,} of {counted(len(twin), 'image')} {'has a twin' if twin.sum() == 1 else 'have twins'} in the training images"
        blocks.append(html.Text(f"{what} ({TWINS_NAME} lists them): top-1 is {with_them} with them and {without} without."))
    widths, heights, _ = val.shapes(images.samples)
    tables = [("shorter side", by_size(np.minimum(widths, heights), right))]
    if not tables[0][1]:  # packing made them all as large as training needs
        tables = [("longer side", by_size(np.maximum(widths, heights), right))]
    if (groups := groups_of(val, "val", examples.config.data, str(examples.config.data.val or examples.config.data.train))) is not None:
        tables.append(("groups with most mistakes", by_group(groups.names, groups.codes[images.samples], right, MOST_BARS // 3)))
    blocks += [
        html.Table(
            [name, "right", "images", "top-1"],
            [[Cell(one.name), Cell(f"{one.right:,}", True), Cell(f"{one.total:,}", True), Cell(percent(one.right / one.total, 1), True)] for one in shares],
            compact=True,
        )
        for name, shares in tables
        if shares
    ]
    pairs = confused_pairs(images.labels, images.predicted, len(found.names))
    for true, taken, count in [pair for pair in pairs if pair[2] > 1][:_PAIRS_SHOWN]:  # a single image is among the mistakes above
        rows = np.flatnonzero((images.labels == true) & (images.predicted == taken))
        rows = rows[np.argsort(-images.probability[rows], kind="stable")][:_OF_A_PAIR]
        blocks.append(html.Subheading(f"{found.names[true]}, predicted as {found.names[taken]} ({counted(count, 'image')})"))
        blocks.append(html.Tiles(examples.tiles(images, rows, found.names, examples.task_of(found.names), with_files=True)))
    return html.section("Where it errs", *blocks) if blocks else None


def _transfer(record: RunRecord) -> html.Section | None:
    found = record.transfer
    if found is None:
        return None
    rows = [[Cell(name), Cell(f"{n.tensors:,}", number=True), Cell(f"{n.parameters:,}", number=True)] for name, n in found.totals.items()]
    words = f"From {found.source}, by {found.by}: {percent(found.coverage)} of all layers, norms and tables were loaded."
    tensors = [[Cell(cell, number=column == 3) for column, cell in enumerate(row)] for row in found.table]
    notes = found.lines or (*found.warnings, *found.notes)
    return html.section(
        "Pretrained weights",
        html.Text(words),
        html.Table(["outcome", "tensors", "parameters"], rows, compact=True) if rows else None,
        html.Bullets(notes) if notes else None,
        html.Table(["outcome", "target", "source", "tensors", "why"], tensors) if tensors else None,
    )


def _notes(record: RunRecord) -> html.Section | None:
    lines = []
    for note in record.notes[-_MOST_NOTES:]:
        known = {key: value for key, value in note.items() if key not in ("event", "note", "step")}
        more = ", ".join(f"{key} {value}" for key, value in known.items() if isinstance(value, (str, int, float)))
        step = f"step {note['step']}: " if "step" in note else ""
        lines.append(f"{step}{note.get('note', '')}" + (f" ({more})" if more else ""))
    return html.section("Notes", html.Bullets(lines)) if lines else None
