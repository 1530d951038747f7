"""Packing: the same bytes whatever happens on the way, nothing lost, nothing half done, and real webdataset reads it."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_folders import hashes, pack, with_bad_images
from PIL import Image
from tiny_images import encoded, image_folder, pixels

from dtl.data.decoding.decode import decode
from dtl.data.packing import tasks as pack_tasks
from dtl.data.packing.job import Job, PackOptions
from dtl.data.shards.index import Shards
from dtl.errors import UserError


def images_of(folder: Path) -> list[bytes]:
    shards = Shards.open(folder)
    found = shards.read(np.arange(shards.num_samples))
    assert all(isinstance(one, bytes) for one in found)
    return found  # type: ignore[return-value]


def test_every_image_once_with_its_own_bytes_and_label(source: Path, packed: Path) -> None:
    shards = Shards.open(packed)
    stored = images_of(packed)
    seen = Counter((shards.path(sample), stored[sample], shards.classes[shards.labels[sample]]) for sample in range(shards.num_samples))
    expected = Counter((str(path.relative_to(source)), path.read_bytes(), path.parent.name) for path in source.rglob("*.jpg"))
    assert seen == expected
    for sample in range(0, 150, 13):
        assert decode(stored[sample]).shape == (shards.heights[sample], shards.widths[sample], 3)


def test_only_the_promised_files_are_there(packed: Path) -> None:
    names = sorted(entry.name for entry in packed.iterdir())
    num_shards = len(Shards.open(packed).manifest.shards)
    assert num_shards > 3
    assert names == ["dhashes-1.npy", "index.bin", "manifest.json", "paths.bin", *(f"shard-{number:05d}.tar" for number in range(num_shards))]


def test_shards_are_nearly_equal_and_shuffled(packed: Path) -> None:
    shards = Shards.open(packed)
    assert np.ptp(shards.shard_sizes) <= 1
    changes = (np.diff(shards.labels) != 0).mean()
    assert changes > 0.5, "neighbours are of different classes more often than not"


def test_manifest_tells_the_truth_about_the_shards(packed: Path) -> None:
    manifest = Shards.open(packed).manifest
    for shard in manifest.shards:
        data = (packed / shard.url).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)


def test_index_is_what_a_reader_of_tars_finds(packed: Path) -> None:
    shards, sample = Shards.open(packed), 0
    for shard in shards.manifest.shards:
        with tarfile.open(packed / shard.url) as tar:
            for member in tar:
                assert (member.mtime, member.pax_headers) == (0, {})
                if not member.name.endswith(".cls"):
                    assert member.offset_data == shards.offsets[sample]
                    assert member.size == shards.sizes[sample]
                    sample += 1
    assert sample == shards.num_samples


@pytest.mark.parametrize("kind", ["BMP", "PNG", "GIF", "WEBP", "TIFF"])
def test_formats_keep_their_bytes_and_get_their_real_extension(tmp_path: Path, kind: str) -> None:
    # All are called .jpg: the content decides. BMP sorts before `cls` in the tar, the others after it.
    image_folder(tmp_path / "s", {"a": 3, "b": 3}, kind=kind)
    pack(tmp_path / "s", tmp_path / "d")
    assert sorted(images_of(tmp_path / "d")) == sorted(path.read_bytes() for path in (tmp_path / "s").rglob("*.jpg"))
    with tarfile.open(tmp_path / "d" / "shard-00000.tar") as tar:
        extensions = {name.split(".")[1] for name in tar.getnames()}
    assert extensions == {kind.lower(), "cls"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset 1.0.2 leaves the last tar open
def test_webdataset_reads_our_shards(packed: Path) -> None:
    import webdataset

    shards = Shards.open(packed)
    urls = [str(packed / shard.url) for shard in shards.manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [one["__key__"] for one in read] == [shards.key(sample) for sample in range(shards.num_samples)]
    assert [one["jpg"] for one in read] == images_of(packed)
    assert [int(one["cls"]) for one in read] == shards.labels.tolist()
    decoded = list(webdataset.WebDataset(urls[:1], shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls"))
    np.testing.assert_array_equal(decoded[0][0], decode(images_of(packed)[0]))
    assert [label for _, label in decoded] == shards.labels[: len(decoded)].tolist()
    gc.collect()


# --- determinism, parallel and interrupted


@pytest.mark.parametrize("processes", [2, 3])
def test_same_bytes_for_any_number_of_processes(source: Path, packed: Path, tmp_path: Path, processes: int) -> None:
    pack(source, tmp_path / "d", shard_bytes=50_000, processes=processes)
    assert hashes(tmp_path / "d") == hashes(packed)


def test_same_bytes_from_another_place(source: Path, packed: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(source, tmp_path / "elsewhere")
    pack(tmp_path / "elsewhere", tmp_path / "d", shard_bytes=50_000)
    assert hashes(tmp_path / "d") == hashes(packed)


def test_seed_and_content_change_order_and_identity(source: Path, packed: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "d", shard_bytes=50_000, seed=1)
    one, other = Shards.open(packed), Shards.open(tmp_path / "d")
    assert one.dataset_id != other.dataset_id
    assert sorted(images_of(packed)) == sorted(images_of(tmp_path / "d"))
    assert images_of(packed) != images_of(tmp_path / "d")


def test_shard_size_changes_no_order_and_no_identity(source: Path, packed: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "d")
    assert len(Shards.open(tmp_path / "d").manifest.shards) == 1
    assert images_of(tmp_path / "d") == images_of(packed)
    assert Shards.open(tmp_path / "d").dataset_id == Shards.open(packed).dataset_id


def test_killed_in_the_middle_then_run_again(source: Path, packed: Path, tmp_path: Path) -> None:
    """SIGKILL of the main process while children write: they end too, and the next run finishes the job."""
    code = f"""
import os
import time
from dtl.data import workers as pack_pool
from dtl.data.packing.pack import pack
ask = pack_pool._Child.ask
pack_pool._Child.ask = lambda self, task: (os.write(1, b"%d\\n" % self._process.pid), time.sleep(0.2), ask(self, task))[2]
pack({str(source)!r}, {str(tmp_path / "d")!r}, shard_bytes=50_000, processes=2, progress=False)
"""
    main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    children = {int(main.stdout.readline()) for _ in range(5)}
    main.send_signal(signal.SIGKILL)
    main.wait()
    main.stdout.close()
    assert not (tmp_path / "d" / "manifest.json").exists()
    deadline = time.monotonic() + 10
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "a packing process outlived its parent"
        time.sleep(0.02)
    pack(source, tmp_path / "d", shard_bytes=50_000)
    assert hashes(tmp_path / "d") == hashes(packed)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_source_that_changes_while_it_is_packed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    real = pack_tasks.write_shard

    def meddle(job: Job, split: str, number: int) -> int:
        (root / "a" / "0001.jpg").write_bytes(encoded(seed=999))
        return real(job, split, number)

    monkeypatch.setattr(pack_tasks, "write_shard", meddle)
    with pytest.raises(UserError, match=r"a/0001.jpg changed while it was packed"):
        pack(root, tmp_path / "d")


# --- unreadable images


BAD = {
    "ant/zero bytes.jpg": "the file is empty (0 bytes)",
    "ant/text.jpg": "not an image (text)",
    "bee/cut.jpg": "truncated",
    "bee/broken link.png": "No such file or directory",
    "bee/page.jpg": "not an image (an HTML page)",
}


@pytest.mark.parametrize("processes", [1, 2])
def test_unreadable_images_are_refused_by_name(tmp_path: Path, processes: int) -> None:
    with pytest.raises(UserError) as error:
        pack(with_bad_images(tmp_path / "s"), tmp_path / "d", processes=processes)
    message = str(error.value)
    assert message.startswith("5 of 45 images cannot be read: ")
    assert message.endswith("--on-error skip (training: --data.on-error skip)")
    assert "\n" not in message
    for path, reason in BAD.items():
        assert f"{path}: " in message
        assert reason in message


def test_many_unreadable_images_are_counted(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 2, "b": 2})
    for number in range(14):
        (root / "a" / f"bad{number:02d}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"14 of 18 images cannot be read: .*bad09.jpg: [^;]*; and 4 more; fix"):
        pack(root, tmp_path / "d")


def test_skip_leaves_them_out_and_reports_them(tmp_path: Path) -> None:
    root = with_bad_images(tmp_path / "s")
    report = pack(root, tmp_path / "d", on_error="skip")
    assert {path for path, _ in report.skipped} == set(BAD)
    assert all(BAD[path] in reason for path, reason in report.skipped)
    shards = Shards.open(tmp_path / "d")
    assert shards.num_samples == 40
    assert not {shards.path(sample) for sample in range(40)} & set(BAD)
    assert [shards.key(sample) for sample in range(40)] == [f"{sample:06d}" for sample in range(40)], "no holes in the numbering"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_now_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """`--on-error skip` is for images that are damaged; a permission or a disk may come back (root may read all, so the call itself fails here)."""
    root, read = image_folder(tmp_path / "s", {"a": 3, "b": 3}), Job.read

    def refused(job: Job, sample: int) -> bytes:
        if job.names[sample] == "b/0001.jpg":
            raise OSError(number, os.strerror(number))
        return read(job, sample)

    monkeypatch.setattr(Job, "read", refused)
    with pytest.raises(UserError) as error:
        pack(root, tmp_path / "d", on_error="skip", processes=1)
    reason = os.strerror(number)
    assert str(error.value).startswith(f"b/0001.jpg cannot be read now ({reason}), which does not mean that it is damaged, so it is not left out: ")
    with pytest.raises(UserError, match=f"1 of 6 images cannot be read: b/0001.jpg: {reason}"):
        pack(root, tmp_path / "e", processes=1)
    monkeypatch.undo()
    assert len(pack(root, tmp_path / "d", on_error="skip", processes=1).skipped) == 0


def test_too_little_memory_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("simplejpeg.decode_jpeg", full)
    with pytest.raises(UserError, match=r"^(a|b)/000\d.jpg: there is not enough memory to decode it, which does not mean that it is damaged: use fewer"):
        pack(root, tmp_path / "d", on_error="skip", processes=1)


def test_a_class_that_loses_all_its_images_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    (root / "wasp").mkdir()
    (root / "wasp" / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image for 1 of 3 classes: wasp \(1 of 7 images cannot be read\)"):
        pack(root, tmp_path / "d", on_error="skip")


def test_doubtful_images_are_packed_and_reported(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    data = encoded()
    table = data.index(b"\xff\xc4")
    (root / "a" / "stray.jpg").write_bytes(data[:table] + b"\x12\x34" + data[table:])
    report = pack(root, tmp_path / "d")
    assert report.doubtful == (("a/stray.jpg", "libjpeg warns of damage, but the image decodes"),)
    assert Shards.open(tmp_path / "d").num_samples == 7


def test_without_verify_only_headers_are_read(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 3, "b": 3})
    good = encoded(height=80, width=80)
    (root / "a" / "cut.jpg").write_bytes(good[: len(good) // 2])
    pack(root, tmp_path / "d", verify=False)
    assert Shards.open(tmp_path / "d").num_samples == 7


# --- splits


def test_val_fraction_is_stratified_and_by_content(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"a": 40, "b": 20})
    report = pack(root, tmp_path / "d", val_fraction=0.25)
    assert [(split.split, split.num_samples) for split in report.splits] == [("train", 45), ("val", 15)]
    train, val = Shards.open(tmp_path / "d" / "train"), Shards.open(tmp_path / "d" / "val")
    assert (train.manifest.class_counts, val.manifest.class_counts) == ((30, 15), (10, 5))
    assert not set(images_of(train.folder)) & set(images_of(val.folder))
    before = set(images_of(val.folder))
    # Renamed and copied images stay on their side.
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        path.rename(path.with_name(f"renamed-{997 - number}.jpg"))
    pack(root, tmp_path / "again", val_fraction=0.25)
    assert set(images_of(tmp_path / "again" / "val")) == before


def test_val_fraction_of_a_source_with_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the built-in digits already has the splits train, val"):
        pack("digits", tmp_path / "d", val_fraction=0.2)


def test_train_and_val_share_one_class_list(tmp_path: Path) -> None:
    image_folder(tmp_path / "s" / "train", {"a": 3, "b": 3, "c": 3})
    image_folder(tmp_path / "s" / "val", {"a": 1, "c": 2}, seed=1)
    pack(tmp_path / "s", tmp_path / "d")
    val = Shards.open(tmp_path / "d" / "val")
    assert val.classes == Shards.open(tmp_path / "d" / "train").classes == ("a", "b", "c")
    assert sorted(val.labels.tolist()) == [0, 2, 2]
    pack(tmp_path / "s" / "val", tmp_path / "alone", classes=["a", "b", "c"])
    assert sorted(Shards.open(tmp_path / "alone").labels.tolist()) == [0, 2, 2]


def test_digits(tmp_path: Path) -> None:
    report = pack("digits", tmp_path / "d")
    assert [split.num_samples for split in report.splits] == [1437, 360]
    train, val = Shards.open(tmp_path / "d" / "train"), Shards.open(tmp_path / "d" / "val")
    # Golden: the built-in example is the same data on every machine and with every version of Pillow and zlib.
    assert (train.dataset_id, val.dataset_id) == DIGITS_IDS
    assert decode(images_of(val.folder)[0]).shape == (8, 8, 3)


DIGITS_IDS = ("fdad6a96e2887c5a354b95500cd0b497", "7e4a4d4e7e5019598a992c493cc91bfe")


# --- smaller images


@pytest.mark.parametrize(("option", "expected"), [({"max_side": 50}, (25, 50)), ({"short_side": 30}, (30, 60)), ({"max_side": 500}, (100, 200))])
def test_shrinking(tmp_path: Path, option: dict[str, int], expected: tuple[int, int]) -> None:
    root = image_folder(tmp_path / "s", {"a": 1, "b": 1})
    big = {"photo.jpg": encoded(height=100, width=200), "lossless.png": encoded("PNG", height=100, width=200)}
    big["gray.jpg"] = encoded(mode="L", height=100, width=200)
    big["cmyk.jpg"] = encoded(mode="CMYK", height=100, width=200)
    big["alpha.webp"] = encoded("WEBP", mode="RGBA", height=100, width=200)
    for name, data in big.items():
        (root / "a" / name).write_bytes(data)
    pack(root, tmp_path / "d", **option)
    shards = Shards.open(tmp_path / "d")
    stored = {shards.path(sample): (data, sample) for sample, data in enumerate(images_of(tmp_path / "d"))}
    for name, data in big.items():
        found, sample = stored[f"a/{name}"]
        assert decode(found).shape[:2] == expected == (shards.heights[sample], shards.widths[sample])
        assert (found == data) == (expected == (100, 200)), "the original bytes wherever nothing has to shrink"
        with Image.open(io.BytesIO(found)) as image:
            assert image.format == ("PNG" if name.endswith(".png") else "WEBP" if expected == (100, 200) and "webp" in name else "JPEG")
            assert image.mode == {"gray.jpg": "L", "cmyk.jpg": "CMYK" if expected == (100, 200) else "RGB"}.get(name, image.mode)
    small = stored["a/0000.jpg"][0]
    assert small == (root / "a" / "0000.jpg").read_bytes()
    with Image.open(io.BytesIO(stored["a/lossless.png"][0])) as image:
        reference = Image.fromarray(pixels(100, 200)).resize(expected[::-1], Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(reference))


# --- the destination


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be 'fail' or 'skip', got 'ignore'"),
        ({"val_fraction": 1.0}, "must be 0 or more and less than 1, got 1.0"),
        ({"val_fraction": -0.1}, "must be 0 or more and less than 1, got -0.1"),
        ({"max_side": 0}, "max_side must be at least 1, got 0"),
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
        ({"quality": 101}, "quality must be between 1 and 100, got 101"),
    ],
)
def test_options_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack("digits", tmp_path / "d", **options)


def test_memory_is_a_few_columns_per_sample(tmp_path: Path) -> None:
    """200,000 samples: the main process holds no object for each. One str a name would be 87 bytes more than the 150 of today."""
    code = """
import pathlib
import numpy as np
from dtl.data.sources.base import SourceBuilder
def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return 1024 * int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
def of(labels):
    builder = SourceBuilder()
    for label in range(labels):
        names = [f"class{label:03d}/n{label:08d}_{number:06d}.JPEG" for number in range(1000)]
        builder.add(names, label=label, split=0, sizes=[1] * 1000, mtimes=[1] * 1000)
    return builder.build(kind="x", root=None, classes=(), split_names=("all",), display_names={}, notes=())
of(1).names.take(np.arange(1000)[::-1])  # what is imported and allocated only once
before = peak()
source = of(200)
assert source.names[199_999].endswith("class199/n00000199_000999.JPEG")
source.names.take(np.arange(200_000)[::-1])
print((peak() - before) / 200_000)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 80 < float(out.stdout) < 200, "the columns are 43, the names in another order 38 more: less would be no measurement"


# --- the command


def test_help_is_fast_and_without_torch() -> None:
    code = """
import sys
from dtl.commands.pack import run
try:
    run(["--help"])
except SystemExit:
    print("torch" in sys.modules, "numpy" in sys.modules)
"""
    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False False"
    assert "dtl pack photos shards --val-fraction 0.1" in out.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < 0.4


def test_real_sets(tmp_path: Path, real_images: Path) -> None:
    report = pack(real_images / "hymenoptera_data", tmp_path / "h", processes=2)
    assert [split.num_samples for split in report.splits] == [245, 153]
    shards = Shards.open(tmp_path / "h" / "train")
    names = {shards.path(sample) for sample in range(245)}
    assert {"train/ants/imageNotFound.gif", "train/ants/ant photos.jpg", "train/ants/formica.jpeg"} <= names
    assert "val/ants/F.pergan.28(f).jpg" in {Shards.open(tmp_path / "h" / "val").path(sample) for sample in range(153)}
    pack(real_images / "flowers", tmp_path / "f", processes=2)
    flowers = Shards.open(tmp_path / "f" / "val")
    assert flowers.classes[:4] == ("101", "11", "17", "2")
    assert flowers.manifest.display_names["101"] == "trumpet creeper"
    assert flowers.manifest.class_counts == (10,) * 16
    assert PackOptions() == PackOptions(**flowers.manifest.made_by["options"])
