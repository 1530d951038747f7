"""Layers behind a list of tensors."""

from __future__ import annotations

from small_networks import hashed, net

from dtl.checkpoint.transfer.layers.layer import TensorSpec, layers_of, specs_of


def test_layers_behind_names_and_behind_shapes() -> None:
    named = layers_of(specs_of(net().state_dict()))
    flat = layers_of([TensorSpec(hashed(e.name), e.shape, e.family) for e in specs_of(net().state_dict())])
    assert [(u.kind, u.shape) for u in named] == [(u.kind, u.shape) for u in flat]
    assert [u.kind for u in named[:4]] == ["conv", "bn", "conv", "bn"]
    assert list(named[1].roles) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
