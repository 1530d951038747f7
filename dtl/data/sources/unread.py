"""What dtl does not read, named for what it is, with what to do: formats of images, and the forms in which other tools keep whole data sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dtl.data.sources.base import IMAGE_EXTENSIONS

# Extensions of images that dtl does not read. Pillow reads those of _BY_PILLOW; with a package of _PLUGINS dtl reads its formats.
_BY_PILLOW = frozenset((".jp2", ".j2k", ".jpx", ".jpf", ".ico", ".tga", ".psd", ".dds", ".qoi"))
_PLUGINS = {".avif": "pillow-avif-plugin", ".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
_RAW = frozenset((".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".dng", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"))
_OTHERS = frozenset((".exr", ".hdr", ".dcm", ".nii", ".fits", ".svg", ".eps"))
UNREAD_EXTENSIONS = (_BY_PILLOW | _PLUGINS.keys() | _RAW | _OTHERS) - IMAGE_EXTENSIONS
_MOST_EXTENSIONS = 6
_MOST_ENTRIES = 1000  # that are looked at in one folder


def extension_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def describe_passed_over(names: Iterable[str]) -> str:
    """One line about files that were passed over, counted by extension; empty where there are none."""
    counts = Counter(map(extension_of, names))
    parts = []
    images = {extension: count for extension, count in counts.items() if extension in UNREAD_EXTENSIONS}
    if images:
        of = "an image format" if len(images) == 1 else "image formats"
        parts.append(f"{_counted(images)} in {of} that dtl does not read: {how_to_read(images)}")
    others = {extension: count for extension, count in counts.items() if extension not in UNREAD_EXTENSIONS}
    if others:
        parts.append(f"{_counted(others)} without an image's extension")
    return f"passed over: {'; '.join(parts)}" if parts else ""


def how_to_read(extensions: Iterable[str]) -> str:
    """What to do about images of these extensions."""
    found = sorted(extensions)
    plugins = dict.fromkeys(_PLUGINS[one] for one in found if one in _PLUGINS)
    said = [f"{', '.join(one for one in found if _PLUGINS.get(one) == plugin)} is read after pip install {plugin}" for plugin in plugins]
    found = [one for one in found if one not in _PLUGINS]
    ways = [f"Pillow reads {', '.join(by_pillow)}"] if (by_pillow := [one for one in found if one in _BY_PILLOW]) else []
    if raw := [one for one in found if one in _RAW]:
        ways.append(f"{', '.join(raw)} after pip install rawpy")
    if found:
        said.append(f"convert {'the others' if said else 'them'} to JPEG or PNG first" + (f" ({'; '.join(ways)})" if ways else ""))
    return "; ".join(said)


def data_set_of_others(folder: Path) -> str:
    """What tool's data set a folder without images is, and what to do, for a message; empty where it is none that is known."""
    places = [folder, *(folder / name for name in _names(folder) if (folder / name).is_dir())]
    names = [name for place in places for name in _names(place)]
    if any(extension_of(name) in IMAGE_EXTENSIONS - {".npy"} for name in names):
        return ""
    kind = next((kind for kind, holds in _DATA_SETS.items() if any(map(holds, names))), None)
    if kind is None:
        return ""
    if kind in _PACKED:
        return f"it is {kind}: give it to --data.train, or pack it first (dtl pack SRC DST)"
    return f"it is {kind}, which dtl does not read: write its images into a folder for each class (CLASS/IMAGE), or into tars for `dtl index` (docs/data.md)"


_PACKED = ("a data set of Hugging Face's datasets (.arrow files)", "a data set in Parquet files")
_DATA_SETS = {
    _PACKED[0]: lambda name: name.endswith(".arrow"),
    "a data set in MosaicML's format (MDS shards)": lambda name: ".mds" in name,
    _PACKED[1]: lambda name: name.endswith(".parquet"),
    "a data set in TFRecord files": lambda name: ".tfrecord" in name or name.endswith(".tfrec"),
    "a data set in LMDB": lambda name: name in ("data.mdb", "lock.mdb") or name.endswith(".lmdb"),
    "a data set in HDF5 or NumPy files": lambda name: name.endswith((".h5", ".hdf5", ".npz", ".npy")),
}


def _counted(counts: dict[str, int]) -> str:
    """`2 .heic, 1 .cr2 and 5 with other extensions`."""
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    parts = [f"{count:,} {extension or 'without any'}" for extension, count in ordered[:_MOST_EXTENSIONS]]
    rest = sum(count for _, count in ordered[_MOST_EXTENSIONS:])
    return ", ".join(parts) + (f" and {rest:,} with other extensions" if rest else "")


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry, _ in zip(entries, range(_MOST_ENTRIES))]
    except OSError:
        return []
