"""Names of what is remote, and whose caches are used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dtl.data.remote.address import base_name, cache_place, default_cache_dir, is_remote, join, private_cache, shown, without_query
from dtl.errors import UserError


def test_names() -> None:
    assert all(is_remote(name) for name in ("http://x/y", "s3://x/y", "pipe:cat x", "S3://x"))
    assert not any(is_remote(name) for name in ("/a/b", "C:/x", Path("http://x")))
    assert join("http://x/y/?sig=1", "m.json") == "http://x/y/m.json?sig=1"
    assert join("s3://b/y/", "m.json") == "s3://b/y/m.json"
    assert base_name("https://x/y/t-01.tar?sig=a/b") == "t-01.tar"
    assert base_name("pipe:aws s3 cp s3://b/t-01.tar -") == "t-01.tar"
    assert without_query("https://u:p@x:8/y?z#w") == "https://x:8/y"
    assert shown("https://u:p@x/y?z") == "https://x/y?..."


def test_a_new_cache_is_private(tmp_path: Path) -> None:
    place = cache_place(tmp_path / "a/cache")
    assert place == tmp_path / "a/cache"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.parametrize(("mode", "right"), [(0o700, True), (0o755, True), (0o775, False), (0o777, False), (0o1777, False)])
def test_a_cache_that_others_may_write_is_refused(mode: int, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("DTL_CACHE", str(tmp_path / "cache"))
    for named in (tmp_path / "cache", tmp_path / "link", None):
        if right:
            assert cache_place(named) == tmp_path / "cache"
        else:
            with pytest.raises(UserError, match=r"is writable by other users: run chmod 700 .*, or share it with --data.cache-shared true"):
                cache_place(named)


def test_a_cache_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(UserError, match="belongs to another user"):
        cache_place(tmp_path)


def test_of_a_shared_cache_only_what_is_verified_is_shared(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert cache_place(tmp_path, shared=True, own=False) == tmp_path
    own = cache_place(tmp_path, shared=True)
    assert own == tmp_path / f"of-user-{os.geteuid()}" == private_cache(tmp_path, shared=True)
    own.chmod(0o777)
    with pytest.raises(UserError, match="is writable by other users"):
        cache_place(tmp_path, shared=True)


def test_without_a_home_that_can_be_written_the_cache_lies_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a bare user id: $HOME is / or unset, and there is no entry in /etc/passwd."""
    monkeypatch.delenv("DTL_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_cache_dir() == tmp_path / "home/.cache/dtl"
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # root may write anywhere
    assert default_cache_dir() == tmp_path / ".dtl-cache"
    monkeypatch.setattr(Path, "home", no_home)
    assert default_cache_dir() == tmp_path / ".dtl-cache"
    assert cache_place(None).stat().st_mode & 0o777 == 0o700


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
