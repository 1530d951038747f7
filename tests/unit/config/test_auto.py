"""`auto`: settings by the network's family, beside what is given, with their source; samples per step by the number of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtl.config import Config, config_from_dict, resolve_config
from dtl.config.auto import epoch_steps, families, family_of, with_batch_size


def finetune(**options: object) -> Config:
    dotted = {key.replace("__", "."): value for key, value in options.items()}
    return resolve_config("finetune", {"data.train": "photos", **dotted})[0]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("torchvision/resnet18", "CNN"), ("timm/mobilenetv2_100", "CNN"), ("dtl/resnet_tiny", "CNN"), ("networks:small", "CNN"), ("efficientnet_b0", "CNN"),
        ("timm/vit_base_patch16_224.augreg_in21k", "ViT"), ("torchvision/vit_b_16", "ViT"), ("timm/vit_small_patch14_dinov2", "ViT"),
        ("timm/deit_tiny_patch16_224", "ViT"), ("timm/hf-hub:timm/beit_base_patch16_224", "ViT"), ("torchvision/vit_l_16", "large ViT"),
        ("timm/vit_large_patch14_dinov2", "large ViT"), ("timm/swin_tiny_patch4_window7_224", "Swin"), ("torchvision/swin_v2_t", "Swin"),
        ("timm/swinv2_tiny_window8_256", "Swin"), ("timm/convnext_tiny", "ConvNeXt"), ("torchvision/convnext_base", "ConvNeXt"),
        ("timm/convnextv2_atto", "ConvNeXt"),
    ],
)  # fmt: skip
def test_a_network_is_of_one_family(model: str, family: str) -> None:
    assert family_of(model).family == family


def test_every_row_says_whose_it_is_and_whether_it_was_measured() -> None:
    rows = families()
    assert rows[-1].networks == ("*",)
    assert [row.family for row in rows if row.measured] == ["CNN"]
    assert all("/" in row.source for row in rows)
    vit = family_of("vit_base_patch16_224")
    assert [vit.lr_of(size) for size in (1024, 256, 64)] == [0.002, 0.0005, 0.000125], "the source's rule: in proportion to the batch"
    assert family_of("convnext_tiny").lr_of(128) == 0.000025
    assert family_of("resnet18").lr_of(512) == family_of("resnet18").lr_of(64) == 0.001


@pytest.mark.parametrize("batch", ["32", 32.0])
def test_a_batch_size_in_other_words_is_one(batch: object) -> None:
    """`dtl.fit(recipe, {"data.global_batch_size": "32"})`: it was taken, and `auto` came to the first step."""
    config = finetune(data__global_batch_size=batch, model__name="timm/vit_base_patch16_224")
    phase = config.phases["all"]
    assert (config.data.global_batch_size, phase.optimizer, phase.lr) == (32, "adamw", pytest.approx(0.0000625))


def test_the_table_of_the_docs_is_that_of_the_package() -> None:
    page = (Path(__file__).parents[3] / "docs/recipes.md").read_text()
    for row in families():
        scale = {"linear": f" x batch / {row.batch}", "sqrt": f" x sqrt(batch / {row.batch})", "none": ""}[row.scale]
        networks, why = ", ".join(f"`{name}`" for name in row.networks), "" if row.measured else "; not measured with dtl"
        numbers = f"{row.lr:g}{scale} | {row.weight_decay:g} | {row.layer_decay:g} | {row.drop_path:g}"
        assert f"| {row.family} | {networks} | {row.optimizer} | {numbers} | {row.source}{why} |" in page


def test_finetune_takes_the_familys_settings_and_says_so() -> None:
    phase = finetune().phases["all"]
    assert (phase.optimizer, phase.lr, phase.weight_decay, phase.layer_decay) == ("sgd", 0.001, 0.0001, 0.7), "a CNN's are what they were"
    config = finetune(model__name="timm/vit_base_patch16_224", data__global_batch_size=128)
    phase = config.phases["all"]
    assert (phase.optimizer, phase.lr, phase.weight_decay, phase.layer_decay) == ("adamw", 0.00025, 0.05, 0.65)
    assert config.model.options == {"drop_path_rate": 0.1}
    (line,) = config.notes
    assert line == (
        "phase all: optimizer adamw, lr 0.00025, weight_decay 0.05, layer_decay 0.65, drop_path_rate 0.1, as for ViT networks "
        "(facebookresearch/mae, FINETUNE.md, ViT-Base; not measured with dtl)"
    )
    assert finetune(model__name="torchvision/vit_b_16").model.options == {}, "torchvision's ViT has no stochastic depth"
    stored = config_from_dict(config.to_dict(), "a checkpoint")
    assert stored.to_dict() == config.to_dict()
    assert not stored.notes, "what is stored is settled"


def test_what_is_given_stays() -> None:
    config = finetune(model__name="timm/convnext_tiny", phases__all__lr=0.003, model__options={"drop_path_rate": 0.0})
    phase = config.phases["all"]
    assert (phase.optimizer, phase.lr, phase.layer_decay) == ("adamw", 0.003, 0.8)
    assert config.model.options == {"drop_path_rate": 0.0}
    assert "lr" not in config.notes[0].split(", as for")[0].replace("layer", "")
    assert "drop_path_rate" not in config.notes[0]
    before = finetune(model__name="timm/convnext_tiny", phases__all__optimizer="sgd").phases["all"]
    assert (before.optimizer, before.lr, before.weight_decay, before.layer_decay) == ("sgd", 0.001, 0.0001, 0.7), "the settings of before"
    adam = finetune(phases__all__optimizer="adam").phases["all"]
    assert (adam.optimizer, adam.lr, adam.layer_decay) == ("adam", 0.001, 0.7)
    assert not finetune(phases__all=None, phases__top={"train": "last:2", "epochs": 1}).notes


@pytest.mark.parametrize(
    ("images", "size", "steps"),
    [(1, 16, 1), (73, 16, 5), (320, 16, 20), (639, 16, 40), (640, 32, 20), (1279, 32, 40), (1280, 64, 20), (50_000, 64, 782)],
)
def test_few_images_make_smaller_batches(images: int, size: int, steps: int) -> None:
    config = with_batch_size(finetune(), images)
    assert config.data.global_batch_size == size
    assert epoch_steps(config.data, images) == epoch_steps(finetune().data, images) == steps
    assert config.notes[-1] == f"data.global_batch_size auto: {size}, which is {steps} step{'s' * (steps > 1)} an epoch"
    assert with_batch_size(config, 7).to_dict() == config.to_dict(), "what was settled stays"


def test_what_follows_from_the_batch_size_is_as_if_it_was_given() -> None:
    vit = {"model__name": "timm/vit_base_patch16_224", "phases__all__warmup": 0.25}
    for images, size in ((100, 16), (700, 32), (5000, 64)):
        found, given = with_batch_size(finetune(**vit), images), finetune(**vit, data__global_batch_size=size)
        assert found.to_dict() == given.to_dict()
        assert found.notes[:-1] == given.notes
    own = with_batch_size(finetune(**vit, phases__all__lr=0.003), 100)
    assert own.phases["all"].lr == 0.003
    assert "lr 0.003" not in own.notes[0]


def test_a_micro_batch_is_not_larger_than_the_batch() -> None:
    assert with_batch_size(finetune(data__micro_batch_size=24), 100).data.global_batch_size == 24
    assert with_batch_size(finetune(data__micro_batch_size=8), 100).data.global_batch_size == 16
    drop = finetune(data__last="drop").data
    assert [epoch_steps(drop, images) for images in (7, 73, 1279)] == [1, 4, 39]
