"""Which networks there are, by name: torchvision/NAME, timm/NAME, timm/hf-hub:ORG/NAME, dtl/NAME, package.module:function.

A name that a file gives (model.json, a run's config.yaml) builds a network of the catalogues only: no function is called, and nothing fetched.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import nn

from dtl.config.functions import import_function
from dtl.errors import UserError
from dtl.imports import without_compiler
from dtl.models.hub import hub_in_reach, hub_name, why_not_fetched
from dtl.models.plain_resnet import PLAIN_RESNETS
from dtl.models.preprocessing import OWN, Preprocessing, timm_preprocessing, torchvision_preprocessing


@dataclass(frozen=True)
class Entry:
    """One known network. `construct` takes num_classes (where `takes_num_classes`) and the options, and downloads nothing."""

    name: str
    library: str
    construct: Callable[..., nn.Module]
    takes_num_classes: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    """Options that the name implies."""

    def preprocessing(self, module: nn.Module) -> Preprocessing:
        """The preprocessing of the default pretrained weights; ImageNet's values if there are none. What is the network's own, any weights have."""
        if self.library == "torchvision":
            found = torchvision_preprocessing(self.name.removeprefix("torchvision/"))
            built_for = getattr(module, "image_size", None)  # vit_h_14: for 224, where the default weights are for 518
            return replace(found, image_size=built_for if isinstance(built_for, int) else found.image_size, origins={"image_size": OWN})
        if self.library == "timm":
            return replace(timm_preprocessing(dict(module.pretrained_cfg)), origins={"image_size": OWN})  # type: ignore[arg-type]
        if self.library == "dtl" and module.get_submodule("0.0").kernel_size == (3, 3):  # the stem for small images
            return Preprocessing(image_size=32, crop_ratio=1.0, origins={"image_size": OWN, "crop_ratio": OWN})
        return Preprocessing()


def model_names() -> list[str]:
    """The full name of every network that can be built here, timm's included when it is installed; sorted within a library."""
    names = [f"dtl/{name}" for name in PLAIN_RESNETS] + [f"torchvision/{name}" for name in _torchvision_names()]
    return names + [f"timm/{name}" for name in _timm_names()]


def find(name: str, *, own: bool = False) -> Entry:
    """The network of that name. The library may be left out: dtl's and torchvision's names come first, then timm's.

    `own`: the user has named it, or trusts who did. UserError for a function and for an address where nobody has said so.
    """
    if (repository := hub_name(name)) is not None:
        if not own:
            raise UserError(
                f"the network {name!r} would be downloaded from the hub, but only a file names it: to allow this, name it yourself with --model.name or --model"
            )
        return _hub_entry(name, repository)
    if ":" in name:
        if not own:
            raise UserError(
                f"the network {name!r} is a function, but only a file names it, so it is not called: to allow this, name it yourself, or see --trust"
            )
        return _function_entry(name)
    library, _, short = name.rpartition("/")
    if library not in ("", "dtl", "torchvision", "timm"):
        raise UserError(_unknown(name))
    if library in ("", "dtl") and short in PLAIN_RESNETS:
        return Entry(f"dtl/{short}", "dtl", PLAIN_RESNETS[short])
    if library in ("", "torchvision") and short in _torchvision_names():
        return Entry(f"torchvision/{short}", "torchvision", lambda **arguments: _construct_torchvision(short, **arguments))
    if library == "timm" and importlib.util.find_spec("timm") is None:
        raise UserError(f"model {name!r} needs timm, which is not installed: pip install timm")
    if library in ("", "timm") and short.partition(".")[0] in _timm_names():
        _check_timm_tag(short)
        return Entry(f"timm/{short}", "timm", lambda **arguments: _construct_timm(short, **arguments))
    raise UserError(_unknown(name))


def _construct_torchvision(name: str, **arguments: Any) -> nn.Module:
    with without_compiler():
        import torchvision.models

    if name in ("inception_v3", "googlenet"):
        # init_weights is given because its default will change. Both networks were trained with Inception's own normalisation, which
        # torchvision converts inside the network only if it loads the weights itself.
        arguments = {"init_weights": True, "transform_input": True, **arguments}
    module: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    return module


def _construct_timm(name: str, **arguments: Any) -> nn.Module:
    with without_compiler():
        import timm

    return timm.create_model(name, pretrained=False, **arguments)


def _hub_entry(name: str, repository: str) -> Entry:
    """The repository's config names the timm network. The entry has that name, so that later builds do not need the hub."""
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"model {name!r} needs timm, which is not installed: pip install timm")
    with without_compiler():
        import timm
        from timm.models import load_model_config_from_hf

    with hub_in_reach():
        try:
            config, architecture, arguments = load_model_config_from_hf(repository)
        except Exception as error:  # the hub's client has a dozen kinds of failure
            raise UserError(f"model {name!r}: {why_not_fetched(repository, error)}") from error
    if architecture not in _timm_names():
        raise UserError(f"model {name!r} is a {architecture!r}, which the installed timm does not have: pip install -U timm")
    # Arguments of the network only: a repository of a stranger must not choose what else is loaded (checkpoint_path ...).
    ours = {"num_classes", *inspect.signature(timm.create_model).parameters}
    options = {key: value for key, value in (arguments or {}).items() if key not in ours}

    def construct(**given: Any) -> nn.Module:
        return timm.create_model(architecture, pretrained=False, pretrained_cfg=config, **given)

    return Entry(f"timm/{architecture}", "timm", construct, options=options)


def _check_timm_tag(name: str) -> None:
    """timm's names may end in the tag of one set of pretrained weights (resnet18.a1_in1k), which decides the preprocessing."""
    with without_compiler():
        import timm

    architecture, _, tag = name.partition(".")
    if tag:
        known = timm.list_pretrained(architecture + ".*")
        if name not in known:
            raise UserError(f"timm/{architecture} has no pretrained weights {tag!r}; it has {', '.join(known) or 'none'}")


def _function_entry(name: str) -> Entry:
    function = import_function(name, f"model {name!r}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:  # most builtins have no signature
        raise UserError(
            f"model {name!r}: {name.partition(':')[2]} is a builtin without a signature; give a Python function that returns a torch.nn.Module"
        ) from error
    takes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    return Entry(name, "function", function, takes_num_classes=takes)


@lru_cache(maxsize=1)
def _torchvision_names() -> tuple[str, ...]:
    with without_compiler():
        import torchvision.models

    return tuple(sorted(torchvision.models.list_models(module=torchvision.models)))


@lru_cache(maxsize=1)
def _timm_names() -> tuple[str, ...]:
    if importlib.util.find_spec("timm") is None:
        return ()
    with without_compiler():
        import timm

    return tuple(sorted(timm.list_models()))


def _unknown(name: str) -> str:
    return f"unknown model {name!r}{nearest(name, model_names())}; `dtl models` lists them all"


def nearest(name: str, names: list[str]) -> str:
    library, _, short = name.rpartition("/")
    if library in ("dtl", "torchvision", "timm"):
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    else:
        by_short: dict[str, str] = {}
        for known in names:  # dtl's and torchvision's come first, and stand for a name that timm has too
            by_short.setdefault(known.rpartition("/")[2], known)
        near = [by_short[match] for match in difflib.get_close_matches(short, by_short, n=3, cutoff=0.6)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
