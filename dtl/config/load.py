"""Reading a config: the YAML file, and the command line's `--section.key VALUE` on top of it.

Values are validated here, before any device is touched. Unknown keys and wrong types are refused in one line with the nearest name.
Command-line values are read as YAML (`--data.workers 4`, `--phases.top.train '[layer4.*, fc.*]'`), so both are written the same way.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from dtl.config.models import Config, PhaseConfig, Section
from dtl.errors import UserError
from dtl.text import some
from dtl.untrusted import MAX_YAML_BYTES, NotYaml, check_values, parse_yaml

__all__ = ["Config", "PhaseConfig", "Section", "builtin_recipes", "config_from_dict", "load_config", "resolve_config"]


def load_config(arguments: Sequence[str]) -> tuple[Config, str]:
    """Read `[--config FILE] [--section.key VALUE ...]`; without a file the built-in digits recipe is the base.

    Returns the config and the run's default name. Raises UserError if something is wrong with the file or the options.
    """
    options = dict(_read_options(arguments))
    return resolve_config(options.pop("config", None), options)


def resolve_config(recipe: str | Path | Mapping[str, Any] | None, options: Mapping[str, Any]) -> tuple[Config, str]:
    """The config of a recipe (a file, a built-in one's name, or its sections as plain values) with `options` on top, by their dotted names.

    Without a recipe it is the built-in digits. Returns the config and the run's default name; raises UserError if something is wrong.
    """
    overrides = {dotted.replace("-", "_"): _plain(value) for dotted, value in options.items()}
    if recipe is None:
        _check_digits(overrides)
    check_values(overrides, "the options")
    if isinstance(recipe, Mapping):
        values, origin, name = _plain(recipe), "the recipe", "notebook"
        check_values(values, origin)
    else:
        text, origin, name = _read_recipe(str(recipe or "digits"))
        values = _parse_yaml(text, origin)
    for dotted, value in overrides.items():
        _check_phase(values, dotted, origin)
        _set(values, dotted, value)
        _replace_duration(values, dotted, overrides)
    config = _validate(values, origin)
    _check_whole(config, origin)
    return config, check_run_name(config.run.name if config.run.name is not None else _of_sweep(name))


def _plain(value: Any) -> Any:
    """A copy, as YAML would give it: no tuples, no paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def check_run_name(name: str) -> str:
    """The name, if it can name one folder inside run.dir. UserError for a path, or for characters that a folder name cannot have."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(os.fsencode(name)) > 200:
        raise UserError(f"run.name {name!r} must be the name of one folder in run.dir (--run.dir), without / and control characters")
    return name


def _of_sweep(name: str) -> str:
    """Each trial of a wandb sweep is a separate run: the agent gives it an id."""
    trial = os.environ.get("WANDB_RUN_ID")
    return f"{name}-{trial}" if trial and os.environ.get("WANDB_SWEEP_ID") else name


def builtin_recipes() -> dict[str, str]:
    """Name -> text of the recipes that ship inside the package, so that an installed wheel runs them."""
    files = [file for file in resources.files("dtl").joinpath("recipes").iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in sorted(files, key=lambda file: file.name)}


def config_from_dict(values: Mapping[str, Any], origin: str) -> Config:
    """Validate plain values, such as those of a stored config.yaml."""
    return _validate(dict(values), origin)


def _read_recipe(file: str) -> tuple[str, str, str]:
    """Text, origin for messages, and name of a config file, or of a built-in recipe where no such file exists."""
    path = Path(str(file))
    builtin = builtin_recipes()
    if not path.exists() and str(file) in builtin:
        return builtin[str(file)], f"the built-in recipe {file}", str(file)
    try:
        with path.open("rb") as opened:  # may be a pipe of the shell: --config <(...)
            return opened.read(4 * MAX_YAML_BYTES + 1).decode("utf-8"), str(path), path.stem
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, list(builtin), n=1, cutoff=0.6)
        hint = f"; did you mean --config {near[0]}?" if near else f" (built-in recipes: {', '.join(builtin)})"
        raise UserError(f"{path}: no such config file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this config file: {error}") from None


def _parse_yaml(text: str, origin: str) -> dict[str, Any]:
    values = parse_yaml(text, origin)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{origin}: a config is a mapping of sections, got {type(values).__name__}")
    return values


def _read_options(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """`--a.b-c VALUE`, `--a.b_c=VALUE`, and a bare `--a.b` for true."""
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or option == "--":
            raise UserError(f"unexpected argument {option!r}: options are --section.key VALUE (see --help)")
        name, equals, value = option[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        name = name.replace("-", "_")
        if name == "config":
            yield name, value
            continue
        try:
            yield name, parse_yaml(value, f"--{name}")
        except NotYaml:
            yield name, value


def _check_digits(overrides: Mapping[str, Any]) -> None:
    """The base without a file is a recipe for small gray digits: it must not be used on photos by accident."""
    if str(overrides.get("data.train", "digits")) != "digits":
        raise UserError("--data.train without --config would use the digits recipe; give --config finetune (or features, or your own file)")


def _check_phase(values: Mapping[str, Any], dotted: str, origin: str) -> None:
    """An override of a phase that does not exist is a typo: it would add a phase to the run."""
    parts = dotted.split(".")
    phases = values.get("phases")
    if parts[0] == "phases" and len(parts) > 2 and isinstance(phases, dict) and phases and parts[1] not in phases:
        near = difflib.get_close_matches(parts[1], list(phases), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"its phases: {', '.join(phases)}"
        raise UserError(f"--{dotted}: {origin} has no phase {parts[1]}; {hint}")


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = values
    for i, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"--{dotted}: {'.'.join(parents[: i + 1])} is a single value, it has no key {last!r}")
        node = child
    node[last] = value


def _replace_duration(values: dict[str, Any], dotted: str, overrides: Mapping[str, Any]) -> None:
    """`--phases.all.steps 50` takes the place of the recipe's epochs, and the other way round; both as options are refused."""
    *place, last = dotted.split(".")
    other = {"epochs": "steps", "steps": "epochs"}.get(last)
    if overrides[dotted] is not None and len(place) == 2 and place[0] == "phases" and other and ".".join([*place, other]) not in overrides:
        values["phases"][place[1]].pop(other, None)


def _validate(values: dict[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, origin)) from None


def _one_line(error: ValidationError, origin: str) -> str:
    """The first error, in words; an unknown key before anything else, because it often causes the others."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    place = [str(part) for part in first["loc"]]
    known = _known_keys(place[:-1])
    if first["type"] == "extra_forbidden":
        near = [".".join([*place[:-1], name]) for name in difflib.get_close_matches(place[-1], known, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}"
        return f"{origin}: unknown config key {'.'.join(place)}; {hint}"
    dotted = ".".join(_real_keys(place))
    if first["type"] == "missing":
        return f"{origin}: {dotted} is missing"
    inner = _known_keys(place)
    if inner and not isinstance(first["input"], dict):
        return f"{origin}: {dotted} is a section, not a single value (got {first['input']!r}); its settings are {dotted}.{inner[0]}, {some(inner[1:])}"
    messages = [e["msg"] for e in problems if [str(p) for p in e["loc"]][: len(_real_keys(place))] == _real_keys(place)]
    message = "; or ".join(dict.fromkeys(m.removeprefix("Value error, ") for m in messages))
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"{origin}: {dotted or 'config'}: {message}{got}"


def _real_keys(place: list[str]) -> list[str]:
    """The part of a pydantic location that names config keys; what follows names members of a union."""
    kept: list[str] = []
    for part in place:
        known = _known_keys(kept)
        if known and part not in known and kept != ["phases"]:
            break
        if not known and kept and kept != ["phases"]:
            break
        kept.append(part)
    return kept


def _known_keys(place: list[str]) -> list[str]:
    model: Any = Config
    for part in place:
        if isinstance(model, type) and issubclass(model, Section):
            fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
            model = _section_of(fields.get(part))
        elif model is dict:
            model = PhaseConfig
        else:
            return []
    if isinstance(model, type) and issubclass(model, Section):
        return [field.alias or name for name, field in model.model_fields.items()]
    return []


def _section_of(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        found = [_section_of(member) for member in get_args(annotation)]
        return next((member for member in found if member is not None), None)
    if get_origin(annotation) is dict:
        return dict if PhaseConfig in get_args(annotation) else None
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def check_phase_names(config: Config, origin: str) -> None:
    for name in config.phases:
        if not name.replace("-", "_").isidentifier():
            raise UserError(f"{origin}: {name!r} is not a valid phase name; use letters, digits, - and _")


def _check_whole(config: Config, origin: str) -> None:
    """Contradictions between sections."""
    if not config.phases:
        raise UserError(f"{origin}: no phases; a recipe needs at least one, such as `phases: {{all: {{train: all, epochs: 10}}}}`")
    check_phase_names(config, origin)
    if config.data.train is None:
        raise UserError(f"{origin}: no training data; give --data.train FOLDER")
    if config.data.val is not None and config.data.val_fraction:
        raise UserError(f"{origin}: data.val and data.val_fraction are both given; use one of them")
    micro = config.data.micro_batch_size
    if micro != "auto" and micro > config.data.global_batch_size:
        raise UserError(f"{origin}: data.micro_batch_size {micro} is larger than data.global_batch_size {config.data.global_batch_size}")
    rotated = [name for name, phase in config.phases.items() if phase.task == "rotate"]
    if rotated and list(config.phases)[-1] in rotated and len(config.phases) > len(rotated):
        raise UserError(f"{origin}: phase {rotated[-1]} (rotate) is the last phase; put pretext phases before the phases that classify")
