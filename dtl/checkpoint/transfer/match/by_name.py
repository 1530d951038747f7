"""Planning by names: layer by layer, never half a layer, and never a tensor of another layer that happens to share a name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dtl.checkpoint.transfer.layers.layer import WEIGHTED, Key, Layer, Shape, TensorSpec, layer_transform, layers_of, names_speak, strip_wrappers
from dtl.checkpoint.transfer.match.evidence import Clash, Match, Matching

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


def _clean(specs: Sequence[TensorSpec]) -> dict[str, str]:
    """Wrappers, legacy names and TensorFlow words undone, each only where no two names become one."""
    names = {spec.name: spec.name for spec in specs}
    for step in (strip_wrappers, _modern_densenet, _without_base_layer):
        changed = {name: step(now).lstrip(".") for name, now in names.items()}
        if len(set(changed.values())) == len(changed):
            names = changed
    return _torch_roles(names)


def _modern_densenet(name: str) -> str:
    found = _LEGACY_DENSENET.match(name)
    return found.group(1) + found.group(2) if found else name


def _without_base_layer(name: str) -> str:
    """PEFT puts the layer that it adapts below itself."""
    return re.sub(r"\.base_layer\.(weight|bias)$", r".\1", name)


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


def rename(source: Sequence[TensorSpec], target: Sequence[TensorSpec], *, prefix: str | None = None) -> Renaming:
    """Undo wrappers, then look for the one prefix of the source that stands for one prefix of the target.

    `prefix`: the user's choice (`encoder_q.`); names without it keep themselves and match nothing.
    A swap is taken when at least 30 % of the smaller side then fits by name and shape. Rivals within 2 % of the best
    that hold other tensors (a student and a teacher, MoCo's two encoders) are reported instead of choosing.
    """
    clean = _clean(source)
    if prefix:
        source = [spec for spec in source if clean[spec.name].startswith(prefix) or spec.name.startswith(prefix)]
    shapes = {clean[spec.name]: spec.shape for spec in source}
    wanted = {spec.name: spec.shape for spec in target}
    swaps = _swaps(shapes, wanted)
    whole = frozenset(spec.name for spec in source)
    if not swaps:
        return Renaming({spec.name: clean[spec.name] for spec in source}, inside=whole)
    hits, _, old, new = swaps[0]
    rivals = tuple(dict.fromkeys(other for count, _, other, _ in swaps[1:] if count >= 0.98 * hits and not other.startswith(old) and not old.startswith(other)))
    kept = {spec.name: clean[spec.name] for spec in source}
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


def renamed_specs(source: Sequence[TensorSpec], renaming: Renaming, *, turned: Collection[str] = ()) -> list[TensorSpec]:
    """The source's tensors under the names that the target would give them; those `turned` with output channels first."""
    specs = []
    for spec in source:
        if spec.name in renaming.renamed:
            shape = spec.shape
            if spec.name in turned:
                shape = (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
            specs.append(TensorSpec(renaming.renamed[spec.name], shape, spec.family))
    return specs


def kernels(source: Sequence[TensorSpec], renaming: Renaming) -> set[str]:
    """Tensors that other frameworks call `kernel`: they keep their output channels last, [kh, kw, I, O] and [I, O]."""
    return {
        spec.name for spec in source if spec.name.endswith(".kernel") and renaming.renamed.get(spec.name, "").endswith(".weight") and len(spec.shape) in (2, 4)
    }


def match_names(source: list[TensorSpec], target: list[Layer], *, heads: Sequence[Layer], first: Callable[[], int | None]) -> Matching:
    """Pair each target layer with the source tensors of the same names; shapes must be equal, or an adapter must know the way.

    `source` carries the target's names already (see `renamed_specs`); `first` tells which layer sees the input. Clashes of shape leave the whole layer out:
    a convolution that does not fit must not leave its bias behind. More than a tenth of the layers clashing means that the
    names do not mean the same layers (shifted Sequential indices, another depth of the same family): refused.
    """
    matching = Matching(view="names")
    by_name = {spec.name: spec for spec in source}
    kinds = _kinds(source, target)
    apart = {id(layer) for layer in heads}
    same = clashing = 0
    for layer in target:
        roles = _same_named(layer, by_name)
        if not roles or (layer.path in kinds and not roles.keys() - {"num_batches_tracked"}):
            continue
        same += 1
        found = Layer(layer.path, kinds.get(layer.path, layer.kind), roles)
        if {found.kind, layer.kind} == {"bn", "norm"}:
            lacking = "the source has no running_mean and running_var for it: it is another kind of norm, or the file was saved without them"
            changed = f"the kind of norm changed: {found.kind} in the source, {layer.kind} here"
            matching.flag(layer, lacking if layer.kind == "bn" else changed)
            continue
        transform = layer_transform(found, layer, first=not _equal(found, layer) and layer.kind == "conv" and layer.index == first())
        if transform is not None:
            matching.pair(found, layer, transform=transform, evidence="name")
        elif id(layer) not in apart:
            clashing += 1
            _clash(matching, found, layer)
    if clashing > 0.1 * same:
        matching.refusals.append(
            f"the names match but the shapes do not: {clashing} of {same} layers with the same name have different shapes, the first is {matching.clashes[0]}; "
            "indices may have shifted or the depth differs (try by: auto)"
        )
    return matching


def _same_named(layer: Layer, by_name: dict[str, TensorSpec]) -> dict[str, tuple[Key, tuple[int, ...]]]:
    found: dict[str, tuple[Key, tuple[int, ...]]] = {}
    for role, (key, _) in layer.roles.items():
        if len(key) == 1 and key[0] in by_name:
            found[role] = (key, by_name[key[0]].shape)
    return found


def _kinds(source: list[TensorSpec], target: list[Layer]) -> dict[str, str]:
    return {layer.path: layer.kind for layer in layers_of(source, like=target)} if names_speak(source, target) else {}


def _equal(found: Layer, layer: Layer) -> bool:
    return all(layer.roles[role][1] == shape for role, (_, shape) in found.roles.items())


def _clash(matching: Matching, found: Layer, layer: Layer) -> None:
    for role, (key, shape) in found.roles.items():
        target_key, target_shape = layer.roles[role]
        if shape != target_shape:
            matching.clashes.append(Clash(target_key[0], target_shape, key[0], shape))
            return


MOST_AGREE = 0.6
"""Least share of same-named layers that must have the same shape: below it the names mean other layers."""
MOST_NAMED = 0.9
"""Least share of one side's layers that must have a namesake, for names to be believed as a whole."""
SOME_NAMED = ((0.9, 0.5), (1.0, 0.2))
"""(least share of namesakes that agree, least share that has one) for believing the namesakes alone: blocks were put in and
taken out. No lower than this: a stem and a head of common names prove nothing about the blocks between."""


@dataclass
class Trust:
    """`anchors`: target layer -> source layer of the same name, believed. `distrusted`: target layers whose name proves nothing.

    `as_a_whole`: same names have the same shapes nearly everywhere, and cover nearly all of one side. `numbers`: whether numbers
    in names may be used at all. `mapped`: anchors that the user's map gave. `new_names`: namesakes are believed, so that a
    layer without one is a new layer, unless there is more evidence than its shape.
    """

    as_a_whole: bool
    anchors: dict[int, int] = field(default_factory=dict)
    distrusted: set[int] = field(default_factory=set)
    numbers: bool = True
    mapped: set[int] = field(default_factory=set)
    new_names: bool = False


def trust_names(matching: Matching, source: Sequence[Layer], target: Sequence[Layer], heads: Sequence[Layer]) -> Trust:
    """Judge a matching by names. Numbered lists that have shifted are believed nowhere: those in which a layer clashes with its
    namesake, while a neighbour in the same list has its shape, and those that both sides number from another beginning."""
    own = {name: layer.index for layer in source for name in layer.names}
    apart = {layer.index for layer in heads}
    paired: dict[int, int] = {}
    for layer in target:
        sources = {own[matching.matches[name].source[0]] for name in layer.names if name in matching.matches}
        if len(sources) == 1:
            paired[layer.index] = sources.pop()
    clashed = {clash.target for clash in matching.clashes}
    clashing = [layer for layer in target if clashed.intersection(layer.names)]
    kinds_changed = [layer for layer in target if any(name in matching.flags for name in layer.names) and layer not in clashing]
    agree = len(paired) / max(1, len(paired) + len(clashing))
    counted = [layer for layer in target if layer.index not in apart]
    namesakes = len(clashing) + len(kinds_changed)
    share = max(
        (sum(layer.index in paired for layer in counted) + namesakes) / max(1, len(counted)),
        (len(set(paired.values())) + namesakes) / max(1, len(source)),
    )
    if len(clashing) > 2 and agree < MOST_AGREE:
        return Trust(False, distrusted={layer.index for layer in target})
    shifted = _shifted_lists(clashing, source) | _renumbered_lists(source, target)
    distrusted = {layer.index for layer in target if any(_in_list(layer.path, each) for each in shifted)}
    believed = {j: i for j, i in paired.items() if j not in distrusted}
    if share >= MOST_NAMED:
        return Trust(True, believed, distrusted, new_names=True)
    agreeing = len(paired) / max(1, len(paired) + namesakes)
    if any(agreeing >= least and share >= named for least, named in SOME_NAMED):
        return Trust(False, believed, distrusted, new_names=True)
    # Not trusted, but enough for a new name beside them to be in doubt.
    return Trust(False, distrusted=distrusted, new_names=agreeing >= 0.5 and share >= SOME_NAMED[-1][1])


def _renumbered_lists(source: Sequence[Layer], target: Sequence[Layer]) -> set[str]:
    """Numbered lists (as what stands before the number) in which each side has numbers that the other has not.

    0 to 11 against 1 to 12: the same blocks, counted from another beginning. A namesake is then another block of the same
    shape. Where one side's numbers are all among the other's, blocks were added or left out, and the names hold.
    """
    ours, theirs = _numbers(source), _numbers(target)
    return {before for before, numbers in theirs.items() if before in ours and numbers - ours[before] and ours[before] - numbers}


def _numbers(layers: Sequence[Layer]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for layer in layers:
        for number in re.finditer(r"\d+", layer.path):
            found.setdefault(layer.path[: number.start()], set()).add(int(number.group()))
    return found


def _shifted_lists(clashing: Sequence[Layer], source: Sequence[Layer]) -> set[str]:
    """Numbered lists, as what stands before the number, in which a namesake's neighbour has the wanted shape."""
    shapes = {layer.path: layer.signature for layer in source}
    found = set()
    # Norms have few shapes, which prove little; a convolution with a neighbour's shape does.
    for layer in (each for each in clashing if each.kind in WEIGHTED):
        for number in re.finditer(r"\d+", layer.path):
            before, after = layer.path[: number.start()], layer.path[number.end() :]
            pattern = re.compile(re.escape(before) + r"\d+" + re.escape(after) + r"$")
            if any(pattern.match(path) and signature == layer.signature for path, signature in shapes.items()):
                found.add(before)
    return found


def _in_list(path: str, before: str) -> bool:
    return path.startswith(before) and path[len(before) : len(before) + 1].isdigit()


def with_settled(trust: Trust, settled: Mapping[str, Match], source: Sequence[Layer], target: Sequence[Layer]) -> Trust:
    """The layers that the user's map pairs become anchors, ahead of the names."""
    ours = {name: layer.index for layer in source for name in layer.names}
    theirs = {name: layer.index for layer in target for name in layer.names}
    given = {theirs[name]: ours[match.source[0]] for name, match in settled.items() if len(match.source) == 1}
    taken = set(given.values())
    anchors = {j: i for j, i in trust.anchors.items() if i not in taken and j not in given}
    return replace(trust, anchors={**anchors, **given}, mapped=set(given))
