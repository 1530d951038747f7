"""Planning: names, strict order, alignment with gaps, maps; what is certain, what is flagged, what is refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import Block, Net, hashed, net, right, state
from torch import nn
from transfer_networks import RandomNetwork, edit, random_plan
from transfer_networks import rename as renamed

from dtl.checkpoint.transfer.layers.dataflow import trace_dataflow
from dtl.checkpoint.transfer.layers.layer import TensorSpec, layers_of, specs_of, strip_wrappers
from dtl.checkpoint.transfer.match import auto
from dtl.checkpoint.transfer.match.alignment import IMPOSSIBLE, align
from dtl.checkpoint.transfer.match.by_name import rename
from dtl.checkpoint.transfer.match.evidence import likeness
from dtl.checkpoint.transfer.plan import plan_transfer
from dtl.checkpoint.transfer.report import save_map
from dtl.errors import UserError

# --- the parts ---


def test_layers_behind_names_and_behind_shapes() -> None:
    named = layers_of(specs_of(net().state_dict()))
    flat = layers_of([TensorSpec(hashed(e.name), e.shape, e.family) for e in specs_of(net().state_dict())])
    assert [(u.kind, u.shape) for u in named] == [(u.kind, u.shape) for u in flat]
    assert [u.kind for u in named[:4]] == ["conv", "bn", "conv", "bn"]
    assert list(named[1].roles) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def brute_force(scores: np.ndarray[Any, Any]) -> float:
    from functools import lru_cache

    @lru_cache(None)
    def best(i: int, j: int, gap: str) -> float:
        if i == scores.shape[0] and j == scores.shape[1]:
            return 0.0
        options = []
        if i < scores.shape[0] and j < scores.shape[1]:
            options.append(scores[i, j] + best(i + 1, j + 1, ""))
        if i < scores.shape[0]:
            options.append(-(0.02 if gap == "s" else 0.6) + best(i + 1, j, "s"))
        if j < scores.shape[1]:
            options.append(-(0.02 if gap == "t" else 0.6) + best(i, j + 1, "t"))
        return max(options)

    return best(0, 0, "")


@pytest.mark.parametrize("seed", range(8))
def test_alignment_equals_brute_force_and_knows_every_alternative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.choice([IMPOSSIBLE, 1.0, 2.0], size=(rng.integers(1, 7), rng.integers(1, 7)))
    found = align(scores)
    assert found.best == pytest.approx(brute_force(scores))
    for (i, j), through in np.ndenumerate(found.through):
        if scores[i, j] > 0:
            forced = scores.copy()
            forced[i, j] += 100
            assert through == pytest.approx(brute_force(forced) - 100)
    for j, alone in enumerate(found.skips_target):
        without = scores.copy()
        without[:, j] = IMPOSSIBLE
        assert alone == pytest.approx(brute_force(without))


def test_wrappers_prefixes_and_likeness() -> None:
    assert strip_wrappers("module._orig_mod.layer1._fsdp_wrapped_module.conv.weight") == "layer1.conv.weight"
    assert likeness("layer1.0.bn1", "layer1.0.norm1") == 1.0
    assert likeness("conv1", "conv2") == 0.5
    target = specs_of(net().state_dict())
    for prefix in ("backbone.", "model.encoder.", "module.net."):
        source = [TensorSpec(prefix + e.name, e.shape, e.family) for e in target]
        assert all(rename(source, target).renamed[prefix + e.name] == e.name for e in target)


def test_dataflow_is_the_order_of_use() -> None:
    flow = trace_dataflow(net())
    assert flow is not None
    assert flow.order[0] == "conv1.weight"
    assert flow.order.index("layer2.0.shortcut.0.weight") > flow.order.index("layer2.0.bn2.weight")
    assert flow.feeds["layer2.0.bn1.weight"] == {"layer2.0.conv1.weight"}
    real = Net()
    before = {name: value.clone() for name, value in real.state_dict().items()}
    assert trace_dataflow(real) == flow
    assert real.training
    assert all(torch.equal(value, before[name]) for name, value in real.state_dict().items())


# --- by name ---


def test_by_name_with_prefix_and_another_head() -> None:
    plan = plan_transfer(state(net(), "module.backbone.{}".format), net(classes=3), by="name")
    right(plan, "module.backbone.{}".format)
    assert plan.ok
    assert plan.coverage == 1.0
    assert plan.fresh == ("fc.weight", "fc.bias")
    assert [o.reason for o in plan.outcomes if o.target == "fc.weight"] == ["head: 3 outputs here, 10 in the source"]


def test_names_of_another_network_are_refused_with_the_first_clash() -> None:
    other = state(net())
    shuffled = {name: torch.empty((*value.shape[:-1], 5), device="meta") if value.dim() == 4 else value for name, value in other.items()}
    plan = plan_transfer(shuffled, net(), by="name")
    assert plan.pairs == {}
    assert "conv1.weight [8, 3, 3, 3] against conv1.weight [8, 3, 3, 5]" in plan.refusals[0]


def test_low_coverage_is_refused() -> None:
    half = {name: value for name, value in state(net()).items() if not name.startswith("layer2")}
    plan = plan_transfer(half, net())
    assert plan.pairs == {}
    assert "under min_coverage 60%" in plan.refusals[0]
    assert plan_transfer(half, net(), min_coverage=0.4).ok


def test_a_norm_without_statistics_is_not_loaded() -> None:
    source = {name: value for name, value in state(net()).items() if name != "bn1.running_var"}
    plan = plan_transfer(source, net())
    assert "a norm without its statistics is not loaded" in plan.refusals[0]
    fresh = plan_transfer(source, net(), on_ambiguous="fresh")
    assert fresh.ok
    assert {"bn1.weight", "bn1.running_mean"} <= set(fresh.fresh)


def test_norms_of_another_kind_are_flagged_and_never_loaded() -> None:
    target = net()
    target.bn1 = nn.GroupNorm(2, 8, device="meta")  # type: ignore[assignment]
    for by in ("name", "auto"):
        plan = plan_transfer(state(net()), target, by=by)  # type: ignore[arg-type]
        assert set(plan.flagged) == {"bn1.weight", "bn1.bias"}
        assert "the kind of norm changed" in plan.refusals[0]


def test_a_file_without_any_statistics_says_so() -> None:
    source = {name: value for name, value in state(net()).items() if "running" not in name and "num_batches" not in name}
    plan = plan_transfer(source, net())
    assert "bn1.weight is not decided: the source has no statistics for it (running_mean, running_var)" in plan.refusals[0]
    assert not {name for name in plan.pairs if "bn" in name}


def test_shifted_numbers_are_noticed() -> None:
    """A convolution put into a Sequential: names fit, shapes do not, and where they do the layer is another."""

    def sequence(*extra: nn.Module) -> nn.Sequential:
        widths = [(3, 8), (8, 8), (8, 12), (12, 12), (12, 16)]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in widths]
        return nn.Sequential(*layers[:2], *extra, *layers[2:], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    with torch.device("meta"):
        source, target = sequence(), sequence(nn.Conv2d(8, 8, 5, padding=2))
    by_name = plan_transfer(source.state_dict(), target, by="name")
    assert by_name.pairs == {}
    assert "2.weight [8, 8, 5, 5] against 2.weight [12, 8, 3, 3]; indices may have shifted" in by_name.refusals[0]
    plan = plan_transfer(source.state_dict(), target, min_coverage=0.5)
    moved = {f"{n + 1}.{role}": f"{n}.{role}" for n in (2, 3, 4) for role in ("weight", "bias")}
    assert {t: s for t, s in plan.pairs.items() if t in moved} == moved
    assert "2.weight" in plan.fresh


def test_legacy_densenet_names() -> None:
    def layer() -> nn.Sequential:
        norms = [(f"norm{n}", nn.BatchNorm2d(8)) for n in (1, 2)]
        return nn.Sequential(OrderedDict([norms[0], ("conv1", nn.Conv2d(8, 8, 1)), norms[1], ("conv2", nn.Conv2d(8, 8, 3, padding=1))]))

    with torch.device("meta"):
        target = nn.Sequential(OrderedDict([(f"denselayer{number}", layer()) for number in (1, 2, 3)]))

    def legacy(name: str) -> str:
        return name.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1", "conv.1").replace("conv2", "conv.2")

    old = {legacy(name): value for name, value in target.state_dict().items() if "num_batches" not in name}
    plan = plan_transfer(old, target)
    assert plan.ok
    right(plan, legacy)


def test_names_of_detectron2() -> None:
    """A norm inside its convolution, frozen norms without counters, stages counted from 2."""
    import re

    def detectron(name: str) -> str:
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name).replace("shortcut.0.", "shortcut.").replace("shortcut.1.", "shortcut.norm.")
        name = re.sub(r"layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        return "backbone.bottom_up." + (name if name.startswith("res") else f"stem.{name}")

    source = {detectron(n): v for n, v in state(net()).items() if "num_batches" not in n and not n.startswith("fc.")}
    plan = plan_transfer(source, net())
    assert plan.ok, plan.refusals
    assert plan.coverage == 1.0
    right(plan, detectron)


def test_rival_prefixes_are_refused_and_can_be_chosen() -> None:
    source = state(net(), "encoder_q.{}".format) | state(net(), "encoder_k.{}".format)
    plan = plan_transfer(source, net())
    assert plan.pairs == {}
    assert "encoder_k." in plan.refusals[0]
    assert "encoder_q." in plan.refusals[0]
    right(plan_transfer(source, net(), prefix="encoder_k."), "encoder_k.{}".format)


def test_old_files_without_counters_and_tensorflow_words() -> None:
    old = {name: value for name, value in state(net()).items() if "num_batches" not in name}
    plan = plan_transfer(old, net())
    assert plan.ok
    assert plan.count("filled") == sum("num_batches" in name for name in net().state_dict())
    words = {"bn": {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}}

    def tensorflow(name: str) -> str:
        path, _, word = name.rpartition(".")
        norm = "bn" in path or path.endswith("shortcut.1")
        return f"{path}.{words['bn'].get(word, word) if norm else word}"

    right(plan_transfer(state(net(), tensorflow), net()), tensorflow)


# --- by order ---


def test_strict_order_takes_equal_sequences_whatever_the_names() -> None:
    for source, target in ((net(), net(classes=3)), (net(classes=3), net())):
        plan = plan_transfer(state(source, hashed), target, by="order")
        right(plan, hashed)
        assert plan.ok
        assert plan.view == "strict order"
        assert plan.fresh == ("fc.weight", "fc.bias")
    headless = {hashed(n): v for n, v in net().state_dict().items() if not n.startswith("fc.")}
    assert plan_transfer(headless, net(), by="order").fresh == ("fc.weight", "fc.bias")


@pytest.mark.parametrize("by", ["order", "strict"])
def test_order_is_refused_for_sorted_names(by: Any) -> None:
    plan = plan_transfer(dict(sorted(state(net()).items())), net(), by=by)
    assert plan.pairs == {}
    assert f"by: {by} needs the order" in plan.refusals[0]
    assert "safetensors keeps no order" in plan.refusals[0]


def test_strict_takes_equal_sequences_or_nothing() -> None:
    right(plan_transfer(state(net(), hashed), net(classes=3), by="strict"), hashed)
    plan = plan_transfer(state(net(), hashed), net((3, 2)), by="strict")
    assert plan.pairs == {}
    assert "the sequences of shapes differ (50 tensors against 60): layer1.2.conv1.weight [8, 8, 3, 3] against" in plan.refusals[0]


def test_order_aligns_with_gaps() -> None:
    class Deeper(Net):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.extra = self.bn1, nn.Conv2d(8, 8, 5, padding=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.extra(torch.relu(self.bn1(self.conv1(x))))
            return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))

    with torch.device("meta"):
        target = Deeper()
    plan = plan_transfer(state(net(), hashed), target, by="order")
    right(plan, hashed)
    assert set(plan.fresh) == {"extra.weight", "extra.bias"}
    assert plan.coverage > 0.8


# --- auto ---


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
    line = plan.refusals[0].split("a map settles it: ")[1]
    ((name, other),) = yaml.safe_load(line).items()
    settled = plan_transfer(source, target, mapping={name: other}, min_coverage=0.1, on_ambiguous="fresh")
    assert settled.pairs[name] == other


# --- maps ---


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
        ({"*": "*", "conv9.weight": "conv1.weight"}, "map rule conv9.weight: conv1.weight matches no name"),
        ({"*": "*", "bn1.weight": "nothing"}, "asks for nothing"),
        ({"bn1.weight": "layer1.0.bn1.weight", "*": "*"}, "layer1.0.bn1.weight would go to both"),
        ({"conv1.weight": "fc.weight"}, r"shapes differ and no transform is named: conv1.weight \[8, 3, 3, 3\] against fc.weight \[10, 12\]"),
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
        ("a: {source: b, transform: magic}", "no transform called magic"),
        ("a: [", "not readable as YAML"),
    ],
)
def test_mistakes_in_map_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        plan_transfer(state(net()), net(), by="map", mapping=tmp_path / "m.yaml")


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match=r"by: Input should be 'auto', 'name', 'order', 'strict' or 'map' \(got 'guess'\)"):
        plan_transfer(state(net()), net(), by="guess")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="by: map needs a map"):
        plan_transfer(state(net()), net(), by="map")
    with pytest.raises(UserError, match="heads: the network has no layer called top"):
        plan_transfer(state(net()), net(), heads=["top"])
    with pytest.raises(UserError, match="source_model: its tensors are not those of the source"):
        plan_transfer(state(net()), net(), source_model=net((1, 1)))


# --- the same plan everywhere ---


_DIGEST = """
import sys; sys.path.insert(0, {folder!r})
from small_networks import *
from dtl.checkpoint import plan_transfer
plans = [plan_transfer(state(net(), c), net((3, 2), classes=5), on_ambiguous="fresh", min_coverage=0.1, assume_order=a)
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
        plan = plan_transfer(state(net()), target, by=by)  # type: ignore[arg-type]
        assert plan.ok
        assert {"conv1.weight", "bn1.weight", "bn1.running_mean"} <= set(plan.fresh)
        assert next(o.reason for o in plan.outcomes if o.target == "bn1.weight") == "its layer conv1 has no source"


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
