"""What a user can get wrong ends with status 2 and one clear line, once, on any number of ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import history, run, start, status, the_line, wait_for
from recipes import write_images, write_recipe


def empty_folder(folder: Path) -> list[str]:
    (folder / "photos").mkdir()
    return ["--data.train", "photos", "--data.val", "photos"]


def one_class(folder: Path) -> list[str]:
    write_images(folder / "photos", {"ants": 4})
    return ["--data.train", "photos", "--data.val-fraction", "0.5"]


def class_without_image(folder: Path) -> list[str]:
    write_images(folder / "photos", {"ants": 4, "bees": 4})
    (folder / "photos/cows").mkdir()
    return ["--data.train", "photos", "--data.val-fraction", "0.5"]


def truncated_image(folder: Path) -> list[str]:
    write_images(folder / "photos", {"ants": 4, "bees": 4})
    file = folder / "photos/bees/2.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    return ["--data.train", "photos", "--data.val-fraction", "0.5"]


def other_classes_in_val(folder: Path) -> list[str]:
    write_images(folder / "a", {"ants": 4, "bees": 4})
    write_images(folder / "b", {"ants": 4, "cows": 4}, seed=1)
    return ["--data.train", "a", "--data.val", "b"]


def without_validation(folder: Path) -> list[str]:
    write_images(folder / "photos", {"ants": 4, "bees": 4})
    return ["--data.train", "photos", "--data.val-fraction", "0"]


def weights_of_another_network(folder: Path) -> list[str]:
    torch.save({"a.weight": torch.ones(3, 3), "b.weight": torch.ones(7)}, folder / "other.pt")
    return ["--transfer.source", "other.pt"]


def weights_that_are_a_pickle(folder: Path) -> list[str]:
    torch.save(torch.nn.Flatten(), folder / "other.pt")
    return ["--transfer.source", "other.pt"]


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "missing folder": (lambda folder: ["--data.train", "nowhere", "--data.val", "nowhere"], "nowhere does not exist; give a folder of images"),
    "empty folder": (empty_folder, "photos holds no images"),
    "one class": (one_class, "photos has only one class, 'ants'"),
    "class without image": (class_without_image, "photos: class folder 'cows' holds no image"),
    "truncated image": (truncated_image, "1 of 8 images cannot be read: bees/2.jpg: "),
    "other classes in val": (other_classes_in_val, "b has images of 1 class that the given class list does not have: 'cows'"),
    "no validation data": (without_validation, "photos: no validation data; give --data.val FOLDER"),
    "unknown model": (lambda folder: ["--model.name", "torchvision/resnet19"], "unknown model 'torchvision/resnet19'; did you mean torchvision/resnet18"),
    "weights that do not fit": (
        weights_of_another_network,
        "transfer from other.pt refused (the whole report: runs/tiny/transfer_refused.json): nothing matches",
    ),
    "weights that are a pickle": (weights_that_are_a_pickle, "other.pt: contains no tensors, only 1 object of torch.nn.modules.flatten.Flatten"),
    "missing weights": (lambda folder: ["--transfer.source", "gone.pt"], "no pretrained weights at gone.pt; give a file"),
    "unknown key": (lambda folder: ["--data.wrkers", "1"], "unknown config key data.wrkers; did you mean data.workers"),
    "unknown pattern": (lambda folder: ["--phases.head.train", "[layr4.*]"], "phase head: train: the pattern 'layr4.*' matches no parameter"),
    "bad last": (lambda folder: ["--phases.head.train", "last:99"], "phase head: train: 'last:99' must be last:N with N from 1 (the head) to 3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_process_says_it_in_one_line(tmp_path: Path, name: str) -> None:
    prepare, words = MISTAKES[name]
    arguments = prepare(tmp_path)
    job = run(["--config", str(write_recipe(tmp_path)), *arguments], cwd=tmp_path, code=2)
    assert words in the_line(job)


@pytest.mark.parametrize("name", ["missing folder", "truncated image", "weights that do not fit", "unknown model", "unknown key"])
def test_two_ranks_say_it_once(tmp_path: Path, name: str) -> None:
    prepare, words = MISTAKES[name]
    arguments = prepare(tmp_path)
    job = run(["--config", str(write_recipe(tmp_path)), *arguments], cwd=tmp_path, world=2, code=2)
    assert words in the_line(job)
    assert "dtl:" not in job.err(rank=1)


def test_a_batch_smaller_than_the_world(tmp_path: Path) -> None:
    job = run(["--config", str(write_recipe(tmp_path, data={"global_batch_size": 1}))], cwd=tmp_path, world=2, code=2)
    assert "global_batch_size 1 is smaller than the 2 processes" in the_line(job)


def test_a_run_folder_that_is_in_use(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    first = start(["--config", str(recipe), "--phases.all.epochs", "200"], cwd=tmp_path)
    wait_for(lambda: (tmp_path / "runs/tiny/history.jsonl").exists(), what="the first run")
    second = run(["--config", str(recipe), "--phases.all.epochs", "200"], cwd=tmp_path, code=2)
    assert "another process is training in" in the_line(second)
    assert status(tmp_path / "runs/tiny")["state"] == "running"
    first.kill()
    first.wait()


def test_an_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    job = run(["--config", str(write_recipe(tmp_path))], cwd=tmp_path, world=2, code=2)
    assert "the run folder runs/tiny cannot be written: Not a directory" in the_line(job)


def test_a_loss_that_is_not_finite_names_step_lr_and_samples(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={"name": "networks:diverging"}, phases={"all": {"train": "all", "steps": 9, "lr": 0.1}})
    for world in (1, 2):
        job = run(["--config", str(recipe), "--run.name", f"world{world}"], cwd=tmp_path, world=world, code=2)
        assert "the loss is not finite at step 2 of phase all (lr 0.0" in the_line(job)
        assert re.search(r"\(lr 0\.0\d+; samples digits/\d{4}(, digits/\d{4}){3} \.\.\.\)", job.err()), job.err()
        assert status(tmp_path / f"runs/world{world}")["state"] == "failed"


def test_statistics_that_are_not_finite_end_a_run_before_they_are_kept(tmp_path: Path) -> None:
    """Its checkpoint could not be resumed from."""
    recipe = write_recipe(tmp_path, model={"name": "networks:overflowing"}, phases={"all": {"train": "all", "steps": 9, "lr": 0.1}})
    for world in (1, 2):
        job = run(["--config", str(recipe), "--run.name", f"world{world}"], cwd=tmp_path, world=world, code=2)
        assert re.search(r"running_level is not finite after step \d of phase all: lower phases\.all\.lr \(0\.1\), or add warmup or clip_norm$", the_line(job))
        assert history(tmp_path / f"runs/world{world}")[-1]["note"] == "diverged"
        assert not list((tmp_path / f"runs/world{world}/checkpoints").glob("step-*"))


def test_a_node_that_sees_other_data_is_told(tmp_path: Path) -> None:
    """One node has another copy of the images: an error on both, not a silent mixture."""
    for name, seed in (("a", 0), ("b", 5)):
        write_images(tmp_path / name / "photos", {"ants": 6, "bees": 6}, seed=seed)
    recipe = write_recipe(tmp_path, data={"global_batch_size": 4, "train": "photos", "val_fraction": 0.5})
    from harness import free_port

    port = free_port()
    jobs = []
    for rank, name in enumerate(("a", "b")):
        variables = {
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "CUDA_VISIBLE_DEVICES": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = ["--config", str(recipe), "--run.dir", str(tmp_path / "runs")]
        jobs.append(start(arguments, cwd=tmp_path / name, env={**variables, "GLOO_SOCKET_IFNAME": "lo"}))
    for job in jobs:
        job.wait().check(2)
    assert "ranks disagree on the training data" in the_line(jobs[0])


def test_the_debug_mode_overfits_one_batch_and_keeps_the_traceback(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    job = run(["--config", str(recipe), "--run.debug"], cwd=tmp_path)
    assert "overfit one batch: loss" in job.err()
    assert "it can learn" in job.err()
    assert status(tmp_path / "runs/tiny-debug")["state"] == "done"
    job = start(["--config", str(recipe), "--run.debug", "--data.train", "nowhere", "--data.val", "nowhere"], cwd=tmp_path).wait()
    assert job.codes == [1]
    assert "Traceback" in job.err()
    assert run(["--config", str(recipe), "--run.debug"], cwd=tmp_path, world=2, code=2).err().count("one process") == 1


def test_a_history_that_cannot_be_written_is_said_and_training_goes_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={"name": "obstacles:full_history"})
    run_folder = tmp_path / "runs/tiny"
    job = run(["--config", str(recipe)], cwd=tmp_path)
    assert "history.jsonl cannot be written (No space left on device): training continues, and the next write tries again" in job.err()
    assert status(run_folder)["state"] == "done"
