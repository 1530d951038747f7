"""Reading pretrained weights: every layout people have, and one clear line for what cannot be read."""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dtl.checkpoint import load_pretrained
from dtl.checkpoint.transfer.source.read import read_weights
from dtl.errors import TransferRefused, UserError
from dtl.files import hash_file


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def names(folder: Path, content: object, **options: object) -> list[str]:
    torch.save(content, folder / "w.pth")
    return list(read_weights(folder / "w.pth", **options).tensors)  # type: ignore[arg-type]


def test_a_flat_file_keeps_order_and_is_memory_mapped(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save(state, tmp_path / "w.pt")
    read = read_weights(tmp_path / "w.pt")
    assert list(read.tensors) == list(state)
    assert read.ordered
    assert read.sha256 is not None
    assert len(read.sha256) == 64
    assert all(torch.equal(read.tensors[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}},
        lambda s: {"model_state_dict": s, "loss": torch.tensor(1.0)},
        lambda s: {"classy_state_dict": {"base_model": {"model": {"trunk": s, "heads": {}}}}},
        lambda s: {"state_dict": s, "pytorch-lightning_version": "2", "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
    ],
)
def test_containers_are_undone(tmp_path: Path, wrap: object) -> None:
    state = small().state_dict()
    assert names(tmp_path, wrap(state)) == list(state)  # type: ignore[operator]


def test_wrappers_are_undone(tmp_path: Path) -> None:
    state = small().state_dict()
    assert names(tmp_path, {"state_dict": {f"module._orig_mod.{n}": v for n, v in state.items()}}) == list(state)


def test_two_networks_in_one_file_need_a_choice(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save({"state_dict": state, "state_dict_ema": {n: v + 1 for n, v in state.items()}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"'state_dict' .* and 'state_dict_ema' .*#state_dict"):
        read_weights(tmp_path / "w.pth")
    read = read_weights(f"{tmp_path / 'w.pth'}#state_dict_ema")
    assert read.container == "state_dict_ema"
    assert read.passed_over == ("state_dict",)
    with pytest.raises(UserError, match="no state dict under 'teacher'; found: 'state_dict', 'state_dict_ema'"):
        read_weights(f"{tmp_path / 'w.pth'}#teacher")


def test_a_key_that_ends_in_a_dot_is_a_prefix_of_names(tmp_path: Path) -> None:
    state = {f"{side}.{n}": v for side in ("encoder_q", "encoder_k") for n, v in small().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    assert read_weights(f"{tmp_path / 'w.pth'}#encoder_q.").prefix == "encoder_q."


class Custom(nn.Linear):
    """A class that weights_only does not know."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (argparse.Namespace(lr=1), "contains no tensors, only 1 object of argparse.Namespace; none of its code was run"),
        ({"rng": random.Random(0)}, "contains no tensors .*'rng'"),
        ([1, 2], "contains a list, not a state dict"),
        ({"epoch": 3}, "contains no tensors .*'epoch'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"not readable as .*"):
        read_weights(path)


def test_missing_file_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pretrained weights at"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"contains no weights; expected one of model.safetensors"):
        read_weights(tmp_path)


def test_safetensors_keeps_no_order_but_a_model_folder_does(tmp_path: Path) -> None:
    state = small().state_dict()
    run = tmp_path / "runs" / "a" / "model"
    run.mkdir(parents=True)
    save_file(dict(state), run / "model.safetensors")
    assert not read_weights(run / "model.safetensors").ordered
    facts = {
        "format": 1,
        "architecture": {"name": "torchvision/resnet18", "num_classes": 2},
        "classes": ["ants", "bees"],
        "display_names": {},
        "preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1], "image_size": 32, "interpolation": "bilinear", "crop_ratio": 1},
        "metrics": {},
        "made_by": {},
        "order": list(state),
    }
    (run / "model.json").write_text(json.dumps(facts))
    for folder in (run, tmp_path / "runs" / "a"):
        read = read_weights(folder)
        assert read.ordered
        assert list(read.tensors) == list(state)
        assert read.facts["classes"] == ("ants", "bees")
    (run / "model.json").write_text(json.dumps(facts | {"weights": {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(UserError, match=r"the weights .*model.safetensors are damaged"):
        read_weights(run)
    found = hash_file(run / "model.safetensors")
    (run / "model.json").write_text(json.dumps(facts | {"weights": {"bytes": found.size, "sha256": found.sha256}}))
    assert read_weights(run).ordered
    save_file({name: value + 1 for name, value in state.items()}, run / "model.safetensors")
    with pytest.raises(UserError, match=r"the weights .*model.safetensors do not match the model.json beside them"):
        read_weights(run)
    (run / "model.json").write_text(json.dumps(facts | {"classes": "ants"}))
    with pytest.raises(UserError, match=r"model.json: classes: must be a list"):
        read_weights(run)
    (run / "model.json").write_text('{"generatedBy": "another program"}')
    assert read_weights(run).facts == {}


@pytest.mark.parametrize("name", ["small-0123abcd.safetensors", "small-0123abcd.pth", "a-b-0123abcdef.v2.pth"])
def test_a_name_that_promises_a_hash_is_held_to_it(tmp_path: Path, name: str) -> None:
    save = save_file if name.endswith(".safetensors") else torch.save
    save(dict(small().state_dict()), tmp_path / name)
    with pytest.raises(UserError, match=r"according to its name, its SHA-256 begins with 0123abcd"):
        read_weights(tmp_path / name)
    digest = hash_file(tmp_path / name).sha256
    for right in (f"small-{digest[:8]}", f"small-{digest}", "small-20251231", "small-cafe", "small_0123abcd"):
        place = tmp_path / f"{right}{Path(name).suffix}"
        place.write_bytes((tmp_path / name).read_bytes())
        assert len(read_weights(place).tensors) == len(small().state_dict())


@pytest.mark.parametrize("name", ["../part.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\0", 3, ["a"], None])
def test_an_index_of_weights_names_files_beside_it(tmp_path: Path, name: object) -> None:
    place = tmp_path / "model.safetensors.index.json"
    place.write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    with pytest.raises(UserError, match=r"index.json: weight_map.fc.weight: "):
        read_weights(place)
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map":' + "[" * 5000):
        place.write_text(text)
        with pytest.raises(UserError, match=r"index.json: "):
            read_weights(place)


def test_sharded_index(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in small().state_dict().items()}
    halves = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    where = {}
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"part{number}.safetensors")
        where.update(dict.fromkeys(half, f"part{number}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    read = read_weights(tmp_path)
    assert set(read.tensors) == set(state)
    assert not read.ordered
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists part1.safetensors, which is not in the same folder"):
        read_weights(tmp_path)


def test_sharded_index_of_torch_files(tmp_path: Path) -> None:
    state = small().state_dict()
    where = {}
    for number, half in enumerate((dict(list(state.items())[:3]), dict(list(state.items())[3:]))):
        torch.save(half, tmp_path / f"pytorch_model-{number}.bin")
        where.update(dict.fromkeys(half, f"pytorch_model-{number}.bin"))
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for source in (tmp_path, index):
        read = read_weights(source)
        assert all(torch.equal(read.tensors[name], value) for name, value in state.items())
    torch.save({"0.weight": state["0.weight"], "args": argparse.Namespace()}, tmp_path / "pytorch_model-0.bin")
    with pytest.raises(UserError, match=r"according to the index, pytorch_model-0.bin contains 0.bias, but it does not"):
        read_weights(tmp_path)


def test_dicts_modules_and_arrays() -> None:
    module = small()
    assert list(read_weights(module).tensors) == list(module.state_dict())
    arrays = OrderedDict((name, value.numpy()) for name, value in module.state_dict().items())
    assert torch.equal(read_weights(arrays).tensors["3.bias"], module[3].bias)


# --- layouts of others ---


def test_every_extension_is_read(tmp_path: Path) -> None:
    state = small().state_dict()
    for suffix in (".pt", ".pth", ".th", ".bin", ".ckpt", ".tar", ".pkl"):
        torch.save(state, tmp_path / f"w{suffix}")
        assert list(read_weights(tmp_path / f"w{suffix}").tensors) == list(state)
    save_file(dict(state), tmp_path / "w.safetensors")
    assert set(read_weights(tmp_path / "w.safetensors").tensors) == set(state)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert list(read_weights(tmp_path / "old.pth").tensors) == list(state)
    assert list(read_weights(f"file://{tmp_path}/old.pth").tensors) == list(state)


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda s: {"state_dict": s, "pytorch-lightning_version": "2.4", "optimizer_states": []}, "model."),
        (lambda s: {"model": s, "iteration": 9, "__author__": "Detectron2"}, "backbone.bottom_up."),
        (lambda s: {"teacher": s, "epoch": 3}, "backbone."),
        (lambda s: {"model_ema": s}, "module."),
        (lambda s: {"student": s}, "module.backbone."),
        (lambda s: s, "base_model.model._orig_mod."),
    ],
)
def test_trainers_prefixes_and_containers_lead_to_the_network(tmp_path: Path, wrap: Callable[[object], object], prefix: str) -> None:
    source, target = small(), small()
    torch.save(wrap({prefix + name: value for name, value in source.state_dict().items()}), tmp_path / "w.pth")
    report = load_pretrained(target, tmp_path / "w.pth")
    assert report.coverage == 1.0
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_moco_and_dino_need_a_choice_and_take_it(tmp_path: Path) -> None:
    query, key, target = small(), small(), small()
    both = {f"module.encoder_{side}.{n}": v for side, net in (("q", query), ("k", key)) for n, v in net.state_dict().items()}
    torch.save({"state_dict": {**both, "module.queue": torch.zeros(8, 16)}}, tmp_path / "moco.pth")
    with pytest.raises(TransferRefused, match=r"several networks.*'encoder_[kq]\.', 'encoder_[kq]\.'"):
        load_pretrained(target, tmp_path / "moco.pth")
    load_pretrained(target, f"{tmp_path}/moco.pth#encoder_q.")
    assert torch.equal(target[0].weight, query[0].weight)
    student, teacher = ({f"backbone.{n}": v for n, v in net.state_dict().items()} for net in (query, key))
    torch.save({"student": student, "teacher": teacher}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match=r"'student' .* and 'teacher' .*#student"):
        load_pretrained(target, tmp_path / "dino.pth")
    load_pretrained(target, f"{tmp_path}/dino.pth#teacher")
    assert torch.equal(target[0].weight, key[0].weight)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_that_accelerate_saved(tmp_path: Path, name: str) -> None:
    state = small().state_dict()
    save_file(dict(state), tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    assert set(read_weights(tmp_path).tensors) == set(state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>404</html>", "a web page, not weights"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"hello", "not readable as a torch file or a pickle"),
        (b"PK\x03\x04hello", "not readable as a torch file or a pickle .a zip archive whose end is missing"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / "w.pth")
