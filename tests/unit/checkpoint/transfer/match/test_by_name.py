"""Planning by names: prefixes, other heads, names that mean other layers, norms, names of other libraries."""

from __future__ import annotations

from collections import OrderedDict

import torch
from small_networks import net, right, state
from torch import nn

from dtl.checkpoint.transfer.plan import plan_transfer


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
    assert "conv1.weight [8, 3, 3, 3] here, conv1.weight [8, 3, 3, 5] in the source" in plan.refusals[0]


def test_low_coverage_is_refused() -> None:
    half = {name: value for name, value in state(net()).items() if not name.startswith("layer2")}
    plan = plan_transfer(half, net())
    assert plan.pairs == {}
    assert "below min_coverage 60%" in plan.refusals[0]
    plan = plan_transfer(half, net(), min_coverage=0.4)
    assert plan.refusals[0].endswith("set fresh: ['layer2.*']")
    assert plan_transfer(half, net(), min_coverage=0.4, fresh=["layer2.*"]).ok


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
    assert plan.refusals[0].startswith("besides the head 40 tensors would stay random, and loaded layers follow: ")
    assert "(bn1: the source has no running_mean and running_var for it" in plan.refusals[0]
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
    assert "2.weight [8, 8, 5, 5] here, 2.weight [12, 8, 3, 3] in the source; indices may have shifted" in by_name.refusals[0]
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
