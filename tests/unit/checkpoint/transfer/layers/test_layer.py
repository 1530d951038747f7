"""Layers behind a list of tensors."""

from __future__ import annotations

from small_networks import hashed, net

from dtl.checkpoint.transfer.layers.layer import TensorSpec, detect_heads, layers_of, specs_of


def test_layers_behind_names_and_behind_shapes() -> None:
    named = layers_of(specs_of(net().state_dict()))
    flat = layers_of([TensorSpec(hashed(e.name), e.shape, e.family) for e in specs_of(net().state_dict())])
    assert [(u.kind, u.shape) for u in named] == [(u.kind, u.shape) for u in flat]
    assert [u.kind for u in named[:4]] == ["conv", "bn", "conv", "bn"]
    assert list(named[1].roles) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_the_head_is_found_under_sorted_names() -> None:
    """As safetensors writes them: a ViT's patch embedding comes last, and a prefix stands before all."""
    for prefix in ("", "model."):
        names = ["head.bias", "head.weight", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.pre_logits.fc.weight", "patch_embed.proj.weight"]
        shapes = {"head.bias": (5,), "head.pre_logits.fc.weight": (8, 8), "patch_embed.proj.weight": (8, 3, 4, 4)}
        specs = [TensorSpec(prefix + name, shapes.get(name, (5, 8))) for name in sorted(names)]
        assert [layer.path for layer in detect_heads(layers_of(specs))] == [f"{prefix}head"]
    specs = [TensorSpec(f"classifier.1.{word}", (5,) if word == "bias" else (5, 8, 1, 1)) for word in ("bias", "weight")]
    specs += [TensorSpec(f"features.{n}.conv.weight", (8, 8, 3, 3)) for n in range(4)]
    assert [layer.path for layer in detect_heads(layers_of(specs))] == ["classifier.1"]
    assert detect_heads(layers_of(specs[2:])) == []


def test_numbers_that_rise_are_no_sorted_names() -> None:
    """A Sequential's names stand in alphabetical order as it registers them, but for weight before bias."""
    specs = [TensorSpec(f"{n}.{word}", (5, 8) if word == "weight" else (5,)) for n in (0, 1, 3, 4, 9) for word in ("weight", "bias")]
    assert [layer.path for layer in detect_heads(layers_of(specs))] == ["9"]
    assert detect_heads(layers_of(sorted(specs, key=lambda spec: spec.name))) == []
