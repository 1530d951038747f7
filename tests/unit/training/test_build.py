"""From the config to data, network, dataloaders and weights, and what of it is refused early."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import torchvision
from model_folders import model_folder
from recipes import write_images
from timm.layers import resample_abs_pos_embed

from dtl.checkpoint.resume.store import Checkpoint, CheckpointStore
from dtl.config import Config, load_config
from dtl.config.models import sides
from dtl.data.shards.index import Shards
from dtl.data.splits_of_run import Splits
from dtl.distributed.runtime import Runtime
from dtl.errors import UserError
from dtl.models.build import build as build_model
from dtl.models.preprocessing import Preprocessing
from dtl.reading import Reading
from dtl.runs.folder import RunFolder
from dtl.training import build

Pair = tuple[Shards, Shards]
SMALL = ("--model.name", "networks:small", "--data.image_size", "16", "--data.workers", "0")


def config_of(*options: str) -> Config:
    return load_config([*SMALL, *options])[0]


def loaders_of(digits: Pair, runtime: Runtime, config: Config) -> Any:
    return build.build_dataloaders(config, runtime, Splits(*digits), build.build_network(config, 10, runtime))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.name", "networks:smal"), "smal"),
        (("--transfer.source", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_names_are_refused_before_anything_is_packed(tmp_path: Path, runtime: Runtime, options: tuple[str, ...], message: str) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        build.check_names(config_of(*options), folder, runtime)
    build.check_names(config_of(), folder, runtime)


def test_a_run_that_resumes_needs_its_source_no_more(tmp_path: Path, runtime: Runtime) -> None:
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "run/checkpoints/step-3").mkdir(parents=True)
    gone = ("--transfer.source", "nowhere.safetensors")
    build.check_names(config_of(*gone), folder, runtime)
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        build.check_names(config_of(*gone, "--run.resume", "never"), folder, runtime)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--phases.all.train", "[nothing.*]"), r"^phase all: .*nothing"),
        (("--phases.all.class_weights", "weights.json"), r"^phase all: class_weights is 'weights\.json': neither none, inverse or sqrt, nor a file"),
    ],
)
def test_a_mistake_in_the_last_phase_is_refused_first(digits: Pair, runtime: Runtime, options: tuple[str, ...], message: str) -> None:
    config = config_of(*options)
    network = build.build_network(config, 10, runtime)
    loaders = build.build_dataloaders(config, runtime, Splits(*digits), network)
    with pytest.raises(UserError, match=message):
        build.check_phases(build.planned(config, loaders), network, loaders, runtime, monitor="top1")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("networks:small", ""),
        ("networks:with_dropout", ""),
        ("torchvision/squeezenet1_1", "the head classifier.1 is no linear layer with a bias"),
        ("networks:squashed", "the output of the network is not the output of head"),
    ],
)
def test_a_recipe_of_dtl_trains_by_sgd_what_cannot_be_solved(runtime: Runtime, model: str, why: str) -> None:
    given = ["--config", "features", "--data.train", "photos", "--model.name", model]
    config = load_config(given)[0]
    network = build.build_network(config, 3, runtime)
    modes, state = [part.training for part in network.module.modules()], torch.get_rng_state()
    found = build.sgd_where_unsolvable(config, network, 500, runtime)
    assert [part.training for part in network.module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.phases["head"].optimizer, found.phases["head"].epochs) == (("sgd", 10) if why else ("solve", None))
    assert found.notes == ((f"phase head: optimizer sgd in place of solve: 10 epochs, lr 0.01, since {why}",) if why else ())
    assert build.sgd_where_unsolvable(config, network, 10**8, runtime).phases["head"].optimizer == "sgd"  # images, or what they take
    own = load_config([*given, "--phases.head.optimizer", "solve"])[0]
    assert build.sgd_where_unsolvable(own, network, 500, runtime) is own


def test_data_that_teaches_nothing_is_refused(tmp_path: Path, digits: Pair, runtime: Runtime) -> None:
    one, two = write_images(tmp_path / "one", {"cat": 4}), write_images(tmp_path / "two", {"cat": 4, "dog": 4})

    def opened(*options: str) -> Splits:
        return build.open_data(load_config(["--config", "finetune", *SMALL, *options])[0], runtime, lambda line: None)

    with pytest.raises(UserError, match=r"one has only one class, 'cat'; a classifier needs two or more"):
        opened("--data.train", str(one), "--data.val", str(one))
    with pytest.raises(UserError, match=r"no validation data; give --data.val FOLDER, or --data.val-fraction 0.1"):
        opened("--data.train", str(digits[0].folder), "--data.val", str(digits[0].folder))
    found = opened("--data.train", str(two), "--data.val_fraction", "0.25")
    assert (found.train.num_samples, found.val.num_samples, found.train.classes) == (6, 2, found.val.classes)


def test_more_processes_than_samples_a_step_are_refused(digits: Pair, runtime: Runtime) -> None:
    runtime.world_size = 3
    runtime.gather = lambda value: [value] * 3  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match=r"data\.global_batch_size 2 is smaller than the 3 processes"):
        loaders_of(digits, runtime, config_of("--data.global_batch_size", "2"))


def test_dataloaders_follow_the_recipe(digits: Pair, runtime: Runtime) -> None:
    config = config_of("--data.global_batch_size", "100", "--data.micro_batch_size", "10", "--data.last", "drop")
    loaders = loaders_of(digits, runtime, config)
    assert (loaders.steps_per_epoch, loaders.micro_batch_size, loaders.workers) == (14, 10, 0)
    assert loaders_of(digits, runtime, config_of("--data.micro_batch_size", "auto")).micro_batch_size is None
    debug = loaders_of(digits, runtime, config_of("--run.debug", "--data.workers", "3"))
    assert (debug.steps_per_epoch, debug.workers, len(list(debug.val_steps()))) == (build.DEBUG_TRAIN_STEPS, 0, build.DEBUG_VAL_STEPS)
    phases = build.planned(config, loaders)
    assert [(phase.name, phase.num_outputs) for phase in phases] == [("pretext", 4), ("head", 10), ("all", 10)]


def test_initial_weights_follow_the_seed_alone(runtime: Runtime) -> None:
    def weights(seed: int, torch_seed: int) -> torch.Tensor:
        torch.manual_seed(torch_seed)
        return build.build_network(config_of("--run.seed", str(seed)), 10, runtime).module.state_dict()["0.weight"]

    assert torch.equal(weights(1, 0), weights(1, 5))
    assert not torch.equal(weights(1, 0), weights(2, 0))


def test_a_network_is_placed_channels_last_only_where_asked(runtime: Runtime) -> None:
    for asked in (True, False):
        config = config_of("--model.channels_last", str(asked).lower())
        network = build.build_network(config, 10, runtime)
        normalise = build.place_network(config, network, runtime)
        images = normalise(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        assert images.is_contiguous(memory_format=torch.channels_last) is asked
        assert network.module[3].weight.is_contiguous(memory_format=torch.channels_last) is asked


def test_pretrained_weights_are_those_of_the_source(tmp_path: Path, digits: Pair, runtime: Runtime) -> None:
    folder = model_folder(tmp_path / "model", seed=4)
    config = config_of("--transfer.source", str(folder))
    network = build.build_network(config, 10, runtime)
    lines: list[str] = []
    report = build.load_pretrained(config, network, runtime, digits[0], lines.append)
    assert report is not None
    assert lines == report.lines()
    number = len(lines)
    torch.manual_seed(4)
    assert torch.equal(network.module.state_dict()["0.weight"], networks.small(3).state_dict()["0.weight"])
    assert build.load_pretrained(config_of(), network, runtime, digits[0], lines.append) is None
    assert len(lines) == number


@pytest.mark.parametrize("init", ["default", "library", "xavier"])
def test_a_new_head_beside_loaded_weights_starts_at_zero(init: str, tmp_path: Path, digits: Pair, runtime: Runtime) -> None:
    config = config_of("--transfer.source", str(model_folder(tmp_path / "model", seed=4)), "--model.init", init)
    network = build.build_network(config, 10, runtime)
    (head,) = map(network.module.get_submodule, network.heads)
    before = [parameter.clone() for parameter in head.parameters()]
    lines: list[str] = []
    report = build.load_pretrained(config, network, runtime, digits[0], lines.append)
    assert report is not None
    said = [line for line in (*lines, *report.to_dict()["notes"]) if "starts at zero" in line]
    if init == "default":
        assert not any(parameter.any() for parameter in head.parameters())
        assert len(said) == 2
        assert said[1] in said[0]
        assert said[1].startswith(f"the new head {network.heads[0]} ")
    else:
        assert all(map(torch.equal, before, head.parameters()))
        assert not said


def test_a_network_from_scratch_keeps_the_head_of_its_library(runtime: Runtime) -> None:
    network = build.build_network(config_of("--model.init", "default"), 10, runtime)
    assert network.module.get_submodule(network.heads[0]).weight.any()


def test_refused_weights_are_one_line_a_short_table_and_a_file(tmp_path: Path, digits: Pair, runtime: Runtime) -> None:
    torch.save({f"layers.{n}.weight": torch.zeros(7, 7, 3, 3) for n in range(40)}, tmp_path / "w.pth")
    config = config_of("--transfer.source", str(tmp_path / "w.pth"))
    network = build.build_network(config, 10, runtime)
    lines: list[str] = []
    with pytest.raises(UserError, match=rf"w\.pth refused \(the whole report: {tmp_path}/transfer_refused\.json\): ") as refused:
        build.load_pretrained(config, network, runtime, digits[0], lines.append, folder=tmp_path)
    assert "\n" not in str(refused.value)
    assert 4 < len(lines) < 20
    report = json.loads((tmp_path / "transfer_refused.json").read_text())
    assert report["refusals"][0] in str(refused.value)
    assert len(report["outcomes"]) == len(network.module.state_dict()) + 40


def test_refused_weights_that_look_like_another_network_say_so_in_the_line(digits: Pair, runtime: Runtime, tmp_path: Path) -> None:
    """Where the log is not shown, too."""
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "w.pth")
    config = config_of("--model.name", "timm/vit_tiny_patch16_224", "--transfer.source", str(tmp_path / "w.pth"))
    network = build.build_network(config, 10, runtime)
    with pytest.raises(UserError, match=r"refused: nothing matches.*; the weights look like torchvision/squeezenet1_1 \(50 of 50 tensors fit"):
        build.load_pretrained(config, network, runtime, digits[0], lambda line: None)


def test_a_network_of_ones_own_has_no_published_weights(digits: Pair, runtime: Runtime) -> None:
    config = config_of("--transfer.source", "pretrained")
    network = build.build_network(config, 10, runtime)
    with pytest.raises(UserError, match=r"transfer\.source is pretrained, but networks:small has no published weights; give a file with --transfer\.source"):
        build.load_pretrained(config, network, runtime, digits[0], lambda line: None)


NEW = Reading(exif=True, alpha=True)


def test_the_size_comes_from_the_weights_unless_a_number_is_given(tmp_path: Path, runtime: Runtime) -> None:
    said = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "image_size": [24, 40], "interpolation": "bicubic", "crop_ratio": 0.8}
    folder = model_folder(tmp_path / "model", preprocessing=said)

    def prepared(*options: str) -> build.Parts:
        run = RunFolder(tmp_path / "run")
        config = load_config(["--model.name", "networks:small", "--data.workers", "0", "--data.cache_dir", str(tmp_path / "cache"), *options])[0]
        return build.prepare(config, run, CheckpointStore(run.path / "checkpoints", config.checkpoint), runtime, print)

    auto = ("--data.image_size", "auto")
    parts = prepared("--transfer.source", str(folder), *auto, "--phases", "{all: {train: all}}")
    assert parts.network.preprocessing == replace(Preprocessing.from_values(said), reading=NEW)
    assert (parts.loaders.image_size, parts.loaders.val_transform.image_size, parts.loaders.train_transform.interpolation) == ((24, 40), (24, 40), "bicubic")
    assert set(parts.network.preprocessing.origins.values()) == {f"from {folder}/model.safetensors"}
    with pytest.raises(UserError, match=r"phase pretext: the task rotate needs square images, but data\.image_size is \[24, 40\]; give one number"):
        build.check_phases(prepared("--transfer.source", str(folder), *auto).phases, parts.network, parts.loaders, runtime, monitor="top1")
    given = prepared("--transfer.source", str(folder), "--data.image_size", "[16, 16]", "--data.crop_ratio", "0.9")
    assert given.network.preprocessing == replace(Preprocessing.from_values(said), image_size=16, crop_ratio=0.9, reading=NEW)
    assert given.network.preprocessing.origins["image_size"] == "data.image_size"
    assert prepared(*auto).network.preprocessing == Preprocessing(reading=NEW), "without weights the usual values"


def test_a_run_goes_on_with_the_preprocessing_that_it_began_with(runtime: Runtime) -> None:
    """Its weights may be gone. An older dtl stored none, and used that of the published weights, whatever was loaded."""
    config = config_of("--model.name", "mobilenet_v2", "--data.image_size", "96")
    network = build.build_network(config, 10, runtime)
    stored = Preprocessing(image_size=(24, 40), crop_ratio=0.7, mean=(0.5, 0.5, 0.5))
    for state, expected in (
        ({"preprocessing": {**stored.to_json(), "origins": {"mean": "from x"}}}, stored),
        ({}, replace(network.preprocessing, image_size=96, crop_ratio=224 / 232)),
    ):
        checkpoint = Checkpoint(path=Path("step-3"), step=3, groups=(), aliases={}, state=state)
        assert build.stored_preprocessing(config, network, checkpoint) == expected
    with pytest.raises(UserError, match=r"step-3/state\.json is damaged: preprocessing: KeyError 'std'"):
        build.stored_preprocessing(
            config, network, Checkpoint(path=Path("step-3"), step=3, groups=(), aliases={}, state={"preprocessing": {"mean": [1, 2, 3]}})
        )


VIT = (
    "--model.name",
    "timm/vit_tiny_patch16_224",
    "--model.options",
    "{embed_dim: 24, depth: 1, num_heads: 2}",
    "--data.workers",
    "0",
    "--phases",
    "{all: {train: all}}",
)


@pytest.mark.parametrize("size", [64, [32, 80]])
def test_a_network_of_one_size_is_built_for_the_size_that_is_wanted(tmp_path: Path, runtime: Runtime, size: int | list[int]) -> None:
    """Its constructor is told; the weights of another size are resized; model.json has what builds it again."""
    import timm

    given = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, **given)
    torch.nn.init.normal_(source.pos_embed)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    config = load_config([*VIT, "--data.image_size", str(size), "--transfer.source", str(tmp_path / "w.pth"), "--data.cache_dir", str(tmp_path / "cache")])[0]
    run = RunFolder(tmp_path / "run")
    parts = build.prepare(config, run, CheckpointStore(run.path / "checkpoints", config.checkpoint), runtime, print)
    network = parts.network
    assert network.options == {**given, "img_size": size}
    report = build.load_pretrained(config, network, runtime, parts.loaders.train, print, weights=parts.weights)
    assert report is not None
    assert report.fresh == ("head.weight", "head.bias")
    height, width = sides(parts.loaders.image_size)
    expected = resample_abs_pos_embed(source.pos_embed, [height // 16, width // 16])
    torch.testing.assert_close(network.module.get_parameter("pos_embed"), expected, rtol=0, atol=1e-6)
    assert network.module(torch.zeros(2, 3, height, width)).shape == (2, 10)
    again = build_model(network.name, num_classes=10, options=network.options)
    assert again.module.load_state_dict(network.module.state_dict())
    assert again.preprocessing.image_size == parts.loaders.image_size


def test_a_network_that_takes_one_size_only_says_which(tmp_path: Path, runtime: Runtime) -> None:
    config = load_config(["--model.name", "vit_b_16", "--data.image_size", "[224, 160]", "--data.workers", "0", "--data.cache_dir", str(tmp_path / "cache")])[0]
    network = build_model("vit_b_16", num_classes=10, meta=True)
    with pytest.raises(UserError) as refused:
        build.network_for(replace(network.preprocessing, image_size=(224, 160)), config, network, runtime)
    assert str(refused.value) == (
        "torchvision/vit_b_16 takes images of 224 pixels, not of [224, 160] (AssertionError: Wrong image width! Expected 224 but got 160!); "
        "use --data.image_size 224, or another network"
    )


def _phases(*sizes: object) -> list[str]:
    given = {"first": sizes[0], "last": sizes[1]}
    return ["--phases", json.dumps({name: {"train": "all", **({} if size is None else {"image_size": size})} for name, size in given.items()})]


def test_each_phase_has_its_size(tmp_path: Path, runtime: Runtime) -> None:
    options = ["--model.name", "networks:small", "--data.workers", "0", "--data.cache_dir", str(tmp_path / "cache"), "--data.image_size", "16"]
    run = RunFolder(tmp_path / "run")

    def prepared(*phases: str) -> build.Parts:
        config = load_config([*options, *phases])[0]
        return build.prepare(config, run, CheckpointStore(run.path / "checkpoints", config.checkpoint), runtime, print)

    parts = prepared(*_phases(None, [24, 32]))
    loaders = parts.loaders
    phases = [phase for phase in parts.phases if phase.name in ("first", "last")]  # behind those of the built-in example
    assert [loaders.size_of(phase) for phase in phases] == [16, (24, 32)]
    assert loaders.image_size == (24, 32), "what is said at the start is about the model"
    assert loaders.batch_bytes == 3 * 24 * 32 * loaders.layout(phases[0]).micro_batch_size, "the memory is that of the largest"
    for phase, size in zip(phases, ([16, 16], [24, 32])):
        loaders.use(phase)
        batch = next(loaders.train_steps(phase, 0))[0]
        assert list(batch.images.shape[2:]) == size
        assert list(next(loaders.val_steps())[0].images.shape[2:]) == size
    assert parts.network.preprocessing.image_size == 16, "what holds for phases without a size of their own, in a resume too"
    delivered = build.delivered(load_config([*options, *_phases(None, [24, 32])])[0], parts.network.preprocessing)
    assert (delivered.image_size, delivered.origins["image_size"]) == ((24, 32), "phases.last.image_size")
    turned = prepared("--phases", "{first: {train: all, task: rotate, image_size: [24, 32]}, last: {train: all}}")
    with pytest.raises(UserError, match=r"the task rotate needs square images, but phases\.first\.image_size is \[24, 32\]; give one number"):
        build.check_phases(turned.phases, turned.network, turned.loaders, runtime, monitor="top1")


def test_a_network_with_a_table_is_built_for_all_sizes_of_its_phases(runtime: Runtime) -> None:
    config = load_config([*VIT[:-2], *_phases(32, 64), "--data.image_size", "32"])[0]
    network = build.build_network(config, 10, runtime)
    found = build.with_settings(config, network.preprocessing)
    made = build.network_for(found, config, network, runtime)
    assert made.options == {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 64, "dynamic_img_size": True}
    assert made.module.get_parameter("pos_embed").shape == (1, 17, 24), "the table is that of the last phase"
    assert made.module(torch.zeros(2, 3, 32, 32)).shape == made.module(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_a_network_of_one_size_is_refused_before_phases_of_two(runtime: Runtime) -> None:
    config = load_config(["--model.name", "vit_b_16", *_phases(128, 224), "--data.image_size", "224"])[0]
    network = build_model("vit_b_16", num_classes=10, meta=True)
    with pytest.raises(UserError) as refused:
        build.network_for(network.preprocessing, config, network, runtime)
    assert str(refused.value) == (
        "phase first has images of 128 pixels, which torchvision/vit_b_16 does not take in a run whose last phase has 224 (AssertionError: Wrong image "
        "height! Expected 224 but got 128!); give all phases one size, or use another network"
    )


def test_layers_of_the_size_of_the_images_are_not_resized(runtime: Runtime) -> None:
    config = load_config(["--model.name", "timm/gmixer_12_224", "--data.image_size", "64", "--phases", "{all: {train: all}}"])[0]
    network = build_model("timm/gmixer_12_224", num_classes=10, meta=True)
    last = load_config(["--model.name", "timm/gmixer_12_224", "--phases", "{all: {train: all, image_size: 64}}"])[0]
    with pytest.raises(UserError, match=r"; use --phases\.all\.image_size 224, another network, or no pretrained weights$"):
        build.network_for(network.preprocessing, last, network, runtime, pretrained=True)
    found = replace(network.preprocessing, image_size=64)
    with pytest.raises(UserError) as refused:
        build.network_for(found, config, network, runtime, pretrained=True)
    assert str(refused.value) == (
        "timm/gmixer_12_224 takes images of 224 pixels with pretrained weights, not of 64 (its layer blocks.0.mlp_tokens.fc1 has one input for each patch); "
        "use --data.image_size 224, another network, or no pretrained weights"
    )
