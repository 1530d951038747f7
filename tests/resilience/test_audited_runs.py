"""What data.audit says about single images is honoured through any kill: the same weights, the same ledger. With other decisions a run does not go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import history, run, start, the_line
from recipes import weights_hash, write_recipe

HEADER = "path,kind,score,other,suggestion,action\n"
ACTIONS = ("drop", "relabel:3", "group", "keep", "")


def audit_csv(folder: Path, *, count: int = 90) -> None:
    """Decisions of each kind, about images of both splits."""
    rows = [f"digits/{n:04d},label,0.1,digits/{n + 1:04d},,{ACTIONS[n % len(ACTIONS)]}\n" for n in range(count)]
    (folder / "audit.csv").write_text(HEADER + "".join(rows))


def arguments(folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    audit_csv(folder)
    return ["--config", str(write_recipe(folder, checkpoint={"async": False})), "--data.audit", "audit.csv", "--data.group-check", "warn"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """An uninterrupted run for each world size."""
    runs = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"reference-{world}")
        run(arguments(folder), cwd=folder, world=world)
        runs[world] = folder / "runs/tiny"
    return runs


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_many_moments_it_is_the_same_run_with_the_same_ledger(tmp_path: Path, reference: dict[int, Path], world: int) -> None:
    words, folder = arguments(tmp_path), tmp_path / "runs/tiny"

    def killed(moment: str, step: int = 0) -> None:
        hooks = {rank: {"before": f"kill_hooks:{moment}"} for rank in range(world)}
        job = start(words, cwd=tmp_path, world=world, env={"KILL_AT": str(step)}, by_rank=hooks).wait()
        assert -9 in job.codes, job.err()

    killed("in_the_audit")
    assert not (folder / "audited.jsonl").exists()
    killed("in_the_ledger")
    killed("at_a_step", step=2)
    assert not list(folder.glob("checkpoints/step-*"))
    assert (folder / "audited.jsonl").read_bytes() == (reference[world] / "audited.jsonl").read_bytes()
    killed("at_a_step", step=8)
    assert list(folder.glob("checkpoints/step-*"))
    killed("in_the_ledger")
    job = run(words, cwd=tmp_path, world=world)
    assert "resuming at step" in job.err()
    assert weights_hash(folder) == weights_hash(reference[world])
    assert history(folder) == history(reference[world])
    assert (folder / "audited.jsonl").read_bytes() == (reference[world] / "audited.jsonl").read_bytes()


def test_a_run_does_not_go_on_with_other_decisions(tmp_path: Path) -> None:
    words = arguments(tmp_path)
    run(words, cwd=tmp_path, code=-9, env={"KILL_AT": "8"}, by_rank={0: {"before": "kill_hooks:at_a_step"}})
    audit_csv(tmp_path, count=95)
    line = the_line(run(words, cwd=tmp_path, code=2))
    assert "runs/tiny was started with different train images (data.train has changed, or the decisions in data.audit audit.csv)" in line
    line = the_line(run(words[:2], cwd=tmp_path, code=2))
    assert "was started with data.audit 'audit.csv', now it is unset" in line
    audit_csv(tmp_path)
    assert "resuming at step" in run(words, cwd=tmp_path).err()
