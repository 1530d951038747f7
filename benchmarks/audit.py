"""What `dtl audit` finds of labels that were flipped: precision and recall of what it names.

    python benchmarks/audit.py FEATURES.npz [--share 0.1] [--seeds 3] [--json FILE]

FEATURES.npz holds features [N, D] as `x` and labels [N] as `y`. In each seed a share of the labels is replaced by another class, drawn uniformly. Then the
images are dealt to folds and judged as `dtl audit` does. With --share 0 all that is named is (as far as the labels are right) named falsely.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from dtl.inference.labels import FOLDS, deal, find_suspects


def measure(features: np.ndarray, labels: np.ndarray, share: float, seed: int) -> dict[str, float]:
    draw, classes = np.random.default_rng(seed), int(labels.max()) + 1
    noisy, rows = labels.copy(), draw.permutation(len(labels))[: round(share * len(labels))]
    noisy[rows] = (labels[rows] + draw.integers(1, classes, len(rows))) % classes
    wrong, started = noisy != labels, time.process_time()
    found = find_suspects(features, noisy, deal(np.arange(len(labels)), noisy, FOLDS), classes)
    hits = int(wrong[found.rows].sum())
    return {
        "seed": seed,
        "flipped": int(wrong.sum()),
        "named": len(found.rows),
        "precision": hits / max(1, len(found.rows)),
        "recall": hits / max(1, int(wrong.sum())),
        "right_class": float(np.mean(found.suggested[wrong[found.rows]] == labels[found.rows][wrong[found.rows]])) if hits else 0.0,
        "cpu_seconds": time.process_time() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json")
    options = parser.parse_args()
    with np.load(options.features) as file:
        features, labels = file["x"], np.unique(file["y"], return_inverse=True)[1].astype(np.int64)
    rows = [measure(features, labels, options.share, seed) for seed in range(options.seeds)]
    for row in rows:
        print(json.dumps(row))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
