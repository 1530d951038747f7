"""Names of tensors: what wrappers and trainers put in front of them, and how alike two of them are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dtl.checkpoint.transfer.layers.units import Entry, Shape

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Words that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names, at any depth."""

TENSORFLOW_ROLES = {
    "gamma": "weight",
    "beta": "bias",
    "kernel": "weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

# torchvision's DenseNets before 0.2 registered `norm.1`, which modules may no longer be called.
_LEGACY_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$")


@dataclass(frozen=True)
class Renaming:
    """How the source's names were put into the target's terms.

    `renamed`: for each source tensor its name without wrappers and prefixes. `source_prefix` was replaced by
    `target_prefix` for `hits` tensors whose name and shape then fit. `rivals`: other prefixes that fit as well and
    hold other tensors; with any of these nothing was replaced. `inside`: the source tensors under the prefix that was
    chosen or found; what lies outside of it is another part of the file, and no part of the network that is asked for.
    """

    renamed: dict[str, str]
    source_prefix: str = ""
    target_prefix: str = ""
    hits: int = 0
    rivals: tuple[str, ...] = ()
    inside: frozenset[str] = frozenset()


def strip_wrappers(name: str) -> str:
    *path, word = name.split(".")
    return ".".join([*(part for part in path if part not in WRAPPERS), word])


def _clean(entries: Sequence[Entry]) -> dict[str, str]:
    """Wrappers, legacy names and TensorFlow words undone, each only where no two names become one."""
    names = {entry.name: entry.name for entry in entries}
    for step in (strip_wrappers, _modern_densenet):
        changed = {name: step(now).lstrip(".") for name, now in names.items()}
        if len(set(changed.values())) == len(changed):
            names = changed
    return _torch_roles(names)


def _modern_densenet(name: str) -> str:
    found = _LEGACY_DENSENET.match(name)
    return found.group(1) + found.group(2) if found else name


def _torch_roles(names: dict[str, str]) -> dict[str, str]:
    """gamma and beta only as a complete set: a layer scale called `gamma` stands alone and stays what it is."""
    words: dict[str, set[str]] = {}
    for now in names.values():
        path, _, word = now.rpartition(".")
        words.setdefault(path, set()).add(word)
    out = {}
    for name, now in names.items():
        path, _, word = now.rpartition(".")
        present = words[path]
        norm = {"gamma", "beta"} <= present
        layer = "kernel" in present and present <= {"kernel", "bias"}
        if word in TENSORFLOW_ROLES and (norm or (layer and word == "kernel")):
            out[name] = f"{path}.{TENSORFLOW_ROLES[word]}"
        else:
            out[name] = now
    return out if len(set(out.values())) == len(out) else names


def _prefixes(names: Sequence[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        for depth in range(min(5, len(parts))):
            counts[".".join(parts[:depth]) + ("." if depth else "")] += 1
    return counts


def rename(source: Sequence[Entry], target: Sequence[Entry], *, prefix: str | None = None) -> Renaming:
    """Undo wrappers, then look for the one prefix of the source that stands for one prefix of the target.

    `prefix`: the user's choice (`encoder_q.`); names without it keep themselves and match nothing.
    A swap is taken when at least 30 % of the smaller side then fits by name and shape. Rivals within 2 % of the best
    that hold other tensors (a student and a teacher, MoCo's two encoders) are reported instead of choosing.
    """
    clean = _clean(source)
    if prefix:
        source = [entry for entry in source if clean[entry.name].startswith(prefix) or entry.name.startswith(prefix)]
    shapes = {clean[entry.name]: entry.shape for entry in source}
    wanted = {entry.name: entry.shape for entry in target}
    swaps = _swaps(shapes, wanted)
    whole = frozenset(entry.name for entry in source)
    if not swaps:
        return Renaming({entry.name: clean[entry.name] for entry in source}, inside=whole)
    hits, _, old, new = swaps[0]
    rivals = tuple(dict.fromkeys(other for count, _, other, _ in swaps[1:] if count >= 0.98 * hits and not other.startswith(old) and not old.startswith(other)))
    kept = {entry.name: clean[entry.name] for entry in source}
    if rivals or hits < 0.3 * min(len(wanted), len(shapes)):
        return Renaming(kept, old, new, hits, rivals, inside=whole)
    swapped = {name: new + now[len(old) :] if now.startswith(old) else now for name, now in kept.items()}
    if len(set(swapped.values())) < len(swapped):
        return Renaming(kept, old, new, hits, inside=whole)
    return Renaming(swapped, old, new, hits, inside=frozenset(name for name, now in kept.items() if now.startswith(old)))


def _swaps(shapes: dict[str, Shape], wanted: dict[str, Shape]) -> list[tuple[int, int, str, str]]:
    """(tensors that fit, -length, source prefix, target prefix), best first; ties go to the shorter, then to the alphabet."""
    source_counts, target_counts = _prefixes(list(shapes)), _prefixes(list(wanted))
    least = 0.3 * min(len(wanted), len(shapes))
    found = []
    for old in sorted(source_counts):
        if old and source_counts[old] < max(4, 0.2 * len(wanted)):
            continue
        inside = [name for name in shapes if name.startswith(old)]
        for new in sorted(target_counts):
            if new and target_counts[new] < max(4, least):
                continue
            # What wraps a network holds most of it on one side or the other; a part that was renamed is no wrapper.
            if max(len(inside) / len(shapes), target_counts[new] / len(wanted)) < 0.6:
                continue
            hits = sum(wanted.get(new + name[len(old) :]) == shapes[name] for name in inside)
            if hits and not _is_part(old, new, shapes, wanted):
                found.append((hits, -len(old) - len(new), old, new))
    return sorted(found, key=lambda swap: (-swap[0], -swap[1], swap[2], swap[3]))


def _is_part(old: str, new: str, shapes: dict[str, Shape], wanted: dict[str, Shape]) -> bool:
    """Whether the two prefixes are parts of networks whose names fit already outside of them: `block0.` for `extra.` is then
    another block, and no other way to write the same."""
    ours, theirs = _ancestors(old), _ancestors(new)
    for above in ours:
        for beside in theirs:
            if beside + old[len(above) :] == new:
                continue
            outside = (name for name in shapes if name.startswith(above) and not name.startswith(old))
            # A head is two tensors: these alone make no network.
            if sum(wanted.get(beside + name[len(above) :]) == shapes[name] for name in outside) > 2:
                return True
    return False


def _ancestors(prefix: str) -> list[str]:
    parts = prefix.split(".")[:-1]
    return ["".join(part + "." for part in parts[:depth]) for depth in range(len(parts))]


_SYNONYMS = {
    "bn": "norm",
    "ln": "norm",
    "batchnorm": "norm",
    "layernorm": "norm",
    "shortcut": "downsample",
    "fc": "linear",
    "classifier": "linear",
    "head": "linear",
}


@lru_cache(maxsize=100_000)
def words(path: str) -> tuple[str, ...]:
    """The words and numbers of a dotted path, common synonyms made one."""
    return tuple(_SYNONYMS.get(word.lower(), word.lower()) for word in re.findall(r"[A-Za-z]+|\d+", path))


@lru_cache(maxsize=1_000_000)
def likeness(left: str, right: str) -> float:
    """0..1: twice the longest common subsequence of words, over all words. Whole words only: `conv1` is not half `conv2`."""
    a, b = words(left), words(right)
    if not a or not b or left[0] == "#" or right[0] == "#":
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(a) + len(b))


def looks_sorted(entries: Sequence[Entry]) -> bool:
    """Whether the names stand in alphabetical order, as safetensors writes them: no module registers bias before weight."""
    names = [entry.name for entry in entries if entry.family == "f"]
    return len(names) > 8 and names == sorted(names)
