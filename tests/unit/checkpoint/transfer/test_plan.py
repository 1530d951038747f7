"""Random networks, random edits, random names: what is loaded is true, always."""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_networks import net
from torch import nn
from transfer_networks import RandomNetwork, edit, random_plan, rename, truth

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer.plan import plan_transfer
from dtl.errors import UserError

EDITS = ("insert", "delete", "width", "classes", "permute")
NAMES = ("keep", "wrap", "words", "hash parts", "hash")
# The same examples at each run; DTL_EXAMPLES=N looks at that many new ones.
QUIET = settings(
    max_examples=int(os.environ.get("DTL_EXAMPLES", "40")),
    derandomize="DTL_EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def block_of(name: str) -> str:
    return ".".join(name.split(".")[:-2])


@QUIET
@given(
    seed=st.integers(0, 1 << 20),
    edits=st.lists(st.sampled_from(EDITS), max_size=3),
    how=st.sampled_from(NAMES),
    permuted=st.booleans(),
    alphabetical=st.booleans(),
)
def test_no_false_assignment(seed: int, edits: list[str], how: str, permuted: bool, alphabetical: bool) -> None:
    rng = random.Random(seed)
    ours = theirs = random_plan(rng)
    for what in edits:
        theirs = edit(theirs, what, rng)
    if permuted:
        ours = edit(ours, "permute", rng)
    with torch.device("meta"):
        source, target = RandomNetwork(ours), RandomNetwork(theirs)
        true = truth(ours, theirs, how)
    state = {rename(name, how): value for name, value in source.state_dict().items()}
    if alphabetical:
        state = dict(sorted(state.items()))
    plan = plan_transfer(state, target, min_coverage=0.0)
    wrong = {t: s for t, s in plan.pairs.items() if true.get(t) != s}
    if how not in ("keep", "wrap"):
        # Under new names a block that was taken out or changed and one put in that is as it was are one block, renamed: nothing
        # tells otherwise.
        gone = {block_of(s) for s in state if s not in true.values()}
        wrong = {t: s for t, s in wrong.items() if t in true or block_of(s) not in gone}
    assert wrong == {}
    # With names that tell the truth nearly all of it is found, whatever was put in, taken out or registered in another order.
    if how in ("keep", "wrap") and "width" not in edits:
        assert sum(plan.pairs.get(t) == s for t, s in true.items()) >= 0.95 * len(true)


@QUIET
@given(seed=st.integers(0, 1 << 20), how=st.sampled_from(NAMES), permuted=st.booleans())
def test_with_the_source_network_hashed_names_do_no_harm(seed: int, how: str, permuted: bool) -> None:
    rng = random.Random(seed)
    ours = random_plan(rng)
    theirs = edit(ours, "classes", rng)
    if permuted:
        theirs = edit(theirs, "permute", rng)
    with torch.device("meta"):
        source, target = RandomNetwork(ours), RandomNetwork(theirs)
        true = {t: s for t, s in truth(ours, theirs, how).items() if not t.endswith("num_batches_tracked")}
    state = {rename(name, how): value for name, value in source.state_dict().items()}
    plan = plan_transfer(state, target, source_model=source)
    floating = {t: s for t, s in plan.pairs.items() if not t.endswith("num_batches_tracked")}
    assert floating == true


def test_recall_where_blocks_are_put_in_and_taken_out() -> None:
    """Three of four blocks have a namesake here, and the alignment would rather pair four: names that all fit decide."""
    rng = random.Random(727000)
    ours = random_plan(rng)
    theirs = edit(edit(ours, "insert", rng), "delete", rng)
    with torch.device("meta"):
        source, target = RandomNetwork(ours), RandomNetwork(theirs)
    plan = plan_transfer(source.state_dict(), target)
    assert plan.pairs == truth(ours, theirs, "keep")


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("count", [4, 12])
def test_blocks_counted_from_another_number_are_not_those_of_the_same_name(first: int, count: int) -> None:
    """Twelve equal blocks, 0 to 11 here and 1 to 12 there: eleven names fit, and each of them is another block."""

    def numbered(start: int) -> nn.Sequential:
        blocks = [(f"block{start + n}", nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))) for n in range(count)]
        ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
        return nn.Sequential(OrderedDict([("stem", nn.Conv2d(3, 8, 3)), *blocks, ("pool", ends[0]), ("flat", ends[1]), ("fc", ends[2])]))

    source, target = numbered(first), numbered(1 - first)
    plan = plan_transfer(source.state_dict(), target)
    assert plan.pairs == dict(zip(target.state_dict(), source.state_dict()))


@pytest.mark.parametrize("seed", [1071, 1037, 239, 8724, 8444, 3363])
def test_a_new_name_beside_names_that_hold_is_not_guessed(seed: int) -> None:
    rng = random.Random(seed)
    ours = random_plan(rng)
    theirs = ours
    for what in ("insert", "delete", "width"):
        theirs = edit(theirs, what, rng)
    with torch.device("meta"):
        source, target = RandomNetwork(ours), RandomNetwork(theirs)
    true = truth(ours, theirs, "keep")
    plan = plan_transfer(source.state_dict(), target, min_coverage=0.0)
    assert {t: s for t, s in plan.pairs.items() if true.get(t) != s} == {}


def test_stages_of_one_and_two_equal_blocks_are_not_told_apart_by_counting() -> None:
    """One block and two there, two and one here, under hashed names in alphabetical order: a block may have moved either way."""
    rng = random.Random(235)
    ours = theirs = random_plan(rng)
    for what in ("insert", "classes", "delete"):
        theirs = edit(theirs, what, rng)
    with torch.device("meta"):
        source, target = RandomNetwork(ours), RandomNetwork(theirs)
    true = truth(ours, theirs, "hash parts")
    state = dict(sorted((rename(name, "hash parts"), value) for name, value in source.state_dict().items()))
    plan = plan_transfer(state, target, min_coverage=0.0)
    assert {t: s for t, s in plan.pairs.items() if true.get(t) != s} == {}


class _Shortcut(nn.Module):
    """A block whose shortcut has the shape of its first convolution, as in RegNet; named and registered as one library or the other does."""

    def __init__(self, fan_in: int, width: int, *, first: bool) -> None:
        super().__init__()
        inner = [("conv1", (fan_in, width, 1)), ("conv2", (width, width, 3)), ("conv3", (width, width, 5))]
        shortcut = [("downsample", (fan_in, width, 1))] if fan_in != width else []
        names = {"conv1": "f.a", "conv2": "f.b", "conv3": "f.c", "downsample": "proj"}
        self.words = {word: names[word].replace(".", "_") if first else word for word, _ in (*inner, *shortcut)}
        for word, (a, b, kernel) in (*shortcut, *inner) if first else (*inner, *shortcut):
            parts = OrderedDict([("conv", nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False)), ("bn", nn.BatchNorm2d(b))])
            self.add_module(self.words[word], nn.Sequential(*parts.values()) if first else nn.Sequential(parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for word in ("conv1", "conv2", "conv3"):
            y = self.get_submodule(self.words[word])(y)
        return y + (self.get_submodule(self.words["downsample"])(x) if "downsample" in self.words else x)


@pytest.mark.parametrize("alphabetical", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_shortcut_is_what_is_left_of_a_block_whose_other_layers_stand(first: bool, alphabetical: bool) -> None:
    def network(first: bool) -> nn.Sequential:
        blocks = [_Shortcut(8 if n == 0 else 12, 12, first=first) for n in range(3)] + [_Shortcut(12 if n == 0 else 20, 20, first=first) for n in range(2)]
        ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5)]
        return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, *ends)

    with torch.device("meta"):
        source, target = network(first), network(not first)
    state = source.state_dict()
    plan = plan_transfer(dict(sorted(state.items())) if alphabetical else state, target)
    words = {"proj": "downsample", "f_a": "conv1", "f_b": "conv2", "f_c": "conv3"} | {"downsample": "proj", "conv1": "f_a", "conv2": "f_b", "conv3": "f_c"}
    parts = {"conv": "0", "bn": "1", "0": "conv", "1": "bn"}

    def there(name: str) -> str:
        path = name.split(".")
        return name if len(path) == 2 else ".".join([path[0], words[path[1]], parts[path[2]], path[3]])

    assert {t: s for t, s in plan.pairs.items() if s != there(t)} == {}
    assert plan.ok, plan.refusals
    assert plan.coverage == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_ambiguous": "eror"}, r"on_ambiguous: must be 'error' or 'fresh' \(got 'eror'\)"),
        ({"keep_head": "maybe"}, r"keep_head: must be 'auto' or 'rows'; or must be true or false \(got 'maybe'\)"),
        ({"fill": {"conv_bias": "ones"}}, r"fill\.conv_bias: must be 'keep' or 'zero' \(got 'ones'\)"),
        ({"fill": {"bias": "zero"}}, r"fill\.bias: "),
        ({"fill": "zero"}, r"fill: "),
        ({"ignore": "decoder.*"}, r"ignore: must be a list: \['decoder\.\*'\]"),
        ({"heads": "fc"}, r"heads: must be a list: \['fc'\]"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    for call in (lambda: plan_transfer(net().state_dict(), net(), **options), lambda: load_pretrained(net(), net().state_dict(), **options)):
        with pytest.raises(UserError, match=f"^{message}"):
            call()
