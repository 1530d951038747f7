"""For the tests of training: the digits as shards, opened once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dtl.data.open import ensure_packed
from dtl.data.shards.index import Shards
from dtl.distributed.runtime import Runtime


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, Shards]:
    """Training and validation shards of the built-in digits: 1,437 and 360 images of 10 classes."""
    from dtl.config.models import DataConfig

    options = DataConfig(cache_dir=str(tmp_path_factory.mktemp("digits")))
    train, val = (Shards.open(ensure_packed("digits", options, split=split, progress=False, log=lambda line: None)) for split in ("train", "val"))
    return train, val


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with Runtime.alone("cpu") as alone:
        yield alone
