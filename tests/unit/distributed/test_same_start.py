"""Ranks that were not started alike all raise the same error, which names the first rank and the first difference."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from dtl.config import load_config
from dtl.distributed import same_start
from dtl.distributed.same_start import check_same_start
from dtl.errors import UserError


class Rank:
    """What `check_same_start` uses of a runtime; each rank is a thread."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier, **facts: str) -> None:
        self.rank, self.shared, self.barrier = rank, shared, barrier
        self.device, self.precision = SimpleNamespace(type=facts.get("device", "cpu")), facts.get("precision", "no")

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier.wait(10)
        values = list(self.shared)
        self.barrier.wait(10)
        return values


def started(*ranks: tuple[list[str], str, dict[str, str]]) -> list[str | None]:
    """(arguments, name of the run, facts) of each rank -> each rank's error."""
    shared, barrier = [None] * len(ranks), threading.Barrier(len(ranks))

    def start(rank: int) -> str | None:
        arguments, name, facts = ranks[rank]
        try:
            check_same_start(load_config(arguments)[0], name, Rank(rank, shared, barrier, **facts))  # type: ignore[arg-type]
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(start, range(len(ranks))))


def test_what_nodes_may_have_of_their_own_is_no_difference() -> None:
    own = ["--data.workers", "3", "--data.train", "/scratch/photos", "--data.cache_dir", "/scratch/cache", "--config", "finetune"]
    other = ["--data.workers", "8", "--data.train", "/local/photos", "--data.cache_dir", "/local/cache", "--config", "finetune"]
    assert started((own, "run", {}), (other, "run", {})) == [None, None]
    assert started(([], "run", {})) == [None]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((["--run.seed", "5"], "run", {}), r"run\.seed is 5 on rank 1 \(host .*\), 0 on rank 0 \(host .*\); give all nodes the same command"),
        (([], "another", {}), r"run is 'another' on rank 1 .*, 'run' on rank 0"),
        (([], "run", {"device": "cuda"}), r"the device is 'cuda' on rank 1 .*, 'cpu' on rank 0"),
        (([], "run", {"precision": "bf16"}), r"the precision is 'bf16' on rank 1 .*, 'no' on rank 0"),
        ((["--model.options.width", "2"], "run", {}), r"model\.options\.width is 2 on rank 1 .*, None on rank 0"),
        ((["--run.seed", "5", "--data.window", "64"], "run", {}), r"\(1 more differences\); give"),
    ],
)
def test_the_first_difference_is_named_on_every_rank(other: tuple[list[str], str, dict[str, str]], message: str) -> None:
    first, second = started(([], "run", {}), other)
    assert first is not None
    assert first == second
    with pytest.raises(UserError, match=message):
        raise UserError(first)


def test_the_first_rank_that_differs_is_named_and_the_others_are_counted() -> None:
    seeds = (0, 0, 4, 5)
    errors = started(*((["--run.seed", str(seed)], "run", {}) for seed in seeds))
    assert len(set(errors)) == 1
    assert "run.seed is 4 on rank 2" in str(errors[0])
    assert "and 1 more ranks differ" in str(errors[0])


def test_versions_are_compared_and_a_missing_package_is_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.local()

    def version(package: str) -> str:
        asked.number = getattr(asked, "number", 0) + 1
        if package == "simplejpeg":
            raise same_start.PackageNotFoundError(package)
        return "1.0" if package != "timm" else threading.current_thread().name

    monkeypatch.setattr(same_start, "version", version)
    first, second = started(([], "run", {}), ([], "run", {}))
    assert first == second
    assert "the version of timm is 'ThreadPool" in str(first)
