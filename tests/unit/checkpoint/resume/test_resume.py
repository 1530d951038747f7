"""What may change between two starts of one run: nothing that changes its result, and what changes its rounding is logged."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtl.checkpoint.resume.resume import FREE_SETTINGS, _check_settings, check_plan, check_transforms, checkpoint_state, note_changes
from dtl.checkpoint.resume.state import TrainState
from dtl.config import Config, resolve_config
from dtl.config.auto import with_batch_size
from dtl.config.help import sections
from dtl.data.sampling.plan import PLAN_VERSION
from dtl.data.transforms.transforms import VERSIONS
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.models.preprocessing import Preprocessing

KEYS = [name for _, rows in sections() for name, *_ in rows]


def told(*, device: str | None = "cpu", micro_batch_size: object = "auto", now: object = "auto") -> list[str]:
    """What is said of a run that was on `device` (None: by a dtl that did not write it) when it goes on here, on the CPU."""
    stored: dict[str, Any] = {"config": {"data": {"micro_batch_size": micro_batch_size}}}
    checkpoint: Any = SimpleNamespace(state=stored if device is None else {**stored, "device": device})
    lines: list[str] = []
    with Runtime(device="cpu") as runtime:
        state = TrainState(step=3, num_threads=torch.get_num_threads())
        note_changes(Config.model_validate({"data": {"micro_batch_size": now}}), checkpoint, state, runtime, lines.append)
    return lines


def test_an_own_function_whose_code_has_changed_is_told() -> None:
    config = Config.model_validate({"data": {"augment": {"function": "own_functions:noisy"}}})
    with Runtime(device="cpu") as runtime:
        state = TrainState(num_threads=torch.get_num_threads())
        now = checkpoint_state(config, state, SimpleNamespace(precision="no", device=runtime.device), Preprocessing())["functions"]  # type: ignore[arg-type]
        assert now.keys() == {"data.augment.function"}
        for code, expected in ((now["data.augment.function"], []), ("0" * 64, [True])):
            lines: list[str] = []
            before: Any = SimpleNamespace(state={"config": {}, "device": "cpu", "functions": {"data.augment.function": code}})
            note_changes(config, before, state, runtime, lines.append)
            assert [line.startswith("warning: the file of data.augment.function has changed since the checkpoint") for line in lines] == expected


def test_what_stays_as_it_was_is_not_told() -> None:
    assert told() == []
    assert told(device=None) == []
    assert told(micro_batch_size=16, now=16) == []


def test_another_device_is_told_in_one_line() -> None:
    (line,) = told(device="cuda")
    assert line == "this run was on cuda and is now on cpu: the rounding of sums may differ"


def test_another_micro_batch_size_is_told_in_one_line() -> None:
    (line,) = told(micro_batch_size="auto", now=16)
    assert line.startswith("data.micro_batch_size was auto and is now 16: the samples of each global batch stay the same; batch norm statistics, dropout")


def test_every_free_setting_exists_and_of_the_checkpoints_only_the_monitor_is_not_free() -> None:
    for pattern in FREE_SETTINGS:
        assert fnmatch.filter(KEYS, pattern), pattern
    held = [key for key in KEYS if not any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE_SETTINGS)]
    assert [key for key in held if key.startswith("checkpoint.")] == ["checkpoint.monitor"]
    assert {key for key in KEYS if key.startswith(("phases.", "model.", "transfer.", "data.augment."))} <= set(held)
    assert {"run.seed", "run.gradient_compression", "data.image_size", "data.global_batch_size", "data.window", "data.balance", "data.last"} <= set(held)


@pytest.mark.parametrize(
    ("key", "was", "shown", "now"),
    [
        ("phases.all.norm_statistics", "batch", "'batch'", "'frozen'"),
        ("phases.all.label_smoothing", 0.1, "0.1", "0.0"),
        ("phases.all.epochs", 10, "10.0", "20.0"),
        ("phases.all.keep", "one_se", "'one_se'", "'last'"),
        ("data.global_batch_size", 64, "64", "16"),
    ],
)
def test_a_run_of_finetune_from_before_a_default_changed_names_the_key(key: str, was: Any, shown: str, now: str) -> None:
    def config(**options: Any) -> Config:
        return with_batch_size(resolve_config("finetune", {"data.train": "photos", **options})[0], 100)

    stored = config(**{key: was}).to_dict()
    if key == "phases.all.norm_statistics":  # the key is newer than such a run
        del stored["phases"]["all"]["norm_statistics"]
    before: Any = SimpleNamespace(state={"config": stored}, path=Path("runs/finetune/checkpoints/step-00000010"))
    with pytest.raises(
        UserError,
        match=rf"runs/finetune was started with {key} {shown}, now it is {now}, its default, which may have changed: "
        rf"go on with --{key} {float(was) if key.endswith('epochs') else was}; .*--run.name NEW",
    ):
        _check_settings(config(), before, Path("runs/finetune"))
    _check_settings(config(**{key: was}), before, Path("runs/finetune"))
    _check_settings(config(**{key: was, "phases.all.epochs": 30}), before, Path("runs/finetune"))


def test_a_batch_size_that_follows_from_other_images_is_not_blamed_for_them() -> None:
    def config(images: int, **options: Any) -> Config:
        return with_batch_size(resolve_config("finetune", {"data.train": "photos", **options})[0], images)

    before: Any = SimpleNamespace(state={"config": config(100).to_dict()}, path=Path("runs/finetune/checkpoints/step-00000010"))
    _check_settings(config(5000), before, Path("runs/finetune"), other_images=True)
    with pytest.raises(UserError, match=r"data.global_batch_size 16, now it is 64"):
        _check_settings(config(5000), before, Path("runs/finetune"))
    with pytest.raises(UserError, match=r"data.global_batch_size 16, now it is 64; "):
        _check_settings(config(5000, **{"data.global_batch_size": 64}), before, Path("runs/finetune"), other_images=True)


@pytest.mark.parametrize(("recipe", "kept"), [("finetune", {"lr": 0.05, "epochs": 3}), ("features", {"lr": 0.05, "epochs": 10})])
def test_a_run_from_before_heads_were_solved_names_the_options_that_continue_it(recipe: str, kept: dict[str, float]) -> None:
    before = {"phases.head.optimizer": "sgd", **{f"phases.head.{key}": value for key, value in kept.items()}}
    stored: Any = SimpleNamespace(state={"config": resolve_config(recipe, {"data.train": "photos", **before})[0].to_dict()}, path=Path("runs/a/checkpoints"))
    with pytest.raises(UserError, match=r"runs/a was started with phases.head.\w+ .*, its default, which may have changed: go on with (--.*) \(and") as refused:
        _check_settings(resolve_config(recipe, {"data.train": "photos"})[0], stored, Path("runs/a"))
    words = str(refused.value).partition("go on with ")[2].partition(" (and")[0].split()
    advice = {name.removeprefix("--"): json.loads(value) if value[0].isdigit() else value for name, value in zip(words[::2], words[1::2], strict=True)}
    assert advice == before
    _check_settings(resolve_config(recipe, {"data.train": "photos", **advice})[0], stored, Path("runs/a"))


@pytest.mark.parametrize("split", ["training", "evaluation"])
def test_other_transforms_than_the_runs_are_refused(split: str) -> None:
    check_transforms({"transforms": dict(VERSIONS)}, Path("runs/a"))
    check_transforms({}, Path("runs/a"))  # an older dtl did not write them
    with pytest.raises(UserError, match=f"runs/a was started with version 99 of the {split} transforms.*--run.resume never"):
        check_transforms({"transforms": {**VERSIONS, split: 99}}, Path("runs/a"))


def test_another_order_of_samples_than_the_runs_is_refused() -> None:
    check_plan({"plan": PLAN_VERSION}, Path("runs/a"))
    with pytest.raises(UserError, match=r"runs/a was started with version 99 of the order of samples.*--run.name NEW.*--run.resume never"):
        check_plan({"plan": 99}, Path("runs/a"))
