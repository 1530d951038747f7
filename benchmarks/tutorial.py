"""The tutorial's own loop, written plainly: what dtl is measured against.

pytorch.org's "Transfer Learning for Computer Vision", section "ConvNet as fixed feature extractor", with MobileNetV2: ImageFolder, DataLoader,
random crops and flips, the network in train mode with all but the head frozen, validation after each epoch.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path


def epochs(
    train: Path,
    val: Path,
    weights: Path,
    *,
    image_size: int,
    batch_size: int,
    lr: float,
    momentum: float,
    decay_every: int,
    threads: int,
    crops: bool = True,
    adapting_norms: bool = True,
    weight_decay: float = 0.0,
    crop_ratio: float = 0.875,
) -> Iterator[tuple[float, float, float]]:
    """(wall-clock seconds, CPU seconds of all processes, top1 of validation) of each epoch, without an end and without the time to build it.

    `crops`: random crops and flips of the training images, as published; else they are cut as validation's. `adapting_norms`: the frozen
    network's batch norms go on counting, since the whole is in train mode, as published; else only the head is in train mode.
    `crop_ratio`: image_size / the short side that images are resized to for validation.
    """
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import StepLR
    from torchvision import datasets, models, transforms

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    normalise = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    augmented = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
    cut = [transforms.Resize(round(image_size / crop_ratio)), transforms.CenterCrop(image_size)]
    chosen = {"train": augmented if crops else cut, "val": cut}
    views = {split: transforms.Compose([*steps, transforms.ToTensor(), normalise]) for split, steps in chosen.items()}
    folders = {split: datasets.ImageFolder(str(folder), views[split]) for split, folder in (("train", train), ("val", val))}
    loaders = {split: torch.utils.data.DataLoader(folder, batch_size=batch_size, shuffle=True, num_workers=2) for split, folder in folders.items()}
    network = models.mobilenet_v2()
    network.load_state_dict(dict(zip(network.state_dict(), torch.load(weights, weights_only=True).values())), strict=False)
    for parameter in network.parameters():
        parameter.requires_grad = False
    network.classifier[1] = nn.Linear(network.last_channel, len(folders["train"].classes))
    loss_of = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.classifier[1].parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = StepLR(optimizer, step_size=decay_every, gamma=0.1)
    while True:
        began, cpu, right = time.monotonic(), ended_cpu_seconds(), 0
        for split, loader in loaders.items():
            network.train(split == "train" and adapting_norms)
            network.classifier.train(split == "train")
            right = 0
            for images, labels in loader:
                optimizer.zero_grad()
                with torch.set_grad_enabled(split == "train"):
                    logits = network(images)
                    loss = loss_of(logits, labels)
                    if split == "train":
                        loss.backward()
                        optimizer.step()
                right += int((logits.argmax(1) == labels).sum())
            if split == "train":
                schedule.step()
        yield time.monotonic() - began, ended_cpu_seconds() - cpu, right / len(folders["val"])


def ended_cpu_seconds() -> float:
    """Of this process and of all children that have ended, user and system."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
