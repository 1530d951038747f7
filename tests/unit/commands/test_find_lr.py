"""`dtl find-lr`: mistakes on its command line; tests/distributed has its curves."""

from __future__ import annotations

import pytest

from dtl.commands.find_lr import run
from dtl.errors import UserError


def test_a_phase_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"^--phase hed: the recipe has no such phase; its phases: pretext, head, all$"):
        run(["--phase", "hed"])


@pytest.mark.parametrize("words", [["--step", "5"], ["--steps", "many"], ["--outt=x"]])
def test_an_option_that_is_none_ends_before_anything_is_read(words: list[str]) -> None:
    with pytest.raises((SystemExit, UserError)):
        run([*words, "--config", "nowhere.yaml"])
