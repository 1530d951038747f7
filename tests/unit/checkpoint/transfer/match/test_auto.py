"""Planning by auto: what is certain, what is flagged, what is refused; the same plan everywhere."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import Block, Net, hashed, net, right, state
from torch import nn
from transfer_networks import RandomNetwork, edit, random_plan
from transfer_networks import rename as renamed

from dtl.checkpoint.transfer.match import auto
from dtl.checkpoint.transfer.plan import plan_transfer
from dtl.errors import UserError


def test_hashed_names_are_order_only_and_say_so() -> None:
    plan = plan_transfer(state(net(), hashed), net())
    assert plan.pairs == {}
    assert "assume_order" in plan.refusals[0]
    assumed = plan_transfer(state(net(), hashed), net(), assume_order=True)
    right(assumed, hashed)
    assert assumed.ok
    assert assumed.coverage == 1.0
    known = plan_transfer(state(net(), hashed), net(), source_model=net())
    right(known, hashed)
    assert known.ok


def test_an_identical_block_inserted_under_hashed_names_is_never_guessed() -> None:
    plan = plan_transfer(state(net(), hashed), net((3, 2)), assume_order=True, on_ambiguous="fresh", min_coverage=0.1)
    assert all(not name.startswith(("layer1.1", "layer1.2", "layer1.0.conv2")) for name in plan.pairs)
    assert any(name.startswith("layer1.1") for name in plan.flagged)
    right_outside = {t: s for t, s in plan.pairs.items() if not t.startswith("layer1")}
    assert all(s == hashed(t) for t, s in right_outside.items())
    assert len(right_outside) > 20


def test_renamed_words_and_numbers_from_one() -> None:
    def other(name: str) -> str:
        for old, new in (("layer1", "stages.0"), ("layer2", "stages.1"), ("conv1", "conv.0"), ("conv2", "conv.1"), ("bn1", "norms.0"), ("bn2", "norms.1")):
            name = name.replace(old, new)
        return name

    plan = plan_transfer(state(net(), other), net())
    right(plan, other)
    assert plan.ok
    assert plan.coverage == 1.0
    sorted_names = plan_transfer(dict(sorted(state(net(), other).items())), net())
    right(sorted_names, other)
    assert sorted_names.coverage == 1.0


def test_swapped_registration_in_the_source_is_not_believed() -> None:
    class Swapped(Block):
        def __init__(self, fan_in: int, width: int) -> None:
            super().__init__(fan_in, width)
            first, norm = self.conv1, self.bn1
            del self.conv1, self.bn1
            self.conv1, self.bn1 = first, norm

    with torch.device("meta"):
        source = Net()
        source.layer1 = nn.Sequential(Swapped(8, 8), Swapped(8, 8))
    for change in (hashed, str):
        plan = plan_transfer(state(source, change), net())
        assert all(s == change(t) for t, s in plan.pairs.items())
    assert plan_transfer(state(source), net()).coverage == 1.0


def test_every_flag_has_a_reason_and_a_line_that_settles_it() -> None:
    source, target = state(net(), hashed), net((3, 2))
    options: dict[str, Any] = {"assume_order": True, "on_ambiguous": "fresh", "min_coverage": 0.1}
    before = plan_transfer(source, target, **options)
    name = "layer1.1.conv1.weight"
    assert name in before.flagged
    settled = plan_transfer(source, target, mapping={name: hashed(name)}, **options)
    assert settled.pairs[name] == hashed(name)
    assert next(o.evidence for o in settled.outcomes if o.target == name) == "map"
    roles = {hashed(n): n.rpartition(".")[2] for n in net().state_dict()}
    for flagged, alternatives in before.flagged.items():
        assert {roles[other] for other in alternatives} <= {flagged.rpartition(".")[2]}, "an alternative of a weight is a weight"


def test_the_line_in_a_refusal_settles_it() -> None:
    import yaml

    source, target = dict(sorted(state(net(), lambda n: n.replace("layer1", "a").replace("layer2", "b").replace("conv", "w")).items())), net((3, 2))
    plan = plan_transfer(source, target, min_coverage=0.1)
    line = plan.refusals[0].split("If it is the same layer, write into a map: ")[1]
    ((name, other),) = yaml.safe_load(line).items()
    settled = plan_transfer(source, target, mapping={name: other}, min_coverage=0.1, on_ambiguous="fresh")
    assert settled.pairs[name] == other


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match=r"by: must be 'auto', 'name', 'order', 'strict' or 'map' \(got 'guess'\)"):
        plan_transfer(state(net()), net(), by="guess")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="by: map needs a map"):
        plan_transfer(state(net()), net(), by="map")
    with pytest.raises(UserError, match="heads: the network has no layer called top"):
        plan_transfer(state(net()), net(), heads=["top"])
    with pytest.raises(UserError, match="source_model: its tensors match those of the source neither by name"):
        plan_transfer(state(net()), net(), source_model=net((1, 1)))


# --- the same plan everywhere ---


_DIGEST = """
import sys; sys.path.insert(0, {folder!r})
from small_networks import *
from dtl.checkpoint import plan_transfer
plans = [plan_transfer(state(Net(), c), Net((3, 2), classes=5), on_ambiguous="fresh", min_coverage=0.1, assume_order=a)
         for c in (str, hashed, lambda n: n.replace("layer", "stage")) for a in (False, True)]
print(" ".join(p.digest + str(p.flagged)[:200].replace(" ", "") for p in plans))
"""


def test_plans_do_not_depend_on_hashing() -> None:
    folder = str(Path(__file__).parents[4])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _DIGEST.format(folder=folder)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(5)
    ]
    outputs = {run.communicate(timeout=120)[0] for run in runs}
    assert len(outputs) == 1
    assert next(iter(outputs)).strip()


def test_a_norm_does_not_stay_with_a_layer_that_changed() -> None:
    target = net()
    with torch.device("meta"):
        target.conv1 = nn.Conv2d(3, 8, 5, padding=2, bias=False)
    for by in ("name", "auto"):
        plan = plan_transfer(state(net()), target, by=by, fresh=["conv1.*", "bn1.*"])  # type: ignore[arg-type]
        assert plan.ok
        assert {"conv1.weight", "bn1.weight", "bn1.running_mean"} <= set(plan.fresh)
        assert next(o.reason for o in plan.outcomes if o.target == "bn1.weight") == "the layer before it, conv1, has no source"


@pytest.mark.parametrize("how", ["keep", "words", "hash parts"])
@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_views_and_of_their_claims_does_not_matter(seed: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    ours = theirs = random_plan(rng)
    for what in rng.sample(["insert", "delete", "width", "classes", "permute"], 2):
        theirs = edit(theirs, what, rng)
    with torch.device("meta"):
        source, target = RandomNetwork(ours), RandomNetwork(theirs)
    weights = {renamed(name, how): value for name, value in source.state_dict().items()}

    def plans() -> list[Any]:
        found = [plan_transfer(weights, target, min_coverage=0.0, assume_order=assume, ordered=order) for assume in (False, True) for order in (False, True)]
        if how == "keep":
            found.append(plan_transfer(weights, target, min_coverage=0.0, source_model=source))
        return [(plan.digest, plan.outcomes, plan.refusals) for plan in found]

    expected = plans()

    class Shuffled(auto.Arbiter):
        def __init__(self, case: auto.Case, alignment: auto.Alignment, names: auto.Names, views: list[auto.View]) -> None:
            rng.shuffle(views)
            super().__init__(case, alignment, names, views)

        def _accept(self, claims: Iterable[auto.Claim]) -> bool:
            claims = list(claims)
            rng.shuffle(claims)
            return super()._accept(claims)

    monkeypatch.setattr(auto, "Arbiter", Shuffled)
    for _ in range(3):
        assert plans() == expected
