"""`dtl models [WORD]`: the networks that `model.name` accepts."""

from __future__ import annotations

from collections.abc import Sequence

from dtl.text import OptionParser, to_stdout


def run(arguments: Sequence[str]) -> int:
    parser = OptionParser(prog="dtl models", description="List the networks that model.name accepts.")
    parser.add_argument("word", nargs="?", default="", help="list only names that contain this")
    options = parser.parse_args(list(arguments))

    from dtl.models.build import model_names

    for name in model_names():
        if options.word in name:
            to_stdout(name)
    return 0
