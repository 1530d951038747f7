"""How well is a training set shuffled? Batches of the real plan against independent draws, by window size.

    python benchmarks/shuffling.py [--shards FOLDER] [--batch 256] [--json FILE]

Without --shards: a set of ImageNet's size (1,281,167 samples of 1,000 classes in 1,282 shards), once as `dtl pack` writes it (shuffled over
all shards when packed) and once as tars made class by class. With it: the shards in that folder, by the labels in their index.

Of 200 batches, spread over an epoch: the mean number of distinct classes, and the distance between the classes of a batch and those of
the whole set (total variation, which an independent draw does not bring to 0 either): 0 is as near as independent draws are, 1 is batches
of one class. The last column is what a cache must hold for the window, in shards.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from dtl.data.sampling.plan import EpochPlan
from dtl.data.shards.index import Shards

NUM_SAMPLES, NUM_CLASSES, NUM_SHARDS = 1_281_167, 1_000, 1_282
WINDOWS = (1_000, 4_096, 16_384, 65_536, 262_144, 2**31)
NUM_BATCHES = 200


def made_up() -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """name -> labels, shard sizes, classes."""
    by_class = np.arange(NUM_SAMPLES) * NUM_CLASSES // NUM_SAMPLES
    sizes = np.diff(np.linspace(0, NUM_SAMPLES, NUM_SHARDS + 1).astype(np.int64))
    return {
        "packed by dtl": (np.random.default_rng(0).permutation(by_class), sizes, NUM_CLASSES),
        "class by class": (by_class, sizes, NUM_CLASSES),
    }


def distances(batches: list[np.ndarray], whole: np.ndarray) -> tuple[float, float]:
    """(mean number of distinct classes, mean total variation to the shares of the whole set) of batches of labels."""
    counts = np.array([np.bincount(batch, minlength=len(whole)) for batch in batches])
    return float((counts > 0).sum(axis=1).mean()), float(np.abs(counts / counts.sum(axis=1, keepdims=True) - whole).sum(axis=1).mean() / 2)


def measure(labels: np.ndarray, sizes: np.ndarray, num_classes: int, *, batch: int) -> list[dict[str, Any]]:
    """One row a window, the last one for independent draws."""
    whole = np.bincount(labels, minlength=num_classes) / len(labels)
    random = np.random.default_rng(1)
    distinct, floor = distances([labels[random.integers(0, len(labels), batch)] for _ in range(NUM_BATCHES)], whole)
    rows = []
    for window in [window for window in WINDOWS if window < len(labels)] + [len(labels)]:
        plan = EpochPlan(sizes, seed=0, epoch=0, global_batch_size=batch, window=window)
        steps = np.unique(np.linspace(0, plan.num_steps - 1, NUM_BATCHES).astype(int))
        found, distance = distances([labels[plan.step_samples(int(step))] for step in steps], whole)
        rows.append({
            "window": window,
            "distinct_classes": round(found, 1),
            "distance": round(max(0.0, (distance - floor) / (1 - floor)), 3),
            "shards_at_once": int(min(len(sizes), np.ceil(window / sizes.mean()) + 1)),
        })  # fmt: skip
    return [*rows, {"window": None, "distinct_classes": round(distinct, 1), "distance": 0.0, "shards_at_once": None}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", metavar="FOLDER", help="measure these packed or indexed shards")
    parser.add_argument("--batch", type=int, default=256, metavar="G", help="global batch size (256)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    options = parser.parse_args()
    sets = made_up()
    if options.shards:
        shards = Shards.open(options.shards)
        sets = {options.shards: (np.array(shards.labels), np.array(shards.shard_sizes), shards.num_classes)}
    results = {name: measure(*facts, batch=options.batch) for name, facts in sets.items()}
    for name, rows in results.items():
        print(f"\n{name}: {len(sets[name][0]):,} samples, {sets[name][2]:,} classes, {len(sets[name][1]):,} shards, batches of {options.batch}")
        print(f"{'window':>12} {'classes a batch':>16} {'distance':>9} {'shards at once':>15}")
        for row in rows:
            window = "independent" if row["window"] is None else f"{row['window']:,}"
            print(f"{window:>12} {row['distinct_classes']:>16.1f} {row['distance']:>9.3f} {row['shards_at_once'] or '':>15}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
