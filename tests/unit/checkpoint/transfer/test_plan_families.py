"""Networks of many families on the meta device: built, with head and layer groups, and their own weights transferred, at their size and at another."""

from __future__ import annotations

import pytest

from dtl.checkpoint import plan_transfer
from dtl.errors import UserError
from dtl.models.build import Network, build, model_names, sized
from dtl.models.freeze import select
from dtl.models.groups import layer_groups

FEW = (
    "torchvision/resnet18", "torchvision/vit_b_32", "torchvision/swin_t", "torchvision/squeezenet1_1",
    "timm/resmlp_12_224", "timm/sequencer2d_s", "timm/coat_tiny", "timm/vit_small_patch14_dinov2", "timm/beit_base_patch16_224", "timm/xcit_nano_12_p8_224",
)  # fmt: skip

# What is not right yet: mended, it has to leave this list.
NOT_YET = {
    "timm/gmixer_12_224": "its token-mixing layers have the size of the image; twice the size is no line, but a plan that leaves them out",
    "timm/levit_128": "its attention biases are left undecided",
}


def families() -> list[str]:
    """The first network of each of timm's families, and all of torchvision's."""
    import timm

    firsts = {}
    for name in timm.list_models():
        firsts.setdefault(timm.models.model_entrypoint(name).__module__, f"timm/{name}")
    return [*firsts.values(), *(name for name in model_names() if name.startswith("torchvision/"))]


def walk(name: str, *, resized: bool = True) -> None:
    def again(options: dict[str, object], *, meta: bool = True) -> Network:
        return build(name, num_classes=7, options=options, meta=True, own=True)

    network = again({})
    assert network.num_outputs == 7
    assert len(layer_groups(network)) >= 2
    assert select(network, "last:2")
    state = network.module.state_dict()
    plan = plan_transfer(state, network.module, heads=network.heads, trace=False)
    assert plan.ok, (name, plan.refusals)
    assert not [o.target for o in plan.outcomes if o.target and o.outcome in ("fresh", "ambiguous") and not o.head], name
    if not resized:
        return
    own = network.preprocessing.image_size
    assert isinstance(own, int)
    try:
        other = sized(network, 2 * own, again)
    except UserError:  # in one line: test_build.py
        return
    plan = plan_transfer(state, other.module, heads=other.heads, trace=False)
    assert plan.ok, (name, plan.refusals)


@pytest.mark.parametrize("name", FEW)
def test_a_network_takes_its_own_weights(name: str) -> None:
    walk(name, resized="sequencer" not in name)  # its LSTMs are slow, even on shapes


@pytest.mark.soak
def test_every_family_takes_its_own_weights() -> None:
    problems = {}
    for name in families():
        try:
            walk(name)
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {str(error)[:200]}"
    assert problems.keys() == NOT_YET.keys(), problems
