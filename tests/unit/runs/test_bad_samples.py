"""The ledger of bad samples: in the file, and in the checkpoint for the case that the file is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtl.config import DataConfig
from dtl.distributed.runtime import Runtime
from dtl.runs.bad_samples import BadSamples

ENTRY = {"split": "train", "sample": 7, "shard": "shard-00000.tar", "key": "000007", "offset": 512, "reason": "crc32", "message": "..."}


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(device="cpu", precision="no")


def test_what_the_file_has_lost_comes_back_from_the_checkpoint(tmp_path: Path, runtime: Runtime) -> None:
    path = tmp_path / "bad_samples.jsonl"
    first = BadSamples(path, runtime, DataConfig(on_error="skip", max_bad=2), known=[ENTRY])
    assert first.count == 1
    assert json.loads(path.read_text()) == ENTRY
    path.write_text(path.read_text() + '{"split": "val", "sam')  # torn by a kill
    again = BadSamples(path, runtime, DataConfig(on_error="skip", max_bad=2), known=[ENTRY])
    assert again.entries == [ENTRY]
    assert again.count == 1
