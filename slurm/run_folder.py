"""Print the run folder of a training command line, or after the word search the folder of a search.

An error in it is printed in one line on stderr, with exit status 2.

The templates need the folder to read status.json. Here it comes from the same code as in training.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dtl.config import load_config  # noqa: E402
from dtl.errors import UserError  # noqa: E402


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["search"]:
            from dtl.commands.search import folder_of

            print(folder_of(arguments[1:]))
            return 0
        config, name = load_config(arguments)
        if config.run.debug:
            raise UserError("run.debug is for a terminal (on a node: srun --pty), not for a job")
    except UserError as error:
        print(f"dtl: {error}", file=sys.stderr)
        return 2
    print(f"{config.run.dir}/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
