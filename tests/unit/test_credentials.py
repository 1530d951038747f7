"""User, password and query of addresses: taken off where they are given, put back where they are opened, and nowhere in between."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtl import credentials
from dtl.credentials import bare, expand_braces, redact, redacted_line, with_credentials
from dtl.errors import UserError


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "_known", {})


@pytest.mark.parametrize(
    ("given_as", "kept"),
    [
        ("http://me:geheim42@host:81/set/train?token=tok99", "http://host:81/set/train"),
        ("https://host/a.tar?X-Amz-Signature=abc#x", "https://host/a.tar#x"),
        ("https://host?token=a/b", "https://host"),
        ("HTTP://u@host", "HTTP://host"),
        ("s3://key:secret@bucket/a?b.tar", "s3://bucket/a?b.tar"),
        ("https://host/train-{000..010}.tar?sig=1", "https://host/train-{000..010}.tar"),
        ("https://host/weights.pth#model_ema", "https://host/weights.pth#model_ema"),
        ("photos/a?b@c", "photos/a?b@c"),
        ("pipe:curl -u me:pw https://host/x", "pipe:curl -u me:pw https://host/x"),
        ("digits", "digits"),
    ],
)
def test_what_stays_of_an_address(given_as: str, kept: str) -> None:
    assert bare(given_as) == kept
    assert bare(kept) == kept


def test_put_back_for_the_address_what_lies_below_it_and_the_files_of_a_pattern() -> None:
    bare("http://me:pw@host/set?token=1")
    bare("http://host/tars/train-{0..3}.tar?sig=2")
    bare("http://{a,b}.host/x.tar?sig=3")
    assert with_credentials("http://host/set/train/shard-00000.tar") == "http://me:pw@host/set/train/shard-00000.tar?token=1"
    assert with_credentials("http://host/tars/train-2.tar") == "http://host/tars/train-2.tar?sig=2"
    assert with_credentials("http://b.host/x.tar") == "http://b.host/x.tar?sig=3"
    for other in ("http://host/settings", "http://other/set/a.tar", "https://host/set/a.tar", "http://host:81/set", "http://host/tars/train-2/x.tar",
                  "http://hosts/set", "http://host.evil/set/a.tar", "http://b.host.evil/x.tar"):  # fmt: skip
        assert with_credentials(other) == other


def test_the_newest_signature_counts() -> None:
    bare("https://host/a.tar?sig=old")
    bare("https://host/a.tar?sig=new")
    assert with_credentials("https://host/a.tar") == "https://host/a.tar?sig=new"
    assert bare("https://host/a.tar") == "https://host/a.tar"
    assert with_credentials("https://host/a.tar").endswith("sig=new"), "naming it without one does not forget it"


WORD = st.text(string.ascii_letters + string.digits + "-._~%!$&'()*+,;=", min_size=6, max_size=20)


@given(user=WORD, password=WORD, token=WORD, path=st.text(string.ascii_lowercase + "/", max_size=20))
def test_nothing_shown_holds_a_secret(user: str, password: str, token: str, path: str) -> None:
    credentials._known.clear()
    address = f"https://{user}:{password}@the-host/{path}?token={token}"
    for text in (bare(address), redact(address), redacted_line(f"cannot open {address}: no"), json.dumps(redact({"a": [address]}))):
        assert password not in text or password in f"https://the-host/{path}"
        assert token not in text or token in f"https://the-host/{path}"
    assert with_credentials(bare(address)) == address


def test_a_secret_that_a_library_repeats_is_not_printed() -> None:
    bare("https://me:pass%20word@host/a?token=t0ken99")
    line = redacted_line("error for url: host/a?token=t0ken99 (user me, 'pass word', pass%20word)")
    assert "t0ken99" not in line
    assert "pass word" not in line
    assert "pass%20word" not in line


def test_helpers_get_them_through_their_environment_and_hand_them_to_nobody() -> None:
    bare("http://me:pw@host/set")
    code = "import os; from dtl.credentials import with_credentials as w; print(w('http://host/set/a')); print('DTL_ADDRESS_CREDENTIALS' in os.environ)"
    done = subprocess.run([sys.executable, "-c", code], env=credentials.environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["http://me:pw@host/set/a", "False"]
    assert "DTL_ADDRESS_CREDENTIALS" not in os.environ


def test_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert credentials.of_netrc("host") is None
    (tmp_path / ".netrc").write_text("machine host login me password pw\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert credentials.of_netrc("host") == ("me", "pw")
    assert credentials.of_netrc("other") is None
    (tmp_path / ".netrc").chmod(0o644)
    assert credentials.of_netrc("host") is None, "others can read it"
    (tmp_path / ".netrc").write_text("machine host login")
    (tmp_path / ".netrc").chmod(0o600)
    assert credentials.of_netrc("host") is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("photos/train", "photos/train"),
        ("torchvision:IMAGENET1K_V2", "torchvision:IMAGENET1K_V2"),
        ("https://host/shards/{000..009}.tar", "https://host/shards/{000..009}.tar"),
        ("https://me:p@ss@host:8080/a.tar?token=abc#x", "https://host:8080/a.tar"),
        ("https://host/a.tar?X-Signature=abc https://me:secret@other/b.tar", "https://host/a.tar https://other/b.tar"),
        ("pipe:curl -H 'Authorization: abc' https://host/a.tar", "pipe:"),
        ({"train": ["s3://key@bucket/a", 3], "val": None, "lr": 0.1}, {"train": ["s3://bucket/a", 3], "val": None, "lr": 0.1}),
    ],
)
def test_addresses_lose_what_is_secret_and_nothing_else_changes(given: Any, kept: Any) -> None:
    assert redact(given) == kept


@pytest.mark.parametrize(
    "text", ["{0..9999999999}.tar", "{0..999}{0..999}{0..9}.tar", "{" + ",".join("ab" * 600_000) + "}", "{0..99999}{a,b,c,d,e,f,g,h,i,j,k}"], ids=range(4)
)
def test_a_pattern_of_too_many_names_is_refused_before_any_is_made(text: str) -> None:
    with pytest.raises(ValueError, match="more than 1,000,000 names"):
        expand_braces(text)


def test_patterns() -> None:
    assert expand_braces("t-{08..11}.tar") == ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    with pytest.raises(ValueError, match=r"."):
        expand_braces("{a")
    assert bare("http://me:pw@{0..99999999}/x") == "http://{0..99999999}/x"


def test_an_error_names_no_password() -> None:
    error = UserError("list.txt, line 3: no label: `https://me:geheim42@host/a.tar?token=tok99`")
    assert str(error) == "list.txt, line 3: no label: `https://host/a.tar"
