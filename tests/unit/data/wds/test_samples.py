"""How members of a tar become samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_images import encoded, huge_bmp
from wds_tars import check_like_webdataset, indexed, interop, sample, write_tar

from dtl.config.models import DataConfig
from dtl.data.shards.index import Shards
from dtl.data.wds.index import index_shards
from dtl.errors import UserError


@interop
@pytest.mark.parametrize(
    ("extension", "kind"),
    [("JPEG", "JPEG"), ("jpg", "JPEG"), ("Png", "PNG"), ("webp", "WEBP"), ("BMP", "BMP"), ("tiff", "TIFF"), ("gif", "GIF"), ("ppm", "PPM")],
)
def test_any_image_extension_in_any_case(tmp_path: Path, extension: str, kind: str) -> None:
    path = write_tar(tmp_path / "a.tar", [m for n in range(3) for m in sample(f"k{n}", n, seed=n, extension=extension, kind=kind)])
    check_like_webdataset(indexed(path), [path], extension.lower())


@interop
def test_several_members_a_key_and_members_of_no_sample(tmp_path: Path) -> None:
    members = [("README", b"no dot"), (".DS_Store", b""), ("__meta__/x.jpg", b"?")]
    for number in range(3):
        members += sample(f"k{number}", number, seed=number, txt=b"a caption", npy=b"x" * 3000, **{"seg.png": encoded("PNG")}, empty=b"")
    path = write_tar(tmp_path / "a.tar", members)
    report = index_shards([path], processes=1, progress=False)
    check_like_webdataset(Shards.open(report.folder), [path])
    assert report.notes == ("3 members of the tars belong to no sample (the first: README): hidden, without an extension, or named like __this__",)


def broken_samples() -> dict[str, tuple[list[tuple[str, bytes]], str]]:
    good = encoded(seed=3)
    return {
        "no image": ([("b.cls", b"1")], "it has no image, only .cls"),
        "no label": ([("b.jpg", good)], "it has no .cls, and no folder in its key that could be its label, only .jpg"),
        "empty image": ([("b.jpg", b""), ("b.cls", b"1")], "its image: the file is empty (0 bytes)"),
        "no picture": ([("b.jpg", b"<html>404</html>"), ("b.cls", b"1")], "its image: not an image (an HTML page)"),
        "two images": ([("b.jpg", good), ("b.png", good), ("b.cls", b"1")], "it has 2 images: .jpg, .png; choose one with --image-field"),
        "a dotted key": (
            [("b.v1.jpg", good), ("b.v2.jpg", good), ("b.cls", b"1")],
            "it has 2 images: .v1.jpg, .v2.jpg (a key ends at the first dot of its name); choose one with --image-field",
        ),
    }


@pytest.mark.parametrize("which", list(broken_samples()))
def test_a_sample_that_cannot_be_used(tmp_path: Path, which: str) -> None:
    members, reason = broken_samples()[which]
    path = write_tar(tmp_path / "x.tar", [*sample("a", 0, seed=1), *members, *sample("c", 2, seed=2)])
    with pytest.raises(UserError) as refused:
        indexed(path)
    message = str(refused.value)
    assert message.startswith(f"1 sample cannot be used: {path}: sample b at byte ")
    assert reason in message
    assert "--on-error skip" in message
    assert not (tmp_path / "manifest.json").exists()
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"
    report = index_shards([path], DataConfig(on_error="skip"), processes=1, progress=False)
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


def test_members_that_are_not_adjacent(tmp_path: Path) -> None:
    a, b = sample("a", 0, seed=1), sample("b", 1, seed=2)
    for on_error in ("fail", "skip"):
        with pytest.raises(UserError, match=r"x.tar: the members of sample a are not next to each other.*tar --sort=name"):
            indexed(write_tar(tmp_path / "x.tar", [a[0], b[0], a[1], b[1]]), on_error=on_error)
