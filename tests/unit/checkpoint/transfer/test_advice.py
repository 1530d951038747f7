"""Advice is printed where planning again with it shows that it helps, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_networks import net, state
from torch import nn

from benchmarks.transfer_cases import Equal, Tokens, advice, renamed, trained
from dtl.checkpoint import load_pretrained, plan_transfer
from dtl.checkpoint.transfer.advice import Advice, Attempt, Refusal, message, under
from dtl.checkpoint.transfer.apply import save_map
from dtl.errors import UserError


@pytest.mark.parametrize(
    ("share", "least", "shown"),
    [
        (0.42, 0.6, ("42%", "60%")),
        (0.5976, 0.6, ("59.8%", "60.0%")),
        (0.59999, 0.6, ("59.999%", "60.000%")),
        (0.0, 1.0, ("0%", "100%")),
    ],
)
def test_a_share_is_never_under_itself(share: float, least: float, shown: tuple[str, str]) -> None:
    assert under(share, least) == shown


def attempts(*good: Mapping[str, Any]) -> Any:
    """Plans that succeed with these options or lines alone; else the next refusal asks for `fresh`."""
    following = Refusal("random", (Advice("If new", {"fresh": ["x.*"]}),))

    def again(options: Mapping[str, Any], lines: Mapping[str, Any]) -> Attempt:
        return Attempt(() if {**options, **lines} in good else (following,), dict(lines))

    return again


A, B = Advice("If so", {"assume_order": True}), Advice("If it is the same layer", line="a.weight: b.weight")
C = Advice("If it is the same layer", line="a.weight: c.weight")


def test_only_what_helps_is_printed() -> None:
    assert message(Refusal("no", (A,)), attempts({"assume_order": True})) == "no. If so, set assume_order: true"
    assert message(Refusal("no", (A,)), attempts({"assume_order": True, "fresh": ["x.*"]})) == "no. If so, set assume_order: true, fresh: ['x.*']"
    assert message(Refusal("no", (A,)), attempts({"other": 1})) == "no"
    both = attempts({"assume_order": True}, {"a.weight": "b.weight"})
    assert message(Refusal("no", (B, A)), both) == "no. If so, set assume_order: true. If it is the same layer, write into a map: a.weight: b.weight"


def test_of_two_lines_that_fit_equally_well_none_is_recommended() -> None:
    assert message(Refusal("no", (B, C)), attempts({"a.weight": "b.weight"})) == "no. If it is the same layer, write into a map: a.weight: b.weight"
    assert message(Refusal("no", (B, C)), attempts({"a.weight": "b.weight"}, {"a.weight": "c.weight"})) == "no"


def test_words_that_say_nothing_lead_to_the_order_and_to_the_network() -> None:
    source, target = trained(Equal(["alpha", "beta", "gamma", "delta"])), Equal(["first", "second", "third", "fourth"])
    refusal = plan_transfer(source.state_dict(), target).refusals[0]
    assert "source_arch" in refusal
    assert advice(refusal) == {"assume_order": True}
    load_pretrained(target, source.state_dict(), assume_order=True)


def test_a_renamed_layer_among_kept_names_has_its_line() -> None:
    source = renamed(trained(Tokens()).state_dict(), (r"blocks\.1\.fc1", "blocks.1.dense"))
    assert advice(plan_transfer(source, Tokens()).refusals[0]) == {"mapping": {"blocks.1.fc1.weight": "blocks.1.dense.weight"}}


def test_a_norm_of_another_kind_is_no_line_of_a_map() -> None:
    target = net()
    target.bn1 = nn.GroupNorm(2, 8, device="meta")  # type: ignore[assignment]
    assert advice(plan_transfer(state(net()), target).refusals[0]) == {"fresh": ["bn1.*"]}


def test_a_refusal_keeps_what_it_found(tmp_path: Path) -> None:
    source = {name: value for name, value in state(net()).items() if not name.startswith("layer2")}
    plan = plan_transfer(source, net(), min_coverage=0.9)
    assert plan.pairs == {}
    found = {o.target: o.alternatives for o in plan.outcomes if o.target and o.reason.startswith("not loaded, because the transfer was refused")}
    assert found["layer1.0.conv1.weight"] == ("layer1.0.conv1.weight",)
    save_map(plan, tmp_path / "map.yaml")
    with pytest.raises(UserError, match="its lines are comments: take the # from those that are right"):
        plan_transfer(source, net(), by="map", mapping=tmp_path / "map.yaml")
    lines = (tmp_path / "map.yaml").read_text().splitlines()
    (tmp_path / "map.yaml").write_text("\n".join(line.removeprefix("# ") for line in lines if line.startswith("# ") and not line.endswith(".")))
    again = plan_transfer(source, net(), by="map", mapping=tmp_path / "map.yaml", min_coverage=0.4, fresh=["layer2.*"])
    assert again.ok, again.refusals
    assert set(again.pairs) == set(found)
