"""Shell completion, made from the commands' own help: asked in a real bash, and in zsh and fish where they are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dtl.cli import COMMANDS, main
from dtl.commands.completion import options_of


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("completion")
    files = {}
    for shell in ("bash", "zsh", "fish"):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert main(["completion", shell]) == 0
        files[shell] = folder / shell
        files[shell].write_text(text.getvalue())
    return files


def test_options_come_from_the_help() -> None:
    assert {"--config", "--data.train", "--phases.all.lr", "--phases.head.lr", "--precision", "--help"} <= set(options_of("train"))
    assert {"--phase", "--steps", "--data.train"} <= set(options_of("find-lr"))
    assert "--json" in options_of("doctor")
    for name in COMMANDS:
        assert "--help" in options_of(name), name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dtl", "ev"], {"evaluate"}),
        (["dtl", "verify"], {"verify", "verify-epoch", "verify-resume"}),
        (["dtl", "train", "--data.micro"], {"--data.micro_batch_size"}),
        (["dtl", "doctor", "--q"], {"--quick"}),
    ],
)
def test_bash_completes(scripts: dict[str, Path], words: list[str], expected: set[str]) -> None:
    quoted = " ".join(words)
    code = f'source {scripts["bash"]}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _dtl; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_one_of_its_shell(scripts: dict[str, Path], shell: str) -> None:
    text = scripts[shell].read_text()
    for name in COMMANDS:
        assert name in text
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} is installed to read its script")
    subprocess.run([shell, "-n", str(scripts[shell])], check=True)
