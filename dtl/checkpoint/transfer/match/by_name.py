"""Planning by names: unit by unit, never half a layer, and never a tensor of another layer that happens to share a name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from dtl.checkpoint.transfer.layers.names import Renaming
from dtl.checkpoint.transfer.layers.units import Entry, Key, Unit, names_speak, units_of
from dtl.checkpoint.transfer.match.fits import unit_transform
from dtl.checkpoint.transfer.match.matching import Clash, Matching


def renamed_entries(source: Sequence[Entry], renaming: Renaming, *, turned: Collection[str] = ()) -> list[Entry]:
    """The source's tensors under the names that the target would give them; those `turned` with output channels first."""
    entries = []
    for entry in source:
        if entry.name in renaming.renamed:
            shape = entry.shape
            if entry.name in turned:
                shape = (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
            entries.append(Entry(renaming.renamed[entry.name], shape, entry.family))
    return entries


def kernels(source: Sequence[Entry], renaming: Renaming) -> set[str]:
    """Tensors that other frameworks call `kernel`: they keep their output channels last, [kh, kw, I, O] and [I, O]."""
    return {
        entry.name
        for entry in source
        if entry.name.endswith(".kernel") and renaming.renamed.get(entry.name, "").endswith(".weight") and len(entry.shape) in (2, 4)
    }


def match_names(source: list[Entry], target: list[Unit], *, heads: Sequence[Unit], first: Callable[[], int | None]) -> Matching:
    """Pair each target unit with the source tensors of the same names; shapes must be equal, or an adapter must know the way.

    `source` carries the target's names already (see `renamed_entries`); `first` tells which layer sees the input. Clashes of shape leave the whole unit out:
    a convolution that does not fit must not leave its bias behind. More than a tenth of the units clashing means that the
    names do not mean the same layers (shifted Sequential indices, another depth of the same family): refused.
    """
    matching = Matching(view="names")
    by_name = {entry.name: entry for entry in source}
    kinds = _kinds(source)
    apart = {id(unit) for unit in heads}
    same = clashing = 0
    for unit in target:
        roles = _same_named(unit, by_name)
        if not roles or (unit.path in kinds and not roles.keys() - {"num_batches_tracked"}):
            continue
        same += 1
        found = Unit(unit.path, kinds.get(unit.path, unit.kind), roles)
        if {found.kind, unit.kind} == {"bn", "norm"}:
            lacking = "the source has no statistics for it (running_mean, running_var): another kind of norm, or a file without them"
            changed = f"the kind of norm changed: {found.kind} in the source, {unit.kind} here"
            matching.flag(unit, lacking if unit.kind == "bn" else changed, [] if unit.kind == "bn" else [(found, "")])
            continue
        transform = unit_transform(found, unit, first=not _equal(found, unit) and unit.kind == "conv" and unit.index == first())
        if transform is not None:
            matching.pair(found, unit, transform=transform, evidence="name")
        elif id(unit) not in apart:
            clashing += 1
            _clash(matching, found, unit)
    if clashing > 0.1 * same:
        matching.refusals.append(
            f"names fit but shapes do not: {clashing} of {same} layers of the same name clash, the first is {matching.clashes[0]}; "
            "indices may have shifted or the depth differs (try by: auto)"
        )
    return matching


def _same_named(unit: Unit, by_name: dict[str, Entry]) -> dict[str, tuple[Key, tuple[int, ...]]]:
    found: dict[str, tuple[Key, tuple[int, ...]]] = {}
    for role, (name, _) in unit.roles.items():
        if isinstance(name, str) and name in by_name:
            found[role] = (name, by_name[name].shape)
    return found


def _kinds(source: list[Entry]) -> dict[str, str]:
    return {unit.path: unit.kind for unit in units_of(source)} if names_speak(source) else {}


def _equal(found: Unit, unit: Unit) -> bool:
    return all(unit.roles[role][1] == shape for role, (_, shape) in found.roles.items())


def _clash(matching: Matching, found: Unit, unit: Unit) -> None:
    for role, (name, shape) in found.roles.items():
        target_name, target_shape = unit.roles[role]
        if shape != target_shape:
            clash = Clash(str(target_name), target_shape, str(name), shape)
            matching.clashes.append(clash)
            return
