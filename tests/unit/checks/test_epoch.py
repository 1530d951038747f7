"""`dtl verify-epoch`: the same batches and the same pixels for every world size and worker count, and it notices what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import damage
import numpy as np
import pytest
from tiny_images import image_folder

from dtl.commands import verify_epoch as command
from dtl.data.packing.pack import pack
from dtl.data.sampling import balance as balance_module
from dtl.data.sampling import plan as plan_module
from dtl.data.shards.index import Shards
from dtl.errors import UserError

COMMON = ["--image-size", "8", "--global-batch-size", "10", "--window", "16", "--json", "--quiet"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 24, "bee": 23})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=30_000, processes=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = image_folder(tmp_path_factory.mktemp("uneven"), {"ant": 24, "bee": 5, "cow": 1})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=30_000, processes=1, progress=False)
    return folder


def proof(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, Any]:
    assert command.run([str(folder), *COMMON, *options]) == code
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # more than the cores of a small machine
def test_the_same_for_every_world_and_worker_count(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = [(world, 0) for world in (1, 2, 3, 4, 7, 10)] + [(1, 1), (2, 2), (3, 3)]
    found = [proof(packed, capsys, "--world", str(w), "--workers", str(n), "--pixels", "--epoch", "3") for w, n in grid]
    found.append(proof(packed, capsys, "--world", "2", "--workers", "0", "--pixels", "--epoch", "3", "--micro-batch-size", "2"))
    for one in found:
        assert (one["expected"], one["seen"], one["duplicated"], one["missing"], one["damaged"]) == (47, 47, 0, 0, [])
    assert len({(one["order_hash"], one["pixel_hash"]) for one in found}) == 1


def test_another_epoch_seed_or_batch_is_another_sequence(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [[], ["--epoch", "1"], ["--seed", "1"], ["--global-batch-size", "9"], ["--window", "1000"]]
    found = [proof(packed, capsys, "--workers", "0", "--pixels", *one) for one in options]
    assert len({one["order_hash"] for one in found}) == len(options)
    assert len({one["pixel_hash"] for one in found}) == len(options)


def test_a_later_start_is_the_rest_of_the_epoch(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever resumes at step 2 gets what the others would have got."""
    found = [proof(packed, capsys, "--workers", "0", "--start", "2", "--pixels", "--world", world) for world in ("1", "3")]
    assert found[0]["order_hash"] == found[1]["order_hash"]
    assert found[0]["pixel_hash"] == found[1]["pixel_hash"]
    shards = Shards.open(packed)
    plan = plan_module.EpochPlan(shards.shard_sizes, seed=0, epoch=0, global_batch_size=10, window=16)
    assert found[0]["expected"] == found[0]["seen"] == 47 - plan.step_bounds(2)[0]
    with pytest.raises(UserError, match="--start 5: the epoch has 5 steps, 0 to 4"):
        command.run([str(packed), *COMMON, "--start", "5"])


def test_dropping_the_last(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = proof(packed, capsys, "--workers", "0", "--last", "drop")
    assert (one["num_samples"], one["expected"], one["seen"], one["missing"]) == (47, 40, 40, 0)


@pytest.mark.parametrize("balance", ["sqrt", "uniform"])
def test_balanced_epochs_are_proved_by_their_quotas(uneven: Path, capsys: pytest.CaptureFixture[str], balance: str) -> None:
    """Draws by quota: the same for every world, and what should come again is no duplicate."""
    found = [
        proof(uneven, capsys, "--balance", balance, "--workers", w, "--world", r, "--pixels", "--epoch", "1") for w, r in (("0", "1"), ("1", "2"), ("0", "3"))
    ]
    for one in found:
        assert (one["expected"], one["seen"], one["duplicated"], one["missing"], one["damaged"]) == (30, 30, 0, 0, [])
        assert one["distinct"] < 30
    assert len({(one["order_hash"], one["pixel_hash"]) for one in found}) == 1
    later = [proof(uneven, capsys, "--balance", balance, "--workers", "0", "--world", r, "--start", "1") for r in ("1", "4")]
    assert later[0]["order_hash"] == later[1]["order_hash"]
    assert {(one["expected"], one["seen"], one["missing"]) for one in later} == {(20, 20, 0)}


def test_a_wrong_draw_of_a_balanced_epoch_is_noticed(uneven: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = balance_module.BalancedPlan.draws

    def wrong(self: Any, positions: Any) -> Any:
        found = real(self, positions)
        found[np.asarray(positions) == 5] = (real(self, [5]) + 1)[0] % self.num_samples
        return found

    monkeypatch.setattr(balance_module.BalancedPlan, "draws", wrong)
    one = proof(uneven, capsys, "--balance", "sqrt", "--workers", "0", code=2)
    assert (one["seen"], one["duplicated"], one["missing"]) == (30, 1, 1)


def test_it_notices_what_is_missing_or_doubled(packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that gives a sample twice, and so another one never."""
    real = plan_module.EpochPlan.draws

    def wrong(self: Any, positions: Any) -> Any:
        found = real(self, positions)
        found[np.asarray(positions) == 5] = real(self, [6])[0]
        return found

    monkeypatch.setattr(plan_module.EpochPlan, "draws", wrong)
    one = proof(packed, capsys, "--workers", "0", code=2)
    assert (one["seen"], one["duplicated"], one["missing"]) == (47, 1, 1)


def test_ranks_that_read_the_same_are_noticed(packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module.RankLayout, "slots", lambda self, num_slots, rank: (0, num_slots // 2))
    one = proof(packed, capsys, "--workers", "0", "--world", "2", code=2)
    assert one["duplicated"] > 0
    assert one["missing"] > 0


def test_a_damaged_sample_keeps_its_place(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    damage.flip_bit(copy, 9)
    good = proof(packed, capsys, "--workers", "0")
    one = proof(copy, capsys, "--workers", "0", "--world", "3", code=2)
    assert (one["seen"], one["duplicated"], one["missing"]) == (47, 0, 0)
    assert one["order_hash"] == good["order_hash"]
    assert len(one["damaged"]) == 1
    assert "sample 000009 at byte" in one["damaged"][0]
