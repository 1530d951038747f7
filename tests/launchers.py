"""The real launchers, started on the real entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from harness import free_port

ROOT = Path(__file__).resolve().parents[1]


SCRIPT = str(ROOT / "dtl/train.py")


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def launch(command: list[str], cwd: Path, *, limit: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    simulated = os.environ.get("GPUSIM_BUILD")  # pytest --device sim
    environment = {
        **os.environ,
        "DTL_CACHE": str(cwd / "cache"),
        "HF_HOME": str(cwd / "hf"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *([f"{simulated}/site"] if simulated else [])]),
        "GLOO_SOCKET_IFNAME": "lo",
        **variables,
    }
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=limit, check=False)


def port() -> list[str]:
    return ["--main_process_port", str(free_port())]
