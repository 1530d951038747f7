"""`dtl find-lr` in real runs, on one rank and on two, and through the engine: it measures, and leaves no trace."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path

import harness
import pytest
import recipes
import torch

STEPS = ["--steps", "24", "--from", "1e-4", "--to", "30"]
PHASES = {"head": {"train": "head", "steps": 2}, "all": {"train": "all", "epochs": 1, "lr": 0.1, "ema": 0.9}}
PLAIN = {"model": {"name": "networks:without_norms"}, "data": {"workers": 0}, "phases": PHASES}


@pytest.mark.parametrize("phase", ["all", "head"])
def test_two_ranks_measure_the_curve_of_one(tmp_path: Path, phase: str) -> None:
    recipe = recipes.write_recipe(tmp_path, **PLAIN)
    curves = []
    for world in (1, 2):
        job = harness.run(["--config", str(recipe), "--phase", phase, "--out", f"out-{world}", *STEPS], cwd=tmp_path, world=world, command="find-lr")
        curves.append(json.loads((tmp_path / f"out-{world}/tiny-{phase}.json").read_text()))
        assert (tmp_path / f"out-{world}/tiny-{phase}.png").stat().st_size > 5000
        assert job.out(0).startswith(f"phase {phase}: ")
        if world == 2:
            assert job.out(1) == "", "one rank speaks"
    one, two = curves
    assert len(one["lrs"]) > 10
    assert one["lrs"] == two["lrs"]
    # The same global batches: equal but for the order of sums, until the large rates at the end magnify it.
    assert one["losses"][:12] == pytest.approx(two["losses"][:12], rel=1e-3)
    assert not (tmp_path / "runs").exists(), "no run folder is made"


def test_what_it_tries_is_undone_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from dtl.checks.lr_range import find_lr
    from dtl.config import load_config
    from dtl.distributed.runtime import Runtime
    from dtl.models.network import Normalise
    from dtl.training import build
    from dtl.training.active import enter

    phases = {"all": {"train": "all", "epochs": 1, "lr": 0.05, "optimizer": "adamw", "ema": 0.9, "mixup": 0.2}}
    config, _ = load_config(["--config", str(recipes.write_recipe(tmp_path, phases=phases)), "--data.workers", "0"])
    runtime = Runtime(device="cpu", precision="no")
    data = build.open_data(config, runtime, print)
    network = build.build_network(config, data.train.num_classes, runtime)
    loaders = build.build_dataloaders(config, runtime, data, network)
    (phase,) = build.planned(config, loaders)
    active = enter(
        network, phase, runtime, class_counts=loaders.class_counts, classes=loaders.classes, freeze_norm=True, micro_batch_size=120, image_size=16, log=print
    )
    settings = {"normalise": Normalise(network.preprocessing, runtime.device, channels_last=False), "seed": 0, "num_steps": 12, "first": 1e-3, "last": 1.0}
    # An optimizer with a state of its own, as in the middle of a phase.
    for parameter in active.parameters:
        parameter.grad = torch.ones_like(parameter)
    active.optimizer.step()
    active.optimizer.zero_grad()
    assert active.ema is not None
    active.ema.update()

    def everything() -> list[torch.Tensor]:
        state = active.optimizer.state_dict()["state"]
        moments = [value for values in state.values() for value in values.values()]
        assert moments
        return [
            *(tensor.detach().clone() for tensor in network.module.state_dict().values()),
            *(value.clone() for value in moments),
            *(value.clone() for value in active.ema.state_tensors().values()),  # type: ignore[union-attr]
            torch.get_rng_state(),
        ]

    before, groups, modes = everything(), json.dumps(active.optimizer.state_dict()["param_groups"]), [m.training for m in network.module.modules()]
    curve = find_lr(active, loaders, runtime, **settings)  # type: ignore[arg-type]
    assert len(curve.lrs) == 12
    assert curve.losses[0] != curve.losses[-1]
    assert all(torch.equal(old, new) for old, new in zip(before, everything(), strict=True))
    assert json.dumps(active.optimizer.state_dict()["param_groups"]) == groups
    assert [m.training for m in network.module.modules()] == modes
    assert active.ema.num_updates == 1
    assert all(parameter.grad is None for parameter in network.module.parameters())
    # And so a second test measures the very same.
    assert find_lr(active, loaders, runtime, **settings).losses == curve.losses  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--phase", "nothing"], "the recipe has no such phase; its phases: head, all"),
        (["--from", "1", "--to", "0.1"], "the learning rates must be above 0 and increase"),
        (["--steps", "3"], "3 steps are too few"),
        (["--start", "nowhere"], "nowhere does not exist"),
        (["--phse", "head"], "unknown option --phse; did you mean --phase?"),
    ],
)
def test_what_makes_no_test_is_refused(tmp_path: Path, options: list[str], said: str) -> None:
    recipe = recipes.write_recipe(tmp_path, **PLAIN)
    job = harness.run(["--config", str(recipe), *options], cwd=tmp_path, command="find-lr", code=2)
    assert said in job.err()


def test_a_signal_ends_it_on_all_ranks_with_one_line_and_nothing_written(tmp_path: Path) -> None:
    recipe = recipes.write_recipe(tmp_path, **PLAIN)
    words = ["--config", str(recipe), "--phase", "all", "--steps", "100000", "--from", "1e-9", "--to", "2e-9"]
    job = harness.start(words, cwd=tmp_path, world=2, command="find-lr")
    harness.wait_for(lambda: re.search(r"step \d+/100000  lr 1.00e-09  loss \d", job.err(0)), what="the first line of progress")
    job.kill(1, signal.SIGTERM)
    job.wait().check(75)
    assert job.err(0).splitlines()[-1].startswith("dtl: stopped by a signal to another rank after ")
    assert job.err(0).splitlines()[-1].endswith(" of 100000 steps; nothing was written, and no weights were changed")
    assert "stopped" not in job.err(1)
    assert not (tmp_path / "find-lr").exists()


def test_a_signal_before_the_first_step_ends_it_too(tmp_path: Path) -> None:
    recipe = recipes.write_recipe(tmp_path, model={"name": "obstacles:signalled"}, phases=PHASES)
    job = harness.run(["--config", str(recipe)], cwd=tmp_path, command="find-lr", code=75)
    assert job.err(0).splitlines()[-1] == "dtl: stopped by SIGTERM; nothing was written, and no weights were changed"


def test_what_it_suggests_trains_better_than_a_thirtieth_and_thirty_times_of_it(tmp_path: Path) -> None:
    recipe = recipes.write_recipe(tmp_path, data={"augment": {"preset": "none"}}, phases={"all": {"train": "all", "epochs": 3}})
    harness.run(["--config", str(recipe), "--steps", "60", "--from", "1e-5"], cwd=tmp_path, command="find-lr")
    suggestion = json.loads((tmp_path / "find-lr/tiny-all.json").read_text())["suggestion"]
    losses = []
    for factor in (1 / 30, 1, 30):
        name = f"times-{factor:g}"
        # A phase hands on its best evaluation; here its last counts.
        options = ["--run.name", name, "--phases.all.lr", str(suggestion * factor), "--phases.all.keep", "last", "--data.cache-dir", str(tmp_path / "cache")]
        job = harness.start(["--config", str(recipe), *options], cwd=tmp_path).wait()
        events = [event for event in harness.history(tmp_path / "runs" / name) if event["event"] == "val"]
        losses.append(events[-1]["loss"] if job.codes == [0] else math.inf)  # a loss that is not finite ends a run
    assert losses[1] < 0.8 * min(losses[0], losses[2]), (suggestion, losses)


def test_it_is_as_deterministic_as_the_training_it_is_for(tmp_path: Path) -> None:
    recipe = recipes.write_recipe(tmp_path, model={"name": "networks:unpooled"}, phases={"all": {"train": "all", "steps": 4}}, run={"deterministic": True})
    job = harness.run(["--config", str(recipe), "--out", "out", "--steps", "10"], cwd=tmp_path, command="find-lr")
    assert f"phase all: run.deterministic fails: 1 operator without a deterministic kernel on {harness.kind()} (max_unpooling2d_forward_out)" in job.err()
