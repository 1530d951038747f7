"""Durations in steps, and what holds while a phase is active: frozen means frozen."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dtl.config import PhaseConfig
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.models.build import Network, build
from dtl.models.freeze import freeze, select, set_train_mode
from dtl.models.norms import plain_norms
from dtl.training.active import ActivePhase, _sync_norms, enter, leave, set_head
from dtl.training.phases import plan_phases
from dtl.training.step import normaliser


def config(**values: object) -> PhaseConfig:
    return PhaseConfig.model_validate(values)


def test_durations_become_steps_and_epochs_count_on() -> None:
    phases = plan_phases(
        {"a": config(task="rotate", epochs=1.5), "b": config(steps=7), "c": config(epochs=2, eval_every=0.5)}, steps_per_epoch=10, num_classes=6
    )
    assert [phase.num_steps for phase in phases] == [15, 7, 20]
    assert [phase.first_step for phase in phases] == [0, 15, 22]
    assert [phase.first_epoch for phase in phases] == [0, 2, 3], "no phase repeats the order of another"
    assert [phase.num_outputs for phase in phases] == [4, 6, 6]
    assert phases[0].epoch_of(12) == (1, 2)
    assert [step for step in range(1, 21) if phases[2].eval_due(step)] == [5, 10, 15, 20]
    assert [step for step in range(1, 16) if phases[0].eval_due(step)] == [10, 15], "the end is always evaluated"


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(device="cpu", precision="no")


def active(network: Network, runtime: Runtime, phase: PhaseConfig, **options: object) -> ActivePhase:
    planned = plan_phases({"it": phase}, steps_per_epoch=5, num_classes=3)[0]
    set_head(network, planned, init="default", seed=0)
    values = {"class_counts": [1, 2, 3], "classes": ["a", "b", "c"], "freeze_norm": True, "micro_batch_size": 4, "image_size": 16}
    return enter(network, planned, runtime, **(values | options), log=lambda line: None)  # type: ignore[arg-type]


def step(phase: ActivePhase) -> None:
    phase.set_lr(0)
    logits, _ = phase.wrapped(torch.randn(4, 3, 16, 16))
    logits.sum().backward()
    phase.optimizer.step()
    phase.optimizer.zero_grad()


def tensors(network: Network) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.module.state_dict().items()}


@pytest.mark.parametrize("name", ["dtl/resnet_tiny", "torchvision/resnet18"])
def test_only_the_head_moves_in_a_head_phase(runtime: Runtime, name: str) -> None:
    network = build(name, num_classes=3)
    phase = active(network, runtime, config(train="head", lr=0.5, weight_decay=0.1))
    before = tensors(network)
    for _ in range(3):
        network.module.train()  # what a careless caller does
        step(phase)
    moved = {key for key, value in tensors(network).items() if not torch.equal(value, before[key])}
    assert moved == {f"{network.heads[0]}.weight", f"{network.heads[0]}.bias"}
    assert {name for group in phase.optimizer.param_groups for name in group["names"]} == moved
    leave(phase, runtime)


def test_leaving_proves_that_nothing_frozen_moved(runtime: Runtime) -> None:
    network = build("dtl/resnet_tiny", num_classes=3)
    phase = active(network, runtime, config(train="last:2"))
    frozen = next(parameter for parameter in network.module.parameters() if not parameter.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[0] += 1e-6
    with pytest.raises(RuntimeError, match="frozen weights or statistics changed"):
        leave(phase, runtime)


def test_each_phase_takes_up_the_network_anew(runtime: Runtime) -> None:
    network = build("dtl/resnet_tiny", num_classes=3)
    head = active(network, runtime, config(train="head"))
    step(head)
    leave(head, runtime)
    everything = active(network, runtime, config(train="all", optimizer="adamw", lr=0.01))
    before = tensors(network)
    step(everything)
    moved = {key for key, value in tensors(network).items() if not torch.equal(value, before[key])}
    assert moved >= {name for name, _ in network.module.named_parameters() if "conv" in name and "weight" in name}
    leave(everything, runtime)


def test_a_new_task_gets_a_fresh_head_that_depends_on_the_seed_alone(runtime: Runtime) -> None:
    heads = []
    for noise in (1, 2):
        network = build("dtl/resnet_tiny", num_classes=3)
        torch.manual_seed(noise)
        planned = plan_phases({"pretext": config(task="rotate")}, steps_per_epoch=5, num_classes=3)[0]
        assert set_head(network, planned, init="xavier", seed=5)
        assert not set_head(network, planned, init="xavier", seed=5)
        heads.append(network.module.get_submodule(network.heads[0]).weight.detach().clone())
    assert heads[0].shape[0] == 4
    assert torch.equal(*heads)


def test_the_normaliser_is_that_of_the_global_batch(runtime: Runtime) -> None:
    network = build("dtl/resnet_tiny", num_classes=3)
    labels = np.array([0, 0, 2, 1], dtype=np.int32)
    plain = active(network, runtime, config())
    assert normaliser(plain, labels) == 4.0
    leave(plain, runtime)
    weighted = active(network, runtime, config(class_weights="inverse"))
    assert weighted.class_weights is not None
    assert normaliser(weighted, labels) == pytest.approx(float(weighted.class_weights[torch.tensor([0, 0, 2, 1])].sum()))
    leave(weighted, runtime)
    rotate = active(network, runtime, config(task="rotate"))
    assert normaliser(rotate, labels) == 16.0
    leave(rotate, runtime)


def of_two(device: str) -> Runtime:
    return SimpleNamespace(world_size=2, device=torch.device(device), agree=lambda value: value)  # type: ignore[return-value]


def synchronise(network: Network, runtime: Runtime, wanted: str | bool, *, size: int = 4, before: frozenset[str] = frozenset()) -> list[str]:
    said: list[str] = []
    _sync_norms(network.module, runtime, wanted, before=before, micro_batch_size=size, image_size=16, log=said.append)
    return said


def test_synchronised_batch_norm_on_a_cpu_is_refused_only_when_asked_for() -> None:
    network = build("dtl/resnet_tiny", num_classes=3)
    freeze(network.module, select(network, "all"))
    set_train_mode(network.module)
    synchronise(network, of_two("cpu"), "auto")
    with pytest.raises(UserError, match="on GPUs only"):
        synchronise(network, of_two("cpu"), True)
    freeze(network.module, select(network, "head"))
    set_train_mode(network.module)
    synchronise(network, of_two("cpu"), True)


def test_synchronised_batch_norm_is_for_the_norms_that_a_phase_trains() -> None:
    network = build("dtl/resnet_tiny", num_classes=3)
    trainable = select(network, "last:2")
    freeze(network.module, trainable, freeze_norm=True)
    set_train_mode(network.module)
    said = synchronise(network, of_two("cuda"), "auto", size=16)
    assert said == [], "16 images a rank are enough"
    said = synchronise(network, of_two("cuda"), "auto")
    assert said == ["SyncBatchNorm: batch norm statistics are computed over all 2 ranks (--model.sync-bn false: per rank, without communication)"]
    network.module.train()
    names = {name for name, module in network.module.named_modules() if isinstance(module, torch.nn.SyncBatchNorm)}
    norms = {name: module for name, module in network.module.named_modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)}
    assert {module.training for module in norms.values()} == {True, False}
    assert all(module.training == (f"{name}.weight" in trainable) == (name in names) for name, module in norms.items())
    before = plain_norms(network.module)
    assert before == names
    assert synchronise(network, of_two("cuda"), "auto", before=before) == [], "a second phase with the same norms says nothing more"
