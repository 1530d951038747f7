"""Every torchvision classifier: built, its head found and replaced, on the meta device."""

from __future__ import annotations

import torch
import torchvision.models

from dtl.models.build import build, model_names, replace_head


def test_every_torchvision_head() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 80
    assert {f"torchvision/{name}" for name in names} <= set(model_names())
    for name in names:
        network = build(f"torchvision/{name}", num_classes=7, meta=True)
        assert network.name == f"torchvision/{name}"
        assert network.num_outputs == 7, name
        before = {key: tuple(tensor.shape) for key, tensor in network.module.state_dict().items()}
        replace_head(network, 3)
        after = {key: tuple(tensor.shape) for key, tensor in network.module.state_dict().items()}
        assert list(after) == list(before), name
        changed = {key for key in before if before[key] != after[key]}
        # Nothing else has seven of anything first, so what changed is the heads and all of them.
        assert changed == {key for key, shape in before.items() if shape[:1] == (7,)}, name
        assert {key.rpartition(".")[0] for key in changed} == set(network.heads), name
        assert network.preprocessing.image_size >= 224
        assert all(tensor.is_meta for tensor in network.module.state_dict().values())
        # The declaration of the state dict (order, dtype) is that of torchvision's own constructor.
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in network.module.state_dict().values())
