"""The rules of a search, without any training: what comes next is a function of what is there, in whatever order it came."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from dtl.config.space import resolver
from dtl.inference.search import Score, Task, features_of, next_tasks, num_promoted, promoted, rungs_of, score_of, trials_within


def test_rungs_grow_by_three_and_end_with_the_trial() -> None:
    assert rungs_of(27) == [3, 9, 27]
    assert rungs_of(10) == [1, 3, 10]
    assert rungs_of(1) == [1]
    assert rungs_of(2) == [1, 2]
    assert rungs_of(13, first=3) == [4, 6, 13], "the epochs of a head that is the same in all trials say nothing"


def test_a_third_goes_on_and_at_least_two() -> None:
    assert [num_promoted(number) for number in (1, 2, 3, 6, 7, 9, 27)] == [1, 2, 2, 2, 3, 3, 9]
    scores = {1: Score(0.5, 1.0), 2: Score(0.9, 2.0), 3: Score(0.9, 1.0), 4: Score(math.nan, 0.0), 5: Score(-math.inf, math.inf), 6: Score(0.5, 1.0)}
    assert promoted(scores) == [2, 3]
    assert promoted({**scores, 7: Score(0.1, 1.0)}) == [1, 2, 3], "of equal ones the lower number"
    assert promoted({4: Score(math.nan, 0.0), 5: Score(-math.inf, math.inf), 6: Score(0.0, 9.0)}) == [4, 6]


@pytest.mark.parametrize("seed", range(20))
def test_any_workers_in_any_order_come_to_the_same_end(seed: int) -> None:
    """Workers take whatever task is free, in random order, die, and lose the last result that they wrote; rungs are never passed before they are complete."""
    luck = random.Random(seed)
    trials, rungs = list(range(1, luck.randint(1, 14) + 1)), rungs_of(luck.randint(1, 30))
    truth = {(trial, rung): Score(luck.choice([0.1, 0.5, 0.5, 0.9, math.nan, -math.inf]), luck.choice([0.5, 1.0])) for trial in trials for rung in range(3)}
    ends = []
    for workers in (1, 2, 3, 7):
        known: dict[tuple[int, int], Score] = {}
        running: list[Task] = []
        for _ in range(10_000):
            tasks, complete = next_tasks(trials, rungs, lambda trial, rung: known.get((trial, rung)))  # noqa: B023
            if not tasks:
                break
            assert len({task.rung for task in tasks}) == 1
            assert len(complete) == tasks[0].rung
            free = [task for task in tasks if task not in running]
            if free and len(running) < workers:
                running.append(luck.choice(free))
            elif running:
                task = running.pop(luck.randrange(len(running)))
                if luck.random() < 0.7:  # else it dies
                    known[task.trial, task.rung] = truth[task.trial, task.rung]
                    if luck.random() < 0.1:  # a trial that is killed before its checkpoint repeats what its history had
                        del known[task.trial, task.rung]
        assert not tasks
        ends.append((repr(complete), len(known)))
    assert len(set(ends)) == 1
    assert ends[0][1] == sum(map(len, eval(ends[0][0], {"Score": Score, "nan": math.nan, "inf": math.inf}))), "nothing was trained that no rung needs"


def test_a_budget_in_time_is_a_number_of_trials() -> None:
    rungs, lengths = [1, 3, 9], [9] * 243
    one = 3 * 2.0 + 9 * 10.0
    assert trials_within(one - 0.1, lengths, fixed=2.0, per_epoch=10.0, rungs=rungs) == 0
    assert trials_within(one, lengths, fixed=2.0, per_epoch=10.0, rungs=rungs) == 1
    nine = 9 * 12 + 3 * 22 + 2 * 62
    assert trials_within(nine, lengths, fixed=2.0, per_epoch=10.0, rungs=rungs) == 9
    assert trials_within(nine - 0.1, lengths, fixed=2.0, per_epoch=10.0, rungs=rungs) == 8
    assert trials_within(1e9, lengths, fixed=0.0, per_epoch=0.0, rungs=rungs) == 243


def test_a_budget_in_time_knows_how_long_each_trial_is() -> None:
    """A recipe of ten epochs, and as the last candidate one of forty: the recipe alone does not take as long as that."""
    rungs, lengths = [4, 13, 40], [10, 10, 10, 40]
    alone = (2.0 + 4 * 1.0) + (2.0 + 6 * 1.0)  # it ends before the last rung
    assert trials_within(alone, lengths, fixed=2.0, per_epoch=1.0, rungs=rungs) == 1
    assert trials_within(alone - 0.1, lengths, fixed=2.0, per_epoch=1.0, rungs=rungs) == 0
    four = 4 * (2.0 + 4) + (2.0 + 9) + (2.0 + 6) + (2.0 + 27)
    assert trials_within(four, lengths, fixed=2.0, per_epoch=1.0, rungs=rungs) == 4
    assert trials_within(four - 0.1, lengths, fixed=2.0, per_epoch=1.0, rungs=rungs) == 3


def run_with(folder: Path, rows: list[dict[str, object]], **status: object) -> Path:
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def val(epoch: int, top1: object, *, kept: bool = True, **more: object) -> dict[str, object]:
    return {"event": "val", "phase": "all", "epoch": epoch, "step": 10 * (epoch + 1), "loss": 1.0 + epoch, "top1": top1, "kept": kept, **more}


def test_a_score_is_what_the_run_kept_at_its_first_evaluation_after_the_rung(tmp_path: Path) -> None:
    entering = val(0, 0.9, entering=True, step=0)
    rows = [entering, val(0, 0.2, kept=False), {"event": "epoch"}, val(1, 0.95), val(3, 0.97, kept=False), val(4, 0.99)]
    run = run_with(tmp_path, rows)
    assert score_of(run, 1, "top1") == Score(0.9, 1.0), "the weights that entered are still the best"
    assert score_of(run, 2, "top1") == score_of(run, 3, "top1") == Score(0.95, 2.0)
    assert score_of(run, 5, "top1") == Score(0.99, 5.0)
    assert score_of(run, 6, "top1") is None
    assert score_of(run, None, "top1") is None
    assert score_of(run, 2, "loss") == Score(-2.0, 2.0)
    run_with(tmp_path, rows, state="done", model="m")
    assert score_of(run, 6, "top1") == score_of(run, None, "top1") == Score(0.99, 5.0), "a trial that ends before the rung"


def test_a_trial_that_diverged_is_the_last(tmp_path: Path) -> None:
    run = run_with(tmp_path, [val(0, 0.5), {"event": "note", "note": "diverged"}], state="failed", why="input: the loss")
    assert score_of(run, 1, "top1") == Score(0.5, 1.0), "not yet at the first rung"
    assert score_of(run, 2, "top1") == score_of(run, None, "top1") == Score(-math.inf, math.inf)
    assert score_of(tmp_path / "nowhere", 1, "top1") is None
    assert score_of(run_with(tmp_path, [val(0, "nan")]), 1, "top1") != Score(0.0, 1.0)


def test_trials_of_one_network_share_their_features() -> None:
    """So a worker waits for those that another computes, instead of computing them too."""
    resolve = resolver("finetune", {"data.train": "photos"})
    own = features_of(resolve({}))
    assert own is not None
    assert features_of(resolve({"phases.head.lr": 0.1, "phases.all.lr": 0.1, "checkpoint.keep": 1})) == own
    for key, value in (("model.name", "torchvision/resnet34"), ("data.image_size", 96), ("phases.head.views", 2), ("transfer.source", "w.pt")):
        assert features_of(resolve({key: value})) != own
    assert features_of(resolve({"phases.head.cache_features": False})) is None
    assert features_of(resolver("digits", {})({"phases.pretext.train": "all"})) is None
