"""`dtl search`: the same winner and the same table for any number of workers and after any kills; a promoted trial is the run that never paused."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import history, run, start, status, the_line
from PIL import Image
from recipes import weights_hash, write_recipe

from dtl.cli import main
from dtl.commands import search as command
from dtl.config.own import stored_config
from dtl.config.space import resolver
from dtl.errors import UserError
from dtl.inference.search import Budget, open_search
from dtl.text import to_nobody

PHASES = {"head": {"train": "head", "epochs": 1, "lr": 0.1}, "all": {"train": "all", "epochs": 6, "lr": 0.05, "ema": 0.9, "mixup": 0.2}}
DATA = {
    "train": "photos", "image_size": 8, "global_batch_size": 24, "workers": 0, "val_fraction": 0.25, "test_fraction": 0.2, "augment": {"preset": "cifar"},
}  # fmt: skip
SPACE = "phases.all.lr: {log: [0.003, 0.5]}\nphases.all.optimizer: [sgd, adamw]\nmodel.name: ['networks:small', 'networks:diverging']\n"
SEARCH = ["--config", "tiny.yaml", "--space", "space.yaml", "--budget", "5"]


def prepared(folder: Path) -> Path:
    noise = np.random.default_rng(0)
    for label, brightness in (("a", 60), ("b", 110), ("c", 160)):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(30):
            pixels = brightness + noise.integers(-60, 60) + noise.integers(-40, 40, (12, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"photos/{label}/{number}.jpg")
    write_recipe(folder, phases=PHASES, data=DATA, checkpoint={"every_steps": 2})
    (folder / "space.yaml").write_text(SPACE)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/tiny-search, by one worker in one go."""
    folder = prepared(tmp_path_factory.mktemp("search"))
    job = run(SEARCH, cwd=folder, command="search")
    (folder / "said.txt").write_text(job.out())
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/tiny-search/results.json").read_text())  # type: ignore[no-any-return]


def trial(folder: Path, number: int) -> Path:
    return folder / f"runs/tiny-search/trial-{number}"


def test_a_third_goes_on_and_the_winner_is_compared_and_measured(reference: Path) -> None:
    values = results(reference)
    assert values["rungs"] == [2, 3, 7], "an epoch of the head, which is the same in all trials, and a ninth and a third of the rest"
    rows = {row["trial"]: row for row in values["trials"]}
    assert sorted(rows) == [1, 2, 3, 4, 5]
    assert rows[1]["settings"] == {}
    done = [number for number in rows if status(trial(reference, number))["state"] == "done"]
    assert done == [number for number, row in rows.items() if row["state"] == "done"] == [values["winner"], values["runner_up"]]
    diverged = [number for number, row in rows.items() if row["settings"].get("model.name") == "networks:diverging"]
    assert diverged
    assert {rows[number]["state"] for number in diverged} == {"diverged"}
    assert list(rows)[-len(diverged) :] == diverged, "they are the last"
    second = rows[values["runner_up"]]
    assert 0 <= second["p"] <= 1
    assert second["better"] + second["worse"] <= values["num_samples"]
    said = (reference / "said.txt").read_text()
    assert f"winner: trial {values['winner']}, val top1 {100 * rows[values['winner']]['value']:.2f} %" in said
    assert f"against the runner-up, trial {second['trial']}, on the same {values['num_samples']} validation images: better on {second['better']}" in said
    assert f"to train the winner by itself: {values['command']}" in said
    # The test set: held out in all trials, and looked at once.
    assert values["test"]["num_samples"] == 18
    assert values["test"]["look"] == 1
    assert [place.parent.name for place in (reference / "runs/tiny-search").glob("*/looks.jsonl")] == [f"trial-{values['winner']}"]
    assert not any("test" in event["event"] for number in rows for event in history(trial(reference, number)))


def test_the_winner_is_bit_identical_to_the_run_that_its_command_trains(reference: Path) -> None:
    winner = trial(reference, results(reference)["winner"])
    words = shlex.split(results(reference)["command"])
    assert words[:2] == ["dtl", "train"]
    assert words[-2:] == ["--run.name", "best"]
    run(words[2:], cwd=reference)
    whole = reference / "runs/best"
    assert weights_hash(whole) == weights_hash(winner)
    rows = [[event for event in history(place) if event["event"] in ("train", "val", "epoch")] for place in (whole, winner)]
    assert rows[0] == rows[1]
    tested = status(whole)["test"]
    assert (tested["top1"], tested["look"]) == (results(reference)["test"]["top1"], 1), "the same weights again are the same look"


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_that_are_killed_come_to_the_same_bytes(reference: Path, tmp_path: Path, workers: int) -> None:
    kill_and_compare(reference, prepared(tmp_path), workers=workers, kills=2, luck=random.Random(workers))


@pytest.mark.soak
def test_fifty_kills_at_random_moments_change_nothing(reference: Path, tmp_path: Path) -> None:
    luck, kills, number = random.Random(0), 0, 0
    while kills < 50:
        number += 1
        (tmp_path / str(number)).mkdir()
        kills += kill_and_compare(reference, prepared(tmp_path / str(number)), workers=luck.randint(1, 3), kills=10, luck=luck)
        shutil.rmtree(tmp_path / str(number))


def kill_and_compare(reference: Path, folder: Path, *, workers: int, kills: int, luck: random.Random) -> int:
    """Start workers, kill one of them at a random moment and start another, so many times; returns how many were still at work when they were killed."""
    jobs, killed = [start(SEARCH, cwd=folder, command="search") for _ in range(workers)], 0
    for _ in range(kills):
        wait_for_progress(folder, luck.randint(1, 12), jobs)
        place = luck.randrange(workers)
        killed += jobs[place].codes == [None]
        jobs[place].kill()
        jobs[place] = start(SEARCH, cwd=folder, command="search")
    for job in jobs:
        job.wait(150).check()
    outs = {job.out() for job in jobs}
    assert outs == {(reference / "said.txt").read_text()}, "every worker prints the same table"
    for name in ("results.json", "search.json"):
        assert (folder / "runs/tiny-search" / name).read_bytes() == (reference / "runs/tiny-search" / name).read_bytes()
    for row in results(folder)["trials"]:
        if row["state"] == "done":
            assert weights_hash(trial(folder, row["trial"])) == weights_hash(trial(reference, row["trial"]))
    return killed


def wait_for_progress(folder: Path, lines: int, jobs: list[Any]) -> None:
    """Until the histories of all trials together have so many more lines, or nobody is at work."""

    def count() -> int:
        return sum(len(file.read_bytes().splitlines()) for file in folder.glob("runs/tiny-search/*/history.jsonl"))

    wanted, until = count() + lines, time.monotonic() + 60
    while count() < wanted and time.monotonic() < until and any(job.codes == [None] for job in jobs):
        time.sleep(0.02)


def test_a_signal_stops_it_and_the_same_command_goes_on(reference: Path, tmp_path: Path) -> None:
    job = start(SEARCH, cwd=prepared(tmp_path), command="search")
    wait_for_progress(tmp_path, 5, [job])
    job.kill(number=signal.SIGTERM)
    job.wait(60).check(75)
    assert not (tmp_path / "runs/tiny-search/results.json").exists()
    again = run(SEARCH[:-2], cwd=tmp_path, command="search")  # the budget is written down
    assert again.out() == (reference / "said.txt").read_text()
    assert run([*SEARCH, "--json"], cwd=tmp_path, command="search").out() == json.dumps(results(reference)) + "\n"
    file = tmp_path / "runs/tiny-search/results.json"
    file.write_text("[1]")
    assert "results.json is damaged (TypeError " in the_line(run(SEARCH, cwd=tmp_path, command="search", code=2))
    file.unlink()  # as the line advises
    run(SEARCH, cwd=tmp_path, command="search")
    assert results(tmp_path) == results(reference)


def test_networks_cost_one_pass_of_features_each_whoever_comes_first(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    head = {"head": {"train": "head", "epochs": 2, "lr": 0.1, "cache_features": True}}
    write_recipe(folder, phases=head, data={**DATA, "augment": {"preset": "none"}})
    (folder / "space.yaml").write_text("phases.head.lr: [0.02, 0.1, 0.5]\nmodel.name: ['networks:small', 'networks:without_norms']\n")
    jobs = [start([*SEARCH[:-1], "9"], cwd=folder, command="search") for _ in range(2)]
    said = "".join(job.wait(150).check().err() for job in jobs)
    assert len(results(folder)["trials"]) == 6, "the space has no more"
    assert said.count("features of 72 images computed once") == 2
    assert said.count("cached features are read from") >= 4


def test_another_process_may_begin_it_at_the_same_moment(reference: Path, tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / "meanwhile").mkdir()
    shutil.copy(reference / "runs/tiny-search/search.json", tmp_path / "meanwhile")
    (tmp_path / "runs/tiny-search").mkdir(parents=True)
    run(SEARCH, cwd=tmp_path, command="search", by_rank={0: {"before": "obstacles:begun_by_another"}})
    assert results(tmp_path)["winner"] == results(reference)["winner"]


def test_the_batch_size_that_the_images_give_is_the_trials_own(tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / "space.yaml").write_text("data.global_batch_size: [24, 8]\n")
    options = [*SEARCH[:-1], "3", "--data.global_batch_size", "auto", "--phases.all.epochs", "2"]
    run(options, cwd=tmp_path, command="search")
    assert [stored_config(trial(tmp_path, number)).config.data.global_batch_size for number in (1, 2, 3)] in ([16, 24, 8], [16, 8, 24])
    run(options, cwd=tmp_path, command="search")
    line = the_line(run([*options[:-2], "--phases.all.epochs", "3"], cwd=tmp_path, command="search", code=2))
    assert "trial-1 was trained with phases.all.epochs 2.0, now it is 3.0" in line


def test_the_built_in_rates_are_around_that_of_the_batch_size(tmp_path: Path) -> None:
    """By the family's rule of a vision transformer, which takes its rate in proportion to the batch."""
    prepared(tmp_path)
    options = {"data.train": str(tmp_path / "photos"), "data.val_fraction": 0.2, "data.cache_dir": str(tmp_path / "cache"), "run.dir": str(tmp_path)}
    resolve = resolver("finetune", {**options, "model.name": "timm/vit_tiny_patch16_224"})
    search = open_search(resolve({}), "vit", None, resolve, Budget(3), log=to_nobody)
    first, *others = (search.trial(number).config for number in (1, 2, 3))
    rate = first.phases["all"].lr
    assert (first.data.global_batch_size, rate) == (16, pytest.approx(0.0005 * 16 / 256, rel=0.01))
    assert [config.phases["all"].lr for config in others] == pytest.approx([3 * rate, rate / 3], rel=0.01)


def test_a_pretext_is_trained_in_each_trial_before_they_are_compared(tmp_path: Path) -> None:
    run(["--config", "tiny.yaml", "--budget", "3", "--phases.head.task", "rotate", "--phases.all.epochs", "2"], cwd=prepared(tmp_path), command="train")
    assert results(tmp_path)["rungs"] == [2, 3], "an epoch of rotations, and then those of the classes"
    assert [row["state"] for row in results(tmp_path)["trials"]] == ["done", "done", "stopped"]


def test_an_error_in_a_trial_names_it(tmp_path: Path) -> None:
    prepared(tmp_path)
    (tmp_path / "space.yaml").write_text("model.name: ['networks:small', 'networks:failing']\n")
    job = run(["--config", "tiny.yaml", "--space", "space.yaml", "--budget", "2"], cwd=tmp_path, command="search", code=1)
    assert "trial-2 (model.name networks:failing) ended with an error, and this worker with it:" in job.err()


def test_a_trial_whose_statistics_overflow_is_the_last(tmp_path: Path) -> None:
    """With two trials both reach each rung: it must end there, not at its resume."""
    prepared(tmp_path)
    (tmp_path / "space.yaml").write_text("model.name: ['networks:overflowing', 'networks:small']\n")
    run(["--config", "tiny.yaml", "--space", "space.yaml", "--budget", "2", "--phases.all.epochs", "3"], cwd=tmp_path, command="search")
    assert [(row["settings"].get("model.name"), row["state"]) for row in results(tmp_path)["trials"]] == [(None, "done"), ("networks:overflowing", "diverged")]


def test_a_budget_in_minutes_ends_where_the_trial_that_measures_diverges(tmp_path: Path) -> None:
    """It began this trial again and again."""
    folder = prepared(tmp_path)
    words = ["--config", "tiny.yaml", "--space", "space.yaml", "--phases.all.epochs", "1", "--model.name", "networks:diverging"]
    (folder / "space.yaml").write_text("phases.all.lr: [0.02, 0.05]\n")
    line = the_line(run([*words, "--budget", "2h"], cwd=folder, command="search", code=2))
    assert line.startswith("dtl: trial-1 (the recipe as it is): ")
    assert "not finite" in line
    assert line.endswith("a budget in minutes is measured on this trial: give a number of trials, or change the recipe, both with another --run.name")
    job = run([*words, "--budget", "2h", "--slots", "2", "--run.name", "slots"], cwd=folder, command="search", code=2)
    assert (job.out() + job.err()).count("a budget in minutes is measured on this trial") == 1, "of several workers one says so"
    line = the_line(run([*words, "--budget", "2", "--run.name", "another"], cwd=folder, command="search", code=2))
    assert "no trial came to its end: all diverged" in line
    history = [json.loads(text) for text in (folder / "runs/another-search/trial-2/history.jsonl").read_text().splitlines()]
    assert [event["note"] for event in history if event["event"] == "note"][-1] == "diverged", "a number of trials goes on after it"


def test_a_signal_ends_a_search_although_the_trial_diverges(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    (folder / "space.yaml").write_text("model.name: ['networks:stopped_and_diverging']\nphases.all.lr: [0.02, 0.05]\n")
    run(["--config", "tiny.yaml", "--space", "space.yaml", "--budget", "3", "--phases.all.epochs", "1"], cwd=folder, command="search", code=75)
    assert not (folder / "runs/tiny-search/trial-3").exists()


def test_train_with_a_budget_is_its_shortest_form(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    job = run(["--config", "tiny.yaml", "--budget", "2", "--phases.all.epochs", "1"], cwd=folder, command="train")
    assert [row["settings"] for row in sorted(results(folder)["trials"], key=lambda row: row["trial"])] == [{}, {"phases.all.lr": 0.15}]
    assert f"its model: runs/tiny-search/trial-{results(folder)['winner']}/model" in job.out()
    assert (trial(folder, results(folder)["winner"]) / "model/model.safetensors").is_file()


def test_the_test_set_stays_the_same(tmp_path: Path) -> None:
    """A finished search said that there was none."""
    folder = prepared(tmp_path)
    for label, brightness in (("a", 70), ("b", 120), ("c", 170)):
        for name in ("test", "other"):
            (folder / name / label).mkdir(parents=True)
            Image.new("RGB", (16, 12), (brightness, len(name), 0)).save(folder / name / label / "1.png")
    words = ["--config", "tiny.yaml", "--space", "space.yaml", "--budget", "2", "--phases.all.epochs", "1", "--data.test_fraction", "0"]
    for name, begun, now, was in [
        ("without", [], ["--data.test", "test"], "without a test set"),
        ("with", ["--data.test", "test"], ["--data.test", "other"], "with another test set"),
        ("with", ["--data.test", "test"], [], "with a test set, now there is none"),
    ]:
        run([*words, *begun, "--run.name", name], cwd=folder, command="search")
        line = the_line(run([*words, *now, "--run.name", name], cwd=folder, command="search", code=2))
        assert f"runs/{name}-search was begun {was}; give the same again, or begin another search with --run.name NEW" in line
    assert run(["runs/without-search/trial-1", "--data.val", "test"], cwd=folder, command="evaluate").out().startswith("3 images: top1 "), "as the line advises"
    search = folder / "runs/without-search/search.json"
    search.write_text(json.dumps({key: value for key, value in json.loads(search.read_text()).items() if key != "test"}))
    run([*words, "--run.name", "without"], cwd=folder, command="search")  # an older dtl began it
    assert json.loads(search.read_text())["test"] == ""


def test_a_budget_in_minutes_becomes_a_number_of_trials_once(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    (folder / "space.yaml").write_text("phases.all.lr: [0.02, 0.05]\n")
    words = [*SEARCH[:-2], "--phases.all.epochs", "1"]
    line = the_line(run([*words, "--budget", "0.001s"], cwd=folder, command="search", code=2))
    assert re.search(r"--budget: 0\.001 seconds are too few for one trial, which takes about [0-9.]+ seconds; the same command with more goes on$", line)
    job = run([*words, "--budget", "2h"], cwd=folder, command="search")
    assert "120 minutes with 1 worker come to 2 trials, as measured on trial 1 and written down" in job.err()
    measured = json.loads((folder / "runs/tiny-search/budget.json").read_text())
    assert measured["trials"] == 2, "the space has no more"
    assert "was begun with a budget of 120 minutes, now it is 4 trials" in the_line(run([*words, "--budget", "4"], cwd=folder, command="search", code=2))


def test_what_cannot_be_searched_is_refused_in_one_line(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(reference)
    monkeypatch.setenv("DTL_CACHE", str(reference / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    before = (reference / "runs/tiny-search/search.json").read_bytes()
    (tmp_path / "other.yaml").write_text(SPACE.replace("0.003", "0.002"))
    (tmp_path / "typo.yaml").write_text("phases.alls.lr: {log: [0.1, 0.2]}\n")
    (tmp_path / "network.yaml").write_text("model.name: ['networks:small', torchvision/resnet19]\n")
    (tmp_path / "networks.yaml").write_text("model.name: ['networks:small', 'networks:without_norms']\n")
    (tmp_path / "options.yaml").write_text("model.options: [{}, {widht: 8}]\n")
    (tmp_path / "steps.yaml").write_text("phases.all.steps: [10, 20]\n")
    (tmp_path / "groups.yaml").write_text("phases.all.train: [all, 'last:99']\n")
    (tmp_path / "weights.yaml").write_text("phases.all.class_weights: [none, missing.json]\n")
    (reference / "runs/full-search").mkdir()
    (reference / "runs/full-search/thesis.txt").write_text("mine")
    for options, line in [
        (["--space", str(tmp_path / "other.yaml")], "tiny-search is another search: its range of phases.all.lr is {'log': [0.003, 0.5]}, now it is"),
        (["--space", str(tmp_path / "typo.yaml")], "typo.yaml: phases.alls.lr: tiny.yaml has no phase alls; did you mean all?"),
        (["--space", str(tmp_path / "network.yaml"), "--run.name", "n"], "network.yaml: model.name torchvision/resnet19: unknown model 'torchvision/resnet19'"),
        (["--budget", "7"], "was begun with a budget of 5 trials, now it is 7 trials; give the same again, or begin another search with --run.name NEW"),
        (["--budget", "0"], "--budget 0 is too small for one trial"),
        (["--budget", "0m"], "--budget 0m is too small for one trial"),
        (["--budget", "soon"], "--budget soon: give a number of trials (27), or minutes (30m) or hours (2h)"),
        (["--budget", "9" * 5000], "give a number of trials (27), or minutes (30m) or hours (2h)"),
        (
            ["--space", str(tmp_path / "steps.yaml"), "--phases.all.epochs", "2", "--run.name", "n"],
            "steps.yaml: --phases.all.epochs, phases.all.steps: ",
        ),
        (["--budget", "1001"], "--budget 1001: a search has at most 1,000 trials"),
        (["--run.seed", "1"], "was begun with run.seed 0, now it is 1"),
        (["--phases.head.lr", "0.2"], "was trained with phases.head.lr 0.1, now it is 0.2: all trials need the same recipe"),
        (["--data.test-fraction", "0.3"], "was begun with other images: data.train or data.val has changed"),
        (["--space", str(tmp_path / "options.yaml"), "--run.name", "n"], "options.yaml: model.options {'widht': 8}: "),
        (["--space", str(tmp_path / "groups.yaml"), "--run.name", "n"], "groups.yaml: phases.all.train last:99: phase all: "),
        (["--space", str(tmp_path / "weights.yaml"), "--run.name", "n"], "weights.yaml: phases.all.class_weights missing.json: phase all: class_weights is"),
        (["--run.name", "full"], "full-search is not empty (it holds 'thesis.txt'), and no search is in it"),
        (["--run.resume", "never"], "run.resume never is for one run"),
        (["--run.debug", "true"], "run.debug is for one run: dtl train --run.debug true"),
        (["--dry-run"], "--dry-run is for one run: leave out --budget"),
        (
            ["--space", str(tmp_path / "networks.yaml"), "--phases.head.task", "rotate", "--run.name", "r"],
            "phase head does not classify, so trials cannot be compared in it: train it first, and search without it from its weights (--phases.head null",
        ),
    ]:
        assert main(["search", *SEARCH, *options]) == 2
        said = capfd.readouterr().err
        assert line in said
        assert said.count("dtl: ") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["search", *SEARCH]) == 2
    assert "a trial is trained by one process: start dtl search without a launcher" in capfd.readouterr().err
    assert (reference / "runs/tiny-search/search.json").read_bytes() == before
    assert not (reference / "runs/n-search").exists()


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("import sys; sys.exit(0)", 0),
        ("import sys; sys.exit(75)", 75),
        ("import os; os.kill(os.getpid(), 9)", 0),
    ],
)
def test_slots_are_processes_with_a_gpu_each(monkeypatch: pytest.MonkeyPatch, script: str, found: int) -> None:
    lines: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a, b")
    monkeypatch.setattr("dtl.machine.fresh_python", lambda *words: ["python3", "-c", script])
    assert command._work_together(["--config", "x"], 2, lambda: False, lines.append) == found
    assert lines == ([f"worker {number} ended with status -9" for number in (1, 2)] if "kill" in script else [])


def test_an_error_of_the_user_is_told_once_for_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second says it too, or is ended by the first one's: neither is told."""
    lines: list[str] = []
    for ends in ("sys.exit(2)", "time.sleep(60)"):
        script = f"import os, sys, time; os.write(int(sys.argv[1]), b'wrong\\n'); sys.exit(2) if os.environ['CUDA_VISIBLE_DEVICES'] == 'a' else {ends}"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a, b")
        monkeypatch.setattr("dtl.machine.fresh_python", lambda *words, script=script: ["python3", "-c", script, words[3]])
        with pytest.raises(UserError, match=r"^wrong$"):
            command._work_together([], 2, lambda: False, lines.append)
    assert not lines


def test_of_two_slots_one_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "a, b")
    script = "import os; os.environ['CUDA_VISIBLE_DEVICES'] == 'b' and os.kill(os.getpid(), 9)"
    monkeypatch.setattr("dtl.machine.fresh_python", lambda *words: ["python3", "-c", script])
    assert command._work_together([], 2, lambda: False, lines.append) == 0
    assert lines == ["worker 2 ended with status -9; others took over its trial"]


def test_a_worker_without_memory_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(arguments: Sequence[str]) -> int:
        raise MemoryError

    monkeypatch.setattr(command, "run", fails)
    monkeypatch.setattr("dtl.machine.end_with_parent", lambda parent: None)
    with pytest.raises(SystemExit) as ended:
        command.worker("1", "2")
    assert ended.value.code == 1
    assert capfd.readouterr().err.startswith("dtl: there is not enough memory")


def test_a_stop_reaches_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtl.machine.fresh_python", lambda *words: ["sleep", "60"])
    begun = time.monotonic()
    assert command._work_together([], 2, lambda: True, lambda line: None) == 75
    assert time.monotonic() - begun < 30


@pytest.mark.soak
def test_two_slots_on_this_machine(reference: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DTL_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{Path(__file__).parents[3]}:{Path(__file__).parents[2]}",
    }
    words = ["python3", "-m", "dtl", "search", *SEARCH, "--slots", "2"]
    done = subprocess.run(words, cwd=prepared(tmp_path), env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == (reference / "said.txt").read_text()
