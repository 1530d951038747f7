"""Our shards in the hands of other readers: plain webdataset (tests/unit/data/packing/test_pack.py has more of it) and Hugging Face datasets."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_images import image_folder

from dtl.data.decoding.decode import decode
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    root = image_folder(tmp_path_factory.mktemp("source"), {"ant": 9, "bee": 6, "cow": 5})
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(root, folder, shard_bytes=12_000, processes=1, progress=False)
    found = Shards.open(folder)
    assert len(found.shard_sizes) > 1
    return found


def paths(shards: Shards) -> list[str]:
    return [str(shards.folder / shard.url) for shard in shards.manifest.shards]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset 1.0.2 leaves the last tar open
def test_webdataset_decodes_the_same_pixels(shards: Shards) -> None:
    import webdataset

    found = list(webdataset.WebDataset(paths(shards), shardshuffle=False).decode("rgb8").to_tuple("__key__", "jpg", "cls"))
    gc.collect()
    assert [key for key, _, _ in found] == [shards.key(sample) for sample in range(20)]
    assert [label for _, _, label in found] == shards.labels.tolist()
    for sample, (_, image, _) in enumerate(found):
        assert np.array_equal(image, decode(shards.read([sample])[0]))  # type: ignore[arg-type]


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets_reads_them(shards: Shards, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not among the test requirements, since it brings pyarrow and pandas (375 MB): `pip install datasets` switches this on."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="brings 375 MB (pyarrow, pandas): pip install datasets switches this on")
    found = datasets.load_dataset("webdataset", data_files={"train": paths(shards)}, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache"))
    rows = list(found)
    assert [row["__key__"] for row in rows] == [shards.key(sample) for sample in range(20)]
    assert [int(row["cls"]) for row in rows] == shards.labels.tolist()
    for sample, row in enumerate(rows):
        image = row["jpg"] if isinstance(row["jpg"], Image.Image) else Image.open(io.BytesIO(row["jpg"]["bytes"]))
        assert np.array_equal(np.asarray(image.convert("RGB")), decode(shards.read([sample])[0]))  # type: ignore[arg-type]
