"""Shards that others wrote: indexed without a change, trained on as ours, and refused by name where they are not sound."""

from __future__ import annotations

import gc
import gzip
import hashlib
import json
import pickle
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_images import encoded, huge_bmp, image_folder
from wds_tars import numbered, sample, with_json, write_tar

from dtl.commands import index as command
from dtl.data.decoding.decode import decode
from dtl.data.open import ensure_packed
from dtl.data.packing.pack import pack
from dtl.data.shards.index import Manifest, Shards
from dtl.data.wds.index import index_shards
from dtl.errors import UserError


def indexed(*sources: Path | str, **options: Any) -> Shards:
    return Shards.open(index_shards(sources, progress=False, **{"processes": 1, **options}).folder)


def as_webdataset_reads(paths: list[Path]) -> list[dict[str, Any]]:
    import webdataset

    found = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    gc.collect()
    return found


def check_like_webdataset(shards: Shards, paths: list[Path], image: str = "jpg") -> None:
    expected = as_webdataset_reads(paths)
    assert [shards.key(number) for number in range(shards.num_samples)] == [one["__key__"] for one in expected]
    assert shards.read(np.arange(shards.num_samples)) == [one[image] for one in expected]
    assert shards.shard_sizes.sum() == len(expected)


interop = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset 1.0.2 leaves the last tar open


# --- what others write


@interop
@pytest.mark.parametrize("fields", [{"mtime": None}, {"mtime": 0.0}, {"mtime": 1700000000.5}])
def test_webdatasets_own_writer(tmp_path: Path, fields: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Its default is the time of day with a fraction, so a PAX header before each member."""
    import webdataset

    with webdataset.ShardWriter(str(tmp_path / "imagenet-%03d.tar"), maxcount=7, verbose=0, **fields) as writer:
        for number in range(20):
            image = encoded(seed=number, height=10 + number % 3, width=16)
            writer.write({"__key__": f"n0144_{number}", "jpg": image, "cls": number % 4, "json": {"filename": "x" * number}})
    capsys.readouterr()
    paths = sorted(tmp_path.glob("*.tar"))
    before = [path.read_bytes() for path in paths]
    shards = indexed(tmp_path)
    check_like_webdataset(shards, paths)
    assert shards.labels.tolist() == [number % 4 for number in range(20)]
    assert shards.classes == ("0", "1", "2", "3")
    assert shards.heights.tolist() == [10 + number % 3 for number in range(20)]
    assert [path.read_bytes() for path in paths] == before, "the shards are only read"
    assert [shard.url for shard in shards.manifest.shards] == [path.name for path in paths]
    assert [shard.sha256 for shard in shards.manifest.shards] == [hashlib.sha256(data).hexdigest() for data in before]


@interop
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("long", [False, True])
def test_every_tar_format_with_long_and_foreign_names(tmp_path: Path, kind: int, long: bool) -> None:
    folder = "ä ö/日本" + ("/" + "d" * 90 if long else "")
    if kind == tarfile.USTAR_FORMAT:
        folder = "/".join(["plain" * 8] * (3 if long else 1))
    longest = 99 if kind == tarfile.USTAR_FORMAT else 180
    members = []
    for number in range(4):
        name = f"{folder}/Bild{number}" + ("x" * (longest - 20) if long else "")
        members += sample(name, number % 2, seed=number, extension="JPEG")
    path = write_tar(tmp_path / "a.tar", members, kind=kind)
    shards = indexed(path)
    check_like_webdataset(shards, [path], "jpeg")
    again = pickle.loads(pickle.dumps(shards))
    assert [again.key(number) for number in range(4)] == [name.rpartition(".")[0] for name, _ in members[::2]]
    assert np.array_equal(decode(shards.read([2])[0]), decode(members[4][1]))  # type: ignore[arg-type]


@interop
@pytest.mark.parametrize(
    ("extension", "kind"),
    [("JPEG", "JPEG"), ("jpg", "JPEG"), ("Png", "PNG"), ("webp", "WEBP"), ("BMP", "BMP"), ("tiff", "TIFF"), ("gif", "GIF"), ("ppm", "PPM")],
)
def test_any_image_extension_in_any_case(tmp_path: Path, extension: str, kind: str) -> None:
    path = write_tar(tmp_path / "a.tar", [m for n in range(3) for m in sample(f"k{n}", n, seed=n, extension=extension, kind=kind)])
    check_like_webdataset(indexed(path), [path], extension.lower())


def test_system_tar_reads_as_well(tmp_path: Path) -> None:
    """GNU tar itself, class folders as keys, ./ before the names, folders as members."""
    image_folder(tmp_path / "photos", {"ant": 4, "bee": 5})
    subprocess.run(["tar", "--sort=name", "-cf", str(tmp_path / "photos.tar"), "-C", str(tmp_path / "photos"), "."], check=True)
    shards = indexed(tmp_path / "photos.tar")
    assert shards.classes == ("ant", "bee")
    assert shards.labels.tolist() == [0] * 4 + [1] * 5
    assert shards.key(0) == "./ant/0000"
    assert shards.read([4]) == [(tmp_path / "photos/bee/0000.jpg").read_bytes()]


@interop
def test_several_members_a_key_and_members_of_no_sample(tmp_path: Path) -> None:
    members = [("README", b"no dot"), (".DS_Store", b""), ("__meta__/x.jpg", b"?")]
    for number in range(3):
        members += sample(f"k{number}", number, seed=number, txt=b"a caption", npy=b"x" * 3000, **{"seg.png": encoded("PNG")}, empty=b"")
    path = write_tar(tmp_path / "a.tar", members)
    report = index_shards([path], processes=1, progress=False)
    check_like_webdataset(Shards.open(report.folder), [path])
    assert report.notes == ("3 members belong to no sample (the first: README): hidden, without an extension, or __named__ so",)


def test_a_size_beyond_octal_and_in_pax_headers(tmp_path: Path) -> None:
    """Base 256, which GNU tar writes for what octal cannot hold, and sizes in PAX records."""
    path = numbered(tmp_path / "a.tar", 0, 3)
    data = bytearray(path.read_bytes())
    size = int(data[124:135], 8)
    data[124:136] = b"\x80" + size.to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    plain = indexed(path).sizes.tolist()
    assert plain[0] == size
    write_tar(tmp_path / "b.tar", [*sample("k0", 0), *sample("k1", 1)], pax_headers={"comment": "ü", "SCHILY.x": "1"})
    assert indexed(tmp_path / "b.tar", out=tmp_path / "out").num_samples == 2


# --- labels


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["0", " 2\n", "1"], ("0", "1", "2"), [0, 2, 1]),
        (["cat", "ant", "cat"], ("ant", "cat"), [1, 0, 1]),
        (["n02", "n01", "n010"], ("n01", "n010", "n02"), [2, 0, 1]),
        (["007", "1_0", "x"], ("007", "1_0", "x"), [0, 1, 2]),
    ],
)
def test_cls_is_a_number_or_a_name(tmp_path: Path, labels: list[str], classes: tuple[str, ...], expected: list[int]) -> None:
    path = write_tar(tmp_path / "a.tar", [m for n, label in enumerate(labels) for m in sample(f"k{n}", label, seed=n)])
    shards = indexed(path)
    assert shards.classes == classes
    assert shards.labels.tolist() == expected
    assert shards.manifest.class_counts == tuple(np.bincount(expected, minlength=len(classes)).tolist())


def test_labels_in_json(tmp_path: Path) -> None:
    fields = [{"label": 1, "meta": {"name": "bee"}}, {"label": 0, "meta": {"name": "ant"}}, {"label": "1", "meta": {"name": "bee"}}]
    path = write_tar(tmp_path / "a.tar", [m for n, one in enumerate(fields) for m in with_json(f"k{n}", one, seed=n)])
    with pytest.raises(UserError, match=r"it has no cls; .*--label-field with a field of its json \(label, meta\)"):
        indexed(path)
    assert indexed(path, label_field="label").labels.tolist() == [1, 0, 1]
    assert command.run([str(path), "--label-field", "meta.name", "--out", str(tmp_path / "named"), "--quiet"]) == 0
    named = Shards.open(tmp_path / "named")
    assert (named.classes, named.labels.tolist()) == (("ant", "bee"), [1, 0, 1])
    for field, said in [("other", "has no field other; it has label, meta"), ("meta", "not a number or a name"), ("txt", "no field txt")]:
        with pytest.raises(UserError, match=said):
            indexed(path, label_field=field, existing="replace")


def test_labels_from_another_member(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(f"k{n}", 9, seed=n, kind_of=b"dog" if n % 2 else b"cat")])
    assert indexed(path, label_field="kind_of").labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("content", ["zero\none\ntwo\n", '["zero", "one", "two"]', '{"one": 1, "two": 2, "zero": 0}'])
def test_class_names_for_numbers(tmp_path: Path, content: str) -> None:
    numbered(tmp_path / "t" / "a.tar", 0, 6)
    names = tmp_path / ("names.json" if content[0] in "[{" else "names.txt")
    names.write_text(content)
    assert command.run([str(tmp_path / "t"), "--classes", str(names), "--quiet"]) == 0
    shards = Shards.open(tmp_path / "t")
    assert shards.classes == ("zero", "one", "two")
    assert shards.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_validation_set_with_the_classes_of_training(tmp_path: Path) -> None:
    train = indexed(write_tar(tmp_path / "train" / "a.tar", [m for n, c in enumerate("abc") for m in sample(f"k{n}", c, seed=n)]))
    val_tar = write_tar(tmp_path / "val" / "a.tar", sample("v", "c", seed=9))
    val = indexed(val_tar, classes=train.classes)
    assert (val.classes, val.labels.tolist()) == (train.classes, [2])
    assert command.run([str(tmp_path / "val"), "--classes", str(tmp_path / "train"), "--overwrite", "--quiet"]) == 0
    with pytest.raises(UserError, match="label 'c' of sample v is not one of the 2 classes given"):
        indexed(val_tar, classes=("a", "b"), existing="replace")


REFUSED_LABELS = [
    (["0", "cat"], "some labels are numbers and some are names: 0 of sample k0, 'cat' of sample k1"),
    (["-1", "1"], "label -1 of sample k0 is below 0"),
    (["0", "99999"], "labels go up to 99999 .sample k1., but only 2 different ones"),
    (["0", ""], r"a.tar: sample k1 at byte \d+: its .cls is empty"),
    (["0", "a\nb"], "its .cls has several lines"),
    (["0", "\udcff"], "its .cls is not text"),
]


@pytest.mark.parametrize(("labels", "said"), REFUSED_LABELS)
def test_labels_that_are_none(tmp_path: Path, labels: list[str], said: str) -> None:
    members = []
    for number, label in enumerate(labels):
        members += [(f"k{number}.jpg", encoded(seed=number)), (f"k{number}.cls", label.encode("utf-8", "surrogateescape"))]
    with pytest.raises(UserError, match=said):
        indexed(write_tar(tmp_path / "a.tar", members))


def test_labels_from_two_places_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("d/k0", 1), ("d/k1.jpg", encoded(seed=1))])
    with pytest.raises(UserError, match="the label of sample d/k0 is in its cls, that of sample d/k1 in its folder"):
        indexed(path)
    with pytest.raises(UserError, match="all keys have the one folder 'd'"):
        indexed(path, label_field="folder")


def test_gaps_and_labels_from_one_are_told(tmp_path: Path) -> None:
    for labels, said in (((0, 3), "2 of the labels 0 to 3 have no sample"), ((1, 2), "the labels seem to be counted from 1")):
        path = write_tar(tmp_path / "a.tar", [m for n, label in enumerate(labels) for m in sample(f"k{n}", label, seed=n)])
        report = index_shards([path], processes=1, progress=False, existing="replace")
        assert said in report.notes[0]


# --- samples that cannot be used


def broken_samples() -> dict[str, tuple[list[tuple[str, bytes]], str]]:
    good = encoded(seed=3)
    return {
        "no image": ([("b.cls", b"1")], "it has no image, only .cls"),
        "no label": ([("b.jpg", good)], "it has no cls, and no folder in its key that could be its label, only .jpg"),
        "empty image": ([("b.jpg", b""), ("b.cls", b"1")], "its image: the file is empty (0 bytes)"),
        "no picture": ([("b.jpg", b"<html>404</html>"), ("b.cls", b"1")], "its image: not an image (an HTML page)"),
        "two images": ([("b.jpg", good), ("b.png", good), ("b.cls", b"1")], "it has 2 images: .jpg, .png; say which with --image-field"),
        "a dotted key": (
            [("b.v1.jpg", good), ("b.v2.jpg", good), ("b.cls", b"1")],
            "it has 2 images: .v1.jpg, .v2.jpg (a key ends at the first dot of its name); say which with --image-field",
        ),
    }


@pytest.mark.parametrize("which", list(broken_samples()))
def test_a_sample_that_cannot_be_used(tmp_path: Path, which: str) -> None:
    members, reason = broken_samples()[which]
    path = write_tar(tmp_path / "x.tar", [*sample("a", 0, seed=1), *members, *sample("c", 2, seed=2)])
    with pytest.raises(UserError) as refused:
        indexed(path)
    message = str(refused.value)
    assert message.startswith(f"1 sample is not usable: {path}: sample b at byte ")
    assert reason in message
    assert "--on-error skip" in message
    assert not (tmp_path / "manifest.json").exists()
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"
    report = index_shards([path], on_error="skip", processes=1, progress=False)
    assert report.num_skipped == 1
    assert reason in report.skipped[0][1]
    shards = Shards.open(tmp_path)
    assert [shards.key(number) for number in range(2)] == ["a", "c"]


def test_which_image(tmp_path: Path) -> None:
    members = [m for n in range(2) for m in sample(f"k{n}", n, seed=n, png=encoded("PNG", seed=n + 5))]
    shards = indexed(write_tar(tmp_path / "a.tar", members), image_field=".png")
    assert shards.read([0]) == [encoded("PNG", seed=5)]


def test_an_image_of_60000_by_60000_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [*sample("a", 0), ("b.bmp", huge_bmp()), ("b.cls", b"1")])
    with pytest.raises(UserError, match=r"sample b at byte .*60000 x 60000|too many pixels"):
        indexed(path)


# --- shards that are not sound


def test_members_that_are_not_adjacent(tmp_path: Path) -> None:
    a, b = sample("a", 0, seed=1), sample("b", 1, seed=2)
    for on_error in ("fail", "skip"):
        with pytest.raises(UserError, match=r"x.tar: the members of sample a are not next to each other.*tar --sort=name"):
            indexed(write_tar(tmp_path / "x.tar", [a[0], b[0], a[1], b[1]]), on_error=on_error)


def test_keys_and_members_that_are_there_twice(tmp_path: Path) -> None:
    a, b, other = sample("a", 0, seed=1), sample("b", 1, seed=2), sample("a", 1, seed=3)
    with pytest.raises(UserError, match=r"x.tar: two samples have the key a \(samples 0 and 2 of the shard\)"):
        indexed(write_tar(tmp_path / "x.tar", [*a, *b, *other]))
    with pytest.raises(UserError, match=r"x.tar: member a.jpg at byte \d+ is there twice"):
        indexed(write_tar(tmp_path / "x.tar", [a[0], a[0], a[1]]))


def test_the_same_shard_twice(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.tar", 0, 3)
    (tmp_path / "link.tar").symlink_to(path)
    with pytest.raises(UserError, match=r"link.tar is named twice"):
        indexed(tmp_path)
    (tmp_path / "link.tar").unlink()
    (tmp_path / "b.tar").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"b.tar is a copy of .*a.tar; each of its samples would count twice"):
        indexed(tmp_path)


@pytest.mark.parametrize("packer", ["gzip", "bz2", "xz"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.xyz", "a.tgz"])
def test_compressed_tars_are_refused_with_the_command(tmp_path: Path, packer: str, name: str) -> None:
    import bz2
    import lzma

    plain = numbered(tmp_path / "plain" / "p.tar", 0, 2).read_bytes()
    path = tmp_path / name
    path.write_bytes({"gzip": gzip, "bz2": bz2, "xz": lzma}[packer].compress(plain))
    with pytest.raises(UserError, match="is compressed") as refused:
        indexed(path)
    line = str(refused.value).split("`")[1]
    subprocess.run(line, shell=True, check=True)
    made = [other for other in tmp_path.glob("*.tar") if other != path]
    assert made[0].read_bytes() == plain


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.type, member.linkname = kind, "other.jpg"
        tar.addfile(member)
    with pytest.raises(UserError, match=r"member a.jpg at byte 0 is a (symbolic|hard) link"):
        indexed(path)


def cut_everywhere(size: int) -> list[int]:
    return [0, 1, 511, 512, 600, 1023, 1024, size // 2 // 512 * 512, size // 2, size - 10_000]


def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [m for n in range(5) for m in sample(f"k{n}", n, seed=n)]).read_bytes()
    ends = max(at for at in range(0, len(whole), 512) if any(whole[at : at + 512])) + 512
    path = tmp_path / "cut.tar"
    (tmp_path / "whole.tar").unlink()
    for size in [*cut_everywhere(ends), *range(ends - 1024, ends + 1, 128), ends + 512, ends + 513, ends + 1023]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut.tar: damaged at byte \d+: .*(it was cut|0 bytes).*; get the shard anew"):
            indexed(path)
    path.write_bytes(whole[: ends + 1024])
    assert indexed(path).num_samples == 5, "the two zero blocks are enough"


def test_a_damaged_header_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [m for n in range(3) for m in sample(f"k{n}", n, seed=n)], mtime=0.5)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar]
    for start in starts:
        for place in (0, 124, 130, 148, 156, 257, 511):
            data = bytearray(whole)
            data[start + place] ^= 4
            path.write_bytes(data)
            with pytest.raises(UserError, match=rf"a.tar: damaged at byte {start}: this is no tar header"):
                indexed(path)
        path.write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])
        with pytest.raises(UserError, match=r"a.tar: damaged at byte \d+"):
            indexed(path)
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="bytes behind the end mark"):
        indexed(path)


def test_what_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"<!doctype html><html>Not found</html>" + b" " * 600)
    with pytest.raises(UserError, match=r"at byte 0: this is no tar header \(it looks like an HTML page\)"):
        indexed(path)


def test_random_damage_never_passes_in_silence(tmp_path: Path) -> None:
    """Random blocks overwritten: refused, or the samples are those of the whole tar but for the one hit.

    A block of up to 600 bytes that leaves all headers alone reaches into one sample only: 1,023 bytes part two samples' contents.
    """
    path = write_tar(tmp_path / "a.tar", [m for n in range(6) for m in sample(f"k{n}", n, seed=n)])
    whole, random = path.read_bytes(), np.random.default_rng(0)
    with tarfile.open(path) as tar:
        starts = [member.offset for member in tar if member.name.endswith(".jpg")]

    def content(shards: Shards) -> dict[str, tuple[int, str]]:
        return {shards.key(n): (int(shards.crcs[n]), shards.classes[shards.labels[n]]) for n in range(shards.num_samples)}

    good = content(indexed(path))
    outcomes = Counter[str]()
    for _ in range(60):
        data = bytearray(whole)
        at, length = int(random.integers(0, len(whole) - 600)), int(random.integers(1, 600))
        data[at : at + length] = random.bytes(1) * length
        path.write_bytes(data)
        try:
            left = content(indexed(path, existing="replace", on_error="skip"))
        except UserError:
            outcomes["refused"] += 1
            continue
        other = {key for key in good if left.get(key) != good[key]}
        assert left.keys() <= good.keys()
        assert other <= {f"k{n}" for n, start in enumerate(starts) if start < at + length and at < (*starts, len(whole))[n + 1]}
        outcomes[f"{len(other)} other"] += 1
    assert outcomes.keys() == {"refused", "0 other", "1 other"}, outcomes
    assert outcomes["refused"] >= 20, outcomes


# --- which shards, where the index goes


def test_patterns_lists_and_folders_name_the_same(tmp_path: Path) -> None:
    for number in range(3):
        numbered(tmp_path / f"t-{number:02d}.tar", 10 * number, 4)
    (tmp_path / "list.txt").write_text("# mine\nt-00.tar\n\nt-{01..02}.tar\n")
    ids = {
        indexed(source, out=tmp_path / f"out{number}").dataset_id
        for number, source in enumerate([tmp_path, f"{tmp_path}/t-{{00..02}}.tar", f"{tmp_path}/t-*.tar", tmp_path / "list.txt"])
    }
    assert len(ids) == 1
    assert indexed(tmp_path / "t-01.tar", tmp_path / "t-00.tar").labels.tolist() == [1, 2, 0, 1, 0, 1, 2, 0]


def test_urls_are_relative_and_may_move_together(tmp_path: Path) -> None:
    numbered(tmp_path / "all" / "shards" / "a.tar", 0, 4)
    shards = indexed(tmp_path / "all" / "shards", out=tmp_path / "all" / "index")
    assert shards.manifest.shards[0].url == "../shards/a.tar"
    (tmp_path / "all").rename(tmp_path / "moved")
    assert all(isinstance(one, bytes) for one in Shards.open(tmp_path / "moved/index").read(range(4)))


REFUSED_SOURCES = [
    ("{tmp}/t-{{00..09}}.tar", r"t-02.tar does not exist \(8 of 10 shards are missing\)"),
    ("{tmp}/t-0.tar", r"t-0.tar does not exist; did you mean '.*/t-0[01].tar'\?"),
    ("{tmp}/x-*.tar", "no file matches"),
    ("{tmp}/nothing", "nothing does not exist"),
    ("{tmp}/empty", "holds no tar files"),
    ("{tmp}/t-{{0..3.tar", "does not exist"),
    ("http://host/t-{{00..01}}.tar", "say where it goes: --out FOLDER"),
    ("{tmp}/text.tar", "this is no tar header .it looks like text."),
]


@pytest.mark.parametrize(("source", "said"), REFUSED_SOURCES)
def test_what_is_not_there(tmp_path: Path, source: str, said: str) -> None:
    numbered(tmp_path / "t-00.tar", 0, 2)
    numbered(tmp_path / "t-01.tar", 5, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("words " * 200)
    with pytest.raises(UserError, match=said):
        indexed(source.format(tmp=tmp_path))


def test_two_folders_need_a_place_for_the_index(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a" / "0.tar", 0, 2), numbered(tmp_path / "b" / "0.tar", 5, 2)
    with pytest.raises(UserError, match=r"the shards lie in 2 folders .*--out FOLDER"):
        indexed(a, b)
    assert indexed(a, b, out=tmp_path / "out").num_samples == 4


def test_an_index_or_a_packed_set_that_is_there(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t" / "a.tar", 0, 3)
    first = indexed(path).dataset_id
    with pytest.raises(UserError, match=r"has an index already; .*--overwrite"):
        indexed(path)
    assert indexed(path, existing="replace").dataset_id == first
    pack(image_folder(tmp_path / "photos", {"a": 2, "b": 2}), tmp_path / "packed", processes=1, progress=False)
    before = (tmp_path / "packed/manifest.json").read_bytes()
    with pytest.raises(UserError, match="was packed by dtl and has its index"):
        indexed(tmp_path / "packed", existing="replace")
    assert (tmp_path / "packed/manifest.json").read_bytes() == before


def test_a_folder_of_several_splits_is_refused_with_the_command(tmp_path: Path) -> None:
    numbered(tmp_path / "in-train-0.tar", 0, 3)
    numbered(tmp_path / "in-train-1.tar", 5, 3)
    numbered(tmp_path / "in-validation-0.tar", 10, 3)
    with pytest.raises(UserError, match="holds the shards of train, val; index each split by itself") as refused:
        indexed(tmp_path)
    arguments = str(refused.value).partition("dtl index ")[2].replace("'", "").split()
    assert command.run([*arguments, "--quiet"]) == 0
    assert Shards.open(tmp_path / "train-index").num_samples == 6


def test_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    for number in range(5):
        numbered(tmp_path / f"{number}.tar", 10 * number, 4)
    files = []
    for processes in (1, 3):
        index_shards([tmp_path], out=tmp_path / "out", processes=processes, progress=False, existing="replace")
        files.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"manifest.json", "index.bin", "keys.bin"}


def test_an_error_in_a_process_is_one_line(tmp_path: Path) -> None:
    numbered(tmp_path / "a.tar", 0, 3)
    (tmp_path / "b.tar").write_bytes(numbered(tmp_path / "c.tar", 9, 2).read_bytes()[:700])
    with pytest.raises(UserError, match=r"b.tar: damaged at byte"):
        indexed(tmp_path, processes=2)


def test_empty_shards_are_allowed_but_not_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="no usable sample in 1 shard"):
        indexed(tmp_path)
    numbered(tmp_path / "b.tar", 0, 3)
    assert indexed(tmp_path).shard_sizes.tolist() == [0, 3]


def test_a_lost_table_of_names_only_loses_names(tmp_path: Path) -> None:
    shards = indexed(numbered(tmp_path / "a.tar", 0, 3))
    assert shards.damaged(1, "why").key == "s00001"
    (tmp_path / "keys.bin").write_bytes(b"DTLSTR01")
    assert Shards.open(tmp_path).damaged(1, "why").key == ""
    assert all(isinstance(one, bytes) for one in Shards.open(tmp_path).read([0, 1, 2]))


# --- given to training


def given_to_training(tmp_path: Path, source: Path | str, said: list[str], **options: Any) -> Path:
    return ensure_packed(source, **{"split": "train", "cache_dir": tmp_path / "cache", "progress": False, "log": said.append, **options})


def test_a_folder_of_tars_is_indexed_once_into_the_cache(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t" / "a.tar", 0, 6)
    said: list[str] = []
    folder = given_to_training(tmp_path, tmp_path / "t", said)
    assert said[0] == f"indexing {tmp_path / 't'} (1 WebDataset shard) into {folder}; they stay as they are"
    assert said[1] == "  6 images of 3 classes"
    assert list((tmp_path / "t").iterdir()) == [path]
    shards = Shards.open(folder)
    assert shards.manifest.shards[0].url == str(path)
    assert all(isinstance(one, bytes) for one in shards.read(range(6)))
    again: list[str] = []
    assert given_to_training(tmp_path, f"{tmp_path}/t/a.tar", again) == folder
    assert again == []
    numbered(path, 3, 5)
    assert Shards.open(given_to_training(tmp_path, tmp_path / "t", again)).num_samples == 5


@pytest.mark.parametrize("layout", ["side by side", "folders"])
def test_both_splits(tmp_path: Path, layout: str) -> None:
    names = ("in-train-0.tar", "in-val-0.tar") if layout == "side by side" else ("train/0.tar", "valid/0.tar")
    numbered(tmp_path / "t" / names[0], 0, 6)
    numbered(tmp_path / "t" / names[1], 20, 3)
    said: list[str] = []
    train = Shards.open(given_to_training(tmp_path, tmp_path / "t", said))
    val = Shards.open(given_to_training(tmp_path, tmp_path / "t", said, split="val", classes=train.classes))
    assert (train.num_samples, val.num_samples, val.classes) == (6, 3, train.classes)
    with pytest.raises(UserError, match=r"give --data.val SHARDS"):
        given_to_training(tmp_path, tmp_path / "t", said, val_fraction=0.1)


def test_an_image_folder_that_keeps_its_archive_is_an_image_folder(tmp_path: Path) -> None:
    image_folder(tmp_path / "photos", {"a": 2, "b": 2})
    numbered(tmp_path / "photos" / "download.tar", 0, 2)
    said: list[str] = []
    assert Manifest.read(given_to_training(tmp_path, tmp_path / "photos", said)).made_by["source"] == "image folder"


# --- the command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbered(tmp_path / "a.tar", 0, 4)
    assert command.run([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "4 images of 3 classes in 1 shard" in out
    assert str(tmp_path) in out
    made_by = json.loads((tmp_path / "manifest.json").read_text())["made_by"]
    assert made_by["source"] == "WebDataset shards"
