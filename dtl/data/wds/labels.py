"""From the labels in WebDataset shards from other tools, numbers or names, to classes in a fixed order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dtl.data.shards.manifest import MANIFEST_NAME, Manifest
from dtl.data.wds.samples import FOLDER, Label, shown
from dtl.errors import UserError
from dtl.files import user_path
from dtl.text import nearest
from dtl.untrusted import parse_json, read_text


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Class names in the order of their numbers: one name per line, a JSON list, JSON {name: number}, or packed shards."""
    place = user_path(path)
    if (place / MANIFEST_NAME).is_file():
        return Manifest.read(place).classes
    try:
        text = read_text(place)
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror}; it should list the classes") from None
    classes: Sequence[object] = [line.strip() for line in text.splitlines() if line.strip()]
    if place.suffix.lower() == ".json":
        classes = _from_json(parse_json(text, str(place), by_hand=True), place)
    names = tuple(str(name) for name in classes)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or twice:
        raise UserError(f"{place} lists class '{twice[0]}' twice" if twice else f"{place} lists no class")
    return names


def _from_json(value: object, place: Path) -> Sequence[object]:
    if isinstance(value, list) and all(isinstance(name, (str, int)) for name in value):
        return value
    if isinstance(value, dict) and sorted(map(str, value.values())) == sorted(map(str, range(len(value)))):
        return sorted(value, key=lambda name: int(value[name]))
    raise UserError(f"{place} is neither a JSON list of class names nor an object {{class name: number from 0}}")


def decide_classes(first_of: Mapping[Label, str], *, rule: str, given: Sequence[str] | None, notes: list[str]) -> tuple[tuple[str, ...], dict[Label, int]]:
    """(classes, label as it stands -> its number). `first_of` gives for each label a sample that has it, for messages.

    Numbers count the given classes, or else make the classes "0", "1" ...; names are sorted, as an image folder's are.
    """
    if rule == FOLDER:
        first_of = {str(label): sample for label, sample in first_of.items()}
    if given is not None:
        return tuple(given), _numbers_of_given(first_of, tuple(given))
    numbers = [label for label in first_of if isinstance(label, int)]
    names = [label for label in first_of if isinstance(label, str)]
    if numbers and names:
        raise UserError(
            f"some labels are numbers and some are names: {numbers[0]} of sample {shown(first_of[numbers[0]])}, "
            f"'{shown(names[0])}' of sample {shown(first_of[names[0]])}; give the class list with --classes FILE"
        )
    if names:
        if rule == FOLDER and len(names) == 1:
            raise UserError(
                f"all keys are in one folder, '{shown(names[0])}', so there is only one class; "
                "choose where the label is (--label-field), or give the class list with --classes FILE"
            )
        classes = tuple(sorted(names))
        return classes, {name: number for number, name in enumerate(classes)}
    return _numbered(first_of, numbers, notes)


def _numbered(first_of: Mapping[Label, str], numbers: Sequence[int], notes: list[str]) -> tuple[tuple[str, ...], dict[Label, int]]:
    low, high = min(numbers), max(numbers)
    if low < 0:
        raise UserError(f"label {low} of sample {shown(first_of[low])} is negative")
    if high >= 10 * len(numbers) + 1000:
        raise UserError(
            f"labels go up to {high} (sample {shown(first_of[high])}), but only {len(numbers)} different labels occur; "
            "if they are not class numbers, give the class list with --classes FILE"
        )
    count = high + 1
    if count > len(numbers):
        one_based = low == 1 and len(numbers) == high
        notes.append(
            "no sample has label 0: the labels seem to start at 1, so class 0 is empty"
            if one_based
            else f"{count - len(numbers)} of the labels 0 to {high} have no sample"
        )
    return tuple(str(number) for number in range(count)), {number: number for number in numbers}


def _numbers_of_given(first_of: Mapping[Label, str], classes: tuple[str, ...]) -> dict[Label, int]:
    known = {name: number for number, name in enumerate(classes)}
    # A class may be called "7": then the names in the list count, where it has all of the labels.
    if all(str(label) in known for label in first_of):
        return {label: known[str(label)] for label in first_of}
    result: dict[Label, int] = {}
    for label, sample in first_of.items():
        if isinstance(label, int) and 0 <= label < len(classes):
            result[label] = label
        elif isinstance(label, str) and label in known:
            result[label] = known[label]
        else:
            hint = nearest(label, classes) if isinstance(label, str) else f", which are numbered 0 to {len(classes) - 1}"
            raise UserError(f"label {shown(repr(label))} of sample {shown(sample)} is not one of the {len(classes)} classes given{hint}")
    return result


def one_rule(first_of: Iterable[tuple[str, str]]) -> str:
    """The one place where all labels are. `first_of`: (rule, a sample), for each shard; UserError where they differ."""
    seen: dict[str, str] = {}
    for rule, sample in first_of:
        seen.setdefault(rule, sample)
    if len(seen) > 1:
        (one, a), (other, b) = list(seen.items())[:2]
        raise UserError(f"the label of sample {shown(a)} is in its {one}, that of sample {shown(b)} in its {other}; choose one with --label-field")
    return next(iter(seen), "")
