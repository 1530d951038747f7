"""Shell completion, made from the commands' own help: asked in a real bash, zsh and fish."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dtl.cli import main
from dtl.commands import COMMANDS
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
    assert {"--folds", "--refit", "--data.train", "--data.fold.seed"} <= set(options_of("folds"))
    assert {"--space", "--budget", "--slots", "--data.train"} <= set(options_of("search"))
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


ASKED = [
    ("dtl ev", {"dtl evaluate"}),
    ("dtl train --data.micro", {"dtl train --data.micro_batch_size"}),
    ("dtl find-lr --phases.head.l", {f"dtl find-lr --phases.head.{key}" for key in ("label_smoothing", "layer_decay", "loss", "lr")}),
    ("dtl doctor --q", {"dtl doctor --quick"}),
]


@pytest.mark.parametrize(("typed", "expected"), ASKED)
def test_fish_completes(scripts: dict[str, Path], tmp_path: Path, typed: str, expected: set[str]) -> None:
    needs("fish")
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "dumb"}
    code = f"source {scripts['fish']}; complete -C '{typed}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True, env=environment)
    before = typed.rpartition(" ")[0]
    assert {f"{before} {line.partition(chr(9))[0]}" for line in done.stdout.splitlines()} == expected


@pytest.mark.parametrize("sourced", [False, True], ids=["from-fpath", "sourced"])
def test_zsh_completes(scripts: dict[str, Path], tmp_path: Path, sourced: bool) -> None:
    """At a real terminal: what is typed with a tab after it, and then made an argument of `print`."""
    needs("zsh")
    (tmp_path / "functions").mkdir()
    shutil.copy(scripts["zsh"], tmp_path / "functions/_dtl")
    start = [f"fpath=({tmp_path}/functions $fpath)"] if not sourced else []
    start += ["bindkey -e", f"autoload -U compinit; compinit -u -d {tmp_path}/dump", "setopt no_auto_menu"]
    start += [f"source {scripts['zsh']}"] if sourced else []
    typed = [(words, next(iter(found))) for words, found in ASKED if len(found) == 1]
    # Ctrl-A goes to the beginning of the line.
    answers = talk_to_zsh(tmp_path, start, [f"{words}\t\x01print -r -- told: " for words, _ in typed])
    assert answers == [found for _, found in typed]


def needs(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"only {shell} itself can complete a word or read its script, and it is not installed (.ci/run installs it)")


def talk_to_zsh(folder: Path, start: list[str], lines: list[str]) -> list[str]:
    """What an interactive zsh prints after `told:` for each line."""
    # Not pty.fork: the process that tests may have threads, and a fork of these is an error from Python 3.12 on.
    terminal, its_end = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "PS1": "", "COLUMNS": "400"}
    zsh = subprocess.Popen(["zsh", "-f", "-i"], stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True, env=environment)
    os.close(its_end)
    try:
        for line in start:
            os.write(terminal, f"{line}\n".encode())
        heard = ""
        for number, line in enumerate(lines):
            os.write(terminal, line.encode())
            os.write(terminal, b"\n")
            deadline = time.monotonic() + 30
            while len(answers_in(heard)) <= number:
                assert time.monotonic() < deadline, heard
                if select.select([terminal], [], [], 0.2)[0]:
                    heard += os.read(terminal, 65536).decode(errors="replace")
        return answers_in(heard)
    finally:
        zsh.kill()
        zsh.wait()
        os.close(terminal)


def answers_in(heard: str) -> list[str]:
    return [line.removeprefix("told: ").strip() for line in heard.replace("\r", "\n").split("\n") if line.startswith("told: ")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_names_all_commands(scripts: dict[str, Path], shell: str) -> None:
    text = scripts[shell].read_text()
    assert [name for name in COMMANDS if name not in text] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_one_of_its_shell(scripts: dict[str, Path], shell: str) -> None:
    needs(shell)
    subprocess.run([shell, "-n", str(scripts[shell])], check=True)
