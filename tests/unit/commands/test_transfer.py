"""`dtl transfer`: the dry run that people look at before they believe a transfer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import image_folder

from dtl.checkpoint.resume.model_folder import save_model_folder
from dtl.cli import main
from dtl.models.build import build
from dtl.models.plain_resnet import resnet_tiny


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(resnet_tiny(num_classes=10).state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def test_help_imports_no_torch() -> None:
    code = "import sys; from dtl.commands.transfer import parser; parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_dry_run_prints_the_table_and_writes_report_and_map(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["transfer", "--model", "dtl/resnet_tiny", "--num-classes", "4", "--source", str(weights)]
    assert main([*arguments, "--report", str(tmp_path / "r.json"), "--save-map", str(tmp_path / "m.yaml")]) == 0
    assert "coverage 100.0%" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["checksum"] is None
    assert report["refusals"] == []
    assert main([*arguments, "--map", str(tmp_path / "m.yaml"), "--report", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    pairs = [{o["target"]: o["source"] for o in r["outcomes"] if o["source"] and o["target"]} for r in (report, again)]
    assert pairs[0] == pairs[1]


def test_a_refusal_is_status_2_with_one_line_on_stderr(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", "--model", "dtl/resnet18_plain", "--source", str(weights)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dtl: transfer refused: ")
    assert len(captured.err.splitlines()) == 1
    assert "fresh" in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--verify"], "--verify needs --source-arch"),
        (["--by", "map"], "by: map needs a map"),
        (["--min-coverage", "7"], "min_coverage: must be at most 1 (got 7.0)"),
        (["--head-rows", "a=b"], "--head-rows needs --keep-head rows"),
        (["--keep-head", "rows", "--head-rows", "a=b", "--head-rows", "c"], "--head-rows c: expected NEW=OLD"),
        (["--keep-head", "rows"], "the class names of both sides must be known to choose rows"),
        (["--keep-head", "rows", "--classes", "a,b,c,d", "--source-classes", "a,b,c"], "the source has no head of 3 outputs"),
        (["--classes", "a,b"], "--num-classes is 4, but --classes has 2 names"),
        (["--keep-head", "rows", "--classes", "a,b,c,x", "--source-classes", ",".join("abcdefghij")], "the source has no class 'x'"),
        (["--keep-head", "rows", "--classes", "a,b,c,d", "--source-classes", ",".join("aabcdefghi")], "several classes of the source are named 'a'"),
        (["--classes", "nowhere.txt"], "--classes: nowhere.txt is not readable as class names"),
        (["--ignore", "decoder.*"], "ignore: decoder.* matches no tensor of the source"),
    ],
)
def test_wrong_options(weights: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", "--model", "dtl/resnet_tiny", "--num-classes", "4", "--source", str(weights), *options]) == 2
    assert message in capsys.readouterr().err


def test_pool_and_the_size_of_the_last_phase_belong_to_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "{embed_dim: 24, depth: 1, num_heads: 2}"
    module = build("timm/vit_tiny_patch16_224", num_classes=2, options={"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 64}).module
    torch.save(module.state_dict(), tmp_path / "w.pth")
    network = ["--model", "timm/vit_tiny_patch16_224", "--model.options", options, "--model.pool", "token+avg", "--num-classes", "3"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("phases: {small: {train: all}, large: {train: all, image_size: 96}}\n")
    for more, rows in ([], 197), (["--config", str(recipe)], 37):
        assert main(["transfer", *network, *more, "--source", str(tmp_path / "w.pth"), "--report", str(tmp_path / "r.json")]) == 0, capsys.readouterr().err
        shapes = {one["target"]: one["shape"] for one in json.loads((tmp_path / "r.json").read_text())["outcomes"]}
        assert (shapes["head.weight"], shapes["pos_embed"]) == ([3, 48], [1, rows, 24])


def test_a_recipe_is_the_dry_run_of_its_own_transfer_with_options_on_top(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Network, its options, weights, how they are paired, and the classes of the training data, which is not packed."""
    images = image_folder(tmp_path / "photos", {"ant": 2, "bee": 2, "cat": 2})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{train: {images}, image_size: 32}}\nmodel: {{name: dtl/resnet_tiny}}\n"
        f"transfer: {{source: {weights}, by: name, keep_head: false}}\nphases: {{all: {{train: all}}}}\n"
    )

    def report(*more: str, code: int = 0) -> dict[str, Any]:
        assert main(["transfer", "--config", str(recipe), "--report", str(tmp_path / "r.json"), *more]) == code, capsys.readouterr().err
        return json.loads((tmp_path / "r.json").read_text())  # type: ignore[no-any-return]

    def outputs(values: dict[str, Any]) -> int:
        return next(int(one["shape"][0]) for one in values["outcomes"] if one["target"] == "6.weight")

    of_recipe = report()
    assert of_recipe["by"] == "name"
    assert outputs(of_recipe) == 3
    by_hand = ["--model", "dtl/resnet_tiny", "--num-classes", "3", "--source", str(weights), "--by", "name", "--keep-head", "false"]
    assert main(["transfer", *by_hand, "--report", str(tmp_path / "h.json")]) == 0
    assert json.loads((tmp_path / "h.json").read_text())["outcomes"] == of_recipe["outcomes"]
    assert report("--by", "order")["by"] == "order"
    assert report("--transfer.by", "order", "--transfer.assume-order")["by"] == "order"
    assert outputs(report("--num-classes", "7")) == 7
    capsys.readouterr()
    assert main(["transfer", "--config", str(recipe), "--model", "dtl/resnet18_plain"]) == 2
    assert "transfer refused" in capsys.readouterr().err


def test_options_of_the_network(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["transfer", "--model", "torchvision/mobilenet_v2", "--source", str(weights), "--num-classes", "4"]
    assert main([*arguments, "--model.options", "{width_mult: 0.25}"]) == 2
    narrow = capsys.readouterr().out
    assert main(arguments) == 2
    assert narrow != capsys.readouterr().out
    assert main([*arguments, "--model.options", "{widht_mult: 0.25}"]) == 2
    error = capsys.readouterr().err
    assert "widht_mult" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no network: give --model NAME, or --config FILE"),
        (["--model", "dtl/resnet_tiny"], "no source of weights: give --source"),
        (["--config", "digits"], "no source of weights: give --source; digits has no transfer section"),
        (["--config", "finetune"], "no training data; give --data.train FOLDER"),
        (["--config", "finetune", "--data.train", "http://127.0.0.1:9/x.tar", "--source", "w.pth"], "give --num-classes K or --classes NAMES"),
        (["--model", "dtl/resnet_tiny", "--transfer.by", "name"], "unknown option --transfer.by"),
        (["--config", "finetune", "--sorce", "x"], "unknown option --sorce; did you mean --source?"),
    ],
)
def test_what_is_missing_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transfer", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_verify(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "dtl/resnet_tiny", "--num-classes", "4", "--source", str(weights), "--source-arch", "dtl/resnet_tiny"]
    assert main(["transfer", *arguments, "--verify", "--image-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "verify: 9 of 9 paired layers have equal outputs" in out


def test_a_dry_run_takes_no_memory_for_the_network_and_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50: under 3 s (0.4 s of CPU here), every tensor of the network on the meta device."""
    from torchvision import models

    from dtl.models import build as builder

    torch.save(models.resnet50().state_dict(), tmp_path / "r50.pth")
    built = []
    original = builder.build

    def watched(*args: object, **options: object) -> builder.Network:
        built.append(original(*args, **options))  # type: ignore[arg-type]
        return built[-1]

    monkeypatch.setattr(builder, "build", watched)
    started = time.process_time()
    assert main(["transfer", "--model", "torchvision/resnet50", "--num-classes", "10", "--source", str(tmp_path / "r50.pth")]) == 0
    assert time.process_time() - started < 3
    assert len(built) == 1
    assert all(value.is_meta for value in built[0].module.state_dict().values())


def test_rows_of_the_head_by_class_names(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class names from a file, from packed data's manifest and from the command line; the same plan from its map, without any names."""
    names = [f"class{n}" for n in range(10)]
    (tmp_path / "old.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "manifest.json").write_text(json.dumps({"classes": ["class7", "both"]}))
    arguments = ["transfer", "--model", "dtl/resnet_tiny", "--source", str(weights)]
    rows = ["--classes", str(tmp_path / "packed"), "--keep-head", "rows", "--source-classes", str(tmp_path / "old.txt"), "--head-rows", "both=class2,class3"]
    assert main([*arguments, *rows, "--report", str(tmp_path / "r.json"), "--save-map", str(tmp_path / "m.yaml")]) == 0
    assert "adapted, rows of the same classes" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert {o["target"]: o["transform"] for o in report["outcomes"] if o["transform"]} == {"6.weight": "rows", "6.bias": "rows"}
    assert '"rows": [7, [2, 3]]' in (tmp_path / "m.yaml").read_text()
    assert main([*arguments, "--num-classes", "2", "--map", str(tmp_path / "m.yaml"), "--report", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["plan"] == report["plan"]


def test_a_source_that_holds_more_than_the_network_is_refused_with_the_option_that_accepts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = resnet_tiny(num_classes=10).state_dict()
    decoder = {f"decoder.{n}.weight": torch.zeros(5, 5, 3, 3) for n in range(20)}
    torch.save({**state, **decoder}, tmp_path / "both.pth")
    arguments = ["transfer", "--model", "dtl/resnet_tiny", "--num-classes", "4", "--source", str(tmp_path / "both.pth")]
    assert main(arguments) == 2
    assert "To load it anyway, set ignore: ['decoder.*']" in capsys.readouterr().err
    assert main([*arguments, "--ignore", "decoder.*"]) == 0


def test_what_may_be_new_is_named_by_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = resnet_tiny(num_classes=10).state_dict()
    last = [name for name, value in state.items() if value.dim() == 4][1]
    torch.save({name: value for name, value in state.items() if name != last}, tmp_path / "w.pth")
    arguments = ["transfer", "--model", "dtl/resnet_tiny", "--num-classes", "10", "--source", str(tmp_path / "w.pth")]
    assert main(arguments) == 2
    pattern = re.search(r"set fresh: \[(.*)\]$", capsys.readouterr().err.splitlines()[0])
    assert pattern is not None
    patterns = [each.strip("' ") for each in pattern[1].split(",")]
    assert main([*arguments, *(word for each in patterns for word in ("--fresh", each)), "--report", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out.startswith("warning: besides the head ")
    report = json.loads((tmp_path / "r.json").read_text())
    assert last in report["random"]
    assert report["coverage"] < 1
    assert report["warnings"][0].startswith("besides the head ")


def test_the_dry_run_looks_at_the_values_too(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it lets pass is loaded: untrained, not finite and half-precision weights are told as they are when loading."""
    arguments = ["transfer", "--model", "dtl/resnet_tiny", "--num-classes", "4"]
    assert main([*arguments, "--source", str(weights)]) == 0
    assert capsys.readouterr().out.startswith("warning: the source looks untrained: all of its running means are zero\n")
    state = torch.load(weights, weights_only=True)
    name = next(name for name, value in state.items() if value.dim() == 4)
    torch.save({n: v.half() if v.is_floating_point() else v for n, v in state.items()}, tmp_path / "half.pth")
    assert main([*arguments, "--source", str(tmp_path / "half.pth")]) == 0
    assert "tensors cast float16 -> float32" in capsys.readouterr().out
    torch.save({**state, name: torch.full_like(state[name], float("inf"))}, tmp_path / "inf.pth")
    assert main([*arguments, "--source", str(tmp_path / "inf.pth")]) == 2
    assert f"refused: {name}: {name} holds values that are not finite" in capsys.readouterr().err


def test_the_dry_run_says_what_the_images_go_through_as_the_source_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_folder(
        tmp_path / "model",
        resnet_tiny(num_classes=4).state_dict(),
        architecture={"name": "dtl/resnet_tiny", "num_classes": 4, "options": {}},
        classes=["a", "b", "c", "d"],
        display_names={},
        preprocessing={"mean": [0.5, 0.5, 0.5], "std": [0.229, 0.224, 0.225], "image_size": 32, "interpolation": "bilinear", "crop_ratio": 1.0},
        metrics={},
        made_by={},
    )
    assert main(["transfer", "--model", "dtl/resnet_tiny", "--num-classes", "4", "--source", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert (
        f"preprocessing: image size 32, crop ratio 1, bilinear, mean 0.5 0.5 0.5, std 0.229 0.224 0.225 (from {tmp_path / 'model'}/model.safetensors)\n" in out
    )
    assert "warning: the source was trained with" not in out


@pytest.mark.parametrize("option", ["--report", "--save-map"])
@pytest.mark.parametrize("kind", ["pipe", "device", "nowhere"])
def test_a_place_that_cannot_be_written_is_one_line(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, kind: str) -> None:
    place = tmp_path / "out.json"
    if kind == "pipe":
        os.mkfifo(place)  # a write would wait for a reader
    place = {"pipe": place, "device": Path("/dev/full"), "nowhere": tmp_path / "nowhere/out.json"}[kind]
    assert main(["transfer", "--model", "dtl/resnet_tiny", "--num-classes", "10", "--source", str(weights), option, str(place)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"dtl: {place} cannot be written: ")
