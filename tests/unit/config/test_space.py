"""A space says what trials there are: checked before anything runs, drawn by key, none of them twice."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dtl.config import Config
from dtl.config.space import candidates, described, read_space, resolver
from dtl.errors import UserError

RESOLVE = resolver("finetune", {"data.train": "photos"})


def written(folder: Path, text: str) -> str:
    (folder / "space.yaml").write_text(text)
    return str(folder / "space.yaml")


def get(config: Config, key: str) -> Any:
    value: Any = config.to_dict()
    for part in key.split("."):
        value = value[part]
    return value


def test_each_kind_of_range_stays_inside_and_fills_it(tmp_path: Path) -> None:
    space = read_space(
        written(
            tmp_path,
            """
phases.all.lr: {log: [0.001, 0.1]}
phases.all.layer_decay: {uniform: [0.5, 1.0]}
phases.head.epochs: {integers: [1, 3]}
data.global_batch_size: {log_integers: [8, 64]}
phases.all.optimizer: [sgd, adamw]
model.name, transfer.source: [[torchvision/resnet18, pretrained], [torchvision/resnet34, w.pt]]
""",
        )
    )
    assert space.size is None
    trials = space.first(200, 0, RESOLVE)
    assert trials[0][0] == {}, "the first is the recipe as it is"
    drawn = [settings for settings, _ in trials[1:]]
    lrs = [settings["phases.all.lr"] for settings in drawn]
    assert 0.001 <= min(lrs) < 0.0013
    assert 0.08 < max(lrs) <= 0.1
    assert 0.4 < sum(lr < 0.01 for lr in lrs) / len(lrs) < 0.6, "uniform in the logarithm"
    assert {settings["phases.head.epochs"] for settings in drawn} == {1, 2, 3}
    sizes = [settings["data.global_batch_size"] for settings in drawn]
    assert (min(sizes), max(sizes)) == (8, 64)
    assert {(settings["model.name"], settings["transfer.source"]) for settings in drawn} == {
        ("torchvision/resnet18", "pretrained"),
        ("torchvision/resnet34", "w.pt"),
    }
    for settings, config in trials[1:5]:
        assert all(get(config, key) == value for key, value in settings.items())
    assert space.first(20, 0, RESOLVE) == trials[:20], "more trials begin with the same ones"
    assert [settings for settings, _ in space.first(20, 1, RESOLVE)] != [settings for settings, _ in trials[:20]]
    assert all(len(f"{lr:.10g}".replace("0.", "").lstrip("0")) <= 4 for lr in lrs), "a command line can repeat it"


def test_a_space_of_choices_is_gone_through_without_a_repetition(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, "phases.all.layer_decay: [0.65, 0.7, 1.0]\nphases.all.schedule: {choices: [cosine, constant]}\n"))
    assert space.size == 6
    trials = space.first(100, 0, RESOLVE)
    found = {(config.phases["all"].layer_decay, config.phases["all"].schedule) for _, config in trials}
    assert len(trials) == len(found) == 6, "layer_decay 0.7 and cosine is the recipe itself"
    assert math.isclose(trials[0][1].phases["all"].layer_decay or 0, 0.7)


def test_choices_are_read_as_the_recipe_reads_them(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, "model.name: [no, 4711]\nphases.all.layer_decay: [0.5, null]\n"))
    assert space.ranges[0].values == (("no",), ("4711",))
    assert space.ranges[1].values == ((0.5,), (None,))
    assert described({}) == "the recipe as it is"
    space = read_space(written(tmp_path, "phases.all.lr: {log: [1e-4, 1e-2]}\nmodel.name: {choices: [no]}\n"))
    assert [one.values for one in space.ranges] == [(1e-4, 1e-2), (("no",),)], "1e-4 is text to YAML"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("phases.haed.lr: {log: [0.1, 1]}", "space.yaml: phases.haed.lr: the built-in recipe finetune has no phase haed; did you mean head?"),
        ("phases.head.lrr: {log: [0.1, 1]}", "space.yaml: phases.head.lrr: unknown config key phases.head.lrr; did you mean phases.head.lr"),
        ("nodel.name: [a, b]", "space.yaml: nodel.name: unknown config key nodel; did you mean model"),
        ("phases.head.lr: {log: [0.1, -1]}", "phases.head.lr: log takes [lowest, highest], two numbers (got [0.1, -1])"),
        ("phases.head.lr: {log: [0, 1]}", "phases.head.lr: log takes numbers above 0 (got 0)"),
        ("phases.head.lr: {lgo: [0, 1]}", "phases.head.lr: unknown kind of range 'lgo'; did you mean 'log'?"),
        ("phases.head.lr: 0.1", "phases.head.lr: a range is a list of choices, or one of uniform, log, integers, log_integers with [lowest, highest]"),
        ("phases.head.lr: []", "phases.head.lr: a list of choices needs at least one"),
        ("phases.head.epochs: {integers: [1.5, 3]}", "phases.head.epochs: integers takes [lowest, highest], two whole numbers (got [1.5, 3])"),
        ("phases.head.lr: [0.1, fast]", "space.yaml: phases.head.lr: "),
        ("data.val_fraction: [0.1, 0.2]", "data.val_fraction: data.val_fraction is the same for all trials of a search, which are compared with each other"),
        ("data.group.regex: ['a(.)']", "data.group is the same for all trials"),
        ("run.name: [a, b]", "run.name is the same for all trials"),
        ("data.audit: [a.csv]", "data.audit is the same for all trials"),
        ("data: [{image_size: 32}, {val: photos}]", "data.val: data.val is the same for all trials"),
        ("model.name, checkpoint: {choices: [[a, {monitor: loss}]]}", "checkpoint.monitor is the same for all trials"),
        ("phases.head.lr: {choices: 3}", "phases.head.lr: choices takes a list (got 3)"),
        ("model.name, transfer.source: [[a], [b]]", "each choice is a list with a value for each of the 2 keys (got ['a'])"),
        ("model.name, transfer.source: {log: [1, 2]}", "several keys have choices, with a value for each key"),
        ("phases.head.lr: [0.1]\n'phases.head.lr, model.name': [[1, a]]", "phases.head.lr has two ranges"),
        ("phases.head.weight_decay: [0.1]\nphases.head.weight-decay: [0.2]", "phases.head.weight-decay has two ranges"),
        ("phases.head.momentum: [0.1]\nphases.head: [{momentum: 0.5}]", "phases.head.momentum and phases.head set the same; give a range to one of them"),
        ("[1, 2]", "a space is a mapping of config keys to ranges, such as"),
        ("", "a space is a mapping of config keys to ranges"),
        ("a: [", "space.yaml"),
    ],
)
def test_what_is_no_space_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space(written(tmp_path, text)).check(RESOLVE)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--phases" not in str(caught.value), "it stands in the file, not on the command line"


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"--space nowhere\.yaml: cannot be read"):
        read_space("nowhere.yaml")


def test_settings_that_do_not_go_together_are_named_before_anything_runs(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, "phases.all.epochs: [2, 3]\n"))
    with pytest.raises(UserError, match=r"space\.yaml: phases\.all\.epochs [23]: "):
        space.first(9, 0, resolver("finetune", {"data.train": "photos", "phases.all.steps": 5}))


def test_numbers_that_differ_in_no_written_digit_come_to_an_end(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, "phases.all.lr: {uniform: [0.1, 0.10001]}\n"))
    assert [settings for settings, _ in space.first(50, 0, RESOLVE)] == [{}, {"phases.all.lr": 0.1}]


def test_the_candidates_of_a_budget_are_about_the_last_phase_in_a_fixed_order() -> None:
    config = RESOLVE({})
    space = candidates(config)
    trials = [settings for settings, _ in space.first(100, 0, RESOLVE)]
    assert trials == [settings for settings, _ in space.first(100, 1, RESOLVE)]
    lr, epochs = config.phases["all"].lr, config.phases["all"].epochs
    assert epochs is not None
    assert trials[:4] == [{}, {"phases.all.lr": 3 * lr}, {"phases.all.lr": pytest.approx(lr / 3, rel=1e-3)}, {"phases.all.epochs": 2 * epochs}]
    assert len(trials) == 9
    page = (Path(__file__).parents[3] / "docs/search.md").read_text()
    rates, longer = (row.split("|")[2:-1] for row in page.splitlines() if row.startswith(("| `lr`, times", "| `epochs` (or `steps`), times")))
    assert [(Fraction(rate), int(times)) for rate, times in zip(rates, longer)] == [
        (Fraction(row.get("phases.all.lr", lr) / lr).limit_denominator(10), row.get("phases.all.epochs", epochs) // epochs) for row in trials
    ]
    with pytest.raises(UserError, match=r"every phase is solved, .* --config finetune trains the whole network"):
        candidates(resolver("features", {"data.train": "photos"})({}))
    assert isinstance(trials[3]["phases.all.epochs"], int), "a command line repeats it"
    steps = resolver("finetune", {"data.train": "photos", "phases.all.steps": 50})
    assert {"phases.all.steps": 100} in [settings for settings, _ in candidates(steps({})).first(9, 0, steps)]
