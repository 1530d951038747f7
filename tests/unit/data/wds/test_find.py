"""Which tars a source names: patterns, lists, folders, URLs."""

from __future__ import annotations

from pathlib import Path

import pytest
from wds_tars import indexed, numbered

from dtl.commands import index as command
from dtl.data.shards.index import Shards
from dtl.errors import UserError


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
    ("http://host/t-{{00..01}}.tar", "choose a folder for it with --out FOLDER"),
    ("{tmp}/text.tar", "not a tar header .it looks like text."),
]


@pytest.mark.parametrize(("source", "said"), REFUSED_SOURCES)
def test_what_is_not_there(tmp_path: Path, source: str, said: str) -> None:
    numbered(tmp_path / "t-00.tar", 0, 2)
    numbered(tmp_path / "t-01.tar", 5, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("words " * 200)
    with pytest.raises(UserError, match=said):
        indexed(source.format(tmp=tmp_path))


def test_a_folder_of_several_splits_is_refused_with_the_command(tmp_path: Path) -> None:
    numbered(tmp_path / "in-train-0.tar", 0, 3)
    numbered(tmp_path / "in-train-1.tar", 5, 3)
    numbered(tmp_path / "in-validation-0.tar", 10, 3)
    with pytest.raises(UserError, match="holds the shards of train, val; index each split separately") as refused:
        indexed(tmp_path)
    arguments = str(refused.value).partition("dtl index ")[2].replace("'", "").split()
    assert command.run([*arguments, "--quiet"]) == 0
    assert Shards.open(tmp_path / "train-index").num_samples == 6
