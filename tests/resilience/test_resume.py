"""Stop it anywhere, run the same command again: the same weights, bit for bit, and the same history."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from harness import history, kind, run, start, status, steps_done, wait_for
from recipes import weights_hash, write_recipe


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """An uninterrupted run for each world size."""
    runs = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"reference-{world}")
        run(["--config", str(write_recipe(folder))], cwd=folder, world=world)
        runs[world] = folder / "runs/tiny"
    return runs


@pytest.mark.parametrize(("world", "when"), [(1, 2), (2, 6), (2, 13), (1, 20)])
def test_a_run_that_was_stopped_goes_on_bit_identically(tmp_path: Path, reference: dict[int, Path], world: int, when: int) -> None:
    arguments = ["--config", str(write_recipe(tmp_path))]
    folder = tmp_path / "runs/tiny"
    job = start(arguments, cwd=tmp_path, world=world)
    wait_for(lambda: steps_done(folder) >= when or None, what=f"step {when}")
    number = {2: signal.SIGTERM, 6: signal.SIGUSR1, 13: signal.SIGINT, 20: signal.SIGTERM}[when]
    job.kill(rank=world - 1, number=number)  # one rank's signal is enough
    job.wait()
    if job.codes == [75] * world:
        assert status(folder)["state"] == "stopped"
        run(arguments, cwd=tmp_path, world=world)
    else:
        job.check(0)  # it was quicker than the signal
    assert status(folder)["state"] == "done"
    assert weights_hash(folder) == weights_hash(reference[world])
    assert history(folder) == history(reference[world])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("when", [8])  # test_kills.py tries many more places
def test_a_run_that_was_killed_goes_on_bit_identically(tmp_path: Path, reference: dict[int, Path], world: int, when: int) -> None:
    arguments = ["--config", str(write_recipe(tmp_path))]
    folder = tmp_path / "runs/tiny"
    job = start(arguments, cwd=tmp_path, world=world)
    wait_for(lambda: steps_done(folder) >= when or None, what=f"step {when}")
    job.kill()
    run(arguments, cwd=tmp_path, world=world)
    assert weights_hash(folder) == weights_hash(reference[world])
    assert history(folder) == history(reference[world])


def test_gradients_of_several_buckets_are_summed_in_one_order_from_the_first_step_on(tmp_path: Path) -> None:
    # Over three and more ranks the order of an all-reduce's sums depends on where a gradient stands in its bucket.
    phases = {"all": {"train": "all", "steps": 6, "lr": 0.05}}
    weights = []
    for name in ("whole", "killed"):
        recipe = write_recipe(tmp_path, name, model={"name": "networks:wide"}, data={"workers": 0}, phases=phases)
        if name == "killed":
            job = start(["--config", str(recipe)], cwd=tmp_path, world=3)
            wait_for(lambda: steps_done(tmp_path / "runs/killed") >= 3 or None, what="step 3")
            job.kill()
        run(["--config", str(recipe)], cwd=tmp_path, world=3)
        weights.append(weights_hash(tmp_path / f"runs/{name}"))
    assert weights[0] == weights[1]


def test_operators_without_a_deterministic_kernel_are_named_and_a_change_is_logged(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={"name": "networks:unpooled"}, phases={"all": {"train": "all", "steps": 40}})
    job = start(["--config", str(recipe), "--run.deterministic", "true"], cwd=tmp_path, world=2)
    wait_for(lambda: list((tmp_path / "runs/tiny/checkpoints").glob("step-*/state.json")) or None, what="a checkpoint")
    job.kill()
    named = f"1 operator without a deterministic kernel on {kind()} (max_unpooling2d_forward_out): a repeated or resumed run may differ in the last digits"
    assert job.err().count(named) == 1
    assert "does not have a deterministic implementation" not in job.err()
    other = run(["--config", str(recipe)], cwd=tmp_path, world=2)
    of_gpus = (
        ""
        if kind() == "cpu"
        else ", CUBLAS_WORKSPACE_CONFIG was :4096:8 and is now unset, NCCL_ALGO was Ring and is now unset, NCCL_PROTO was Simple and is now unset"
    )
    assert other.err().count(f"run.deterministic was true and is now false{of_gpus}: the rounding of sums may differ") == 1
    assert "without a deterministic kernel" not in other.err()


def test_a_finished_run_prints_its_result_and_changes_nothing(tmp_path: Path, reference: dict[int, Path]) -> None:
    folder = reference[1]
    before = weights_hash(folder), history(folder)
    job = run(["--config", str(folder.parent.parent / "tiny.yaml")], cwd=folder.parent.parent)
    assert "is finished" in job.err()
    assert (weights_hash(folder), history(folder)) == before


def test_more_epochs_on_the_last_phase_go_on(tmp_path: Path) -> None:
    arguments = ["--config", str(write_recipe(tmp_path))]
    run(arguments, cwd=tmp_path)
    first = status(tmp_path / "runs/tiny")["step"]
    free = ["--data.micro-batch-size", "60", "--checkpoint.keep", "1", "--checkpoint.every-steps", "5", "--checkpoint.async", "false"]
    job = run([*arguments, "--phases.all.epochs", "2", *free], cwd=tmp_path)
    assert job.err().count("data.micro_batch_size was auto and is now 60:") == 1
    after = status(tmp_path / "runs/tiny")
    assert after["state"] == "done"
    (newest,) = (tmp_path / "runs/tiny/checkpoints").glob("step-*/state.json")
    assert json.loads(newest.read_text())["device"] == kind(), "a start on another device is to be told"
    assert after["step"] == first + 6
    steps = [event["step"] for event in history(tmp_path / "runs/tiny")]
    assert steps == sorted(steps)


def test_a_changed_setting_is_refused_by_name_with_the_way_out(tmp_path: Path) -> None:
    arguments = ["--config", str(write_recipe(tmp_path))]
    run(arguments, cwd=tmp_path)
    job = run([*arguments, "--phases.head.lr", "0.3", "--data.workers", "0"], cwd=tmp_path, code=2)
    assert job.err().count("\n") == 1
    for words in ("phases.head.lr", "0.1", "0.3", "--run.name NEW", "--run.resume never"):
        assert words in job.err()
    job = run([*arguments, "--checkpoint.monitor", "loss", "--checkpoint.keep", "1", "--phases.all.epochs", "2"], cwd=tmp_path, code=2)
    assert "started with checkpoint.monitor 'top1', now it is 'loss'; start another run" in job.err(), "other weights would be the best"
    job = run([*arguments, "--phases.all.epochs", "2"], cwd=tmp_path, by_rank={0: {"before": "obstacles:other_augmentations"}}, code=2)
    assert "was started with version 2 of the training transforms, but this dtl has version 3" in job.err()
    job = run([*arguments, "--phases.all.epochs", "2"], cwd=tmp_path, by_rank={0: {"before": "obstacles:other_order"}}, code=2)
    assert "was started with version 1 of the order of samples, but this dtl has version 2: " in job.err()
    assert job.err().count("\n") == 1
    run([*arguments, "--phases.head.lr", "0.3", "--run.resume", "never"], cwd=tmp_path)


def test_a_default_that_is_another_one_now_names_the_option_that_goes_on(tmp_path: Path) -> None:
    arguments = ["--config", str(write_recipe(tmp_path, phases={"all": {"train": "all", "steps": 4}}))]
    run([*arguments, "--data.window", "100", "--data.workers", "2"], cwd=tmp_path)
    refused = run([*arguments, "--data.workers", "auto", "--phases.all.steps", "6"], cwd=tmp_path, code=2)
    assert "was started with data.window 100, now it is 65536, its default, which may have changed: go on with --data.window 100;" in refused.err()
    run([*arguments, "--data.workers", "auto", "--phases.all.steps", "6", "--data.window", "100"], cwd=tmp_path)
    assert status(tmp_path / "runs/tiny")["state"] == "done"


def test_a_checkpoint_of_an_older_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    arguments = ["--config", str(write_recipe(tmp_path))]
    run(arguments, cwd=tmp_path)
    for manifest in (tmp_path / "runs/tiny/checkpoints").glob("step-*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    job = run([*arguments, "--phases.all.epochs", "2"], cwd=tmp_path, code=2)
    assert job.err().count("\n") == 1
    for words in ("older dtl (checkpoint format 1, this dtl reads 3)", "the dtl version that started the run", "--run.name NEW", "--run.resume never"):
        assert words in job.err()


def test_resume_must_refuses_to_start_from_nothing(tmp_path: Path) -> None:
    job = run(["--config", str(write_recipe(tmp_path)), "--run.resume", "must"], cwd=tmp_path, code=2)
    assert "run.resume is must" in job.err()
