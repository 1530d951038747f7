"""Reading tars of every format, and refusing damaged ones."""

from __future__ import annotations

import gzip
import pickle
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny_images import image_folder
from wds_tars import check_like_webdataset, indexed, interop, numbered, sample, write_tar

from dtl.data.decoding.decode import decode
from dtl.data.shards.index import Shards
from dtl.errors import UserError


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


def test_system_tar_reads_as_well(tmp_path: Path) -> None:
    """GNU tar itself, class folders as keys, ./ before the names, folders as members."""
    image_folder(tmp_path / "photos", {"ant": 4, "bee": 5})
    subprocess.run(["tar", "--sort=name", "-cf", str(tmp_path / "photos.tar"), "-C", str(tmp_path / "photos"), "."], check=True)
    shards = indexed(tmp_path / "photos.tar")
    assert shards.classes == ("ant", "bee")
    assert shards.labels.tolist() == [0] * 4 + [1] * 5
    assert shards.key(0) == "./ant/0000"
    assert shards.read([4]) == [(tmp_path / "photos/bee/0000.jpg").read_bytes()]


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
        with pytest.raises(UserError, match=r"cut.tar: damaged at byte \d+: .*(it is truncated|0 bytes).*; copy or download the shard again"):
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
            with pytest.raises(UserError, match=rf"a.tar: damaged at byte {start}: not a tar header"):
                indexed(path)
        path.write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])
        with pytest.raises(UserError, match=r"a.tar: damaged at byte \d+"):
            indexed(path)
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="data after the end of the tar"):
        indexed(path)


def test_what_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"<!doctype html><html>Not found</html>" + b" " * 600)
    with pytest.raises(UserError, match=r"at byte 0: not a tar header \(it looks like an HTML page\)"):
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
