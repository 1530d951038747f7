"""The report, for people and for machines."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
import torch
from transfer_networks import TwoConvolutions as Net

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer.apply import fold
from dtl.checkpoint.transfer.verify import randomise
from dtl.errors import TransferRefused


@pytest.fixture
def source() -> Net:
    model = Net()
    randomise(model)
    return model.eval()


def test_the_report_is_for_people_and_for_machines(source: Net, tmp_path: Path) -> None:
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    report = load_pretrained(Net(classes=9), tmp_path / "w.pth")
    text = str(report)
    assert "coverage 100.0% of all layers, norms and tables, 11.1% of all parameters newly initialised" in text
    assert "from 'state_dict'" in text
    assert "conv{1,2}.weight" in text
    assert "head fc.{weight,bias}: fresh, head: 9 outputs here, 4 in the source" in text
    report.to_json(tmp_path / "transfer.json")
    data = json.loads((tmp_path / "transfer.json").read_text())
    assert data["coverage"] == 1.0
    assert data["sha256"] == report.sha256
    assert len(data["outcomes"]) == len(Net().state_dict()) + 2
    assert {o["outcome"] for o in data["outcomes"]} == {"loaded", "fresh", "unused"}
    assert data["totals"]["loaded (name)"]["tensors"] == 12


def test_a_notebook_shows_a_table_and_a_debugger_one_line(source: Net) -> None:
    model, state = Net(classes=9), source.state_dict()
    state["<b>other</b>"] = torch.zeros(3)
    report = load_pretrained(model, state, on_ambiguous="fresh")
    assert repr(report).startswith("<TransferReport from a dict: coverage 100.0%, ")
    assert "\n" not in repr(report)
    assert len(repr(report)) < 200
    shown = report._repr_html_()
    assert "<b>" not in shown
    plain = html.unescape(re.sub(r"<[^>]*>", " ", shown))
    data = report.to_dict()
    for words in (*data["lines"], *(cell for row in data["table"] for cell in row)):
        assert " ".join(words.split()) in " ".join(plain.split())
        assert words in str(report)


def test_a_refusal_shows_the_reason_first_and_the_table(source: Net) -> None:
    with pytest.raises(TransferRefused) as refused:
        load_pretrained(Net(), {"conv1.weight": source.conv1.weight})
    first, *rest = str(refused.value).splitlines()
    assert "refused: coverage" in first
    assert "the first layer without a source is conv2 [8, 6, 3, 3]" in first
    assert any(line.startswith("fresh") for line in rest)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.weight", "a.bias"], "a.{weight,bias}"),
        ([f"layer{s}.{b}.conv{c}.weight" for s in range(1, 5) for b in (0, 1) for c in (1, 2)], "layer{1...4}.{0,1}.conv{1,2}.weight"),
        (["cls_token"], "cls_token"),
        ([], ""),
    ],
)
def test_folding(names: list[str], folded: str) -> None:
    assert fold(names) == folded
