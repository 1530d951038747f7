"""Names for people: a JSON file {class name: display name}, such as the cat_to_name.json that comes with the flowers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dtl.errors import UserError
from dtl.files import user_path
from dtl.untrusted import parse_json, read_text

NAME_FILES = ("cat_to_name.json", "class_names.json", "names.json")


def find_display_names(classes: Sequence[str], *, given: str | Path | None, beside: Sequence[Path], notes: list[str]) -> dict[str, str]:
    """Display names of `classes`, from the file `given`, or from the first of NAME_FILES in the folders `beside` that names any of them."""
    if given is not None:
        path = user_path(given)
        names = _known(_read(path), classes)
        if not names:
            raise UserError(f"{path} names none of the classes ({', '.join(classes[:5])} ...); its keys must be class names")
        return names
    for path in (folder / name for folder in beside for name in NAME_FILES):
        if not path.is_file():
            continue
        try:
            names = _known(_read(path), classes)
        except UserError as error:
            notes.append(f"display names not used: {error}")
            continue
        if names:
            notes.append(f"display names from {path}")
            return names
    return {}


def _read(path: Path) -> dict[str, str]:
    try:
        raw = parse_json(read_text(path), str(path), by_hand=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it should be a JSON file {{class name: display name}}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(raw, dict) or not all(isinstance(shown, str) for shown in raw.values()):
        raise UserError(f"{path} is not a JSON object of {{class name: display name}}")
    return raw


def _known(names: dict[str, str], classes: Sequence[str]) -> dict[str, str]:
    return {name: names[name] for name in classes if name in names}
