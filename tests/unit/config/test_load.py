"""The config: files, overrides, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from dtl.config import Config, builtin_recipes, config_from_dict, load_config, resolve_config
from dtl.config.load import is_shipped, parse_config, with_sgd
from dtl.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def test_without_arguments_it_is_the_digits_recipe() -> None:
    config, name = load_config([])
    assert name == "digits"
    assert config.data.train == "digits"
    assert list(config.phases) == ["pretext", "head", "all"]


def test_a_file_gives_the_run_its_name_and_options_go_on_top(tmp_path: Path) -> None:
    file = tmp_path / "flowers.yaml"
    file.write_text("data: {train: a, val: b}\nphases: {head: {train: head, epochs: 2}}\n")
    config, name = load_config(["--config", str(file), "--phases.head.lr", "0.5", "--data.micro-batch-size=8", "--model.freeze_norm", "false", "--run.debug"])
    assert name == "flowers"
    assert config.phases["head"].lr == 0.5
    assert config.phases["head"].epochs == 2
    assert config.data.micro_batch_size == 8
    assert config.model.freeze_norm is False
    assert config.run.debug is True
    assert load_config(["--config", str(file), "--run.name", "x"])[1] == "x"


def test_values_are_yaml(tmp_path: Path) -> None:
    config, _ = load_config(
        ["--phases.all.train", "[layer4.*, fc.*]", "--data.augment.color_jitter", "[0.1, 0.2, 0.3, 0.05]", "--transfer.source", "torchvision:resnet18"]
    )
    assert config.phases["all"].train == ("layer4.*", "fc.*")
    assert config.data.augment.color_jitter == (0.1, 0.2, 0.3, 0.05)
    assert config.transfer is not None
    assert config.transfer.source == "torchvision:resnet18"


def test_a_bare_no_and_off_mean_themselves(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("data: {train: a, val: b}\nphases: {all: {}}\nprecision: no\ntracking: {wandb: off}\n")
    config, _ = load_config(["--config", str(file)])
    assert (config.precision, config.tracking.wandb) == ("no", "off")
    config, _ = load_config(["--precision", "no", "--tracking.wandb", "off"])
    assert (config.precision, config.tracking.wandb) == ("no", "off")


def test_the_stored_config_reads_back_as_the_same() -> None:
    config, _ = load_config(["--checkpoint.async", "false", "--data.augment.randaugment", "[2, 9]"])
    assert config.checkpoint.asynchronous is False
    assert config_from_dict(yaml.safe_load(config.to_yaml()), "stored") == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.wrkers", "3"], "unknown config key data.wrkers; did you mean data.workers?"),
        (["--dta.workers", "3"], "unknown config key dta; did you mean data?"),
        (["--phases.all.lrr", "1"], "unknown config key phases.all.lrr; did you mean phases.all.lr?"),
        (["--phases.hed.lr", "1"], "the built-in recipe digits has no phase hed; did you mean head?"),
        (["--data.workers", "x"], "^--data.workers: data.workers: must be 'auto'; or must be a whole number \\(got 'x'\\)$"),
        (["--data.workers", "-1"], "^--data.workers: data.workers: must be 'auto'; or must be at least 0 \\(got -1\\)$"),
        (["--precision", "b16"], "^--precision: precision: must be 'auto', 'no', 'bf16' or 'fp16' \\(got 'b16'\\)"),
        (["--transfer.by", "name"], "transfer.source is missing"),
        (["--transfer.source", "x", "--transfer.by", "map"], "transfer: `by: map` needs `map: FILE`"),
        (["--phases.all.steps", "5", "--phases.all.epochs", "2"], "phases.all: give `epochs` or `steps`, not both"),
        (["--phases.all.steps", "5", "--phases", "0"], "phases: must be an object \\(got 0\\)"),
        (["--phases.all.steps", "5", "--phases", "null"], "no phases"),
        (
            ["--data.fit", "pad", "--data.crop_ratio", "0.9", "--data.augment.preset", "none"],
            "crop_ratio 0.9 has no effect with fit pad, which shows the whole image",
        ),
        (["--phases.all.step-epochs", "[3, 2]"], "phases.all: step_epochs must be increasing, got \\[3.0, 2.0\\]"),
        (["--run.name.x", "5"], "run.name is a single value, it has no key 'x'"),
        (["--run", "5"], "run is a section, not a single value"),
        (["--data.micro_batch_size", "128"], "micro_batch_size 128 is larger than data.global_batch_size 64"),
        (["--data.val", "x", "--data.val_fraction", "0.1"], "both given"),
        (["--data.fold.number", "3", "--data.fold.of", "2"], "data.fold: there is no fold 3 of 2"),
        (["--data.fold.number", "2", "--data.test", "x"], "--data.test: data.test and data.fold are both given, and the fold is the test set"),
        (["--data.fold.of", "2", "--data.val_fraction", "0.5"], "data.val_fraction and data.fold leave no image to train on"),
        (["--data.train", "photos"], "would use the digits recipe; give --config finetune"),
        (["--phases.all.task", "rotate"], "phase all \\(rotate\\) is the last phase"),
        (["data.workers", "3"], "unexpected argument 'data.workers'"),
        (["--config", "nope.yaml"], "nope.yaml: no such config file"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [None, "epochs: 2", "steps: 7"])
def test_a_duration_on_the_command_line_replaces_the_other_kind(tmp_path: Path, file: str | None) -> None:
    recipe = [] if file is None else ["--config", str(tmp_path / "own.yaml")]
    (tmp_path / "own.yaml").write_text(f"data: {{train: a, val: b}}\nphases: {{all: {{train: all, {file}}}}}\n")
    phase = load_config([*recipe, "--phases.all.steps", "5"])[0].phases["all"]
    assert (phase.steps, phase.epochs) == (5, None)
    phase = load_config([*recipe, "--phases.all.epochs", "3"])[0].phases["all"]
    assert (phase.steps, phase.epochs) == (None, 3)


def test_a_blend_on_the_command_line_replaces_the_rule_of_kept_weights() -> None:
    words = ["--config", "finetune", "--data.train", "photos"]
    assert load_config(words)[0].phases["all"].keep == "last"
    phase = load_config([*words, "--phases.all.after", "blend"])[0].phases["all"]
    assert (phase.after, phase.keep) == ("blend", "one_se")
    with pytest.raises(UserError, match="`after: blend` chooses by `keep: one_se`, not by `keep: last`; leave out one of them"):
        load_config([*words, "--phases.all.after", "blend", "--phases.all.keep", "last"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [1, 2]\nphases: {a: {}}", "data is a section, not a single value"),
        ("data: {train: x\n", "not valid YAML"),
        ("- a\n- b\n", "a config is a mapping of sections, got list"),
        ("data: {train: x}\n", "no phases"),
        ("phases: {all: {}}\n", "no training data"),
        ("data: {train: x}\nphases: {'a b': {}}\n", "'a b' is not a valid phase name"),
        ("data: {train: x}\nphases: {all: 3}\n", "phases.all is a section, not a single value"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(["--config", str(file)])
    assert str(file) in str(caught.value)


def test_every_builtin_recipe_is_valid() -> None:
    assert "digits" in builtin_recipes()
    for name, text in builtin_recipes().items():
        Config.model_validate(yaml.safe_load(text))
        assert load_config(["--config", name, "--data.train", "digits"])[1] == name


def test_a_config_has_one_flat_form() -> None:
    config, _ = load_config(["--data.augment.color-jitter", "[0.1, 0.2, 0.3, 0.4]"])
    values = config.flat()
    assert values["data.augment.color_jitter"] == [0.1, 0.2, 0.3, 0.4]
    assert values["checkpoint.async"] is True, "under the names of the YAML file"
    assert values["transfer"] is None
    assert "model.options" not in values, "an empty section has no key"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs", "../x", "a\nb", "a\x1b[31m", "x\u202e", "x" * 300])
def test_a_run_name_is_a_plain_name(name: str) -> None:
    with pytest.raises(UserError, match=r"must be the name of one folder in run\.dir") as caught:
        resolve_config("digits", {"run.name": name})
    assert caught.value.args[0].isprintable()


@pytest.mark.parametrize("name", ["digits", "a b", "2-lr0.03", "naïve", "..x", "-x"])
def test_run_names_that_folders_have(name: str) -> None:
    assert resolve_config("digits", {"run.name": name})[1] == name


def test_a_sweep_cannot_lead_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "../../x")
    with pytest.raises(UserError, match=r"must be the name of one folder in run\.dir"):
        resolve_config("finetune", {"data.train": "photos"})


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_of_options_are_finite(value: str) -> None:
    with pytest.raises(UserError, match="finite"):
        load_config(["--phases.head.lr", value])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), [float("-inf")], "a\0b"])
def test_values_of_python_are_finite_too(value: object) -> None:
    with pytest.raises(UserError, match=r"finite|NUL"):
        resolve_config("digits", {"phases.all.lr": value})


@pytest.mark.parametrize("value", ["a: b: c", "2024-99-99", "@x", "[", "*", "&"])
def test_options_that_are_no_yaml_are_text(value: str) -> None:
    assert load_config(["--config", "finetune", "--data.train", value])[0].data.train == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)), "more than 100,000 values"),
        ("[" * 3000, "maximum nesting depth|nested deeper"),
        ("a: " * 60 + "1", "not valid YAML|nested deeper"),
        ("x: 1\0", "not valid YAML|special characters"),
        ("# " + "x" * 1_100_000, "1,048,576 characters"),
    ],
)
def test_a_recipe_that_would_grow_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config(["--config", str(tmp_path / "r.yaml")])
    assert "\n" not in str(caught.value)


def test_a_recipe_may_come_out_of_a_pipe() -> None:
    """--config <(sed ... recipe.yaml)"""
    read, write = os.pipe()
    os.write(write, b"data: {train: photos, val: photos}\nphases: {all: {epochs: 3}}\n")
    os.close(write)
    config, _ = load_config(["--config", f"/dev/fd/{read}"])
    os.close(read)
    assert config.phases["all"].epochs == 3


OWN = "data: {train: a, val: b}\nphases:\n  head: {train: head, epochs: 2, lr: 0.2}\n  all: {train: all, epochs: 3, lr: 0.03, early_stop: {patience: 4}}\n"


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.yaml").write_text(OWN)
    return str(tmp_path / "own.yaml")


TEXTS = ["4711", "007", "0x10", "1e3", "1_000", "2024-11-28", "12:30:00", "no", "on", "Yes", "true", ".inf", "a #1", "a: b", "[x", "-5", "naïve"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_setting_that_takes_text_takes_it_as_it_stands(own: str, tmp_path: Path, text: str) -> None:
    config, name = load_config(["--config", own, f"--run.name={text}", f"--data.train={text}", f"--phases.all.train={text}", f"--transfer.source={text}"])
    assert (config.run.name, name, config.data.train, config.phases["all"].train, config.transfer and config.transfer.source) == (text,) * 5
    stored = config_from_dict(parse_config(config.to_yaml(), "stored"), "stored")
    assert stored == config
    if not any(mark in text for mark in "#:["):
        (tmp_path / "two.yaml").write_text(
            OWN + f"run: {{name: {text}, dir: {text}}}\ntransfer: {{source: {text}, ignore: [{text}, b.*], head_rows: {{{text}: [{text}]}}, keep_head: rows}}\n"
        )
        config, name = load_config(["--config", str(tmp_path / "two.yaml")])
        assert (config.run.name, name, config.run.dir) == (text,) * 3
        assert config.transfer is not None
        assert (config.transfer.source, config.transfer.ignore, config.transfer.head_rows) == (text, (text, "b.*"), {text: (text,)})


def test_null_and_quotes_keep_their_meaning(own: str) -> None:
    config, name = load_config(["--config", own, "--run.name", "null", "--data.val", "~", "--data.train", '"null"'])
    assert (config.run.name, name, config.data.val, config.data.train) == (None, "own", None, "null")
    assert load_config(["--config", own, "--phases.all.train", "[fc.*, 7]"])[0].phases["all"].train == ("fc.*", "7")
    assert load_config(["--config", own, "--transfer", "{source: 1, source_classes: [001, no]}"])[0].transfer.source_classes == ("001", "no")  # type: ignore[union-attr]


def test_settings_that_take_more_than_text_are_yaml(own: str) -> None:
    config, _ = load_config(["--config", own, "--model.sync_bn", "no", "--model.options", "{width: 2, name: no}", "--data.micro_batch_size", "auto"])
    assert (config.model.sync_bn, config.model.options, config.data.micro_batch_size) == (False, {"width": 2, "name": False}, "auto")
    assert load_config(["--config", own, "--run.gradient-compression", "no"])[0].run.gradient_compression == "no"


@pytest.mark.parametrize("option", ["--run.name", "--data.train", "--phases.all.optimizer", "--config"])
@pytest.mark.parametrize("rest", [[], ["--run.debug"]])
def test_an_option_that_takes_text_needs_it(own: str, option: str, rest: list[str]) -> None:
    with pytest.raises(UserError, match=rf"^{option} needs a value$"):
        load_config(["--config", own, option, *rest])


DOTTED = {"phases.all.epochs": 2, "phases.all.early_stop.patience": 9, "data.augment.rotation": 5.0, "model.options.width": 3}
NESTED = [
    {"phases": {"all": {"epochs": 2, "early_stop": {"patience": 9}}}, "data": {"augment": {"rotation": 5.0}}, "model": {"options": {"width": 3}}},
    {"phases.all": {"epochs": 2, "early_stop": {"patience": 9}}, "data.augment": {"rotation": 5.0}, "model.options": {"width": 3}},
]


@pytest.mark.parametrize("nested", NESTED)
def test_a_mapping_merges_into_what_stands(own: str, nested: dict[str, object]) -> None:
    expected = resolve_config(own, DOTTED)[0]
    assert resolve_config(own, nested)[0] == expected
    assert resolve_config(yaml.safe_load(OWN), nested)[0] == expected
    words = [word for key, value in nested.items() for word in (f"--{key}", json.dumps(value))]
    assert load_config(["--config", own, *words])[0] == expected
    assert expected.phases["all"].lr == 0.03
    assert list(expected.phases) == ["head", "all"]
    assert expected.phases["head"].lr == 0.2


def test_a_mapping_replaces_the_other_kind_of_duration_too(own: str) -> None:
    phase = load_config(["--config", own, "--phases", "{all: {steps: 7}}"])[0].phases["all"]
    assert (phase.steps, phase.epochs, phase.lr) == (7, None, 0.03)


def test_none_resets_a_section_and_removes_a_phase(own: str) -> None:
    config, _ = load_config(["--config", own, "--phases.head", "null", "--phases.all.early-stop", "null", "--transfer", "null"])
    assert list(config.phases) == ["all"]
    assert config.phases["all"].early_stop.patience is None
    assert resolve_config(own, {"phases": {"head": None, "mine": {"train": "all", "epochs": 1}}})[0].phases.keys() == {"all", "mine"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phases": {"al": {"epochs": 2}}}, "^--phases: .*own.yaml has no phase al; did you mean all\\?$"),
        ({"phases.al": {"epochs": 2}}, "^--phases.al: .* has no phase al"),
        ({"phases.al": None}, "^--phases.al: .* has no phase al"),
        ({"phases.al.train": "all"}, "^--phases.al.train: .* has no phase al"),
        ({"phases.all": {"epochs": 2, "steps": 3}}, "^.*own.yaml with --phases.all.epochs, --phases.all.steps: phases.all: give `epochs` or `steps`"),
        ({"phases": {"all": {"lrr": 2}}}, "^--phases.all.lrr: unknown config key phases.all.lrr; did you mean phases.all.lr"),
        ({"data.augment.randaugment": [2]}, "^--data.augment.randaugment: data.augment.randaugment: has too few values: number 2 is missing"),
        ({"data.augment": {"randaugment": [1, 2, 3]}}, "^--data.augment.randaugment: data.augment.randaugment: must have at most 2 values"),
        ({"phases.all.betas": 9}, "^--phases.all.betas: phases.all.betas: must be a list \\(got 9\\)$"),
        ({"phases.all.betas": ["x", 1]}, "^--phases.all.betas: phases.all.betas: must be a number \\(got 'x'\\)$"),
        ({"data.image_size": 5.5}, "^--data.image_size: data.image_size: must be 'auto'; or must be a whole number; or must be a list \\(got 5.5\\)$"),
        ({"run.name": 5}, "^--run.name: run.name: must be a string \\(got 5\\)$"),
        ({"run.debug": "maybe"}, "^--run.debug: run.debug: must be true or false \\(got 'maybe'\\)$"),
        ({"data.val": "x", "data.val_fraction": 0.5}, "^--data.val, --data.val_fraction: data.val and data.val_fraction are both given"),
        ({"data.micro_batch_size": 128}, "^--data.micro_batch_size: data.micro_batch_size 128 is larger"),
    ],
)
def test_a_mistake_is_reported_where_it_was_made(own: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_config(own, options)


def test_a_mistake_of_the_file_is_the_files(own: str, tmp_path: Path) -> None:
    Path(own).write_text(OWN + "model: {init: magic}\n")
    with pytest.raises(UserError, match=rf"^{own}: model.init: must be 'default', 'library', 'xavier' or 'kaiming' \(got 'magic'\)$"):
        load_config(["--config", own, "--data.workers", "1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OWN + "  all: {train: head}\n", "the key 'all' stands twice in one mapping, in lines 4 and 5"),
        (OWN + "data: {train: c}\n", "the key 'data' stands twice in one mapping, in lines 1 and 5"),
        ("data: {train: a, train: b}\n", "the key 'train' stands twice in one mapping, in line 1"),
        ("data: {train: a}\nphases: {all: &a {lr: 1, lr: 2}, b: *a}\n", "the key 'lr' stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(own: str, text: str, message: str) -> None:
    Path(own).write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(["--config", own])


def test_merged_keys_may_be_set_again(own: str) -> None:
    Path(own).write_text("data: {train: a, val: b}\nphases:\n  head: &h {train: no, epochs: 1, lr: 0.1}\n  all: {<<: *h, lr: 0.5}\n")
    phase = load_config(["--config", own])[0].phases["all"]
    assert (phase.lr, phase.epochs, phase.train) == (0.5, 1, "no")


def test_names_of_phases_and_classes_keep_their_hyphens(own: str) -> None:
    Path(own).write_text("data: {train: a, val: b}\nphases: {warm-up: {epochs: 1}, on: {epochs: 2}}\n")
    config, _ = load_config(["--config", own, "--phases.warm-up.head-lr-scale", "3", "--phases.on.lr", "0.5"])
    assert (config.phases["warm-up"].head_lr_scale, config.phases["on"].lr) == (3.0, 0.5)


def test_a_section_that_text_can_be() -> None:
    config, _ = load_config(["--config", "finetune", "--data.train", "a.csv", "--data.columns", "path=file,label=species"])
    assert config.data.columns is not None
    assert config.data.columns.given() == {"path": "file", "label": "species"}
    by_key, _ = load_config(["--config", "finetune", "--data.train", "a.csv", "--data.columns.path", "file", "--data.columns.label", "species"])
    assert by_key == config
    with pytest.raises(UserError, match=r"--data.columns: .*columns are `path=COLUMN,label=COLUMN,split=COLUMN`, each at most once; got `lable=species`"):
        load_config(["--config", "finetune", "--data.train", "a.csv", "--data.columns", "path=file,lable=species"])


SOLVED = "data: {train: photos}\nphases:\n  head: {train: head, optimizer: solve}\n  all: {train: all, epochs: 2}\n"


@pytest.mark.parametrize(
    ("options", "epochs", "steps", "lr", "given"),
    [
        ({"phases.head.lr": 0.5}, 10, None, 0.5, "--phases.head.lr"),
        ({"phases.head.views": 4, "phases.head.lr": 0.1}, 10, None, 0.1, "--phases.head.lr, --phases.head.views"),
        ({"phases": {"head": {"epochs": 3}}}, 3, None, 0.01, "--phases.head.epochs"),
        ({"phases.head.steps": 7}, None, 7, 0.01, "--phases.head.steps"),
        ({"run.debug": True}, 10, None, 0.01, "--run.debug"),
    ],
)
def test_an_option_of_sgd_takes_the_place_of_a_recipes_solve(
    options: dict[str, object], epochs: int | None, steps: int | None, lr: float, given: str, tmp_path: Path
) -> None:
    (tmp_path / "solved.yaml").write_text(SOLVED)
    config, _ = resolve_config(str(tmp_path / "solved.yaml"), options)
    head = config.phases["head"]
    assert (head.optimizer, head.epochs, head.steps, head.lr) == ("sgd", epochs, steps, lr)
    length = f"{epochs} epochs" if epochs else f"{steps} steps"
    assert config.notes == (f"phase head: {given} {'mean' if ',' in given else 'means'} optimizer sgd in place of solve: {length}, lr {lr}",)


def test_what_has_no_place_beside_solve_is_refused_by_name(tmp_path: Path) -> None:
    recipe = str(tmp_path / "solved.yaml")
    Path(recipe).write_text(SOLVED)
    config, _ = resolve_config(recipe, {"phases.all.lr": 0.5, "phases.head.class_weights": "sqrt", "phases.head.label_smoothing": 0.1})
    assert (config.phases["head"].optimizer, config.phases["head"].num_steps(50), config.notes) == ("solve", 1, ())
    again, _ = resolve_config(config.to_dict(), {})  # as a run stores it
    assert again.phases == config.phases
    for options, names in (
        ({"phases.head.mixup": 0.2}, "mixup"),
        ({"phases.head.optimizer": "solve", "phases.head.lr": 0.5, "phases.head.epochs": 3}, "epochs, lr"),
        ({"phases.head.cache_features": False, "phases.head.early_stop": {"patience": 2}}, "early_stop, cache_features"),
    ):
        with pytest.raises(UserError, match=rf"`optimizer: solve` has no use for {names}; leave that out, or use `optimizer: sgd`$"):
            resolve_config(recipe, options)
    with pytest.raises(UserError, match=r"`optimizer: solve` is for `task: classify`, not for `task: rotate`$"):
        resolve_config(recipe, {"phases.head.task": "rotate"})
    with pytest.raises(UserError, match=r"phases.all: `optimizer: solve` fits the head alone, not `train: all`; use `train: head`, or `optimizer: sgd`$"):
        resolve_config("finetune", {"data.train": "photos", "phases.all.optimizer": "solve"})
    with pytest.raises(UserError, match=r"no use for epochs, norm_statistics, warmup; leave"):  # what the recipe says: nothing of the network's family
        resolve_config("finetune", {"data.train": "photos", "phases.all.optimizer": "solve", "phases.all.train": "head"})


@pytest.mark.parametrize("recipe", ["features", "finetune", "configs/features.yaml"])
def test_a_recipe_of_dtl_solves_its_head_unless_an_option_belongs_to_steps(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def head(**options: object) -> tuple[object, ...]:
        config, _ = resolve_config(recipe, {"data.train": "photos", **{f"phases.head.{key}": value for key, value in options.items()}})
        phase = config.phases["head"]
        return phase.optimizer, phase.epochs, phase.steps, phase.lr, tuple(line for line in config.notes if line.startswith("phase head"))

    assert head() == head(label_smoothing=0.1, keep="last", mixup=0.0) == ("solve", None, None, 0.01, ())
    for options in ({"mixup": 0.2}, {"cache_features": False}, {"train": "last:2"}, {"early_stop": {"patience": 2}}):
        (key,) = options
        line = f"phase head: --phases.head.{key} means optimizer sgd in place of solve: 10 epochs, lr 0.01"
        assert head(**options) == ("sgd", 10, None, 0.01, (line,))
    assert head(optimizer="adam", lr=0.001) == (
        "adam", 10, None, 0.001, ("phase head: --phases.head.optimizer means optimizer adam in place of solve: 10 epochs, lr 0.001",),
    )  # fmt: skip
    assert head(optimizer="sgd", epochs=3, lr=0.05) == ("sgd", 3, None, 0.05, ())
    with pytest.raises(UserError, match="`optimizer: solve` has no use for mixup"):
        head(optimizer="solve", mixup=0.2)


def test_what_comes_with_dtl_is_told_from_what_the_user_wrote(tmp_path: Path) -> None:
    data, key = {"data.train": "photos"}, "phases.head.optimizer"
    own = tmp_path / "features.yaml"
    own.write_text(builtin_recipes()["features"])
    assert is_shipped(resolve_config("features", data)[0], key)
    assert is_shipped(resolve_config(str(own), data)[0], key)
    assert not is_shipped(resolve_config("features", {**data, key: "solve"})[0], key)
    own.write_text(f"{builtin_recipes()['features']}# mine\n")
    assert not is_shipped(resolve_config(str(own), data)[0], key)
    config = with_sgd(resolve_config("features", data)[0], "head", "of a reason")
    assert (config.phases["head"].optimizer, config.phases["head"].epochs) == ("sgd", 10)
    assert config.notes == ("phase head: optimizer sgd in place of solve: 10 epochs, lr 0.01, since of a reason",)
