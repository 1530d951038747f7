"""All pairs of near features among many: time and memory of `dtl.data.near` with its whitening, and whether a pair is lost.

    python benchmarks/near_pairs.py [--rows 100000] [--features 1280] [--threshold 0.55] [--json FILE]

The features are drawn like those of a network: 200 classes around directions of their own, none negative, their spectrum falling as that of MobileNetV2's
features of photographs does (128 directions leave 5 % of the squares). A thousand rows are near twins of others. They lie in a file that is mapped. Time and
peak memory are those of a process of its own, less the imports and the file's pages. Then all products of some rows are computed, to compare.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dtl.data.near import whitened

TWINS = 1000
CLASSES = 200
COMPARED = 10_000


def write_features(path: Path, rows: int, width: int) -> np.ndarray:
    """float32 [rows, width] in `path`; returns the planted pairs [TWINS, 2]."""
    draw = np.random.default_rng(0)
    basis = draw.normal(size=(width, width)).astype(np.float32) / np.sqrt(width)
    spectrum = (np.arange(1, width + 1, dtype=np.float32) ** -0.75)[:, None]
    basis *= spectrum * np.sqrt(width) / np.linalg.norm(spectrum)
    centres = draw.normal(size=(CLASSES, width)).astype(np.float32)
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
    for at in range(0, rows, 5000):
        count = min(5000, rows - at)
        latent = 0.6 * centres[draw.integers(0, CLASSES, count)] + 0.8 * draw.normal(size=(count, width)).astype(np.float32)
        values[at : at + count] = np.maximum(latent @ basis + 0.35, 0)
    places = draw.permutation(rows)[: 2 * TWINS].reshape(TWINS, 2)
    for one, other in places:
        values[other] = values[one] * draw.uniform(0.5, 2) + 0.1 * values[one].mean() * np.abs(draw.normal(size=width))
    values.flush()
    return np.sort(places, axis=1)


def measure(path: str, threshold: float, threads: int) -> None:
    import torch

    from dtl.data.near import scene_pairs

    torch.set_num_threads(threads)
    features = np.load(path, mmap_mode="r")
    scene_pairs(features[:100], threshold)
    before, started, processed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), time.process_time()
    found = scene_pairs(features, threshold, scratch=Path(path).parent)
    cpu, seconds, peak = time.process_time() - processed, time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(path.replace(".npy", ".found.npy"), np.stack([found.first, found.second]))
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "pairs": len(found), "peak_mib_with_the_file": (peak - before) / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--threshold", type=float, default=0.55)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.threshold, options.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        planted = write_features(path, options.rows, options.features)
        command = [sys.executable, __file__, "--measure", str(path), "--threshold", str(options.threshold), "--threads", str(options.threads)]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found = np.load(path.with_suffix(".found.npy"))
        features = whitened(np.load(path, mmap_mode="r"), Path(folder))
        size = path.stat().st_size / 2**20
        unit = features[:COMPARED].astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        expected = np.stack(np.nonzero(np.triu(unit @ unit.T >= options.threshold, 1)))
        of_both = features[planted].astype(np.float64)
        cosines = (of_both[:, 0] * of_both[:, 1]).sum(1) / np.linalg.norm(of_both, axis=2).prod(1)
        there = set(zip(*found.tolist()))
        result |= {
            "rows": options.rows,
            "features": options.features,
            "file_mib": size,
            "threshold": options.threshold,
            "planted_above": int((cosines >= options.threshold).sum()),
            "planted_lost": sum(tuple(pair) not in there for pair in planted[cosines >= options.threshold].tolist()),
            f"pairs_of_{COMPARED}_rows": expected.shape[1],
            "of_them_lost": sum(pair not in there for pair in zip(*expected.tolist())),
        }
    print(json.dumps(result, indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
