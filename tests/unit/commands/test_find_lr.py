"""`dtl find-lr`: mistakes on its command line; tests/distributed has its curves."""

from __future__ import annotations

import pytest

from dtl.commands.find_lr import run
from dtl.errors import UserError


def test_a_phase_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"^--phase hed: the recipe has no such phase; its phases: pretext, head, all$"):
        run(["--phase", "hed"])


def test_a_solved_phase_has_no_learning_rate() -> None:
    solved = ["--phases", "{head: {train: head, optimizer: solve, epochs: null, lr: 0.01}, pretext: null, all: null}"]
    with pytest.raises(UserError, match=r"^phase head is solved \(optimizer: solve\), so it has no learning rate; give another --phase, or --phases"):
        run(solved)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "5"], r"unknown option --step; did you mean --steps\? \(dtl find-lr --help"),
        (["--steps", "many"], r"argument --steps: invalid int value: 'many'"),
        (["--outt=x"], r"unknown option --outt; did you mean --out\?"),
    ],
)
def test_an_option_that_is_none_is_refused_before_the_recipe_is_read(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run([*words, "--config", "nowhere.yaml"])
