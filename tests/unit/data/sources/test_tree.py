"""A folder of a disk as a tree: sorted, links followed, sizes and times only when they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtl.data.sources.tree import Folder, folders_in, joined
from dtl.errors import UserError


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a/inner", ".git"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "c.jpg").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")
    tree = Folder(tmp_path)
    entries = tree.entries("")
    assert [(entry.name, entry.is_folder) for entry in entries] == [(".git", True), ("a", True), ("b", True), ("c.jpg", False), ("link", True), ("loop", False)]
    assert entries[3].size_and_time() == (3, (tmp_path / "c.jpg").stat().st_mtime_ns)
    assert entries[5].size_and_time() == (0, 0), "packing lists it as unreadable"
    assert folders_in(tree, "") == folders_in(tree, ".") == ["a", "b", "link"]
    assert folders_in(tree, "no") == []
    assert tree.identity("link") == tree.identity("a") != tree.identity("b")
    assert joined("", "a") == joined(".", "a") == "a"
    assert joined("a", "inner") == "a/inner"
    with pytest.raises(UserError, match=r"no cannot be listed: No such file or directory"):
        tree.entries("no")
