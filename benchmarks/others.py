"""The ways of others to train on a small set, each a command of its own; `benchmarks.against` runs them and compares dtl with them.

    python -m benchmarks.others WAY --images FOLDER --weights FILE --image-size 128 --batch 16 --epochs 10 --seed 0

FOLDER has train/CLASS, val/CLASS and test/CLASS. Prints one line of JSON: `top1` and `loss` of the test images by the weights that the way delivers, `curve`
with [CPU seconds of the process so far, top1 of the test images] after each epoch, and `not_counted`, the CPU seconds that the test images cost. All load the
same ImageNet MobileNetV2. Loaders have no processes of their own: with so few images these would cost more than they bring. What the ways follow:

- fastai: `vision_learner(...).fine_tune(EPOCHS)` as in its tutorial of pets: Resize(460) on items and aug_transforms(size=224) on batches (or these times
  SIZE / 224), ImageNet's statistics, default rates, one epoch for the head. Its architecture is a function that returns the loaded network.
- timm: neither timm's wheel nor its sdist has train.py (looked into 1.0.31), so timm's parts are put together here as the script does: create_loader with
  the script's random crops, flips and colours, create_optimizer_v2, create_scheduler_v2 (cosine, warmup), label smoothing 0.1, validation and a checkpoint
  after each epoch; the checkpoint with the best validation top1 counts. Options as in its model cards
  for fine-tuning: AdamW, weight decay 0.01, warmup from 0, at ten times the rate of their large ViTs (5e-4). The script's default (SGD, 0.1 for 256 images,
  in proportion) takes the network apart: on long_tail at 96 px, seed 0, 13.5 % against 76.0 %.
- loop: what a careful person writes: the head alone for one epoch, then everything by SGD with momentum, cosine, a ten times higher rate for the head, random
  crops of half the image and more, flips, and the weights of the epoch with the lowest validation loss.
- logistic: scikit-learn's LogisticRegressionCV on the features in front of the head, which a plain loop computes, standardised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

Batches = Sequence[tuple[Tensor, Tensor]]  # images (standardised), labels
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Case:
    images: Path
    weights: Path
    image_size: int
    batch: int
    epochs: int
    seed: int


@dataclass
class Clock:
    """Test images, whose CPU seconds do not count."""

    curve: list[tuple[float, float]] = field(default_factory=list)
    not_counted: float = 0.0

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.not_counted += time.process_time() - began

    def epoch(self, network: nn.Module, batches: Batches) -> None:
        reached = time.process_time() - self.not_counted
        with self.stopped():
            self.curve.append((reached, measured(network, batches)[0]))

    def end(self, network: nn.Module, batches: Batches) -> tuple[Clock, float, float]:
        with self.stopped():
            return self, *measured(network, batches)


def measured(network: nn.Module, batches: Batches | DataLoader[Any]) -> tuple[float, float]:
    """(top1, cross-entropy); the network is left in the mode in which it was."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    right, loss, num = 0, 0.0, 0
    with torch.inference_mode():
        for images, labels in batches:
            logits = network(images)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            num += len(labels)
    for module, mode in modes.items():
        module.training = mode
    return right / num, loss / num


def loaded(network: Any, weights: Path) -> Any:
    """The weights by order: names differ, order and shapes do not. The head stays as it is."""
    network.load_state_dict(dict(zip(network.state_dict(), torch.load(weights, weights_only=True).values())), strict=False)
    return network


def clean(image_size: int) -> transforms.Compose:
    return transforms.Compose(
        [transforms.Resize(round(image_size / 0.875)), transforms.CenterCrop(image_size), transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    )


def folders(case: Case, augmented: transforms.Compose | None = None) -> dict[str, DataLoader[Any]]:
    views = {"train": augmented or clean(case.image_size), "val": clean(case.image_size), "test": clean(case.image_size)}
    found = {}
    for split, view in views.items():
        shuffled = split == "train" and augmented is not None
        found[split] = DataLoader(datasets.ImageFolder(str(case.images / split), view), case.batch if shuffled else 64, shuffle=shuffled, drop_last=shuffled)
    return found


def num_classes(case: Case) -> int:
    return sum(path.is_dir() for path in (case.images / "train").iterdir())


# ---- the ways: (what the curve saw, the final network's top1 and loss)


def fastai(case: Case) -> tuple[Clock, float, float]:
    from fastai.vision import all as fast  # type: ignore[import-not-found]

    fast.set_seed(case.seed, reproducible=True)
    size = case.image_size
    data = fast.ImageDataLoaders.from_folder(
        case.images, train="train", valid="val", bs=case.batch, num_workers=0, device=torch.device("cpu"), seed=case.seed,
        item_tfms=fast.Resize(round(460 * size / 224)), batch_tfms=[*fast.aug_transforms(size=size), fast.Normalize.from_stats(MEAN, DEVIATION)],
    )  # fmt: skip

    def network(pretrained: bool = True) -> nn.Module:
        return nn.Sequential(loaded(models.mobilenet_v2(), case.weights).features, nn.AdaptiveAvgPool2d(1))  # it cuts in front of the last pooling layer

    clock = Clock()
    with clock.stopped():
        tests = data.test_dl(fast.get_image_files(case.images / "test"), with_labels=True, bs=64)
        batches = [(images.as_subclass(Tensor), labels.as_subclass(Tensor)) for images, labels in tests]

    class Curve(fast.Callback):  # type: ignore[misc]
        def after_epoch(self) -> None:
            clock.epoch(self.learn.model, batches)

    learner = fast.vision_learner(data, network, metrics=fast.accuracy, cbs=[Curve()])
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(case.epochs)
    return clock.end(learner.model, batches)


def timm_parts(case: Case) -> tuple[Clock, float, float]:
    import timm.data
    import timm.loss
    import timm.optim
    import timm.scheduler
    import timm.utils

    parts: Any = timm
    parts.utils.random_seed(case.seed)
    network = loaded(parts.create_model("mobilenetv2_100", num_classes=num_classes(case)), case.weights)
    common: dict[str, Any] = {
        "input_size": (3, case.image_size, case.image_size),
        "mean": MEAN,
        "std": DEVIATION,
        "num_workers": 0,
        "persistent_workers": False,
    }
    common |= {"use_prefetcher": False, "device": torch.device("cpu"), "pin_memory": False}

    def loader(split: str) -> Any:
        images = parts.data.create_dataset("", root=str(case.images), split=split, is_training=split == "train", batch_size=case.batch)
        if split == "train":
            return parts.data.create_loader(
                images, batch_size=case.batch, is_training=True, color_jitter=0.4, scale=(0.08, 1.0), interpolation="random", **common
            )
        return parts.data.create_loader(images, batch_size=64, is_training=False, interpolation="bicubic", crop_pct=0.875, **common)

    train, val = loader("train"), loader("val")
    clock = Clock()
    with clock.stopped():
        batches = list(loader("test"))
    optimizer = parts.optim.create_optimizer_v2(network, opt="adamw", lr=5e-4, weight_decay=0.01)
    scheduler, epochs = parts.scheduler.create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=case.epochs, warmup_epochs=1, warmup_lr=0.0, min_lr=0.0, step_on_epochs=False, updates_per_epoch=len(train)
    )
    loss_of, update = parts.loss.LabelSmoothingCrossEntropy(0.1), 0
    folder = case.images.parent / "timm"
    folder.mkdir(exist_ok=True)
    saver = parts.utils.CheckpointSaver(model=network, optimizer=optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=1)
    for epoch in range(epochs):
        network.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss_of(network(images), labels).backward()
            optimizer.step()
            update += 1
            scheduler.step_update(num_updates=update)
        saver.save_checkpoint(epoch, metric=measured(network, val)[0])
        scheduler.step(epoch + 1)
        clock.epoch(network, batches)
    network.load_state_dict(torch.load(folder / "model_best.pth.tar", weights_only=False)["state_dict"])
    return clock.end(network, batches)


def loop(case: Case) -> tuple[Clock, float, float]:
    torch.manual_seed(case.seed)
    crops = [transforms.RandomResizedCrop(case.image_size, scale=(0.5, 1.0)), transforms.RandomHorizontalFlip()]
    loaders = folders(case, transforms.Compose([*crops, transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]))
    clock = Clock()
    with clock.stopped():
        batches = list(loaders["test"])
    network = loaded(models.mobilenet_v2(), case.weights)
    network.classifier[1] = nn.Linear(network.last_channel, num_classes(case))
    loss_of, best, kept = nn.CrossEntropyLoss(label_smoothing=0.1), float("inf"), None
    for epochs, backbone_lr, head_lr in ((1, 0.0, 0.02), (case.epochs, 0.001, 0.01)):
        for parameter in network.features.parameters():
            parameter.requires_grad = backbone_lr > 0
        groups = [{"params": network.classifier.parameters(), "lr": head_lr}, {"params": network.features.parameters(), "lr": backbone_lr}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loaders["train"]))
        for _ in range(epochs):
            network.train()
            if backbone_lr == 0:
                network.features.eval()
            for images, labels in loaders["train"]:
                optimizer.zero_grad()
                loss_of(network(images), labels).backward()
                optimizer.step()
                schedule.step()
            loss = measured(network, loaders["val"])[1]
            if loss <= best:
                best, kept = loss, {name: value.clone() for name, value in network.state_dict().items()}
            clock.epoch(network, batches)
    network.load_state_dict(kept)
    return clock.end(network, batches)


def logistic(case: Case) -> tuple[Clock, float, float]:
    import numpy as np
    from sklearn.linear_model import LogisticRegressionCV  # type: ignore[import-untyped]
    from sklearn.metrics import log_loss  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import StandardScaler  # type: ignore[import-untyped]

    network = loaded(models.mobilenet_v2(), case.weights)
    network.classifier = nn.Identity()
    network.eval()

    def features(split: str) -> tuple[Any, Any]:
        with torch.inference_mode():
            rows = [(network(images), labels) for images, labels in loaders[split]]
        values, labels = (torch.cat(column).numpy() for column in zip(*rows))
        return values, labels

    loaders, clock = folders(case), Clock()
    values, labels = features("train")
    folds = min(5, int(np.bincount(labels).min()))
    by_strength = LogisticRegressionCV(Cs=10, cv=folds, scoring="neg_log_loss", max_iter=1000, l1_ratios=(0,), use_legacy_attributes=False)
    fitted = make_pipeline(StandardScaler(), by_strength).fit(values, labels)
    with clock.stopped():
        values, labels = features("test")
        probabilities = fitted.predict_proba(values)
        top1 = float((probabilities.argmax(1) == labels).mean())
        return clock, top1, float(log_loss(labels, probabilities, labels=range(probabilities.shape[1])))


WAYS: dict[str, Callable[[Case], tuple[Clock, float, float]]] = {"fastai": fastai, "timm": timm_parts, "loop": loop, "logistic": logistic}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("way", choices=WAYS)
    made.add_argument("--images", type=Path, required=True)
    made.add_argument("--weights", type=Path, required=True)
    for name in ("image-size", "batch", "epochs", "seed"):
        made.add_argument(f"--{name}", type=int, required=True)
    options = vars(made.parse_args())
    warnings.filterwarnings("ignore")
    clock, top1, loss = WAYS[options.pop("way")](Case(**options))
    print(json.dumps({"top1": top1, "loss": loss, "curve": clock.curve, "not_counted": clock.not_counted}))


if __name__ == "__main__":
    main()
