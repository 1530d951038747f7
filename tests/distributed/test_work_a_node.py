"""Work on all of the data (listing a source, checking an index) is done by one process of each node, and its mistakes are told once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import run
from recipes import write_images, write_recipe

from dtl.data.packing.pack import pack
from dtl.distributed.runtime import leader_of

PHASES: dict[str, Any] = {"all": {"train": "all", "steps": 2, "lr": 0.01}}


def recipe(folder: Path, **data: Any) -> list[str]:
    data = {"workers": 0, "global_batch_size": 16, **data}
    return ["--config", str(write_recipe(folder, phases=PHASES, data=data))]


def counted(folder: Path, words: list[str], *, nodes: int = 1, code: int = 0, **more: Any) -> tuple[list[int], list[int], str]:
    """Two ranks on so many nodes: how many sources each listed, how many indexes each hashed, and what was said."""
    second = "count_work" if nodes == 1 else "count_work_of_another_node"
    by_rank = {0: {"before": "packing_hooks:count_work"}, 1: {"before": f"packing_hooks:{second}"}}
    job = run(words, cwd=folder, world=2, by_rank=by_rank, code=code, **more)
    files = [[folder / f"{name}-{rank}" for rank in range(2)] for name in ("listed", "hashed")]
    listed, hashed = ([len(file.read_text()) if file.exists() else 0 for file in kind] for kind in files)
    for file in [*files[0], *files[1]]:
        file.unlink(missing_ok=True)
    return listed, hashed, job.err()


def test_one_process_of_a_node_lists_packs_and_checks(tmp_path: Path) -> None:
    words = recipe(tmp_path, train=str(write_images(tmp_path / "photos", {"cat": 30, "dog": 30})), val_fraction=0.2)
    assert counted(tmp_path, words)[:2] == ([1, 0], [2, 0]), "listed once, packed: training and validation, each once"
    again = [*words, "--run.name", "again"]
    assert counted(tmp_path, again)[:2] == ([1, 0], [2, 0]), "from the cache"
    assert counted(tmp_path, [*words, "--run.name", "apart"], nodes=2)[:2] == ([1, 1], [2, 2]), "each node does it"
    listed, hashed, _ = counted(tmp_path, ["runs/tiny"], command="evaluate")
    assert (listed, hashed) == ([1, 0], [1, 0])


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_damaged_index_is_refused_once(tmp_path: Path, nodes: int) -> None:
    pack(write_images(tmp_path / "photos", {"cat": 30, "dog": 30}), tmp_path / "packed", val_fraction=0.2, progress=False)
    words = recipe(tmp_path, train=str(tmp_path / "packed"), val=str(tmp_path / "packed"))
    assert counted(tmp_path, words, nodes=nodes)[:2] == ([0, 0], [2, 2 * (nodes - 1)])
    index = tmp_path / "packed/val/index.bin"
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(bytes(data))
    _, hashed, said = counted(tmp_path, [*words, "--run.name", "damaged"], nodes=nodes, code=2)
    assert hashed == [2, 2 * (nodes - 1)]
    lines = [line for line in said.splitlines() if line.startswith("dtl: ")]
    assert lines == [f"dtl: {index} does not belong to the manifest.json beside it (its sha256 differs); pack the data again"]


def test_a_missing_source_is_told_once(tmp_path: Path) -> None:
    _, _, said = counted(tmp_path, recipe(tmp_path, train=str(tmp_path / "nowhere")), code=2)
    assert said.count("nowhere") == 1, said


@pytest.mark.parametrize(
    ("nodes", "leaders"),
    [
        ([("a", 0)], [0]),
        ([("a", 0), ("a", 1), ("b", 0), ("b", 1)], [0, 0, 2, 2]),
        ([("a", 0), ("b", 0), ("a", 1), ("b", 1)], [0, 1, 0, 1]),  # ranks dealt out in turns
        ([("a", 0), ("a", 1), ("a", 0), ("a", 1)], [0, 0, 2, 2]),  # two launches on one host
        ([("a", 1), ("a", 0)], [1, 1]),
        ([("a", 0), ("b", 1)], [0, 1]),  # a container with a name of its own
    ],
)
def test_who_acts_for_a_node(nodes: list[tuple[str, int]], leaders: list[int]) -> None:
    assert [leader_of(rank, nodes) for rank in range(len(nodes))] == leaders
