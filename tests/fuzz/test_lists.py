"""Damaged lists and CSV files: a source or a UserError of one line, for packing and for prediction."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import strategies as st
from mutations import bounded, fuzzed, mutated, one_line

from dtl.data.sources.open import open_source
from dtl.data.wds.find import find_shards
from dtl.data.wds.labels import read_classes
from dtl.errors import UserError
from dtl.inference.images import find_images

_LISTS = [
    b"a.png 0\nb.png 1\n", b"a.png ants\r\n'b.png' bees\r\n", b'path,label\na.png,"x"\n"b.png",y\n', b"path;label\na.png;1\nb.png;2\n",
    b"\xef\xbb\xbfimage\tclass\na.png\tq\nb.png\tr\n", b"a.png\nb.png\n",
    b'path,label,split,note\na.png,x,train,"two\nlines"\nb.png,y,Test,\n', b'"file","class","is_valid"\r\n"a.png","x","True"\r\n"b.png","y","0"\r\n',
    b'["x", "y"]', b'{"x": 0, "y": 1}',
]  # fmt: skip


@fuzzed(st.one_of(mutated(_LISTS), st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))), 40)
def test_lists(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(b"")
        for name in ("l.txt", "l.csv", "l.json"):
            (folder / name).write_bytes(data)
            for read in (open_source, lambda path: open_source(path, labelled=False), lambda path: find_images([str(path)]), read_classes, _shards):
                with bounded(megabytes=64):
                    try:
                        read(folder / name)
                    except UserError as error:
                        one_line(error)
        assert len(list(folder.iterdir())) == 5


def _shards(path: Path) -> object:
    return find_shards([path])
