"""dtl.optim.losses: against torch's own, against the formula, at the edges, and with a global denominator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional

from dtl.config import PhaseConfig
from dtl.errors import UserError
from dtl.optim.losses import LOSSES, build_loss, class_weights


def _data(num_samples: int = 12, num_classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_samples, num_classes, generator=generator)
    return logits, torch.randint(0, num_classes, (num_samples,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_is_torchs(smoothing: float) -> None:
    logits, labels = _data()
    losses, weights = build_loss(smoothing=smoothing)(logits, labels)
    expected = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(weights, torch.ones(12))
    shares = torch.softmax(torch.randn(12, 5), dim=1)
    soft, _ = build_loss(smoothing=smoothing)(logits, shares)
    torch.testing.assert_close(soft, functional.cross_entropy(logits, shares, reduction="none", label_smoothing=smoothing))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["cross_entropy", "focal"])
def test_class_weights_have_a_global_denominator(ranks: int, name: str) -> None:
    logits, labels = _data()
    weights = torch.tensor([0.1, 1.0, 2.0, 5.0, 0.5])
    loss = build_loss(name, class_weights=weights, gamma=0.0)
    parts = [loss(logits[rank::ranks], labels[rank::ranks]) for rank in range(ranks)]
    mean = sum(part[0].sum() for part in parts) / sum(part[1].sum() for part in parts)
    torch.testing.assert_close(mean, functional.cross_entropy(logits, labels, weight=weights))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_formula(gamma: float) -> None:
    logits, labels = _data()
    alpha = [0.25, 1.0, 0.5, 2.0, 0.1]
    losses, _ = build_loss("focal", gamma=gamma, alpha=alpha)(logits, labels)
    p = torch.softmax(logits.double(), dim=1).gather(1, labels[:, None])[:, 0]
    expected = -torch.tensor(alpha, dtype=torch.float64)[labels] * (1 - p) ** gamma * p.log()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-7)
    plain, _ = build_loss("focal", gamma=gamma, alpha=0.25)(logits, labels)
    torch.testing.assert_close(plain.double(), -0.25 * (1 - p) ** gamma * p.log(), rtol=1e-5, atol=1e-7)


def test_focal_of_shares_mixes_the_focal_of_labels() -> None:
    logits, labels = _data()
    other = (labels + 1) % 5
    loss = build_loss("focal", gamma=2.0)
    shares = 0.3 * functional.one_hot(labels, 5) + 0.7 * functional.one_hot(other, 5)
    torch.testing.assert_close(loss(logits, shares)[0], 0.3 * loss(logits, labels)[0] + 0.7 * loss(logits, other)[0])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_certain_predictions_have_finite_losses_and_gradients(gamma: float, size: float) -> None:
    logits = torch.tensor([[size, -size, 0.0], [-size, size, 0.0]], requires_grad=True)
    losses, _ = build_loss("focal", gamma=gamma)(logits, torch.tensor([0, 0]))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_math_is_float32_under_autocast() -> None:
    logits, labels = _data()
    with torch.autocast("cpu", torch.bfloat16):
        losses, weights = build_loss("focal", smoothing=0.1)(logits.bfloat16(), labels)
    assert losses.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(losses, build_loss("focal", smoothing=0.1)(logits.bfloat16().float(), labels)[0])


def test_an_impossible_class_costs_nothing_without_a_share() -> None:
    logits = torch.tensor([[0.0, float("-inf")]])
    assert build_loss()(logits, torch.tensor([0]))[0].item() == 0


@pytest.mark.parametrize("rule", ["inverse", "sqrt"])
def test_rules_have_mean_one_over_samples(rule: str) -> None:
    counts = [100, 10, 1, 0]
    weights = class_weights(rule, counts, list("abcd"))
    assert weights is not None
    assert (torch.tensor(counts) * weights).sum().item() == pytest.approx(111, rel=1e-6)
    power = 1.0 if rule == "inverse" else 0.5
    assert (weights[1] / weights[0]).item() == pytest.approx(10**power, rel=1e-6)
    assert weights[3] == weights[2]
    assert torch.equal(class_weights(rule, [7, 7, 7], list("abc")), torch.ones(3))


def test_weights_from_a_file_follow_the_names(tmp_path: Path) -> None:
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"bees": 2.5, "ants": 1}))
    weights = class_weights(str(file), [1, 1], ["ants", "bees"])
    assert weights is not None
    assert weights.tolist() == [1.0, 2.5]
    assert class_weights("none", [1], ["a"]) is None
    assert class_weights(None, [1], ["a"]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"ants": 1}', "has no weight for class 'bees'"),
        ('{"ants": 1, "bees": 1, "wasps": 1}', "names unknown class 'wasps'"),
        ('{"ants": 1, "bees": "much"}', "the weight of class 'bees' is 'much'"),
        ('{"ants": 1, "bees": -1}', "must be a number from 0 to 1,000,000,000"),
        ('{"ants": 1, "bees": 1e300}', "the weight of class 'bees' is 1e.300; it must be a number from 0 to"),
        ('{"ants": 1, "bees": true}', "must be a number from 0 to 1,000,000,000"),
        ('{"ants": 1, "bees": NaN}', "weights.json: not valid JSON"),
        ('{"ants": 0, "bees": 0}', "every weight is 0"),
        ("[1, 2]", "not a list"),
        ("{", "weights.json: not valid JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "weights.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        class_weights(str(file), [1, 1], ["ants", "bees"])
    assert str(file) in str(caught.value)


def test_bad_settings_are_refused() -> None:
    for arguments, message in [
        ({"name": "hinge"}, "must be one of cross_entropy,"),
        ({"smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"gamma": -1.0}, "gamma of the focal loss"),
        ({"alpha": [0.0, 0.0]}, "alpha of the focal loss"),
    ]:
        with pytest.raises(UserError, match=message):
            build_loss(**arguments)
    with pytest.raises(UserError, match="3 numbers for 5 classes"):
        build_loss("focal", alpha=[1.0, 1.0, 1.0])(*_data())
    with pytest.raises(UserError, match="neither none, inverse or sqrt, nor a file"):
        class_weights("invers", [1], ["a"])
    with pytest.raises(UserError, match="no samples to count"):
        class_weights("inverse", [0, 0], ["a", "b"])


def test_the_recipes_know_every_loss() -> None:
    assert set(get_args(PhaseConfig.model_fields["loss"].annotation)) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_one_finite_float32_number_a_sample(name: str) -> None:
    """For any finite logits, in half precision too, and gradients likewise; a sample's number does not depend on its batch."""
    for scale in (0.0, 1.0, 1e4):
        logits, labels = _data()
        logits = (scale * logits).requires_grad_()
        losses, _ = build_loss(name)(logits, labels)
        assert (losses.shape, losses.dtype) == ((12,), torch.float32)
        assert torch.isfinite(losses).all()
        assert (losses >= 0).all()
        losses.sum().backward()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        alone, _ = build_loss(name)(logits[3:4], labels[3:4])
        torch.testing.assert_close(alone, losses[3:4])
        halves, _ = build_loss(name)(logits.bfloat16(), labels)
        assert halves.dtype == torch.float32
