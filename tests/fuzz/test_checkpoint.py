"""Any checkpoint on the disk is whole, or skipped with a line; any state.json is one of a run, or one line."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from json_mutations import attempt, mutated_bytes, mutated_json

from dtl.checkpoint.resume.resume import StoredState
from dtl.checkpoint.resume.state import OptimizerFacts, TrainState, load_optimizer, optimizer_tensors
from dtl.checkpoint.resume.store import CheckpointStore
from dtl.config.models import CheckpointConfig


def network() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    module = torch.nn.Linear(2, 2)
    group = {"params": list(module.parameters()), "names": ["weight", "bias"]}
    optimizer = torch.optim.SGD([group], lr=0.1, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return module, optimizer


MODULE, OPTIMIZER = network()
TENSORS, PLAIN = optimizer_tensors(OPTIMIZER)
STATE: dict[str, Any] = {
    "train": TrainState(step=3, dataset_ids={"train": "ab", "val": "cd"}).to_json(),
    "config": {"data": {"train": "digits"}},
    "precision": "no",
    "device": "cpu",
    "transforms": {"train": 1},
    "plan": 1,
    "optimizer": PLAIN,
    "scaler": None,
    "ema_updates": None,
}
FOLDER = Path(tempfile.mkdtemp(prefix="dtl-fuzz-")) / "checkpoints"


def saved() -> Path:
    shutil.rmtree(FOLDER, ignore_errors=True)
    store = CheckpointStore(FOLDER, CheckpointConfig(keep=2), log=lambda line: None)
    store.save(3, {"model": dict(MODULE.state_dict()), "optimizer": TENSORS}, STATE, wait=True)
    return FOLDER / "step-00000003"


def newest() -> Any:
    return attempt(lambda: CheckpointStore(FOLDER, CheckpointConfig(), log=lambda line: None).newest())[0]


MANIFEST = json.loads((saved() / "manifest.json").read_text())


@settings(max_examples=100, deadline=None)
@given(mutated_json(MANIFEST))
def test_a_changed_manifest_of_a_checkpoint(text: bytes) -> None:
    (FOLDER / "step-00000003/manifest.json").write_bytes(text)
    found = newest()
    if found is not None:
        for group in found.groups:
            tensors, refusal = attempt(partial(found.tensors, group))
            assert tensors is not None or "is damaged" in refusal
    assert sorted(path.name for path in FOLDER.parent.iterdir()) == ["checkpoints"]
    assert [path.name for path in FOLDER.iterdir()] == ["step-00000003"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]), st.data())
def test_changed_bytes_never_pass(name: str, data: st.DataObject) -> None:
    path = saved() / name
    before = path.read_bytes()
    after = data.draw(mutated_bytes(before))
    path.write_bytes(after)
    assert (newest() is not None) == (after == before)


def check_state(text: bytes) -> None:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        return
    if attempt(lambda: StoredState.from_values(state, "state.json"))[0] is None:
        return
    restored, _ = attempt(lambda: TrainState.from_json(state["train"]))
    if restored is not None:
        assert isinstance(restored.step, int)
        assert all(isinstance(row, dict) for row in restored.results.phases)
    _, optimizer = network()
    attempt(lambda: load_optimizer(optimizer, TENSORS, state["optimizer"]))


@settings(max_examples=300, deadline=None)
@given(mutated_json(STATE))
def test_a_changed_state(text: bytes) -> None:
    check_state(text)


@pytest.mark.soak
@settings(max_examples=50_000, deadline=None)
@given(mutated_json(STATE))
def test_many_changed_states(text: bytes) -> None:
    check_state(text)


def test_the_state_of_a_run_is_one() -> None:
    assert StoredState.from_values(STATE, "state.json").optimizer == OptimizerFacts.from_values(PLAIN, "x")
