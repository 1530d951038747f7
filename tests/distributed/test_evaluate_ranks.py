"""`dtl evaluate` and `dtl predict` on real ranks over gloo: the same numbers, to the last bit, at any world size, and those of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import history, kind, run
from model_folders import model_folder, write_image
from recipes import write_recipe

PHASES = {"tiny": {"all": {"train": "all", "steps": 6, "lr": 0.05, "ema": 0.5}}, "turns": {"pretext": {"task": "rotate", "steps": 4, "lr": 0.05}}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny (digits) and runs/turns (the rotation task alone)."""
    folder = tmp_path_factory.mktemp("trained")
    for name, phases in PHASES.items():
        run(["--config", str(write_recipe(folder, name, phases=phases))], cwd=folder)
    return folder


def evaluated(folder: Path, arguments: list[str], *, world: int) -> dict[str, Any]:
    file = folder / f"evaluation-{world}.json"
    run([*arguments, "--json", str(file), "--workers", "1"], cwd=folder, world=world, command="evaluate")
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["tiny", "turns"])
def test_any_world_gives_the_same_numbers_and_those_of_the_run(trained: Path, name: str) -> None:
    found = {world: evaluated(trained, [f"runs/{name}", "--batch-size", "25"], world=world) for world in (1, 2, 3)}
    assert found[1] == found[2] == found[3]
    images = 360 if name == "tiny" else 4 * 360
    assert found[1]["num_samples"] == images
    assert sum(map(sum, found[1]["confusion"])) == images
    last = json.loads((trained / f"runs/{name}/model/model.json").read_text())["metrics"]
    for key in ("num_samples", "top1", "top5"):
        assert found[1][key] == last[key]
    assert found[1]["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert any(event.get("top1") == found[1]["top1"] for event in history(trained / "runs" / name) if event["event"] == "val")


def test_more_ranks_than_batches(trained: Path) -> None:
    """Two batches for three ranks: one has nothing to do, and waits for nothing."""
    whole = evaluated(trained, ["runs/tiny", "--batch-size", "200"], world=1)
    assert evaluated(trained, ["runs/tiny", "--batch-size", "200"], world=3) == whole


def test_a_mistake_is_told_once_and_ends_all_ranks(trained: Path) -> None:
    job = run(["runs/tiny/model"], cwd=trained, world=2, code=2, command="evaluate")
    assert job.err().count("dtl:") == 1
    assert "--data.val" in job.err()


def test_predictions_are_one_file_in_one_order_at_any_world_size(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    for number in range(23):
        write_image(tmp_path / f"photos/{number % 3}/{number}.jpg", number)
    (tmp_path / "photos/1/broken.jpg").touch()
    texts = []
    for world, workers in ((1, 0), (1, 2), (2, 1), (3, 0)):
        out = tmp_path / f"{world}-{workers}.csv"
        job = run(["model", "photos", "--out", str(out), "--batch-size", "2", "--workers", str(workers)], cwd=tmp_path, world=world, command="predict")
        assert job.err().count("broken.jpg") == 1
        texts.append(out.read_text())
    assert texts[0].count("\n") == 24
    assert texts == [texts[0]] * 4
    paths = [line.split(",")[0] for line in texts[0].splitlines()[1:]]
    assert paths == sorted(paths)


def test_a_model_computes_in_the_precision_of_its_run(tmp_path: Path) -> None:
    """What `auto` came to stands in model.json, also for a machine on which it would come to something else."""
    with_bf16, without = ({0: {"before": f"obstacles:{name}"}} for name in ("with_bf16", "without_bf16"))
    recipe = write_recipe(tmp_path, phases={"all": {"train": "all", "steps": 2, "lr": 0.05}}, precision="auto")
    run(["--config", str(recipe)], cwd=tmp_path, by_rank=without)
    facts = tmp_path / "runs/tiny/model/model.json"
    stored = json.loads(facts.read_text())
    assert (stored["made_by"]["precision"], stored["made_by"]["settings"]["precision"]) == ("no", "auto")

    def asked(*arguments: str, before: dict[int, dict[str, str]], made_by: dict[str, str | None] | None = None) -> tuple[str, str]:
        """What `dtl evaluate` computed in, and whether it told of it; `made_by`: changes to the model folder (None: it does not say)."""
        changed = {key: value for key, value in {**stored["made_by"], **(made_by or {})}.items() if value is not None}
        facts.write_text(json.dumps({**stored, "made_by": changed}))
        file = tmp_path / "evaluation.json"
        job = run(["runs/tiny", "--json", str(file), "--workers", "0", "--trust", *arguments], cwd=tmp_path, command="evaluate", by_rank=before)
        return json.loads(file.read_text())["precision"], "told" if "was trained with precision" in job.err() else ""

    assert asked(before=with_bf16) == ("no", "")
    assert asked("--precision", "bf16", before=with_bf16) == ("bf16", "")
    assert asked(before=with_bf16, made_by={"precision": "bf16"}) == ("bf16", "")
    assert asked(before=without, made_by={"precision": "bf16"}) == ("no", "told")
    assert asked(before=with_bf16, made_by={"precision": None}) == ("bf16", ""), "a folder of an older dtl"

    facts.write_text(json.dumps({**stored, "made_by": {"precision": "fp16"}}))
    write_image(tmp_path / "a.jpg", 0)
    job = run(["runs/tiny", "a.jpg", "--workers", "0", "--trust"], cwd=tmp_path, command="predict", by_rank=without)
    assert ("was trained with precision fp16, but runs with no here" in job.err()) == (kind() == "cpu"), "GPUs compute in it"
