"""Pretrained weights by name: torchvision's, timm's, and plain web addresses. Caches are theirs and are looked into first."""

from __future__ import annotations

import hashlib
import inspect
import tempfile
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from dtl.config.models import DataConfig
from dtl.credentials import bare, redacted_line
from dtl.data.remote.fetch import Unfetched, fetch_file
from dtl.errors import UserError
from dtl.imports import without_compiler
from dtl.models.hub import hub_in_reach, hub_name, why_not_fetched
from dtl.models.preprocessing import of_torchvision, timm_preprocessing


@dataclass(frozen=True)
class Cached:
    """A file in torch hub's cache folder and what its publisher states about it."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)


def download(address: str, *, facts: dict[str, Any] | None = None) -> Cached:
    """The file of a web address, from torch hub's cache folder or fetched into it (the hash in its name is checked).

    A name without a hash does not identify the content, so such files lie in a folder of their address.
    """
    address = bare(address)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(address).path).name
    found = torch.hub.HASH_REGEX.search(path.name)
    if found is None:
        path = path.parent / f"dtl-{hashlib.sha256(address.encode()).hexdigest()[:12]}" / path.name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as beside:
                file = Path(beside) / "weights"
                fetched = fetch_file(address, file, options=DataConfig(retries=1))
                if found is not None and not fetched.sha256.startswith(found.group(1)):
                    raise UserError(
                        f"{address}: its SHA-256 begins with {fetched.sha256[:8]}, but its name requires {found.group(1)}: the file is damaged or was replaced"
                    )
                file.replace(path)
        except (OSError, Unfetched) as error:
            raise UserError(f"{redacted_line(str(error))}; without network access, put the file at {path}: dtl looks there first") from None
    return Cached(path, facts or {})


def torchvision_file(name: str) -> Cached:
    """`ResNet18_Weights.IMAGENET1K_V1`, `ResNet18_Weights` or `resnet18` (the default weights of the model)."""
    with without_compiler():
        from torchvision import models

    weights = _torchvision_weights(models, name)
    return download(weights.url, facts=_torchvision_facts(weights))


def _torchvision_weights(models: Any, name: str) -> Any:
    model, _, member = name.partition("/") if "/" in name else name.partition(".")
    known = models.list_models()
    try:
        if member:
            return models.get_weight(f"{model}.{member}") if "_Weights" in model else models.get_model_weights(model)[member]
        if model.endswith("_Weights"):
            return models.get_weight(f"{model}.DEFAULT")
        return models.get_model_weights(model).DEFAULT
    except (ValueError, KeyError, AttributeError) as error:
        classes = [models.get_model_weights(m).__name__ for m in known] if "_Weights" in model else known
        near = get_close_matches(model, classes, n=3, cutoff=0.4)
        members = ""
        if model in known:
            members = f"; its weights are {', '.join(w.name for w in models.get_model_weights(model))}"
        raise UserError(f"torchvision:{name}: torchvision has no such weights{members}; the nearest names are {', '.join(near)}") from error


def _torchvision_facts(weights: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if "categories" in weights.meta:
        facts["classes"] = list(weights.meta["categories"])
    preset = weights.transforms()
    if all(hasattr(preset, word) for word in ("mean", "std", "crop_size", "resize_size")):
        facts["preprocessing"] = of_torchvision(preset).to_json()
    return facts


def timm_tensors(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of one of timm's pretrained models, in the names of timm's module, through timm's own cache."""
    try:
        with without_compiler():
            import timm
    except ImportError as error:
        raise UserError(f"timm:{name}: timm is not installed; pip install timm") from error
    if (repository := hub_name(name)) is not None:
        return _hub_tensors(repository)
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = get_close_matches(base, timm.list_models(), n=3, cutoff=0.4)
        raise UserError(f"timm:{name}: timm has no such model; the nearest names are {', '.join(near)}")
    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if name in timm.list_pretrained() or name == base else None
    if config is None or not config.has_weights:
        tags = list(timm.list_pretrained(f"{base}.*"))[:5]
        raise UserError(f"timm:{name}: timm has no pretrained weights of this name; it has {', '.join(tags) or 'none for this model'}")
    with hub_in_reach():
        try:
            module = timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub's client has a dozen kinds of failure
            if not config.hf_hub_id:
                place = f"without network access, put its file into {torch.hub.get_dir()}/checkpoints"
                raise UserError(f"timm:{name}: cannot download {config.url or config.file} ({error}); {place}") from error
            raise UserError(f"timm:{name}: {why_not_fetched(config.hf_hub_id, error)}") from error
    return dict(module.state_dict()), _timm_facts(dict(vars(config)))


def _hub_tensors(repository: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Those of anybody's repository on the Hugging Face hub that timm can read (`hf-hub:ORG/NAME[@REVISION]`)."""
    with without_compiler():
        import timm
        from timm.models import _hub

    # Repositories are anybody's: a timm that would unpickle their files is not let near them.
    safe = inspect.signature(_hub.load_state_dict_from_hf).parameters.get("weights_only")
    if safe is None or safe.default is not True:
        raise UserError(f"timm:hf-hub:{repository} needs a timm that opens files with weights_only=True: pip install -U timm")
    with hub_in_reach():
        try:
            module = timm.create_model(f"hf-hub:{repository}", pretrained=True)
        except Exception as error:
            raise UserError(f"timm:hf-hub:{repository}: {why_not_fetched(repository, error)}") from error
    return dict(module.state_dict()), _timm_facts(dict(module.pretrained_cfg))  # type: ignore[arg-type]


def _timm_facts(config: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"preprocessing": timm_preprocessing(config).to_json()}
    if config.get("label_names"):
        facts["classes"] = list(config["label_names"])
    return facts


def source_named(source: str, model: str, *, named: str) -> str:
    """The source of a recipe's `transfer` section: `pretrained` as the name of the network's own weights. `model` is `named`, as the catalogue has it."""
    if source != "pretrained":
        return source
    if (repository := hub_name(named)) is not None:
        return f"timm:hf-hub:{repository}"
    zoo, _, name = model.partition("/")
    if zoo not in ("torchvision", "timm") or not name:
        raise UserError(f"transfer.source is pretrained, but {model} has no published weights; give a file with --transfer.source")
    return f"{zoo}:{name}"
