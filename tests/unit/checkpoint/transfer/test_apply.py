"""Loading: what is copied, what stays, and that a refusal leaves the network as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transfer_networks import Tied
from transfer_networks import TwoConvolutions as Net

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.checkpoint.transfer.verify import randomise
from dtl.errors import TransferRefused, UserError
from dtl.files import sha256_of_tensors


@pytest.fixture
def source() -> Net:
    model = Net()
    randomise(model)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_loaded_network_is_the_source(source: Net) -> None:
    target = Net()
    report = load_pretrained(target, source.state_dict())
    assert same(source.state_dict(), target.state_dict())
    assert report.coverage == 1.0
    assert report.fresh == ()
    assert report.checksum == sha256_of_tensors(source.state_dict())
    assert all(outcome.reason for outcome in report.outcomes)


def test_a_file_is_hashed_once_and_its_values_are_looked_at_once(source: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 2 GB: 7.2 s of CPU with two hashes and two passes of isfinite, 1.5 s without (python -m benchmarks.transfer_load)."""
    torch.save(source.state_dict(), tmp_path / "w.pth")
    monkeypatch.setattr("dtl.checkpoint.transfer.apply.sha256_of_tensors", None)
    monkeypatch.setattr(torch, "isfinite", None)
    first, again = (load_pretrained(Net(), tmp_path / "w.pth") for _ in range(2))
    assert first.checksum == again.checksum
    assert load_pretrained(Net(classes=9), tmp_path / "w.pth").checksum != first.checksum  # another plan
    assert load_pretrained(Net().half(), tmp_path / "w.pth").checksum != first.checksum  # other values in the model
    with torch.no_grad():
        source.conv2.weight[0, 0, 0, 0] += 1
    torch.save(source.state_dict(), tmp_path / "other.pth")
    assert load_pretrained(Net(), tmp_path / "other.pth").checksum != first.checksum


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen_in_every_type(dtype: torch.dtype, bad: float) -> None:
    state = Net().to(dtype).state_dict()
    largest = torch.finfo(dtype).max
    state["conv2.weight"].view(-1)[:4] = torch.tensor([largest] * 4, dtype=dtype)  # finite, although their sum is not
    assert load_pretrained(Net().to(dtype), state).fresh == ()
    state["conv2.weight"].view(-1)[7] = bad
    with pytest.raises(TransferRefused, match="not finite"):
        load_pretrained(Net().to(dtype), state)
    if dtype == torch.float64:
        state["conv2.weight"].view(-1)[7] = 1.0
        with pytest.raises(TransferRefused, match="too large for float32"):
            load_pretrained(Net(), state)


def test_another_head_stays_fresh_and_the_rest_is_loaded(source: Net) -> None:
    target = Net(classes=7)
    before = snapshot(target)
    report = load_pretrained(target, source.state_dict())
    assert report.fresh == ("fc.weight", "fc.bias")
    assert torch.equal(target.fc.weight, before["fc.weight"])
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target.eval().features(x), source.features(x))
    assert report.coverage == 1.0


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"keep_head": False}, False),
        ({"source_classes": list("abcd"), "target_classes": list("abcd")}, True),
        ({"source_classes": list("abcd"), "target_classes": list("dcba")}, False),
        ({"source_classes": list("abcd"), "target_classes": list("dcba"), "keep_head": True}, True),
    ],
)
def test_a_head_is_kept_when_shapes_and_classes_agree(source: Net, options: dict[str, Any], kept: bool) -> None:
    target = Net()
    report = load_pretrained(target, source.state_dict(), heads=("fc",), **options)
    assert torch.equal(target.fc.weight, source.fc.weight) == kept
    assert ("fc.weight" in report.fresh) != kept


def test_rows_of_the_head_by_class_names(source: Net) -> None:
    target = Net(classes=2)
    load_pretrained(target, source.state_dict(), keep_head="rows", source_classes=list("abcd"), target_classes=["d", "a"])
    assert torch.equal(target.fc.weight, source.fc.weight[[3, 0]])
    load_pretrained(
        target,
        source.state_dict(),
        keep_head="rows",
        head_rows={"insect": ["a", "b"], "pet": "c"},
        source_classes=list("abcd"),
        target_classes=["pet", "insect"],
    )
    torch.testing.assert_close(target.fc.weight, torch.stack([source.fc.weight[2], source.fc.weight[:2].mean(0)]))
    torch.testing.assert_close(target.fc.bias, torch.stack([source.fc.bias[2], source.fc.bias[:2].mean()]))
    with pytest.raises(UserError, match="`head_rows` needs `keep_head: rows`"):
        load_pretrained(Net(classes=2), source.state_dict(), head_rows={"pet": "c"})
    with pytest.raises(TransferRefused, match="the source has no class 'x'"):
        load_pretrained(Net(classes=2), source.state_dict(), keep_head="rows", source_classes=list("abcd"), target_classes=["d", "x"])
    with pytest.raises(TransferRefused, match=r"the head fc cannot be loaded, but keep_head requires it: 2 outputs here, 4 in the source"):
        load_pretrained(Net(classes=2), source.state_dict(), keep_head=True)


def test_a_refusal_leaves_the_network_untouched(source: Net) -> None:
    target = Net()
    before = snapshot(target)
    state = source.state_dict()
    broken = {**state, "conv2.weight": torch.full_like(state["conv2.weight"], float("nan"))}
    short = {name: value for name, value in state.items() if not name.startswith("conv")}
    for bad, message in ((broken, "conv2.weight: conv2.weight holds values that are not finite"), (short, "coverage"), ({}, "no tensors")):
        with pytest.raises(UserError, match=message):
            load_pretrained(target, bad, min_coverage=0.9)
        assert same(before, snapshot(target))


def test_broadcasts_are_not_copies() -> None:
    """copy_ would fill [8] from [1], and [6, 3, 3, 3] from [6, 1, 3, 3], without a word."""
    source = Net().state_dict()
    for name, shape in (("bn2.weight", (1,)), ("bn2.bias", ()), ("conv2.weight", (8, 1, 3, 3)), ("conv2.weight", (1, 6, 3, 3))):
        target = Net()
        before = snapshot(target)
        with pytest.raises(TransferRefused):
            load_pretrained(target, {**source, name: torch.ones(shape)}, min_coverage=0.9)
        assert same(before, snapshot(target))


def test_types_are_cast_and_told(source: Net) -> None:
    target = Net()
    half = {name: value.half() if value.is_floating_point() else value for name, value in source.state_dict().items()}
    report = load_pretrained(target, half)
    assert report.casts == {"float16 -> float32": 12}
    assert target.conv1.weight.dtype == torch.float32
    assert "12 tensors cast float16 -> float32" in str(report)


def test_tied_tensors_are_loaded_once_and_must_agree() -> None:
    source, target = Tied(), Tied()
    load_pretrained(target, source.state_dict())
    assert torch.equal(target.a.weight, source.a.weight)
    assert target.b.weight is target.a.weight
    once = {name: value for name, value in source.state_dict().items() if name != "b.weight"}
    assert load_pretrained(Tied(), once).coverage == 1.0
    with pytest.raises(TransferRefused, match=r"a.weight and b.weight share one tensor in this network, but the source has two different ones"):
        load_pretrained(Tied(), {**source.state_dict(), "b.weight": torch.ones(4, 4)})


def test_an_untrained_source_is_told(source: Net) -> None:
    assert str(load_pretrained(Net(), Net().state_dict())).startswith("warning: the source looks untrained")
    assert "untrained" not in str(load_pretrained(Net(), source.state_dict()))


def test_another_normalisation_is_told(source: Net) -> None:
    weights = replace(read_weights(source), facts={"preprocessing": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}})
    report = load_pretrained(Net(), weights, target_preprocessing={"mean": (0.485, 0.456, 0.406), "std": (0.5, 0.5, 0.5)})
    assert report.warnings == ("the source was trained with mean [0.5, 0.5, 0.5], here it is [0.485, 0.456, 0.406]",)


def test_gray_images_through_an_adapted_stem(source: Net) -> None:
    target = Net(channels=1).eval()
    report = load_pretrained(target, source.state_dict())
    gray = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(target(gray), source(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
    assert [o.transform for o in report.outcomes if o.outcome == "adapted"] == ["stem_channels"]


def test_zero_biases_are_the_same_function(source: Net) -> None:
    target = Net(bias=True).eval()
    report = load_pretrained(target, source.state_dict(), fill={"conv_bias": "zero"})
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target(x), source(x))
    assert report.fresh == ()


def test_an_orphan_norm_is_folded() -> None:
    class Bare(Net):
        def __init__(self) -> None:
            super().__init__(bias=True)
            self.bn2 = nn.Identity()  # type: ignore[assignment]

    source, target = Net().eval(), Bare().eval()
    randomise(source)
    load_pretrained(target, source.state_dict(), fold_norms=True, fill={"conv_bias": "zero"})
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-5)


def test_kernels_with_channels_last(source: Net) -> None:
    def turned(value: torch.Tensor) -> torch.Tensor:
        return value.permute(2, 3, 1, 0).contiguous() if value.dim() == 4 else value.T.contiguous()

    keras = {(n[:-6] + "kernel" if v.dim() > 1 else n): turned(v) if v.dim() > 1 else v for n, v in source.state_dict().items()}
    target = Net().eval()
    load_pretrained(target, keras)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target(x), source(x))


def test_separate_projections_are_fused() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Registered out of order on purpose: names say which is which.
            self.value, self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.fc1, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.query(x), self.key(x), self.value(x)
            return self.head(self.fc1(q * torch.sigmoid(k) + v))

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.fc1, self.head = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.head(self.fc1(q * torch.sigmoid(k) + v))

    x = torch.randn(5, 8)
    for a, b in ((Separate(), Fused()), (Fused(), Separate())):
        load_pretrained(b, a.state_dict())
        torch.testing.assert_close(b(x), a(x))


def test_a_meta_network_cannot_be_filled() -> None:
    with torch.device("meta"):
        target = Net()
    with pytest.raises(UserError, match="has no memory"):
        load_pretrained(target, Net().state_dict())


# --- real weights ---


@pytest.mark.parametrize("family", ["torchvision", "timm"])
def test_real_mobilenet_weights(family: str, imagenet_weights: Path) -> None:
    weights = read_weights(str(imagenet_weights))
    features = {}
    for by in ("order", "auto"):
        if family == "timm":
            import timm

            model = timm.create_model("mobilenetv2_100", num_classes=2)
        else:
            from torchvision import models

            model = models.mobilenet_v2(num_classes=2)
        report = load_pretrained(model, weights, by=by)  # type: ignore[arg-type]
        assert report.coverage == 1.0
        assert len(report.fresh) == 2
        features[by] = sha256_of_tensors({n: v for n, v in model.state_dict().items() if n not in report.fresh})
    assert features["order"] == features["auto"]


def folder_features(model: nn.Module, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(features [N, D] of unit length, labels [N]) of an image folder, as torchvision evaluates MobileNetV2."""
    from torchvision import datasets, transforms

    view = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torch.utils.data.DataLoader(datasets.ImageFolder(folder, view), batch_size=32)
    with torch.no_grad():
        found = [(nn.functional.normalize(model(x).flatten(1)), y) for x, y in images]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def test_real_weights_tell_ants_from_bees(imagenet_weights: Path, real_images: Path) -> None:
    """Frozen features of the transferred network, nearest class mean: 0.967 expected; about 0.6 would mean that nothing was loaded."""
    import timm
    from torchvision import models

    networks = [models.mobilenet_v2(num_classes=2), timm.create_model("mobilenetv2_100", num_classes=2)]
    for network in networks:
        load_pretrained(network.eval(), str(imagenet_weights))
        network.classifier = nn.Identity()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(networks[0](images), networks[1](images), rtol=0, atol=1e-5)
    train, labels = folder_features(networks[0], real_images / "hymenoptera_data/train")
    val, answers = folder_features(networks[0], real_images / "hymenoptera_data/val")
    means = nn.functional.normalize(torch.stack([train[labels == k].mean(0) for k in (0, 1)]))
    top1 = float(((val @ means.T).argmax(1) == answers).float().mean())
    print(f"nearest class mean: {top1:.3f} of {len(answers)}")
    assert top1 >= 0.90
