"""step_epochs, gamma, final_lr, warmup, focal_gamma and focal_alpha, from the config to the rates and losses of an entered phase."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtl.config import PhaseConfig
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.models.build import build
from dtl.training.active import ActivePhase, enter
from dtl.training.phases import plan_phases

PER_EPOCH = 4
CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(device="cpu", precision="no")


def entered(runtime: Runtime, **values: Any) -> ActivePhase:
    phase = plan_phases({"it": PhaseConfig.model_validate(values)}, steps_per_epoch=PER_EPOCH, num_classes=len(CLASSES))[0]
    options: dict[str, Any] = {"class_counts": [1, 2, 3], "classes": CLASSES, "freeze_norm": True, "micro_batch_size": 4, "image_size": 16}
    return enter(build("dtl/resnet_tiny", num_classes=len(CLASSES)), phase, runtime, **options, log=lambda line: None)


def rates(runtime: Runtime, **values: Any) -> list[float]:
    """Of each step of the phase, as the optimizer gets them."""
    active = entered(runtime, lr=1.0, **values)
    found = []
    for step in range(active.phase.num_steps):
        said = active.set_lr(step)
        assert [group["lr"] for group in active.optimizer.param_groups] == [said * group["lr_scale"] for group in active.optimizer.param_groups]
        found.append(said)
    return found


@pytest.mark.parametrize(("every", "steps"), [(1.0, 4), (2, 8), (0.5, 2), (0.01, 1)])
def test_the_rate_falls_every_so_many_epochs(runtime: Runtime, every: float, steps: int) -> None:
    found = rates(runtime, schedule="step", step_epochs=every, gamma=0.5, epochs=5)
    assert found == pytest.approx([0.5 ** (step // steps) for step in range(5 * PER_EPOCH)])


def test_the_rate_falls_at_these_epochs(runtime: Runtime) -> None:
    found = rates(runtime, schedule="step", step_epochs=[1, 1.5, 4], gamma=0.1, epochs=5)
    assert found == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 10 + [0.001] * 4)


def test_epochs_that_come_to_one_step_are_refused(runtime: Runtime) -> None:
    """Those that do not rise are the config's to refuse; these rise by less than a step."""
    with pytest.raises(UserError, match="milestones must be positive and increasing"):
        entered(runtime, schedule="step", step_epochs=[2.0, 2.001], epochs=5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("final", [0.0, 0.25, 1.0])
def test_the_rate_goes_to_its_share_at_the_end(runtime: Runtime, schedule: str, final: float) -> None:
    found = rates(runtime, schedule=schedule, final_lr=final, epochs=50)
    assert found[0] == 1.0
    assert found[len(found) // 2] == pytest.approx((1 + final) / 2)
    assert found[-1] == pytest.approx(final, abs=1.01 / len(found)), "the next step would have it"
    assert all(later <= before for before, later in itertools.pairwise(found))


def test_it_rises_over_the_epochs_of_warmup(runtime: Runtime) -> None:
    found = rates(runtime, schedule="constant", warmup=1.5, epochs=3)
    assert found == pytest.approx([0.01 + 0.99 * step / 6 for step in range(6)] + [1.0] * 6)


LOGITS = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.5])
@pytest.mark.parametrize("alpha", [None, 0.25, [0.5, 1.0, 3.0]])
def test_the_focal_loss_is_that_of_the_config(runtime: Runtime, gamma: float, alpha: Any) -> None:
    loss = entered(runtime, loss="focal", focal_gamma=gamma, focal_alpha=alpha, epochs=1).loss
    factors = torch.tensor(alpha if isinstance(alpha, list) else [1.0 if alpha is None else alpha] * 3, dtype=torch.float64)

    @given(LOGITS, st.integers(0, 2))
    def check(logits: list[float], label: int) -> None:
        got, weights = loss(torch.tensor([logits]), torch.tensor([label]))
        p = torch.tensor(logits, dtype=torch.float64).softmax(0)[label]
        torch.testing.assert_close(got[0].double(), -factors[label] * (1 - p) ** gamma * p.log(), rtol=1e-4, atol=1e-6)
        assert weights.tolist() == [1.0]

    check()


def test_what_the_focal_loss_is_without_settings_and_that_evaluation_has_none_of_it(runtime: Runtime) -> None:
    active = entered(runtime, loss="focal", epochs=1)
    assert (active.loss.name, active.loss.gamma, active.loss.alpha) == ("focal", 2.0, 1.0)
    assert active.eval_loss.name == "cross_entropy"
    assert entered(runtime, epochs=1, focal_gamma=3.0).loss.name == "cross_entropy"


def test_an_alpha_for_another_number_of_classes_is_refused(runtime: Runtime) -> None:
    with pytest.raises(UserError, match="alpha of the focal loss has 2 numbers for 3 classes"):
        entered(runtime, loss="focal", focal_alpha=[1.0, 2.0], epochs=1).loss(torch.zeros(1, 3), torch.tensor([0]))
