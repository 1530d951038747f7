"""The first day on GPUs (`python -m benchmarks.first_day`). Its runs start as those of the tests do, so tests/ is on the path of its modules."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT / "tests"), str(ROOT)) if path not in sys.path]
