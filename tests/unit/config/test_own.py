"""The user's own file of trust, and configs of runs that strangers may have written."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from dtl.config import Config, DataConfig, config_from_dict, own
from dtl.errors import UserError

FUNCTION = "package.module:function"


@pytest.fixture(autouse=True)
def _own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(own, "_noted", set())


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process: only the file counts."""
    monkeypatch.setattr(own, "_noted", set())


def is_made(data: bytes) -> bool:
    return own.is_own(hashlib.sha256(data).hexdigest())


def stored(tmp_path: Path, **sections: object) -> own.StoredConfig:
    text = config(**sections).to_yaml()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/config.yaml").write_text(text)
    return own.stored_config(tmp_path / "run")


def config(**sections: object) -> Config:
    return config_from_dict({"data": {"train": "photos"}, "phases": {"all": {}}, **sections}, "the test")


# ---- what is recorded


def test_trust_is_kept_for_the_function_and_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    def call(function: str = FUNCTION, sha256: str = "a" * 64, *, trust: bool = False) -> None:
        own.may_call(function, {"width": 3}, file=tmp_path / "model.json", sha256=sha256, trust=trust, log=lines.append)

    with pytest.raises(UserError, match=r"calling the function package\.module:function\(width=3\).* add --trust .*trusted\.jsonl") as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not own.own_file().exists()
    call(trust=True)
    assert len(lines) == 1
    assert "trusted from now on" in lines[0]
    forget(monkeypatch)
    call()
    for other in ({"sha256": "b" * 64}, {"function": "package.module:another"}):
        with pytest.raises(UserError, match="--trust"):
            call(**other)
    assert [json.loads(line) for line in own.own_file().read_text().splitlines()] == [{"function": FUNCTION, "sha256": "a" * 64}]


def test_the_file_is_the_users_alone() -> None:
    own.may_call(FUNCTION, {}, file=Path("model.json"), sha256="a" * 64, trust=True, log=print)
    assert stat.S_IMODE(own.own_file().stat().st_mode) == 0o600
    assert stat.S_IMODE(own.own_file().parent.stat().st_mode) == 0o700


def test_what_a_run_wrote_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    assert not is_made(b"a: 1")
    for _ in range(2):
        own.note_made(tmp_path / "config.yaml", print)
    forget(monkeypatch)
    assert is_made(b"a: 1")
    assert not is_made(b"a: 2")
    assert len(own.own_file().read_text().splitlines()) == 1


def test_a_file_that_cannot_be_written_costs_a_line_and_counts_in_this_process(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file, where the folder should be")
    (tmp_path / "config.yaml").write_text("a: 1")
    lines: list[str] = []
    own.note_made(tmp_path / "config.yaml", lines.append)
    assert len(lines) == 1
    assert "cannot be written" in lines[0]
    assert is_made(b"a: 1")


def test_lines_that_are_none_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    own.note_made(tmp_path / "config.yaml", print)
    with own.own_file().open("ab") as file:
        file.write(b'half a li\n{"made": NaN}\n[1]\n\xff\n{"function": 1}\n')
    forget(monkeypatch)
    assert is_made(b"a: 1")
    own.own_file().unlink()
    own.own_file().mkdir()
    assert not is_made(b"a: 1")


# ---- the config of a run


@pytest.mark.parametrize("key", ["train", "val", "test", "names"])
@pytest.mark.parametrize("value", ["pipe:touch x", "https://host/x.tar", "s3://bucket/{0..9}.tar"])
def test_commands_and_addresses_are_taken_out(tmp_path: Path, key: str, value: str) -> None:
    found = stored(
        tmp_path,
        data={
            "train": "photos",
            key: value,
            "allow_pipe": True,
            "cache_shared": True,
            "cache_dir": "/home/victim",
            "workers": 10_000,
            "max_pixels": 10**12,
            "max_file_bytes": 10**15,
        },
    )
    assert not found.own
    assert getattr(found.config.data, key) is None
    assert found.withheld == {f"data.{key}": value}
    assert (found.config.data.allow_pipe, found.config.data.cache_dir, found.config.data.workers) == (False, None, 8)
    assert not found.config.data.cache_shared
    assert (found.config.data.max_pixels, found.config.data.max_file_bytes) == (DataConfig().max_pixels, DataConfig().max_file_bytes)
    with pytest.raises(UserError, match=r"config\.yaml was not written by a run of yours, so data\..*give the data with --data\.val"):
        found.require("data.train", "data.val", "data.test", "data.names")


def test_a_function_for_images_is_not_taken_from_a_stranger(tmp_path: Path) -> None:
    text = config(data={"train": "photos", "augment": {"function": "os:system", "turns": True}}).to_yaml()
    found = own.parse_stored(text.encode(), "config.yaml", own=False)
    assert found.config.data.augment.function is None
    assert found.config.data.augment.turns
    assert found.withheld == {"data.augment.function": "os:system"}
    assert own.parse_stored(text.encode(), "config.yaml", own=True).config.data.augment.function == "os:system"
    assert own.needs_record(own.parse_stored(text.encode(), "config.yaml", own=True).config)


def test_a_run_of_the_users_own_keeps_them(tmp_path: Path) -> None:
    data = {"train": "photos", "val": "pipe:cat x.tar", "allow_pipe": True, "cache_dir": "/scratch"}
    text = config(data=data).to_yaml()
    (tmp_path / "written").write_text(text)
    own.note_made(tmp_path / "written", print)
    found = stored(tmp_path, data=data)
    assert found.own
    assert found.config.data.val == "pipe:cat x.tar"
    assert found.config.data.allow_pipe
    assert found.config.data.cache_dir == "/scratch"
    found.require("data.val")
    assert not stored(tmp_path, data={**data, "val": "pipe:cat y.tar"}).own


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({}, False),
        ({"transfer": {"source": "torchvision:resnet18"}}, False),
        ({"model": {"name": "package.module:function"}}, True),
        ({"model": {"name": "timm/hf-hub:org/name"}}, True),
        ({"data": {"train": "pipe:cat x"}}, True),
        ({"data": {"train": "x", "allow_pipe": True}}, True),
        ({"data": {"train": "x", "cache_dir": "y"}}, True),
        ({"data": {"train": "x", "image_size": 5000}}, True),
    ],
)
def test_what_has_to_be_recorded(sections: dict[str, object], needed: bool) -> None:
    assert own.needs_record(config(**sections)) is needed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("phases: {'../../x': {}}", "is not a valid phase name"),
        ("data: {image_size: 100000}", "image_size 100,000 is larger than"),
        ("[1, 2]", "config.yaml: a config is a mapping of sections, got list"),
        ("data: {workers: .inf}", "not a finite number"),
        ("a: &a [*a]", "contains itself"),
        ("[" * 100, "nested deeper"),
    ],
)
def test_a_strangers_text_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        own.stored_config(tmp_path)
    assert str(tmp_path / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_user_without_a_home_loses_only_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a bare user id: no $HOME, and no entry in /etc/passwd."""
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    (tmp_path / "config.yaml").write_text("data: {train: photos}\n")
    lines: list[str] = []
    own.note_made(tmp_path / "config.yaml", lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("~/.config: the home folder of this user is not known ($HOME is not set)")


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")
