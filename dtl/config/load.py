"""Reading a config: the YAML file, and the command line's `--section.key VALUE` on top of it.

Values are validated here, before any device is touched. Unknown keys and wrong types are refused in one line with the nearest name.
Command-line values are read as YAML (`--data.workers 4`, `--phases.top.train '[layer4.*, fc.*]'`), so both are written the same way. A setting that
takes text takes it as it stands: `--run.name 4711` and `--data.train no` need no quotes, in the file neither.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from dtl.config import auto
from dtl.config.models import BESIDE_SOLVE, Config, PhaseConfig, Section
from dtl.credentials import is_address
from dtl.errors import UserError
from dtl.files import user_path
from dtl.text import some
from dtl.untrusted import MAX_YAML_BYTES, NotYaml, check_values, in_words, parse_yaml

__all__ = ["Config", "PhaseConfig", "Section", "builtin_recipes", "config_from_dict", "load_config", "resolve_config"]


def load_config(arguments: Sequence[str]) -> tuple[Config, str]:
    """Read `[--config FILE] [--section.key VALUE ...]`; without a file the built-in digits recipe is the base.

    Returns the config and the run's default name. Raises UserError if something is wrong with the file or the options.
    """
    return resolve_config(*read_options(arguments))


def read_options(arguments: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The recipe that a command line names, if it names one, and its other options: dotted name -> value."""
    options = dict(_read_options(arguments))
    return options.pop("config", None), options


def resolve_config(recipe: str | Path | Mapping[str, Any] | None, options: Mapping[str, Any]) -> tuple[Config, str]:
    """The config of a recipe (a file, a built-in one's name, or its sections as plain values) with `options` on top, by their dotted names.

    A mapping merges into what stands, as its dotted keys would; None resets a section, and removes a phase. Without a recipe it is the built-in digits.
    Returns the config and the run's default name; raises UserError if something is wrong.
    """
    changes = {_path_of(dotted): _plain(value) for dotted, value in options.items()}
    check_values([list(changes), list(changes.values())], "the options")
    if recipe is None:
        _check_digits(changes)
    if isinstance(recipe, Mapping):
        values, origin, name = _plain(recipe), "the recipe", "notebook"
        check_values(values, origin)
    else:
        text, origin, name = _read_recipe(str(recipe or "digits"))
        values = parse_config(text, origin)
    _check_phases(values, changes, origin)
    shipped = set() if isinstance(recipe, Mapping) or text not in builtin_recipes().values() else {path for path, _ in _leaves((), values)}
    solved = _solved(values)
    by_family = auto.phases_by_family(values)
    for path, value in changes.items():
        _merge(values, path, value)
    given = _Given(origin, dict(leaf for path, value in changes.items() for leaf in _leaves(path, value)))
    _replace_rivals(values, given.options)
    notes = (*_replace_solve(values, given.options, solved, shipped), *auto.fill(values, dict.fromkeys([*by_family, *auto.phases_by_family(values)])))
    config = _validate(values, given)
    config._notes = notes
    config._shipped = frozenset(".".join(path) for path in shipped - set(given.options))
    _check_whole(config, given)
    return config, check_run_name(config.run.name if config.run.name is not None else _of_sweep(name))


_Path = tuple[str, ...]


@dataclass(frozen=True)
class _Given:
    """Where values came from: the recipe, and the options on top of it (key -> value). A mistake is reported where it was made."""

    origin: str
    options: Mapping[_Path, Any] = field(default_factory=dict)

    def of(self, *keys: str) -> str:
        """The options that set one of these dotted keys, or something below it; else the recipe."""
        paths = [tuple(key.split(".")) for key in keys]
        exact = [option for option in self.options if any(option == path[: len(option)] for path in paths)]
        below = [option for option in self.options if any(option[: len(path)] == path for path in paths)]
        if exact:
            return ", ".join(f"--{'.'.join(option)}" for option in exact)
        return f"{self.origin} with {', '.join(f'--{chr(46).join(option)}' for option in below)}" if below else self.origin


def _path_of(dotted: str) -> _Path:
    """The keys of a dotted name. `-` is the same as `_` in the name of a setting, but not in that of a phase or a class."""
    path: list[str] = []
    for part in dotted.split("."):
        path.append(part.replace("-", "_") if not path or (_known_keys(path) and path != ["phases"]) else part)
    return tuple(path)


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
    return _validate(dict(values), _Given(origin))


def _read_recipe(file: str) -> tuple[str, str, str]:
    """Text, origin for messages, and name of a config file, or of a built-in recipe where no such file exists."""
    path = user_path(file)
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


def parse_config(text: str, origin: str) -> dict[str, Any]:
    """The sections of a config in YAML, not validated. Where a setting takes text, `4711`, `no` and `2024-11-28` are text."""
    values = parse_yaml(text, origin, prepare=lambda node: _read_as(node, Config))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{origin}: a config is a mapping of sections, got {type(values).__name__}")
    return values


def _read_as(node: yaml.Node, annotation: Any) -> None:
    """Turn scalars of a YAML tree into text where `annotation` takes text; null and what is quoted stay as they are."""
    kinds = _members(annotation)
    if isinstance(node, yaml.ScalarNode):
        if _takes_text(kinds) and node.tag != _NULL:
            node.tag = _TEXT
    elif isinstance(node, yaml.SequenceNode):
        items = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        for item in node.value:
            _read_as(item, items)
    elif isinstance(node, yaml.MappingNode):
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        values = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        for key, value in node.value:
            if key.tag == _MERGED:
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _read_as(merged, annotation)
            elif isinstance(key, yaml.ScalarNode) and values is Any and section is None:
                continue
            else:
                _read_as(key, str)
                _read_as(value, _fields(section).get(key.value, Any) if section else values)


def read_value_as(node: yaml.Node, dotted: str) -> None:
    """Make the scalars of a YAML tree what the setting of that name takes, as in a recipe."""
    _read_as(node, _annotation_at(_path_of(dotted)))


_TEXT, _NULL, _MERGED = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))


def _takes_text(kinds: list[Any]) -> bool:
    """Whether a single value of this setting can only be text: it is no number, and not true or false."""
    literals = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    return not {int, float, bool, Any}.intersection(kind for kind in kinds if isinstance(kind, type) or kind is Any) and (str in kinds or bool(literals))


def _members(annotation: Any) -> list[Any]:
    """The kinds of value that a setting takes: the members of a union, without their limits."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _members(member)]
    return [annotation]


def _fields(section: type[Section]) -> dict[str, Any]:
    """Key -> annotation, under the names that the YAML file uses."""
    return {info.alias or name: info.annotation for name, info in section.model_fields.items()}


def _read_options(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """`--a.b-c VALUE`, `--a.b_c=VALUE`, and a bare `--a.b` for true."""
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or option == "--":
            raise UserError(f"unexpected argument {option!r}: options are --section.key VALUE (see --help)")
        name, equals, text = option[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        if equals:
            yield name, text if name == "config" else _read_option(name, text)
        elif name == "config" or _takes_text(_members(_annotation_at(_path_of(name)))):
            raise UserError(f"--{name} needs a value")
        else:
            yield name, True


def _read_option(name: str, text: str) -> Any:
    """The value of an option: text as it stands where the setting takes text, else as YAML."""
    annotation = _annotation_at(_path_of(name))
    kinds = _members(annotation)
    quoted = False

    def prepare(node: yaml.Node) -> None:
        nonlocal quoted
        quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
        _read_as(node, annotation)

    try:
        value = parse_yaml(text, f"--{name}", prepare=prepare)
    except NotYaml:
        return text
    if not _takes_text(kinds) or quoted or text.strip().lower() in ("", "~", "null"):
        return value
    taken = {tuple: list, dict: dict}
    return value if any(isinstance(value, taken.get(get_origin(kind), ())) for kind in kinds) else text


def _annotation_at(path: Sequence[str]) -> Any:
    """What the setting at these keys takes; Any where there is none."""
    annotation: Any = Config
    for part in path:
        section = _section_of(annotation)
        if section is dict:
            annotation = PhaseConfig
        elif section is not None:
            annotation = _fields(section).get(part, Any)
        else:
            annotation = next((get_args(kind)[1] for kind in _members(annotation) if get_origin(kind) is dict), Any)
    return annotation


def _check_digits(changes: Mapping[_Path, Any]) -> None:
    """The base without a file is a recipe for small gray digits: it must not be used on photos by accident."""
    data = changes.get(("data",))
    train = changes.get(("data", "train"), data.get("train", "digits") if isinstance(data, dict) else "digits")
    if str(train) != "digits":
        raise UserError("--data.train without --config would use the digits recipe; give --config finetune (or features, or your own file)")


def _check_phases(values: Mapping[str, Any], changes: Mapping[_Path, Any], origin: str) -> None:
    """An option for a phase that does not exist is a typo: it would add a phase to the run. A new one is a mapping with its `train`."""
    phases = values.get("phases")
    if not isinstance(phases, dict) or not phases:
        return
    for path, value in changes.items():
        named = {path[1]: value} if len(path) == 2 else value if path == ("phases",) and isinstance(value, dict) else {}
        wanted = [name for name, phase in named.items() if not (isinstance(phase, dict) and "train" in phase)] if len(path) < 3 else [path[1]]
        for name in wanted if path[0] == "phases" else ():
            if name not in phases:
                near = difflib.get_close_matches(name, list(phases), n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"its phases: {', '.join(phases)}"
                raise UserError(f"--{'.'.join(path)}: {origin} has no phase {name}; {hint}")


def _merge(values: dict[str, Any], path: _Path, value: Any) -> None:
    """Set a key; a mapping sets the keys that it holds, and None resets what is a mapping."""
    *parents, last = path
    node = values
    for i, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"--{'.'.join(path)}: {'.'.join(parents[: i + 1])} is a single value, it has no key {last!r}")
        node = child
    if isinstance(value, dict) and isinstance(node.get(last), dict):
        for key, one in value.items():
            _merge(node[last], (key,), one)
    elif value is None and ((len(path) == 2 and path[0] == "phases") or isinstance(node.get(last), dict)):
        node.pop(last, None)
    else:
        node[last] = value


def _leaves(path: _Path, value: Any) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from _leaves((*path, key), one)
    else:
        yield path, value


def _replace_rivals(values: dict[str, Any], options: Mapping[_Path, Any]) -> None:
    """`--phases.all.steps 50` takes the place of the recipe's epochs, and the other way round; `--phases.all.after blend` that of its rule of kept weights.
    Both as options stay a contradiction."""
    for path, value in options.items():
        other = {"epochs": "steps", "steps": "epochs", "after": "keep"}.get(path[-1])
        if other and value is not None and len(path) == 3 and path[0] == "phases" and (*path[:2], other) not in options:
            phase = values["phases"].get(path[1]) if isinstance(values.get("phases"), dict) else None
            if isinstance(phase, dict):  # else a later option took it away
                phase.pop(other, None)


_OF_SGD = ("lr", "epochs", "steps", "views")
SGD_EPOCHS = 10
"""Of a head that a recipe would solve, where it is trained by SGD."""


def is_shipped(config: Config, key: str) -> bool:
    """Whether the value of a dotted key is that of a recipe that comes with dtl: neither the user's own recipe nor an option has set it."""
    return key in config._shipped


def _solved(values: Mapping[str, Any]) -> list[str]:
    phases = values.get("phases")
    return [name for name, phase in phases.items() if isinstance(phase, dict) and phase.get("optimizer") == "solve"] if isinstance(phases, dict) else []


def _replace_solve(values: dict[str, Any], options: Mapping[_Path, Any], solved: Sequence[str], shipped: Collection[_Path]) -> tuple[str, ...]:
    """`--phases.head.lr 0.5` trains by SGD a head that the recipe solves (`solved`); so does run.debug, which looks at few images. On top of a recipe that
    comes with dtl, so does any setting that means nothing where a head is solved. Returns a line for each such phase."""
    notes = []
    debug = isinstance(values.get("run"), dict) and values["run"].get("debug") is True
    for name in solved:
        phase = values["phases"].get(name) if isinstance(values.get("phases"), dict) else None
        own = options.get(("phases", name, "optimizer"))
        if not isinstance(phase, dict) or own == "solve":
            continue
        keys = {path[2] for path, value in options.items() if path[:2] == ("phases", name) and len(path) > 2 and value is not None}
        is_ours = ("phases", name, "optimizer") in shipped
        unfit = [key for key in _OF_SGD if key in keys]
        unfit += [key for key in sorted(keys.difference(_OF_SGD)) if is_ours and _is_no_use(key, phase.get(key))]
        if own is None and not unfit and not debug:
            continue
        phase["optimizer"] = own or "sgd"
        has_length = phase.get("epochs") is not None or phase.get("steps") is not None
        if not has_length:
            phase["epochs"] = SGD_EPOCHS
        if own is None or not has_length:
            why = [f"--phases.{name}.{key}" for key in (unfit if own is None else ["optimizer"])] or ["--run.debug"]
            notes.append(f"phase {name}: {', '.join(why)} mean{'s' * (len(why) == 1)} {_by_steps(phase)}")
    return tuple(notes)


def _is_no_use(key: str, value: Any) -> bool:
    """Whether this value of a phase's setting, which is not its default, means nothing beside `optimizer: solve`."""
    if key in ("task", "train"):
        return bool(value != {"task": "classify", "train": "head"}[key])
    if key == "cache_features":
        return value is False
    return key not in BESIDE_SOLVE and key in PhaseConfig.model_fields and bool(value != PhaseConfig.model_fields[key].default)


def _by_steps(phase: Mapping[str, Any]) -> str:
    length = f"{phase['epochs']} epochs" if phase.get("epochs") else f"{phase['steps']} steps"
    rate = "" if phase["optimizer"] == "auto" else f", lr {phase.get('lr', PhaseConfig().lr)}"
    return f"optimizer {phase['optimizer']} in place of solve: {length}{rate}"


def with_sgd(config: Config, name: str, why: str) -> Config:
    """`config` with a phase that is trained by SGD, not solved, and a note that says why."""
    phase = config.phases[name].model_copy(update={"optimizer": "sgd", "epochs": SGD_EPOCHS})
    changed = config.model_copy(update={"phases": {**config.phases, name: phase}})
    changed._notes = (*config._notes, f"phase {name}: {_by_steps(dict(phase))}, since {why}")
    return changed


def _validate(values: dict[str, Any], given: _Given) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error, given)) from None


def _one_line(error: ValidationError, given: _Given) -> str:
    """The first thing that is wrong, in words; an unknown key before anything else, since it often is the cause of the rest."""
    problems = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    first = problems[0]
    place = [str(part) for part in first["loc"]]
    known = _known_keys(place[:-1])
    if first["type"] == "extra_forbidden":
        near = [".".join([*place[:-1], name]) for name in difflib.get_close_matches(place[-1], known, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}"
        return f"{given.of('.'.join(place))}: unknown config key {'.'.join(place)}; {hint}"
    keys = _real_keys(place)
    dotted = ".".join(keys)
    if first["type"] == "missing" and keys == place:
        return f"{given.of('.'.join(keys[:-1]))}: {dotted} is missing"
    inner = _known_keys(place)
    if inner and not isinstance(first["input"], dict) and first["type"] != "value_error":  # of a section that text can be
        settings = f"{dotted}.{inner[0]}, {some(inner[1:])}"
        return f"{given.of(dotted)}: {dotted} is a section, not a single value (got {first['input']!r}); its settings are {settings}"
    messages = [in_words(problem) for problem in problems if [str(part) for part in problem["loc"]][: len(keys)] == keys]
    got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
    return f"{given.of(dotted)}: {dotted or 'config'}: {'; or '.join(dict.fromkeys(messages))}{got}"


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
            model = _section_of(_fields(model).get(part))
        elif model is dict:
            model = PhaseConfig
        else:
            return []
    if isinstance(model, type) and issubclass(model, Section):
        return list(_fields(model))
    return []


def _section_of(annotation: Any) -> Any:
    """The section that a setting is; `dict` of `phases`; None of a single value."""
    for kind in _members(annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
        if get_origin(kind) is dict and PhaseConfig in get_args(kind):
            return dict
    return None


def check_phase_names(config: Config, origin: str) -> None:
    for name in config.phases:
        if not name.replace("-", "_").isidentifier():
            raise UserError(f"{origin}: {name!r} is not a valid phase name; use letters, digits, - and _")


def _check_whole(config: Config, given: _Given) -> None:
    """Contradictions between sections."""
    origin = given.origin
    if not config.phases:
        raise UserError(f"{origin}: no phases; a recipe needs at least one, such as `phases: {{all: {{train: all, epochs: 10}}}}`")
    check_phase_names(config, origin)
    if config.data.train is None:
        raise UserError(f"{origin}: no training data; give --data.train FOLDER")
    if config.data.test is not None and config.data.test_fraction:
        raise UserError(f"{given.of('data.test', 'data.test_fraction')}: data.test and data.test_fraction are both given; use one of them")
    if config.data.val_fraction + config.data.test_fraction >= 1:
        raise UserError(
            f"{given.of('data.val_fraction', 'data.test_fraction')}: data.val_fraction and data.test_fraction leave no image to train on; make them smaller"
        )
    fold = config.data.fold
    if fold is not None and fold.number:
        for key in ("data.test", "data.test_fraction"):
            if getattr(config.data, key.removeprefix("data.")):
                raise UserError(f"{given.of(key, 'data.fold')}: {key} and data.fold are both given, and the fold is the test set; use one of them")
        if config.data.val_fraction + 1 / fold.of >= 1:
            raise UserError(f"{given.of('data.val_fraction', 'data.fold')}: data.val_fraction and data.fold leave no image to train on")
    if config.data.val is not None and config.data.val_fraction:
        raise UserError(f"{given.of('data.val', 'data.val_fraction')}: data.val and data.val_fraction are both given; use one of them")
    for key, place in (("run.dir", config.run.dir), ("data.cache_dir", config.data.cache_dir)):
        if place is not None and is_address(place):
            raise UserError(f"{given.of(key)}: {key} is an address ({place}); give a folder of this machine")
    micro, batch = config.data.micro_batch_size, config.data.global_batch_size
    if micro != "auto" and batch != "auto" and micro > batch:
        where = given.of("data.micro_batch_size", "data.global_batch_size")
        raise UserError(f"{where}: data.micro_batch_size {micro} is larger than data.global_batch_size {batch}")
    rotated = [name for name, phase in config.phases.items() if phase.task == "rotate"]
    if rotated and list(config.phases)[-1] in rotated and len(config.phases) > len(rotated):
        raise UserError(f"{origin}: phase {rotated[-1]} (rotate) is the last phase; put pretext phases before the phases that classify")
