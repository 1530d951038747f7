"""Commands (pipe:) and file systems of fsspec."""

from __future__ import annotations

import hashlib
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from harness import wait_for

from dtl.config.models import DataConfig
from dtl.data.remote.fetch import Fetched, Unfetched, fetch

DATA = np.random.default_rng(0).bytes(300_000)


SHA = hashlib.sha256(DATA).hexdigest()


OPTIONS = DataConfig(retries=3, timeout=2.0)


def piped(command: str, **facts: object) -> bytes:
    file = io.BytesIO()
    fetch(f"pipe:{command}", file, options=DataConfig(retries=1, timeout=1.0), **facts)  # type: ignore[arg-type]
    return file.getvalue()


def test_the_output_of_a_command(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    assert piped(f"cat {tmp_path}/a.tar") == DATA
    assert piped(f"cat < {tmp_path}/a.tar | cat", size=len(DATA), sha256=SHA) == DATA


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("cat {tmp}/a.tar; exit 3", "the command exited with status 3 (2 attempts)"),
        ("cat {tmp}/a.tar; echo 'no such bucket' >&2; false", "the command exited with status 1: no such bucket (2 attempts)"),
        ("cat {tmp}/nothing | cat", "the command exited with status 1: cat: {tmp}/nothing: No such file or directory (2 attempts)"),
        ("no-such-program", "command not found (1 attempt)"),
        ("kill -9 $$", "the command was killed by signal 9 (2 attempts)"),
        ("sleep 20", "the command printed nothing for 1 s (2 attempts)"),
    ],
)
def test_a_failing_command_is_an_error(tmp_path: Path, command: str, said: str) -> None:
    """Webdataset takes its output for whole."""
    (tmp_path / "a.tar").write_bytes(DATA)
    with pytest.raises(Unfetched) as caught:
        piped(command.format(tmp=tmp_path))
    assert str(caught.value).endswith(said.format(tmp=tmp_path))


def test_nothing_is_left_running(tmp_path: Path) -> None:
    with pytest.raises(Unfetched):
        piped(f"(sleep 30; echo) & echo $! > {tmp_path}/pid; wait")
    assert not _runs(int((tmp_path / "pid").read_text()))


def test_what_fsspec_reads(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(DATA)
    for url in ("memory://bucket/a.tar", f"file://{tmp_path}/a.tar"):
        (tmp_path / "a.tar").write_bytes(DATA)
        for begin in (b"", DATA[:1000]):
            buffer = io.BytesIO(begin)
            assert fetch(url, buffer, options=OPTIONS, size=len(DATA), sha256=SHA) == Fetched(len(DATA), SHA)
            assert buffer.getvalue() == DATA
    with pytest.raises(Unfetched, match=r"file://.*/b.tar cannot be downloaded: file not found \(1 attempt\)"):
        fetch(f"file://{tmp_path}/b.tar", io.BytesIO(), options=OPTIONS)


def test_a_file_system_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "gcsfs", None)  # wherever it is installed
    monkeypatch.delitem(_registry, "gs", raising=False)  # ... and was used
    with pytest.raises(Unfetched, match=r"reading gs:// needs another package \(Please install gcsfs"):
        fetch("gs://bucket/a.tar", io.BytesIO(), options=OPTIONS)


def test_a_killed_process_leaves_no_command_behind(tmp_path: Path) -> None:
    code = (
        "import io; from dtl.data.remote.fetch import fetch; from dtl.config.models import DataConfig;"
        f"fetch('pipe:echo $$ > {tmp_path}/pid; while true; do printf 0123456789; sleep 0.05; done', io.BytesIO(), options=DataConfig())"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip(), what="the command")
    process.send_signal(signal.SIGKILL)
    process.wait()
    number = int((tmp_path / "pid").read_text())
    assert not _runs(number), "its next write should have ended it"


def _runs(number: int) -> bool:
    """Whether it still does after a while."""
    stat = Path(f"/proc/{number}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.02)
    return True
