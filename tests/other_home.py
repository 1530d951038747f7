"""For `by_rank`: a rank whose `~` is another folder, as on a node with a home of its own."""

from __future__ import annotations

import os


def move() -> None:
    os.environ["HOME"] = os.path.abspath("b")
