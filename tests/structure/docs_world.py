"""A small world in which the commands of the docs can be run as they stand: the folders, weights and runs that the pages name.

What is made shorter than the pages say is in `shortened`, and what stands for the places that a test cannot reach is in `here`; nothing
else of a line is changed.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import harness
import numpy as np
import torch
import yaml
from model_folders import bottleneck_names, write_image

from dtl.config import load_config
from dtl.models.build import build

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("insect", "pet")  # those of the pages' example of --head-rows
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def shortened(arguments: list[str]) -> list[str]:
    """The options that are added to each line that trains: one or two steps a phase, small images, no loader processes, no pictures.

    What the line itself is about (network, source, transfer, phases and their rates, batch, processes) stays as it is.
    """
    config, _ = load_config(arguments)
    # A duration in epochs that the line gives itself can only be replaced by one in epochs.
    few = [word for name in config.phases for word in (f"--phases.{name}.{'epochs' if f'--phases.{name}.epochs' in arguments else 'steps'}", "1")]
    size = "16" if config.data.image_size == 32 else "32"
    return [*few, "--data.image-size", size, "--data.workers", "0", "--tracking.report", "false"]


class World:
    """Everything that pages name, made once; `enter` gives a folder of links to it, where the lines of one block run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.template = folder / "template"
        self.template.mkdir(parents=True)
        for name in ("dtl", "configs", "launch", "slurm", "sweeps"):
            (self.template / name).symlink_to(ROOT / name)
        _make_images(self.template)
        _make_weights(self.template, folder / "torch/hub/checkpoints")
        (self.template / "my_augment.py").write_text("def colours(image):\n    return 255 - image\n")
        (self.template / "lr.txt").write_text("--phases.all.lr 0.003\n--phases.all.lr 0.01\n--phases.all.lr 0.03 --run.seed 1\n")
        shutil.copy(self.template / "lr.txt", self.template / "settings.txt")
        self.environment = {
            "DTL_DATA": str(self.template),
            "DTL_MBV2": str(self.template / "mbv2.pt"),
            "DTL_CACHE": str(folder / "cache"),
            "TORCH_HOME": str(folder / "torch"),
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{_pretend_ssh(folder)}{os.pathsep}{os.environ['PATH']}",
        }
        self.submitted: list[list[str]] = []
        """What templates have trained."""
        self._made: dict[str, Path] = {}
        self._num_entered = 0
        self._entered: list[Path] = []
        self._server: ThreadingHTTPServer | None = None

    # ---- what a block finds

    def enter(self, lines: list[str]) -> Path:
        """A folder with all that every page may name, and of the things that some pages name and others make, those that `lines` name first."""
        self._num_entered += 1
        place = self.folder / f"block-{self._num_entered}"
        place.mkdir()
        self._entered.append(place)
        for entry in self.template.iterdir():
            (place / entry.name).symlink_to(entry.resolve())
        for named, (copy, make) in self._on_demand().items():
            if any(named in line for line in lines):
                shutil.copytree(make(), place / copy, dirs_exist_ok=True)
        return place

    def leave(self) -> None:
        """Removes the folders entered since the last time: each holds weights and checkpoints, and all together would be 10 GB."""
        for place in self._entered:
            shutil.rmtree(place)
        self._entered.clear()

    def _on_demand(self) -> dict[str, tuple[str, Callable[[], Path]]]:
        """What a line names: where that lies, and how it is made."""
        return {
            "runs/finetune": ("runs/finetune", self.finished_run),
            "runs/features": ("runs/features", self.finished_run),
            "runs/lr/*": ("runs/lr", self.sweep),
            "shards/train-{": ("shards", lambda: self.tars("train", "{:04d}")),
        }

    def finished_run(self) -> Path:
        """The folder of a finished run of `dtl train --config finetune`."""
        if "finetune" not in self._made:
            place = self.enter([])
            self._entered.remove(place)  # it stays
            arguments = ["--config", "finetune", "--data.train", "photos/train", "--data.val", "photos/val"]
            self.run("train", [*arguments, *shortened(arguments)], place)
            self._made["finetune"] = place / "runs/finetune"
        return self._made["finetune"]

    def sweep(self) -> Path:
        if "sweep" not in self._made:
            for number in (1, 2):
                shutil.copytree(self.finished_run(), self.folder / f"sweep/{number}-lr0.0{number}")
            self._made["sweep"] = self.folder / "sweep"
        return self._made["sweep"]

    def tars(self, split: str, number: str) -> Path:
        """A folder of ten WebDataset tars as others write them, one image each, its label in a `cls` and in a `json`."""
        folder = self.folder / f"tars-{split}-{len(number.format(0))}"
        if not folder.exists():
            folder.mkdir()
            image = next((self.template / "photos" / split).glob("*/*.jpg")).read_bytes()
            for at in range(10):
                members = {"jpg": image, "cls": str(at % 2).encode(), "json": json.dumps({"label": at % 2}).encode()}
                with tarfile.open(folder / f"{split}-{number.format(at)}.tar", "w") as tar:
                    for extension, data in members.items():
                        member = tarfile.TarInfo(f"s{at:06d}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return folder

    # ---- the places that a test cannot reach

    def here(self, line: str, place: Path) -> str:
        """The line with https://host/, s3://bucket/ and /shared/ as a server and folders of this machine; `ssh` stays here (_pretend_ssh).

        Of a hundred and forty-seven shards there are the first ten.
        """
        line = line.replace("/shared/", f"{place}/").replace("..0146}", "..0009}").replace("..146}", "..009}")
        if "https://host/" not in line and "s3://bucket/" not in line:
            return line
        return line.replace("https://host/", self.address()).replace("s3://bucket/", f"file://{self.folder}/www/")

    def address(self) -> str:
        if self._server is None:
            www = self.folder / "www"
            for split, number in (("train", "{:03d}"), ("val", "{:02d}")):
                shutil.copytree(self.tars(split, number), www, dirs_exist_ok=True)
            shutil.copytree(www, self.folder / "data", ignore=shutil.ignore_patterns("train*"))
            self.run("pack", ["photos", str(www / "shards")], self.enter([]))
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: _Quiet(*given, directory=str(www)))
            Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}/"

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    # ---- running

    def words(self, line: str, place: Path) -> list[str]:
        """The words of a line as bash understands them: variables, braces, patterns, quotes."""
        command = ["bash", "-c", f"printf '%s\\0' {self.here(line, place)}"]
        done = subprocess.run(command, cwd=place, env={**os.environ, **self.environment}, capture_output=True, text=True, check=True)
        return done.stdout.split("\0")[:-1]

    def run(self, command: str, arguments: list[str], place: Path, *, world: int = 1) -> harness.Job:
        before = {rank: {"before": "published_names:believe"} for rank in range(world)}
        return harness.run(arguments, cwd=place, command=command, world=world, env=self.environment, by_rank=before)

    def launch(self, words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
        """With the real launcher."""
        environment = {**os.environ, **self.environment, "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "accelerate.commands.launch", *words]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def num_processes(words: list[str]) -> int:
    """Of an `accelerate launch` or `torchrun` line."""
    given = dict(itertools.pairwise(words))
    for option in ("--num_processes", "--nproc-per-node"):
        if option in given:
            return int(given[option])
    return int(yaml.safe_load((ROOT / given["--config_file"]).read_text())["num_processes"]) if "--config_file" in given else 1


def _pretend_ssh(folder: Path) -> str:
    """A folder with an `ssh` that runs its command on this machine, where /data is a folder of the world."""
    script = folder / "bin/ssh"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nshift\nexec sh -c "$(echo "$*" | sed "s|/data/|{folder}/data/|g")"\n')
    script.chmod(0o755)
    return str(script.parent)


def _make_images(world: Path) -> None:
    for folder, count in (("photos/train", 6), ("photos/val", 5), ("photos/test", 2), ("all_photos", 8)):
        _images(world / folder, CLASSES, count)
    for folder, count in (("hymenoptera_data/train", 6), ("hymenoptera_data/val", 2)):
        _images(world / folder, CLASSES, count)
    _images(world, ("new_photos",), 3)
    for folder, count in (("cifar/train", 1), ("cifar/test", 1)):
        _images(world / folder, CIFAR, count)
    _cifar_batches(world / "cifar-10-batches-py")
    for folder, count in (("flowers/train", 4), ("flowers/valid", 2)):
        _images(world / folder, ("1", "2", "10"), count)
    (world / "flowers/cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "2": "hard-leaved pocket orchid", "10": "globe thistle"}))
    with open(world / "few.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        rows.writerows([f"cifar/train/{name}/0.jpg", name] for name in CIFAR)


def _images(folder: Path, classes: tuple[str, ...], count: int) -> None:
    for position, name in enumerate(classes):
        for number in range(count):
            write_image(folder / name / f"{number}.jpg", 100 * position + number + len(str(folder)), size=(40, 48))


def _cifar_batches(folder: Path) -> None:
    """The python batches as torchvision keeps them, two images each of two classes."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, name in enumerate((*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")):
        pixels = random.integers(0, 256, (4, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [2 * number % 10 + at % 2 for at in range(4)]}, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR)}, protocol=2))


def _make_weights(world: Path, hub: Path) -> None:
    """Files that stand for published weights: right in names and shapes, with statistics as a trained network has them, but random."""
    from torchvision.models import ResNet18_Weights

    hub.mkdir(parents=True)
    resnet = _random_weights("torchvision/resnet18", 1000)
    torch.save(resnet, hub / Path(ResNet18_Weights.DEFAULT.url).name)
    for name in ("weights.pt", "resnet18.pth", "checkpoint.pth"):
        torch.save(resnet, world / name)
    torch.save(_random_weights("torchvision/resnet18", 3), world / "old.pth")
    (world / "old_names.txt").write_text("ant\nbee\ncat\n")
    mobilenet = _random_weights("torchvision/mobilenet_v2", 1000)
    torch.save(mobilenet, world / "weights.pth")
    torch.save(bottleneck_names(mobilenet), world / "mbv2.pt")
    dinov2 = {name: value.half() for name, value in _random_weights("timm/vit_small_patch14_dinov2", 2).items() if not name.startswith("head.")}
    torch.save({**dinov2, "mask_token": torch.zeros(1, 384)}, world / "dinov2_vits14_pretrain.pth")


def _random_weights(name: str, num_classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    module = build(name, num_classes=num_classes).module
    for key, value in module.named_buffers():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
    return module.state_dict()
