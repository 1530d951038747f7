"""`dtl completion bash|zsh|fish`: a script for the shell, made from the commands' own help."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Sequence

from dtl.commands import COMMANDS
from dtl.text import OptionParser

_DESCRIPTION = """\
Print a script that completes commands, options and files of `dtl`.

  bash   dtl completion bash > ~/.local/share/bash-completion/completions/dtl
  zsh    dtl completion zsh > "${fpath[1]}/_dtl"
  fish   dtl completion fish > ~/.config/fish/completions/dtl.fish

In bash, for the current shell only: source <(dtl completion bash)
"""
# Names of phases are the user's own: those of the built-in recipes stand for them.
_PHASES = ("head", "all")


def run(arguments: Sequence[str]) -> int:
    """The command; prints the script."""
    parser = OptionParser(prog="dtl completion", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    shell = parser.parse_args(list(arguments)).shell
    options = {name: options_of(name) for name in COMMANDS}
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](options))
    return 0


def options_of(command: str) -> list[str]:
    """Every --option that the command's help names, those of the recipe included where it takes them."""
    names: set[str] = set()
    for name in (command, "train") if command in ("find-lr", "folds", "search") else (command,):
        text = io.StringIO()
        module = importlib.import_module(f"dtl.commands.{name.replace('-', '_')}")
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            module.run(["--help"])
        # At the beginning of a line, or after a comma or bracket: not in the middle of an example.
        names |= set(re.findall(r"(?:^\s*|, |\[)(--[a-z][\w.-]*)", text.getvalue(), flags=re.MULTILINE))
    spread = {name.replace("phases.NAME", f"phases.{phase}") for name in names for phase in _PHASES} - {"--section.key"}
    return sorted(name.rstrip(".") for name in spread)


def _bash(options: dict[str, list[str]]) -> str:
    cases = "\n".join(f"        {name}) words={shlex.quote(' '.join(found))} ;;" for name, found in options.items())
    return f"""\
# bash completion of dtl, made by `dtl completion bash`
_dtl() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} words=''
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W {shlex.quote(" ".join(options))} -- "$cur"))
        return
    fi
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
    else
        COMPREPLY=($(compgen -f -- "$cur"))
    fi
}}
complete -o filenames -F _dtl dtl"""


def _zsh(options: dict[str, list[str]]) -> str:
    described = "\n".join(f"        {shlex.quote(f'{name}:{what}')}" for name, what in COMMANDS.items())
    cases = "\n".join(f"        {name}) compadd -- {' '.join(found)} ;;" for name, found in options.items())
    return f"""\
#compdef dtl
# zsh completion of dtl, made by `dtl completion zsh`
_dtl() {{
    local -a commands=(
{described}
    )
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    [[ $PREFIX == -* ]] && case $words[2] in
{cases}
    esac || _files
}}
# From a folder of $fpath the file itself is the function when it is first called; sourced, it only registers it with zsh.
if [[ $funcstack[1] == _dtl ]]; then _dtl "$@"; else compdef _dtl dtl; fi"""


def _fish(options: dict[str, list[str]]) -> str:
    lines = ["# fish completion of dtl, made by `dtl completion fish`"]
    for name, what in COMMANDS.items():
        lines.append(f"complete -c dtl -n __fish_use_subcommand -f -a {name} -d {_fish_quoted(what)}")
    for name, found in options.items():
        lines += [f"complete -c dtl -n '__fish_seen_subcommand_from {name}' -l {option[2:]}" for option in found]
    return "\n".join(lines)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
