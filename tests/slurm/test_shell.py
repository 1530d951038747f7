"""The templates' shell functions, without a Slurm."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parent.parent.parent / "slurm"
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")])


def shell(commands: str, ends: int = 0, **environment: str) -> str:
    """What bash prints for `commands` after job.sh was sourced."""
    done = subprocess.run(
        ["bash", "-c", f'set -euo pipefail; source "{SLURM}/job.sh"; {commands}'],
        capture_output=True, text=True, timeout=20, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", **environment},
    )  # fmt: skip
    assert done.returncode == ends, done.stderr
    return done.stdout.strip()


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("template", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_every_option_is_explained_and_none_names_a_site(template: Path) -> None:
    options = [line for line in template.read_text().splitlines() if line.startswith("#SBATCH")]
    assert options
    for line in options:
        assert "  # " in line, line
        assert not any(word in line for word in ("--partition", "--account", "--qos", "--constraint", "--mail")), line


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("2 --phases.all.lr 0.03 --run.seed 1", "2-lr0.03-seed1"),
        ("1 --phases.all.lr=0.03", "1-lr0.03"),
        ("5 --run.seed 1 --debug", "5-seed1-debug"),
        ("3 --phases.top.train '[layer4.*, fc.*]'", "3-train_layer4.___fc.__"),
        ("4 --model.name torchvision/resnet18", "4-nametorchvision_resnet18"),
    ],
)
def test_a_sweep_element_is_named_after_its_settings(words: str, name: str) -> None:
    assert shell(f"element_name {words}") == name


@pytest.mark.parametrize(
    ("element", "words", "line"),
    [
        (
            "2",
            "3 configs/x.yaml --data.train p",
            "configs/x.yaml --run.dir runs/x-folds --run.name fold-2 --data.fold.number 2 --data.fold.of 3 --data.train p",
        ),
        ("4", "3 configs/x.yaml", "there are 3 folds, and this is element 4 of the array: submit with --array=1-3"),
        ("1", "configs/x.yaml --data.train p", "usage: sbatch --array=1-K slurm/array_folds.sbatch K CONFIG"),
    ],
)
def test_an_element_of_folds_trains_one(element: str, words: str, line: str) -> None:
    ends = 0 if element == "2" else 2
    assert line in shell(f'run_job() {{ echo "$*"; }}; run_fold_element {words} 2>&1', ends, SLURM_ARRAY_TASK_ID=element)


def test_an_element_of_a_search_is_a_worker() -> None:
    assert "usage: sbatch --array=1-W slurm/array_search.sbatch CONFIG --space FILE" in shell("run_search_element configs/x.yaml 2>&1", 2)
    stubs = "warned=; set_up() { python=(echo runs/x-search); }; open_notes() { round=0; }; wait_for_step() { status=0; }"
    stubs += '; start_step() { echo "$@"; }; log() { echo "$@"; }'
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "DTL_HOME": "."}
    said = shell(f"{stubs}; run_search_element configs/x.yaml --space s.yaml --budget 9", **array)
    assert said.splitlines()[1] == "search --config configs/x.yaml --space s.yaml --budget 9"
    assert "worker 2 of 3, round 0, search runs/x-search" in said


def port(**environment: str) -> int:
    return int(shell('round=${ROUND:-0}; choose_port; echo "$port"', **environment))


def test_jobs_that_run_side_by_side_get_ports_of_their_own_outside_the_ephemeral_range() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [port(SLURM_JOB_ID=str(number)) for number in range(1_234_560, 1_234_580)]
    assert len(set(ports)) == len(ports)
    assert not any(low <= number <= high for number in ports)
    assert all(1024 < number < 65536 for number in ports)


def test_a_port_that_somebody_listens_on_is_not_taken() -> None:
    first = port()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", first))
        other.listen()
        assert port() == first + 1
    assert port(ROUND="3") == first + 3  # a new round, a new port


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}, "8 1 nodes.yaml"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "4 1 gpus.yaml"),
        ({"SLURM_GPUS_ON_NODE": "1"}, "1 1 gpu.yaml"),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, "2 1 gpus.yaml"),
        ({}, "1 0 cpu.yaml"),
        ({"DTL_PROCESSES": "3"}, "3 0 cpu_2.yaml"),
        ({"SLURM_NNODES": "2"}, "2 0 cpu_2.yaml"),
        ({"SLURM_GPUS_ON_NODE": "2", "DTL_LAUNCH": "launch/cpu_2.yaml"}, "2 1 cpu_2.yaml"),
    ],
)
def test_ranks_and_launch_file_follow_from_the_allocation(environment: dict[str, str], ranks: str) -> None:
    told = shell('count_ranks; choose_launch_file; echo "$world $has_gpus ${launch##*/}"', DTL_HOME=str(SLURM.parent), **environment)
    assert told == ranks


def test_threads_are_shared_among_the_ranks_of_a_node() -> None:
    assert shell('count_ranks; echo "$DTL_THREADS"', SLURM_CPUS_PER_TASK="32", SLURM_GPUS_ON_NODE="4") == "8"
    assert shell('count_ranks; echo "$DTL_THREADS"', SLURM_CPUS_PER_TASK="2", SLURM_GPUS_ON_NODE="4") == "1"


# ---- a run folder that somebody else prepared

NOTES = 'run=runs/x; log() { echo "$*"; }; '


def prepared(folder: Path) -> Path:
    notes = folder / "runs/x/slurm/7"
    notes.mkdir(parents=True)
    return notes


def test_what_is_in_the_notes_is_not_run(tmp_path: Path) -> None:
    notes = prepared(tmp_path)
    (notes / "first_status").write_text("none\n")
    (notes / "tries").write_text("run[$(touch${IFS}PWNED)] the-beginning\n")
    done = shell(f"cd {tmp_path}; {NOTES} open_notes; requeue why; true", SLURM_RESTART_COUNT="1", DTL_REQUEUE="off", ends=75)
    assert "why; not requeued" in done
    assert not (tmp_path / "PWNED").exists()
    assert (notes / "tries").read_text() == "1 the-beginning\n"


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "endless"])
@pytest.mark.parametrize("name", ["first_status", "tries"])
@pytest.mark.parametrize("round", ["0", "1"])
def test_notes_are_regular_files(kind: str, name: str, round: str, tmp_path: Path) -> None:
    notes, mine = prepared(tmp_path), tmp_path / "mine"
    mine.write_text("mine")
    for one in ("first_status", "tries"):
        (notes / one).write_text("0 x\n")
    (notes / name).unlink()
    if kind == "pipe":
        os.mkfifo(notes / name)
    elif kind == "endless":
        (notes / name).touch()
        os.truncate(notes / name, 1 << 40)
    else:
        (notes / name).symlink_to(mine if kind == "link" else "/dev/zero")
    shell(f"cd {tmp_path}; {NOTES} train=(); open_notes; requeue why", SLURM_RESTART_COUNT=round, DTL_REQUEUE="off", ends=75)
    assert mine.read_text() == "mine"
    assert not (notes / "tries").is_symlink()


@pytest.mark.parametrize("place", ["runs/x/slurm", "runs/x/slurm/7", "runs/x/slurm/7/round-0"])
def test_folders_of_notes_are_no_links(place: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).symlink_to(tmp_path / "elsewhere")
    shell(f"cd {tmp_path}; {NOTES} open_notes", ends=2)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "device", "lines"])
def test_a_status_that_somebody_made(kind: str, tmp_path: Path) -> None:
    prepared(tmp_path)
    status = tmp_path / "runs/x/status.json"
    if kind == "pipe":
        os.mkfifo(status)
    elif kind == "device":
        status.symlink_to("/dev/zero")
    else:
        status.write_text('{\n "why": "one \x1b[31m",\n "why": "two"\n}\n')
    shown = shell(f'cd {tmp_path}; {NOTES} status_print; echo "why: $(status_field why)"')
    assert shown.splitlines()[-1] == ("why: one [31m" if kind == "lines" else "why:")
    assert kind == "lines" or shown.startswith("none")
