"""`dtl index`, `dtl verify`, `dtl verify-epoch` and Python on remote shards, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_server import Server
from damage import flip_bit
from tiny_images import image_folder
from wds_tars import numbered

import dtl
from dtl import credentials
from dtl.commands import index, verify, verify_epoch
from dtl.config import resolve_config
from dtl.config.models import DataConfig
from dtl.data.open import ensure_packed, open_split
from dtl.data.packing.pack import pack
from dtl.data.remote.address import default_cache_dir
from dtl.data.shards.index import Manifest, Shards
from dtl.data.verify import verify as verify_split
from dtl.errors import UnreachableSample, UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    folder = place / "www"
    pack(image_folder(place / "photos", {"cat": 30, "dog": 30}), folder, val_fraction=0.2, shard_bytes=20_000, processes=1, progress=False)
    for number in range(4):
        numbered(folder / f"theirs/t-{number:02d}.tar", 10 * number, 10)
    return folder


@pytest.fixture
def www(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "www"))


@pytest.fixture
def server(www: Path) -> Iterator[Server]:
    with Server(www) as running:
        yield running


# --- folders that dtl has packed


def test_a_remote_folder_reads_as_the_local_one(server: Server, www: Path) -> None:
    for address in (f"{server.url}/train", f"{server.url}/train/", server.url, f"{server.url}/?signature=1"):
        far, near = open_split(address, split="train"), Shards.open(www / "train")
        assert far.dataset_id == near.dataset_id
        assert far.read(np.arange(far.num_samples)) == near.read(np.arange(near.num_samples))
        assert [far.key(n) for n in range(5)] == [near.key(n) for n in range(5)]
        assert [far.path(n) for n in range(5)] == [near.path(n) for n in range(5)]
    assert set(server.downloads().values()) == {1}, "four addresses, the same shards"
    assert open_split(server.url, split="val").dataset_id == Shards.open(www / "val").dataset_id


def test_passwords_and_tokens_reach_the_server_and_no_file(server: Server, www: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a packed folder, of tars by a pattern and by a list; in this process, and in helpers that index, verify and fetch ahead."""
    monkeypatch.setattr(credentials, "_known", {})
    tars = tmp_path / "www/tars"
    tars.mkdir()
    numbered(tars / "0.tar", 0, 12)
    server.lock_with = ("me:geheim42", "token=tok99")
    locked = server.url.replace("://", "://me:geheim42@")
    (tmp_path / "list.txt").write_text(f"{locked}/tars/0.tar?token=tok99\n")
    for address in (f"{locked}/train?token=tok99", f"{locked}/tars/{{0..0}}.tar?token=tok99", str(tmp_path / "list.txt")):
        far = open_split(address, DataConfig(retries=0), split="train", progress=False)
        assert all(isinstance(one, bytes) for one in far.read(np.arange(far.num_samples)))
        assert verify_split(far.folder, DataConfig(retries=0), progress=False, processes=2).is_usable
        again = open_split(address, DataConfig(retries=0), split="train", progress=False, found=far.folder)
        assert again.dataset_id == far.dataset_id
        shutil.rmtree(far.cache.folder)  # type: ignore[union-attr]
    config = resolve_config("digits", {"data.train": f"{locked}/train?token=tok99"})[0]
    for text in (config.to_yaml(), repr(config), json.dumps(config.flat())):
        assert "geheim42" not in text
        assert "tok99" not in text
    found = [path for path in default_cache_dir().rglob("*") if path.is_file() and any(word in path.read_bytes() for word in (b"geheim42", b"tok99"))]
    assert found == []
    monkeypatch.setattr(credentials, "_known", {})
    with pytest.raises(UserError, match=r"HTTP 401 Unauthorized \(it needs a password: give it in the address, on the command line") as refused:
        open_split(f"{server.url}/train", DataConfig(retries=0), split="train", progress=False)
    assert "geheim42" not in str(refused.value)


def test_a_changed_folder_is_noticed_at_the_next_start(server: Server, www: Path, tmp_path: Path) -> None:
    before = open_split(server.url, split="train")
    shutil.rmtree(www / "train")
    pack(image_folder(tmp_path / "other", {"cat": 20, "dog": 3}, seed=1), www / "train", processes=1, progress=False)
    after = open_split(server.url, split="train")
    assert after.dataset_id == Shards.open(www / "train").dataset_id != before.dataset_id
    assert all(isinstance(one, bytes) for one in after.read(np.arange(after.num_samples)))


def test_quarantine_is_taken_along(server: Server, www: Path) -> None:
    whole = open_split(server.url, split="train").num_samples
    flip_bit(www / "train", 3)
    assert verify.run([str(www / "train"), "--quarantine", "--quiet", "--processes", "1"]) == 0
    far = open_split(server.url, split="train")
    assert far.num_samples == whole - 1
    assert far.dataset_id == Shards.open(www / "train").dataset_id
    assert [far.path(n) for n in range(5)] == [Shards.open(www / "train").path(n) for n in range(5)]
    (www / "train/quarantine.json").unlink()
    assert open_split(server.url, split="train").num_samples == whole


REFUSED = [
    ("{url}/nothing", r"/nothing holds no manifest.json, neither directly nor in train/, training/; list its tars with braces"),
    ("{url}/theirs/t-*.tar", r"a web server does not list its files; give the shards with braces"),
    ("{url}/theirs/t-{{00..09}}.tar", r"/theirs/t-04.tar cannot be downloaded: HTTP 404 Not Found \(check the address\) \(1 attempt\)"),
    ("http://127.0.0.1:9/x", r"http://127.0.0.1:9/x/manifest.json cannot be downloaded: Connection refused \(1 attempt\)"),
    ("nope://x/y", r"nope:// is not supported"),
]


@pytest.mark.parametrize(("source", "said"), REFUSED, ids=[source for source, _ in REFUSED])
def test_what_is_refused(server: Server, source: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        open_split(source.format(url=server.url), DataConfig(retries=0), split="train", progress=False, processes=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.tar", "pipe:touch /tmp/x", "file:///etc/passwd"])
def test_a_remote_manifest_names_nothing_of_this_machine(server: Server, www: Path, name: str) -> None:
    manifest = json.loads((www / "train/manifest.json").read_text())
    manifest["shards"][0]["url"] = name
    (www / "train/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError,
        match=r"manifest.json (lists the shard '.*(: a remote manifest may list only|, which is outside)|is damaged: the shard '.*' lies outside its folder)",
    ):
        open_split(server.url, split="train")


def test_a_damaged_manifest_and_index(server: Server, www: Path) -> None:
    index_bytes = (www / "train/index.bin").read_bytes()
    (www / "train/index.bin").write_bytes(index_bytes[:-1] + b"x")
    with pytest.raises(UserError, match=r"train/index.bin cannot be downloaded: its sha256 differs from the one in the manifest"):
        open_split(server.url, split="train")
    (www / "train/index.bin").write_bytes(index_bytes)
    (www / "train/manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"train/manifest.json: not valid JSON"):
        open_split(server.url, split="train")


# --- tars of others


def test_index_of_remote_tars(server: Server, www: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = f"{server.url}/theirs/t-{{00..03}}.tar"
    with pytest.raises(UserError, match=r"t-00.tar is remote, so the index cannot go beside it; choose a folder for it with --out FOLDER"):
        index.run([pattern])
    server.plan["theirs/t-01.tar"] = ["503", "drop 3000"]
    assert index.run([pattern, "--out", str(tmp_path / "index"), "--processes", "1"]) == 0
    assert "40 images of 3 classes in 4 shards" in capsys.readouterr().out
    far = Shards.open(tmp_path / "index")
    assert [shard.url for shard in far.manifest.shards] == [f"{server.url}/theirs/t-{n:02d}.tar" for n in range(4)]
    near = Shards.open(ensure_packed(www / "theirs", split="train", progress=False, processes=1))
    assert far.dataset_id == near.dataset_id
    assert far.read(np.arange(40)) == near.read(np.arange(40))
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["index.bin", "keys.bin", "manifest.json"]
    assert verify.run([str(tmp_path / "index"), "--processes", "1"]) == 0
    assert "40 samples in 4 shards" in capsys.readouterr().out


def test_a_page_instead_of_a_tar(server: Server, tmp_path: Path) -> None:
    server.always["theirs/t-02.tar"] = "html"
    with pytest.raises(
        UserError, match=r"t-02.tar cannot be downloaded: the server sent an HTML page \('Please log in'\) with status 200 instead of the file \(2 attempts\)"
    ):
        index.run([f"{server.url}/theirs/t-{{00..03}}.tar", "--out", str(tmp_path / "index"), "--retries", "1", "--processes", "1", "--quiet"])
    assert not (tmp_path / "index/manifest.json").exists()


def test_a_command_whose_pipe_fails(www: Path, tmp_path: Path) -> None:
    """Cut by a failing command: webdataset would take the samples before the cut, and say nothing."""
    command = f"pipe:head -c 9000 {www}/theirs/t-{{00..03}}.tar; exit 7"
    with pytest.raises(UserError, match=r"t-00.tar; exit 7 cannot be downloaded: the command exited with status 7"):
        index.run([command, "--out", str(tmp_path / "index"), "--retries", "0", "--processes", "1", "--quiet"])


def test_commands_need_consent_unless_they_are_the_source(www: Path, tmp_path: Path) -> None:
    command = f"pipe:cat {www}/theirs/t-{{00..03}}.tar"
    assert index.run([command, "--out", str(tmp_path / "index"), "--processes", "1", "--quiet"]) == 0
    with pytest.raises(UserError, match=r"reads shards with shell commands .* allow it with --data.allow-pipe true"):
        Shards.open(tmp_path / "index")
    assert Shards.open(tmp_path / "index", DataConfig(allow_pipe=True)).num_samples == 40
    assert open_split(command, split="train", progress=False, processes=1).num_samples == 40
    listed = tmp_path / "list.txt"
    listed.write_text(f"a.tar\n{command}\n")
    numbered(tmp_path / "a.tar", 900, 3)
    with pytest.raises(UserError, match=r"list.txt contains a command .* commands are run only from your own config"):
        open_split(listed, split="train", progress=False, processes=1)


def test_a_pattern_in_a_file_system_of_fsspec(www: Path) -> None:
    far = open_split(f"file://{www}/theirs/*.tar", split="train", progress=False, processes=1)
    assert [shard.url for shard in far.manifest.shards] == [f"file://{www}/theirs/t-{n:02d}.tar" for n in range(4)]
    assert all(isinstance(one, bytes) for one in far.read(np.arange(40)))
    with pytest.raises(UserError, match="no file matches"):
        open_split(f"file://{www}/theirs/x-*.tar", split="train", progress=False, processes=1)


def test_a_list_of_addresses(server: Server, tmp_path: Path) -> None:
    listed = tmp_path / "shards.txt"
    listed.write_text(f"# theirs\n{server.url}/theirs/t-{{00..01}}.tar\n\n{server.url}/theirs/t-03.tar\n")
    assert open_split(listed, split="train", progress=False, processes=1).num_samples == 30


def test_a_shard_that_was_changed_at_the_server(server: Server, www: Path) -> None:
    shards = open_split(f"{server.url}/train", split="train")
    file = www / "train/shard-00001.tar"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    first = int(shards.shard_sizes[0])
    good, bad = shards.read([0, first])
    assert isinstance(good, bytes)
    assert str(bad).startswith(f"{server.url}/train/shard-00001.tar: a sample at byte ")
    assert "its sha256 differs from the one in the manifest: it was changed on the server or in transit (6 attempts)" in str(bad)
    asked = len(server.requests)
    assert len(shards.read(np.arange(first, first + 3))) == 3
    assert len(server.requests) == asked, "the other samples of the shard are not worth six more attempts each"


# --- proofs


def test_verify_and_verify_epoch(server: Server, www: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run([server.url, "--processes", "1", "--quiet"]) == 0
    with pytest.raises(UserError, match="--quarantine writes beside the manifest, which is remote"):
        verify.run([server.url, "--quarantine"])
    with pytest.raises(UserError, match="tars need an index before they can be verified: dtl index"):
        verify.run([f"{server.url}/theirs/t-{{00..03}}.tar"])
    hashes = set()
    for source in (f"{server.url}/train", str(www / "train")):
        common = ["--global-batch-size", "8", "--image-size", "16", "--json", "--quiet"]
        assert verify_epoch.run([source, "--world", "2", "--workers", "0", *common]) == 0
        hashes.add(json.loads(capsys.readouterr().out)["order_hash"])
    assert len(hashes) == 1
    server.always["train/shard-00001.tar"] = "404"
    shutil.rmtree(Path(open_split(server.url, split="train").cache.folder))  # type: ignore[union-attr]
    assert verify.run([f"{server.url}/train", "--processes", "1"]) == 2
    assert "shard-00001.tar cannot be downloaded: HTTP 404" in capsys.readouterr().err


def test_one_shard_is_tried_of_a_server_that_does_not_answer(server: Server, www: Path) -> None:
    """`dtl verify` takes half a minute for each try; the shards of other servers are still checked."""
    folder, other = www / "train", server.url.replace("127.0.0.1", "localhost")
    text = (folder / "manifest.json").read_text()
    names = [shard.url for shard in Manifest.read(folder).shards]
    assert len(names) >= 3
    for name in names:
        base = other if name == names[-1] else server.url
        text = text.replace(f'"{name}"', f'"{base}/train/{name}"')
        if base == server.url:
            server.always[f"train/{name}"] = "503"
    (folder / "manifest.json").write_text(text)
    report = verify_split(folder, DataConfig(retries=0), processes=1, progress=False)
    assert [url for url, _, _ in report.unread] == [f"{server.url}/train/{name}" for name in names[:-1]]
    assert "HTTP 503" in report.unread[0][2]
    for url, _, reason in report.unread[1:]:
        assert reason.startswith(f"{url} was not tried: {server.url}/train/{names[0]} cannot be downloaded: HTTP 503")
    assert [name for name, _, _ in server.requests] == [f"train/{names[0]}", f"train/{names[-1]}"]
    server.always.clear()
    assert verify_split(folder, DataConfig(retries=0), processes=1, progress=False).is_usable


AWAY = {
    "server error": ("500", "HTTP 500 Internal Server Error (1 attempt)"),
    "not found": ("404", "HTTP 404 Not Found (check the address) (1 attempt)"),
    "forbidden": ("403", "HTTP 403 Forbidden"),
    "cut off": ("drop 1000", "the connection ended"),
    "a page to log in": ("html", "the server sent an HTML page"),
}


@pytest.mark.parametrize("which", AWAY)
def test_what_a_server_does_not_give_is_not_damaged(server: Server, www: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`dtl verify --quarantine` while it is away: counted, told, status not 0; nothing is set aside, and what was stays so."""
    how, reason = AWAY[which]
    folder, options = www / "train", DataConfig(retries=0)
    flip_bit(folder, 1)  # of shard 0
    last = len(Shards.open(folder).manifest.shards) - 1
    good = (folder / Manifest.read(folder).shards[last].url).read_bytes()
    flip_bit(folder, int(Shards.open(folder).shard_sizes[:last].sum()))  # the first of the last shard, which goes away
    assert verify_split(folder, options, processes=1, progress=False, quarantine=True).is_usable
    before, shard = Shards.open(folder), Manifest.read(folder).shards[last]
    assert len(before.quarantined) == 2
    (www / "away").mkdir()
    (folder / shard.url).unlink()
    (www / "away" / shard.url).write_bytes(good)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace(f'"{shard.url}"', f'"{server.url}/away/{shard.url}"'))
    server.always[f"away/{shard.url}"] = how

    report = verify_split(folder, options, processes=2, progress=False, quarantine=True)
    assert not report.is_usable
    assert report.new_samples == []
    assert [(url, count) for url, count, _ in report.unread] == [(f"{server.url}/away/{shard.url}", shard.samples)]
    assert reason in report.unread[0][2]
    after = Shards.open(folder, options)
    assert after.quarantined.tolist() == before.quarantined.tolist()
    away = after.read([after.num_samples - 1])[0]
    assert isinstance(away, UnreachableSample)
    assert str(away).endswith("start the same command again when it can be read")
    with pytest.raises(UnreachableSample, match="cannot be read now"):
        list(dtl.build_loader(str(folder), image_size=16, batch_size=16, workers=0))

    server.always[f"away/{shard.url}"] = "404"  # which is not retried
    assert verify.run([str(folder), "--processes", "1"]) == 2
    said = capsys.readouterr()
    assert f"{server.url}/away/{shard.url}: {shard.samples} samples not checked: " in said.err
    assert f"{shard.samples} could not be read, so nothing is known about them; verify again when they can" in said.out
    assert "no problems" not in said.out
    server.always.clear()
    report = verify_split(folder, options, processes=1, progress=False, quarantine=True)
    assert report.is_usable
    assert [bad.sample for bad in report.samples] == [1]


def test_all_of_it_away(server: Server, www: Path) -> None:
    folder = www / "train"
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"url": "', f'"url": "{server.url}/nowhere/'))
    report = verify_split(folder, DataConfig(retries=0), processes=1, progress=False, quarantine=True)
    assert (report.num_unread, report.samples, report.is_usable) == (report.num_samples, [], False)
    assert not (folder / "quarantine.json").exists()


def test_in_a_notebook(server: Server) -> None:
    loader = dtl.build_loader(server.url, image_size=16, batch_size=16, workers=0)
    assert sum(float(weights.sum()) for _, _, weights in loader) == loader.shards.num_samples


def test_the_manifest_stays_as_it_was(www: Path) -> None:
    assert Manifest.parse((www / "train/manifest.json").read_bytes(), "x") == Manifest.read(www / "train")
