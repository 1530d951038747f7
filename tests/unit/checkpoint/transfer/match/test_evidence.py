"""How alike two layers' names are."""

from __future__ import annotations

from small_networks import net

from dtl.checkpoint.transfer.layers.layer import TensorSpec, specs_of, strip_wrappers
from dtl.checkpoint.transfer.match.by_name import rename
from dtl.checkpoint.transfer.match.evidence import likeness


def test_wrappers_prefixes_and_likeness() -> None:
    assert strip_wrappers("module._orig_mod.layer1._fsdp_wrapped_module.conv.weight") == "layer1.conv.weight"
    assert likeness("layer1.0.bn1", "layer1.0.norm1") == 1.0
    assert likeness("conv1", "conv2") == 0.5
    target = specs_of(net().state_dict())
    for prefix in ("backbone.", "model.encoder.", "module.net."):
        source = [TensorSpec(prefix + e.name, e.shape, e.family) for e in target]
        assert all(rename(source, target).renamed[prefix + e.name] == e.name for e in target)
