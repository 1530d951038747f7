"""Made-up and damaged pickles: values or BadPickle, whatever the bytes; a batch of CIFAR is read or refused in one line."""

from __future__ import annotations

import io
import pickle
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from mutations import bounded, fuzzed, mutated, one_line

from dtl import pickles
from dtl.data.sources.open import open_source
from dtl.errors import UserError

_BATCH = {
    "data": np.arange(3 * 3072, dtype=np.int64).astype(np.uint8).reshape(3, 3072),
    "labels": [0, 1, 2],
    "filenames": ["a", "b", "c"],
    "x": {1: (2.5, None)},
}
_PICKLES = [pickle.dumps(_BATCH, protocol) for protocol in range(6)]
_OPCODES = [bytes([code]) for code in b"(.012FIJKLMNPQRSTUVXabcd}egihjl]oprstu)BC" + bytes(range(0x80, 0x99))]


def check_pickle(data: bytes) -> None:
    with bounded():
        try:
            found = pickles.load(io.BytesIO(data))
            for value in found.values() if isinstance(found, dict) else [found]:
                if isinstance(value, pickles.Array):
                    value.numpy()
        except pickles.BadPickle as error:
            one_line(error)


test_damaged_pickles = fuzzed(mutated(_PICKLES), 150)(check_pickle)
test_programs_of_opcodes = fuzzed(
    st.lists(st.one_of(st.sampled_from(_OPCODES), st.binary(min_size=1, max_size=4)), max_size=60).map(lambda parts: b"".join(parts) + b"."), 150
)(check_pickle)


@fuzzed(mutated(_PICKLES), 60)
def test_batches(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "cifar-10-batches-py"
        folder.mkdir()
        for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
            (folder / name).write_bytes(_PICKLES[2])
        (folder / "data_batch_3").write_bytes(data)
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}))
        with bounded():
            try:
                source = open_source(folder)
                assert source.num_samples >= 15
            except UserError as error:
                one_line(error)
        assert len(list(folder.iterdir())) == 7
