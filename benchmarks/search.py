"""`dtl search` against full random search over the same trials: accuracy of the winners on a test set, and CPU seconds.

    python -m benchmarks.search [--trials 18] [--epochs 9] [--seeds 3] [--folder RUNS] [--out FILE]

The digits (20 % of the training images are the test set), a small ResNet from scratch, four ranges. Full random search trains all trials to their end;
the winner of both is chosen by the same rule. Both run in one process, one trial after the other, and begin with the packed data. CPU seconds are those of
this process and its children, without the imports.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import cpu_seconds, machine, report, table
from benchmarks.measure import parser as benchmark_parser
from dtl.config import resolve_config
from dtl.config.space import read_space, resolver
from dtl.inference.search import Budget, begin, open_search, work
from dtl.inference.search_results import conclude

SPACE = """\
phases.all.lr: {log: [0.003, 1.0]}
phases.all.weight_decay: {log: [0.00001, 0.01]}
phases.all.optimizer: [sgd, adamw]
data.global_batch_size: [32, 64, 128]
"""
RECIPE: dict[str, Any] = {
    "data": {"train": "digits", "image_size": 16, "global_batch_size": 64, "workers": 0, "test_fraction": 0.2, "augment": {"preset": "none"}},
    "model": {"name": "dtl/resnet_tiny", "init": "kaiming"},
    "precision": "no",
    "tracking": {"wandb": "off", "log_every": 1000, "report": False},
}


def searched(folder: Path, *, trials: int, epochs: int, seed: int, halving: bool) -> tuple[dict[str, Any], float]:
    """(results.json, CPU seconds) of one search."""
    recipe = {**RECIPE, "phases": {"all": {"train": "all", "epochs": epochs, "lr": 0.1}}, "run": {"seed": seed, "dir": str(folder)}}
    options = {"run.name": f"{'halving' if halving else 'full'}-{seed}"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.yaml").write_text(SPACE)
    space = read_space(str(folder / "space.yaml"))
    config, name = resolve_config(recipe, options)
    before = cpu_seconds()
    search = open_search(config, name, space, resolver(recipe, options), Budget(trials=trials), log=lambda line: None)
    if not halving:
        search.rungs = [epochs]
    begin(search)
    assert work(search, workers=1, stopped=lambda: False, log=lambda line: None) == 0
    values = conclude(search, [], log=lambda line: None)
    return values, cpu_seconds() - before


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The trials' own lines go nowhere."""
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def main() -> int:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--trials", type=int, default=18)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: nowhere)")
    options = parser.parse_args()
    facts = machine()
    rows: list[list[str]] = []
    differences, shares = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        with quietly():  # packs the digits, and imports what is imported late
            searched(Path(temporary) / "warm", trials=1, epochs=1, seed=0, halving=True)
        for seed in range(options.seeds):
            found = {}
            for halving in (False, True):
                with quietly():
                    found[halving] = searched(folder, trials=options.trials, epochs=options.epochs, seed=seed, halving=halving)
                values, seconds = found[halving]
                winner = values["trials"][0]
                accuracies = [f"{100 * winner['value']:.2f}", f"{100 * values['test']['top1']:.2f}"]
                rows.append([str(seed), "halving" if halving else "full", str(winner["trial"]), *accuracies, f"{seconds:.1f}"])
                print(*rows[-1], file=sys.stderr, flush=True)
            differences.append(100 * (found[True][0]["test"]["top1"] - found[False][0]["test"]["top1"]))
            shares.append(found[True][1] / found[False][1])
    lines = [
        *table(["seed", "search", "winner", "val top1", "test top1", "CPU s"], rows),
        "",
        f"{options.trials} trials of {options.epochs} epochs. Test top1 of the search's winner minus that of full random search's: "
        f"{statistics.mean(differences):+.2f} points on average ({min(differences):+.2f} to {max(differences):+.2f}, n = {len(differences)}). "
        f"CPU seconds: {statistics.mean(shares):.0%} of full random search's ({min(shares):.0%} to {max(shares):.0%}).",
    ]
    report("Search against full random search", lines, rows, facts, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
