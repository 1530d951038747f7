"""`dtl train`: the command line of a run. The run itself is `dtl.training.run`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dtl.config import load_config
from dtl.errors import EXIT_STOPPED


def run(arguments: Sequence[str]) -> int:
    started = time.monotonic()
    if any(argument in ("-h", "--help") for argument in arguments):
        from dtl.config.help import help_text

        print(help_text())
        return 0
    if any(argument.partition("=")[0] == "--budget" for argument in arguments):
        from dtl.commands import search

        return search.run(arguments)
    config, name = load_config([argument for argument in arguments if argument not in ("--print-config", "--dry-run")])
    if "--print-config" in arguments:
        print(config.to_yaml(), end="")
        return 0
    if config.run.debug:
        from dtl.training.session import debug_config

        config, name = debug_config(config, name)
    if "--dry-run" in arguments:
        from dtl.checks.dry_run import dry_run

        return dry_run(config, name, started=started)
    from dtl.runs.folder import stopped_under_this_agent

    if stopped_under_this_agent(f"{config.run.dir}/{name}"):
        return EXIT_STOPPED
    from dtl.report import report_at_end
    from dtl.training.run import run as run_training

    return run_training(config, name, report=report_at_end, started=started).exit_status
