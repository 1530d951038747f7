"""How a start of a run ends: what the `with` block raises, what status.json has, and that the folder is free again."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import status

from dtl.checkpoint.resume.state import TrainState
from dtl.config import Config, load_config
from dtl.distributed.signals import Stopped, StoppedBeforeFirstStep
from dtl.errors import EXIT_DONE, EXIT_STOPPED, UserError
from dtl.runs.tracker import Tracker
from dtl.training.session import Session


def config_in(folder: Path, *options: str) -> Config:
    given = ["--run.dir", str(folder), "--run.device", "cpu", "--precision", "no", "--tracking.wandb", "off", *options]
    return load_config(given)[0]


def test_nothing_that_happened_is_done_and_the_folder_is_free_for_the_next_start(tmp_path: Path) -> None:
    for number in (1, 2):
        session = Session(config_in(tmp_path), "run")
        with session:
            assert session.folder.incarnation == number
        assert (session.result.state, session.result.exit_status) == ("done", EXIT_DONE)


@pytest.mark.parametrize(("error", "why"), [(UserError("no such file"), "input: no such file"), (RuntimeError("boom"), "fault: boom"), (KeyError(), "fault")])
def test_a_failure_is_raised_and_stands_in_status_json(tmp_path: Path, error: Exception, why: str) -> None:
    session = Session(config_in(tmp_path), "run")
    session.heart.enter("load", 7)
    with pytest.raises(type(error)), session:
        raise error
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["why"], ended["step"]) == ("failed", why, 7)
    with Session(config_in(tmp_path), "run"):
        pass


def test_a_stop_before_the_first_step_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(config_in(tmp_path), "run")
    with session:
        session.heart.enter("data")
        raise StoppedBeforeFirstStep("a signal")
    assert session.result.exit_status == EXIT_STOPPED
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["why"], ended["stage"]) == ("stopped", "signal before the first step", "data")
    assert "dtl: stopped by a signal before the first step (stage data): nothing to save yet" in capsys.readouterr().err


def test_a_stop_after_a_checkpoint_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(config_in(tmp_path), "run")
    with session:
        session.open_tracker(TrainState(dataset_ids={}))
        raise Stopped("checkpoint.deadline_seconds", step=12)
    assert (session.result.state, session.result.exit_status) == ("stopped", EXIT_STOPPED)
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["why"], ended["step"]) == ("stopped", "checkpoint.deadline_seconds", 12)
    assert "stopped by checkpoint.deadline_seconds at step 12, after saving a checkpoint; the same command resumes from it" in capsys.readouterr().err


@pytest.mark.parametrize("fresh", [True, False])
def test_a_lost_rank_leaves_an_earlier_run_as_it_was(tmp_path: Path, fresh: bool) -> None:
    """With `run.resume: never` a job's next round takes a changed status for the sign that this run has begun."""
    config = config_in(tmp_path, "--run.resume", "never" if fresh else "auto")
    for start in ("before", "now"):
        session = Session(config, "run")
        with session.folder as folder:
            if start == "before":
                folder.write_status("done", step=5)
            else:
                session.lost("lost rank 1")
                assert status(folder.path)["state"] == ("done" if fresh else "failed")
                folder.write_status("running", step=0)
                session.lost("lost rank 1")
                assert (status(folder.path)["state"], status(folder.path)["why"]) == ("failed", "fault: lost rank 1")


@pytest.mark.parametrize(
    ("options", "name"), [([], "fold-2"), (["--data.fold.number", "2"], "tiny-folds/fold-2"), (["--data.fold.number", "0"], "tiny-folds/fold-2")]
)
def test_a_fold_has_its_recipe_in_its_name_for_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], name: str) -> None:
    """In wandb all runs of a project stand in one list, where five are called fold-2."""
    seen = []

    def tracker(*arguments: object, **more: object) -> Tracker:
        seen.append(more["name"])
        return Tracker(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("dtl.training.session.Tracker", tracker)
    session = Session(config_in(tmp_path / "tiny-folds", *options), "fold-2")
    with session:
        session.open_tracker(TrainState(dataset_ids={}))
    assert seen == [name]
