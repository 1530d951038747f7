"""The config models as text: `dtl train --help`, and the reference in docs/configuration.md, from the same source."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from dtl.config import Config, PhaseConfig, Section, builtin_recipes

USAGE = """\
usage: accelerate launch [LAUNCH OPTIONS] dtl/train.py [--config FILE] [--section.key VALUE ...]
       dtl train [--config FILE] [--section.key VALUE ...]

Train or fine-tune an image classifier, in phases. Without --config: the built-in digits example.
Run the same command again to resume a run. VALUE is YAML, or text as it stands where the key takes TEXT; --a.b-c and --a.b_c are the same.

  --config FILE     a YAML file, or a built-in recipe: {recipes}
  --print-config    print the resolved config and exit
  --budget 10m      dtl search over learning rates and durations of the last phase, in 10 minutes or (--budget 9) with 9 trials
  --dry-run         pack the data, fetch the weights, check all phases, estimate the memory, and exit
  --help            show this text
"""


def help_text(width: int = 100) -> str:
    lines = [USAGE.format(recipes=", ".join(builtin_recipes()))]
    for title, rows in sections():
        lines.append(f"{title}:")
        for name, kind, default, text in rows:
            head = f"  --{name} {kind}"
            about = f"{text} (default: {default})" if default != "" else text
            lines.append(head)
            lines.extend(textwrap.wrap(about, width, initial_indent=" " * 8, subsequent_indent=" " * 8))
        lines.append("")
    return "\n".join(lines).rstrip()


def reference() -> str:
    """Markdown tables of every key, for docs/configuration.md."""
    lines: list[str] = []
    for title, rows in sections():
        lines += [f"## {title}", "", "| key | value | default | |", "|---|---|---|---|"]
        for name, kind, default, text in rows:
            cells = [f"`{name}`", kind, f"`{default}`" if default != "" else "", text]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def sections() -> Iterator[tuple[str, list[tuple[str, str, str, str]]]]:
    """(section, rows of (dotted key, kind of value, default, what it is))."""
    plain = []
    for name, field in Config.model_fields.items():
        model = _section(field.annotation)
        if name == "phases":
            yield "phases", list(_rows(PhaseConfig, "phases.NAME."))
        elif model is not None:
            yield name, list(_rows(model, f"{name}."))
        else:
            plain.append((name, _kind(field.annotation), str(field.default), " ".join((field.description or "").split())))
    yield "other", plain


def _rows(model: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() or field.default is None else _plain(field.default)
        yield f"{prefix}{field.alias or name}", _kind(field.annotation), default, " ".join((field.description or "").split())


def _section(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        found = [_section(member) for member in get_args(annotation)]
        return next((member for member in found if member is not None), None)
    return None


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _kind(annotation: Any) -> str:
    """`auto|INT`, `FLOAT`, `[FLOAT, ...]`: the form of a value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return "|".join(_kind(member) for member in arguments if member is not type(None))
    if origin is tuple:
        return "[" + ", ".join("..." if member is Ellipsis else _kind(member) for member in arguments) + "]"
    if origin is dict:
        return "{KEY: VALUE}"
    names = {bool: "true|false", int: "INT", float: "FLOAT", str: "TEXT"}
    return names.get(annotation, str(annotation))


HEADER = """\
# Configuration

All keys of a config file. Each key is also an option on the command line: `--section.key VALUE`. VALUE is YAML; where a key takes TEXT, it is text
as it stands (`--run.name 4711`), in the file too. `--a.b-c` and `--a.b_c` are the same. The command line takes precedence over the file; a mapping
(`--phases.all '{epochs: 2}'`) sets the keys that it holds and leaves the others, `null` resets a section and removes a phase.
`--print-config` prints what a run would use. Unknown keys, and keys that stand twice, are refused.
This page is generated from the models: `python -m dtl.config.help > docs/configuration.md`.
"""

FOOTER = """
## Environment variables

| variable | |
|---|---|
| `DTL_CACHE` | Folder for packed image folders and downloaded shards, instead of `~/.cache/dtl`; `data.cache_dir` takes precedence. |
| `DTL_DEBUG` | Any value: errors are printed with a traceback, as with `run.debug`. |
| `DTL_NATIVE` | 0: switch off the native JPEG extra. |
| `DTL_TRACE` | A folder: each rank writes the samples of every step there, to compare two runs. |
| `WANDB_PROJECT`, `WANDB_ENTITY` | The wandb project (`dtl` by default) and entity. |
| `WANDB_MODE` | online or offline: what `tracking.wandb: auto` means; disabled: no wandb, whatever the config says. |
| `HF_HOME`, `TORCH_HOME` | Folders for pretrained weights: of timm and the Hugging Face hub, and of torchvision. |
"""

if __name__ == "__main__":
    print(HEADER)
    print(reference().rstrip())
    print(FOOTER.rstrip())
