"""A plan saved as a map and fed back is the same plan, whatever transforms it names."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_networks import net, state
from torch import nn
from transfer_networks import Axes, RandomNetwork, Tied, Tokens, Window, edit, random_plan, rename

from benchmarks.transfer_cases import Tokens as QueryBesideKeyValue
from dtl.checkpoint.transfer.adapt import TRANSFORMS, apply_transform, why_not
from dtl.checkpoint.transfer.apply import apply_plan, save_map
from dtl.checkpoint.transfer.plan import TransferPlan, plan_transfer
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.errors import UserError

State = dict[str, torch.Tensor]
Case = tuple[State, nn.Module, dict[str, Any]]


class Net(nn.Module):
    """Convolution, norm (perhaps), convolution, head."""

    def __init__(self, *, classes: int = 4, channels: int = 3, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        for word, width in (("qkv", 24),) if fused else (("query", 8), ("key", 8), ("value", 8)):
            self.add_module(word, nn.Linear(8, width))
        self.fc1, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).chunk(3, -1) if hasattr(self, "qkv") else (self.query(x), self.key(x), self.value(x))
        return self.head(self.fc1(sum(parts)))


class Patches(nn.Module):
    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch_embed, self.fc1, self.head = nn.Conv2d(3, 12, patch, patch), nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc1(self.patch_embed(x).mean((2, 3))))


class TokensApart(Tokens):
    """Without a position of the class token."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.pos_embed = nn.Parameter(torch.randn(1, (size // 8) ** 2, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.head((x + self.fc2(torch.relu(self.fc1(self.norm(x)))))[:, 0])


def dense(*, kernel: int, as_convolution: bool) -> nn.Sequential:
    """A layer over kernel x kernel features, as a convolution or as a linear layer behind a flatten."""
    layer = [nn.Conv2d(6, 10, kernel), nn.Flatten()] if as_convolution else [nn.Flatten(), nn.Linear(6 * kernel * kernel, 10)]
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.AdaptiveAvgPool2d(kernel), *layer, nn.ReLU(), nn.Linear(10, 3))


def channels_last(state: State) -> State:
    def turned(value: torch.Tensor) -> torch.Tensor:
        return value.permute(2, 3, 1, 0).contiguous() if value.dim() == 4 else value.T.contiguous()

    return {(n[:-6] + "kernel" if v.dim() > 1 else n): turned(v) if v.dim() > 1 else v for n, v in state.items()}


ROWS = {"keep_head": "rows", "source_classes": list("abcd"), "target_classes": ["d", "insect"], "head_rows": {"insect": ["a", "b"]}}
CASES: dict[str, Callable[[], Case]] = {
    "stem": lambda: (Net().state_dict(), Net(channels=1, classes=9), {}),
    "rows": lambda: (Net().state_dict(), Net(classes=2), ROWS),
    "fold": lambda: (Net().state_dict(), Net(norm=False), {"fold_norms": True, "fill": {"conv_bias": "zero"}}),
    "transpose": lambda: (channels_last(Net().state_dict()), Net(), {}),
    "transpose, gray": lambda: (channels_last(Net().state_dict()), Net(channels=1), {}),
    "split, kv": lambda: (QueryBesideKeyValue("fused").state_dict(), QueryBesideKeyValue("q and kv"), {}),
    "fuse": lambda: (Attention(fused=False).state_dict(), Attention(fused=True), {}),
    "split": lambda: (Attention(fused=True).state_dict(), Attention(fused=False), {}),
    "positions": lambda: (Tokens(32).state_dict(), Tokens(64), {}),
    "token": lambda: (Tokens(32).state_dict(), TokensApart(32), {}),
    "token, back": lambda: (TokensApart(32).state_dict(), Tokens(32), {}),
    "window": lambda: (Window(7).state_dict(), Window(12), {}),
    "axes": lambda: (Axes(7).state_dict(), Axes(14), {}),
    "patches": lambda: (Patches(8).state_dict(), Patches(16), {"by": "name"}),
    "squeeze": lambda: (dense(kernel=1, as_convolution=False).state_dict(), dense(kernel=1, as_convolution=True), {"assume_order": True}),
    "reshape": lambda: (dense(kernel=3, as_convolution=True).state_dict(), dense(kernel=3, as_convolution=False), {"assume_order": True}),
    "tied": lambda: (Tied().state_dict(), Tied(), {}),
}


def saved_and_fed_back(state: State, target: nn.Module, plan: TransferPlan, path: Path, options: dict[str, Any]) -> TransferPlan:
    save_map(plan, path)
    kept = {name: value for name, value in options.items() if name in ("fill", "on_ambiguous", "min_coverage", "fresh")}
    return plan_transfer(state, target, by="map", mapping=path, **kept)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_plan_and_the_same_values(case: str, suffix: str, tmp_path: Path) -> None:
    state, target, options = CASES[case]()
    # A tensor that stands under two names keeps one value: two are refused (test_apply).
    random = {value.data_ptr(): torch.rand_like(value) + 0.5 for value in state.values() if value.is_floating_point()}
    state = {name: random.get(value.data_ptr(), value) for name, value in state.items()}
    plan = plan_transfer(state, target, **options)
    assert plan.ok, plan.refusals
    again = saved_and_fed_back(state, target, plan, tmp_path / f"map{suffix}", options)
    assert again.ok, again.refusals
    assert again.digest == plan.digest
    assert again.head_rows == plan.head_rows
    torch.manual_seed(0)
    once = apply_plan(plan, read_weights(state), target)
    assert apply_plan(again, read_weights(state), target).checksum == once.checksum


def test_every_transform_is_among_the_cases() -> None:
    named = set()
    for case in CASES.values():
        state, target, options = case()
        named |= {outcome.transform for outcome in plan_transfer(state, target, **options).outcomes}
    assert named - {""} == set(TRANSFORMS)


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 20),
    edits=st.lists(st.sampled_from(["insert", "delete", "width", "classes"]), max_size=2),
    how=st.sampled_from(["keep", "wrap", "words"]),
)
def test_random_networks(tmp_path: Path, seed: int, edits: list[str], how: str) -> None:
    rng = random.Random(seed)
    ours = theirs = random_plan(rng)
    for what in edits:
        theirs = edit(theirs, what, rng)
    with torch.device("meta"):
        source, target = RandomNetwork(ours), RandomNetwork(theirs)
    state = {rename(name, how): value for name, value in source.state_dict().items()}
    options = {"on_ambiguous": "fresh", "min_coverage": 0.0, "fresh": ["*"]}
    plan = plan_transfer(state, target, **options)  # type: ignore[arg-type]
    if not plan.pairs:
        return
    again = saved_and_fed_back(state, target, plan, tmp_path / "map.yaml", options)
    assert again.refusals == ()
    assert again.pairs == plan.pairs
    assert [o.transform for o in again.outcomes if o.target] == [o.transform for o in plan.outcomes if o.target]


SHAPES: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]] = {
    "stem_channels": ([(8, 3, 3, 3)], (8, 5, 3, 3)),
    "squeeze": ([(8, 4)], (8, 4, 1, 1)),
    "reshape_kernel": ([(8, 18)], (8, 2, 3, 3)),
    "resize_position_embedding": ([(1, 17, 6)], (1, 26, 6)),
    "resize_relative_table": ([(25, 3)], (49, 3)),
    "resize_relative_axis": ([(13, 6)], (27, 6)),
    "add_position": ([(1, 1, 6), (1, 17, 6)], (1, 1, 6)),
    "resize_patches": ([(6, 3, 8, 8)], (6, 3, 16, 16)),
    "zero_position": ([(1, 16, 6)], (1, 26, 6)),
    "transpose_stem": ([(3, 2, 3, 8)], (8, 1, 3, 2)),
    "transpose_kernel": ([(3, 2, 4, 8)], (8, 4, 3, 2)),
    "fuse": ([(4, 6), (4, 6), (4, 6)], (12, 6)),
    "split_0_of_3": ([(12, 6)], (4, 6)),
    "split_1_of_3": ([(12, 6)], (4, 6)),
    "split_2_of_3": ([(12, 6)], (4, 6)),
    "split_1_to_2_of_3": ([(12, 6)], (8, 6)),
    "rows": ([(4, 6)], (2, 6)),
    "fold_norm_weight": ([(4, 3, 3, 3), (4,), (4,), (4,), (4,)], (4, 3, 3, 3)),
    "fold_norm_bias": ([(4, 3, 3, 3), (4,), (4,), (4,), (4,), (4,)], (4,)),
}
PICKS = ((3,), (0, 1))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_the_rules_allow_works_and_what_they_forbid_is_told_before(transform: str) -> None:
    have, want = SHAPES[transform]
    assert why_not(transform, have, want, picks=PICKS) is None
    assert tuple(apply_transform(transform, [torch.rand(shape) for shape in have], want, picks=PICKS).shape) == want
    wrong = [(have, (want[0] + 1, *want[1:])), ([*have[:-1], (*have[-1][:-1], have[-1][-1] + 7)], want), ([*have, *have], want)]
    for shapes, target in wrong:
        assert why_not(transform, shapes, target, picks=PICKS) is not None, (shapes, target)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"source": "conv2.weight", "transform": "squeeze"},
            r"squeeze adds and removes .*: fc.weight \[4, 8\] here, conv2.weight \[8, 6, 3, 3\] in the source",
        ),
        ({"source": "fc.weight", "transform": "rows", "rows": [0, 1, 2, 9]}, "rows selects row 9, but the source has 4 rows"),
        ({"source": "fc.weight", "transform": "rows", "rows": [0, 1]}, "rows was given 2 rows for a head of 4 outputs"),
        ({"source": ["conv1.weight", "fc.weight"]}, "fuse joins tensors along dimension 0"),
        ({"source": ["fc.weight", "fc.bias"], "transform": "fold_norm_weight"}, "fold_norm_weight takes a weight, a norm's"),
    ],
)
def test_a_transform_that_cannot_be_done_is_a_refusal(rule: dict[str, Any], message: str) -> None:
    plan = plan_transfer(Net().state_dict(), Net(), by="map", mapping={"conv*": "conv*", "bn1.*": "bn1.*", "fc.bias": "fc.bias", "fc.weight": rule})
    assert plan.pairs == {}
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(plan.refusals))


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_plan_saved_as_a_map_is_the_same_plan(tmp_path: Path, suffix: str) -> None:
    plan = plan_transfer(state(net(), "module.{}".format), net(classes=4, channels=1))
    save_map(plan, tmp_path / f"map{suffix}")
    assert "\nbn1.weight: module.bn1.weight\n" in (text := (tmp_path / f"map{suffix}").read_text()) or suffix == ".json", text
    again = plan_transfer(state(net(), "module.{}".format), net(classes=4, channels=1), by="map", mapping=tmp_path / f"map{suffix}")
    assert again.ok
    assert again.pairs == plan.pairs
    assert [o.transform for o in again.outcomes if o.target] == [o.transform for o in plan.outcomes if o.target]


@pytest.mark.parametrize(
    "rules",
    [
        {"*": "net.*"},
        {"{a}.{b}": "net.{a}.{b}", "{a}.{b}.{c}.{d}": "net.{a}.{b}.{c}.{d}", "{a}.{b}.{c}.{d}.{e}": "net.{a}.{b}.{c}.{d}.{e}"},
        {r"re:(.*)": r"net.\1"},
        {"net.*": "*"},
    ],
)
def test_patterns(rules: dict[str, str]) -> None:
    plan = plan_transfer(state(net(), "net.{}".format), net(), by="map", mapping=rules)
    assert plan.ok, plan.refusals
    assert len(plan.pairs) == len(net().state_dict())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*": "*", "conv9.weight": "conv1.weight"}, "map rule conv9.weight: conv1.weight: matches no tensor of this network"),
        ({"*": "*", "bn1.weight": "nothing"}, "needs nothing, which the source does not have"),
        ({"bn1.weight": "layer1.0.bn1.weight", "*": "*"}, "layer1.0.bn1.weight would be loaded into both"),
        (
            {"conv1.weight": "fc.weight"},
            r"the shapes differ, and the rule has no transform: conv1.weight \[8, 3, 3, 3\] here, fc.weight \[10, 12\] in the source",
        ),
    ],
)
def test_mistakes_in_maps_are_refusals(rules: dict[str, str], message: str) -> None:
    plan = plan_transfer(state(net()), net(), by="map", mapping=rules)
    assert plan.pairs == {}
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(plan.refusals))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "expected lines of `target: source`, found list"),
        ("a: {from: b}", "a: expected a source"),
        ("a: {source: b, transform: magic}", "unknown transform magic"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_in_map_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        plan_transfer(state(net()), net(), by="map", mapping=tmp_path / "m.yaml")
