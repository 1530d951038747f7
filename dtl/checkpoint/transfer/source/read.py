"""Open pretrained weights, wherever they are: one flat dict of names and tensors, and what is known about it.

Nothing is ever unpickled: torch files and pickles are read by `torch_file`, which runs nothing of them and drops what is no tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtl import files
from dtl.checkpoint.transfer.layers.layer import looks_sorted, specs_of, strip_wrappers
from dtl.checkpoint.transfer.source import hubs
from dtl.checkpoint.transfer.source.torch_file import Read, read_pickled
from dtl.credentials import bare
from dtl.errors import UserError
from dtl.files import expand_home
from dtl.models.hub import hub_name
from dtl.models.model_json import check_weights, read_model_json
from dtl.models.preprocessing import Preprocessing, resolve
from dtl.text import counted, near_path, some, to_nobody
from dtl.untrusted import FileName, Record, Text, open_regular, read_json

_IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class SourceWeights:
    """Pretrained weights as read.

    `tensors`: name -> tensor on the CPU, memory-mapped where the format allows it, in the file's order.
    `ordered`: whether that order is the one in which the network registered them (safetensors sorts by name).
    `container`: words that led to the state dict inside the file; `passed_over`: other mappings of tensors beside it.
    `prefix`: the beginning of names the user chose with `FILE#prefix.`.
    `adapter`: what was merged into the weights (`with_adapter`).
    `facts`: classes, preprocessing, architecture, as far as the source has them.
    """

    tensors: dict[str, torch.Tensor]
    origin: str
    ordered: bool
    sha256: str | None = None
    container: str = ""
    prefix: str = ""
    passed_over: tuple[str, ...] = ()
    adapter: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """The file's SHA-256, else one of names, types and shapes: what ranks compare before they plan."""
        if self.sha256 is not None:
            return self.sha256
        text = json.dumps([(name, str(value.dtype), list(value.shape)) for name, value in self.tensors.items()])
        return hashlib.sha256(text.encode()).hexdigest()


def read_weights(source: str | Path | Mapping[str, Any] | nn.Module | SourceWeights, *, key: str | None = None) -> SourceWeights:
    """Read pretrained weights from a file, a folder, a name, a web address, a dict or a module.

    Takes `.pt .pth .th .bin .ckpt .safetensors`, sharded indexes (`*.index.json`), a dtl run or model folder, an Accelerate
    or Hugging Face folder, `torchvision:NAME`, `timm:NAME`, `hf-hub:ORG/NAME` and `http(s)://` addresses. `FILE#KEY` (or `key`) chooses among
    several state dicts in a file (`ckpt.pth#model_ema`) or, ending in a dot, a prefix of names (`moco.pth#encoder_q.`).
    Raises UserError when the source is missing, unreadable or ambiguous.
    """
    if isinstance(source, SourceWeights):
        return source
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        return _from_mapping(source, origin="a dict", key=key)
    named = str(source)
    if named.startswith("torchvision:"):
        return _from_cache(hubs.torchvision_file(named.removeprefix("torchvision:")), origin=named, key=key)
    if ":" in named and (named.startswith("timm:") or hub_name(named) is not None):
        tensors, facts = hubs.timm_tensors(named.removeprefix("timm:"))
        return SourceWeights(tensors, named, ordered=True, facts=facts)
    if "://" in named:
        named = bare(named)
    if named.startswith(("http://", "https://")):
        address, _, chosen_there = named.partition("#")
        return _from_cache(hubs.download(address), origin=named, key=key or chosen_there or None)
    if "://" in named and not named.startswith("file://"):
        raise UserError(f"{named}: weights are downloaded from http:// and https:// addresses only; download this file yourself and give its path")
    named = named.removeprefix("file://")
    path, chosen = split_fragment(named)
    return _from_path(path, key=key or chosen)


def preprocessing_for(network: Preprocessing, weights: SourceWeights | None) -> Preprocessing:
    """What a network uses with these weights, or without any. `network`: as it was built. UserError where the weights' own words are damaged."""
    said = None if weights is None else weights.facts.get("preprocessing")
    try:
        return resolve(network, said if isinstance(said, Mapping) else None, source="" if weights is None else str(weights.origin))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{weights and weights.origin}: its preprocessing is damaged: {type(error).__name__} {error}") from error


def check_is_there(source: str) -> None:
    """UserError where `source` is meant as a file or folder, and there is none; nothing is read, and nothing fetched."""
    if not (source.startswith(("torchvision:", "timm:")) or hub_name(source) is not None or "://" in source):
        path = expand_home(split_fragment(source)[0])
        if not path.exists():
            _from_path(path, key=None)


def _from_mapping(mapping: Mapping[str, Any], *, origin: str, key: str | None) -> SourceWeights:
    contents = find_state_dict(mapping, key=key, origin=origin)
    return SourceWeights(
        contents.tensors,
        origin,
        ordered=not looks_sorted(specs_of(contents.tensors)),
        container=contents.container,
        prefix=contents.prefix,
        passed_over=contents.passed_over,
    )


def _from_cache(cached: hubs.Cached, *, origin: str, key: str | None) -> SourceWeights:
    read = _from_path(cached.path, key=key)
    return replace(read, origin=origin, facts={**read.facts, **cached.facts})


def split_fragment(named: str) -> tuple[Path, str | None]:
    """`FILE#KEY` as (FILE, KEY)."""
    if "#" in named and not Path(named).exists():
        path, _, chosen = named.rpartition("#")
        return Path(path), chosen
    return Path(named), None


def _from_path(path: Path, *, key: str | None) -> SourceWeights:
    path = expand_home(path)
    if path.is_dir():
        return _from_folder(path, key=key)
    if not path.exists():
        raise UserError(f"no pretrained weights at {path}{near_path(path) or '; give a file, a folder, torchvision:NAME, timm:NAME or an address'}")
    if path.name.endswith(".index.json"):
        return _from_index(path)
    if problem := _BY_SUFFIX.get(path.suffix.lower()):
        raise UserError(f"{path}: {problem}")
    if path.suffix == ".safetensors":
        tensors, ordered = _read_safetensors(path)
        read = _from_mapping(tensors, origin=str(path), key=key)
        read = replace(read, ordered=ordered)
    else:
        found = read_content(path)
        if found.content is None:
            raise UserError(
                f"{path}: contains no tensors, only {'; '.join(found.remarks()) or 'None'}; none of its code was run; save `model.state_dict()` instead"
            )
        read = _from_mapping(found.content, origin=str(path), key=key)
        read = replace(read, passed_over=(*read.passed_over, *found.remarks()))
    sha256 = files.sha256_of_file(path)
    check_promised_hash(path, sha256)
    return replace(read, tensors=without_wrappers(read.tensors), sha256=sha256)


def check_promised_hash(path: Path, sha256: str) -> None:
    """UserError where a file is named after another content, as torchvision and timm name theirs: `resnet18-f37072fd.pth`. Digits alone may be a date."""
    promised = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    if promised is not None and not promised[1].isdigit() and not sha256.startswith(promised[1]):
        raise UserError(
            f"{path}: according to its name, its SHA-256 begins with {promised[1]}, but it begins with {sha256[: len(promised[1])]}: the download is "
            "damaged, or it is another file; download it again, or rename it if that part of the name is not a hash"
        )


def _from_folder(path: Path, *, key: str | None) -> SourceWeights:
    of_run = files.published(path / "model")
    if (of_run / "model.json").is_file():
        path = of_run
    elif (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise UserError(f"{path}: the run has no model yet; it is written when the run is done (run the same command again to resume it)")
    facts_file = path / "model.json"
    for name in _IN_FOLDER:
        if (path / name).is_file():
            read = _from_path(path / name, key=key)
            break
    else:
        if problem := next((why for name, why in _FOLDERS.items() if (path / name).is_file()), None):
            raise UserError(f"{path}: {problem}")
        raise UserError(f"{path}: contains no weights; expected one of {', '.join(_IN_FOLDER)}, or model/ of a run")
    return _with_model_facts(read, facts_file) if facts_file.is_file() else read


def _with_model_facts(read: SourceWeights, facts_file: Path) -> SourceWeights:
    """A dtl model folder knows its classes, its preprocessing, the order in which the network registered its tensors, and the hash of its weights."""
    try:
        value = read_json(facts_file)
    except OSError as error:
        raise UserError(f"{facts_file}: not readable ({_line(error)})") from error
    if not isinstance(value, dict) or "format" not in value:
        return read  # of another program
    known, weights = read_model_json(facts_file.parent), facts_file.with_name("model.safetensors")
    if read.origin == str(weights) and read.sha256 is not None and known.weights is not None:
        check_weights(weights, known, files.FileFacts(weights.stat().st_size, read.sha256), log=to_nobody)
    facts = {name: inner for name, inner in asdict(known).items() if name != "order"}
    if sorted(known.order) == sorted(read.tensors):
        return replace(read, tensors={name: read.tensors[name] for name in known.order}, ordered=True, facts=facts)
    return replace(read, facts=facts)


class _WeightsIndex(Record):
    """Tensor -> the file beside the index that holds it."""

    weight_map: dict[Text, FileName]


def _from_index(path: Path) -> SourceWeights:
    """Several files and a JSON that maps each tensor to its file (Hugging Face, Accelerate)."""
    try:
        where = _WeightsIndex.read(path).weight_map
    except OSError as error:
        raise UserError(f"{path}: not readable ({_line(error)})") from error
    parts: dict[str, Mapping[str, Any]] = {}
    digest = hashlib.sha256()
    for name in sorted(set(where.values())):
        part = path.parent / name
        if not part.is_file():
            raise UserError(f"{path}: lists {name}, which is not in the same folder")
        parts[name] = _read_safetensors(part)[0] if part.suffix == ".safetensors" else read_content(part).content
        sha256 = files.sha256_of_file(part)
        check_promised_hash(part, sha256)
        digest.update(sha256.encode())
    missing = [tensor for tensor, name in where.items() if tensor not in parts[name]]
    if missing:
        raise UserError(
            f"{path}: according to the index, {where[missing[0]]} contains {missing[0]}, but it does not ({counted(len(missing), 'tensor')} missing)"
        )
    tensors = {tensor: parts[name][tensor] for tensor, name in where.items()}
    read = _from_mapping(tensors, origin=str(path), key=None)
    # JSON indexes are written sorted, or by file: neither is the order of registration.
    return replace(read, tensors=without_wrappers(read.tensors), ordered=False, sha256=digest.hexdigest())


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """(tensors, whether in registration order). The format sorts; only our own model folders remember the order elsewhere."""
    from safetensors import SafetensorError, safe_open

    if problem := _no_weights(_beginning(path)):
        raise UserError(f"{path}: {problem}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, False  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors ({_line(error)}); the file is damaged or of another format") from error


def read_content(path: Path) -> Read:
    """Everything in a file of weights of any format, as plain containers of tensors. UserError where it is none."""
    if problem := _no_weights(_beginning(path)):
        raise UserError(f"{path}: {problem}")
    return Read(_read_safetensors(path)[0]) if path.suffix == ".safetensors" else read_pickled(path)


def _beginning(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(64)
    except OSError as error:
        raise UserError(f"{path}: not readable ({_line(error)})") from error


def _no_weights(start: bytes) -> str | None:
    """What else than weights such files turn out to be."""
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: the download failed"
    if start.startswith(b"GGUF"):
        return "a GGUF file: quantised weights of llama.cpp; use the floating-point weights that it was made from"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras); save its weights as a dict of arrays in a .safetensors or .pth file"
    return None


_BY_SUFFIX = {
    ".onnx": "an ONNX file: a network to run, not a state dict; save the state_dict of the PyTorch network that it was exported from",
    ".npz": "arrays of NumPy; load them (dict(numpy.load(FILE))), rename nothing, and save them with safetensors.numpy.save_file",
    ".keras": "a Keras archive; save its weights as a dict of arrays in a .safetensors or .pth file",
    ".tflite": "a TensorFlow Lite file: a network to run; save the weights that it was made from as a dict of arrays in a .safetensors file",
    ".gguf": "a GGUF file: quantised weights of llama.cpp; use the floating-point weights that it was made from",
    ".engine": "a TensorRT engine: a network to run; save the state_dict of the PyTorch network that it was built from",
}
_FOLDERS = {
    "adapter_config.json": "a LoRA or other adapter (PEFT), without the weights that it was trained on; give those as source and this folder as adapter "
    "(transfer.adapter, --adapter, or adapter= in Python)",
    ".metadata": "a checkpoint of torch.distributed.checkpoint; convert it with "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth`",
    "saved_model.pb": "a SavedModel of TensorFlow; save its weights as a dict of arrays in a .safetensors or .pth file",
}


def _not_plain(names: Iterable[str]) -> str | None:
    """What names say that are no names of layers: tensors flattened together or packed into integers."""
    for name in names:
        if re.search(r"(^|\.)_?flat_param(_\d+)?$", name):
            return (
                f"{name} holds the parameters of several layers flattened together by FSDP; save a full state dict "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)"
            )
        if re.search(r"\.(qweight|qzeros|quant_state\..*|absmax|SCB|weight_packed)$", name):
            return f"{name} belongs to quantised weights (GPTQ, AWQ or bitsandbytes); use the floating-point weights, or dequantise them and save again"
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# State of other things than the network: never looked into.
NOT_WEIGHTS = (
    "optim",
    "sched",
    "scaler",
    "amp",
    "rng",
    "loops",
    "callbacks",
    "hparams",
    "hyper",
    "momentum",
    "sampler",
    "criterion",
    "loss",
)


@dataclass(frozen=True)
class Contents:
    """A state dict found in a file. `container`: the words that led to it, joined by `/` ("" for a flat file).

    `prefix` is what of the user's key was no container: the beginning of names. `passed_over` names the other mappings
    of tensors and the specs that are no tensors.
    """

    tensors: dict[str, torch.Tensor]
    container: str
    prefix: str
    passed_over: tuple[str, ...]


def find_state_dict(loaded: Any, *, key: str | None, origin: str) -> Contents:
    """The state dict in what a file held. Two that could be meant, and no `key`: a UserError that names both."""
    if not isinstance(loaded, Mapping):
        raise UserError(f"{origin}: contains a {type(loaded).__name__}, not a state dict; save `model.state_dict()` instead")
    candidates = _candidates(loaded)
    if not candidates:
        raise UserError(f"{origin}: contains no tensors (top-level keys: {_list(loaded)}); a state dict is needed")
    prefix = ""
    if key is None:
        container = _choose(candidates, origin)
    else:
        container, prefix = _by_key(candidates, key, origin)
    tensors = {name: value for name, value in _descend(loaded, container).items() if isinstance(name, str)}
    if problem := _not_plain(tensors):
        raise UserError(f"{origin}: {problem}")
    found = in_whole({name: as_tensor(value) for name, value in tensors.items() if _is_tensor(value)}, origin)
    beside = [other or "(top level)" for other in candidates if other != container]
    beside += [name for name, value in tensors.items() if not _is_tensor(value) and not isinstance(value, Mapping)]
    return Contents(found, container, prefix, tuple(beside))


_PARTS = re.compile(r"(^|\.)parametrizations\.|_(orig|g|v)$")
"""Ends of names of which a weight may have to be computed."""


def in_whole(tensors: dict[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """With the weights that are stored in parts (weight_norm, spectral_norm, pruning) computed. UserError where nobody knows how."""
    if not any(_PARTS.search(name) for name in tensors):
        return tensors
    return computed(tensors, origin)


def without_wrappers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`module.` and the like taken out of all names, unless two names would become one."""
    short = [strip_wrappers(name) for name in tensors]
    if len(set(short)) < len(short):
        return tensors
    return dict(zip(short, tensors.values()))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "shape") and hasattr(value, "dtype"))


def as_tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        return torch.as_tensor(value)
    return value.detach() if value.layout == torch.strided else value.detach().to_dense()


def _candidates(loaded: Mapping[Any, Any]) -> dict[str, int]:
    """container -> number of tensors in it, in the file's order."""
    found: dict[str, int] = {}

    def look(mapping: Mapping[Any, Any], path: tuple[str, ...]) -> None:
        tensors = sum(_is_tensor(value) for name, value in mapping.items() if isinstance(name, str))
        if tensors:
            found["/".join(path)] = tensors
        if len(path) >= 6 or tensors > 0.5 * len(mapping):
            return
        for name, value in mapping.items():
            if isinstance(name, str) and isinstance(value, Mapping) and not name.lower().startswith(NOT_WEIGHTS):
                look(value, (*path, name))

    look(loaded, ())
    return found


def _choose(candidates: dict[str, int], origin: str) -> str:
    most = max(candidates.values())
    # As many tensors, or nearly: a second network of the same kind (an average of weights, a teacher).
    rivals = [container for container, count in candidates.items() if count >= 0.9 * most and (count > 4 or count == most)]
    if len(rivals) > 1:
        named = " and ".join(f"'{container}' ({counted(candidates[container], 'tensor')}{_averaged(container)})" for container in rivals)
        raise UserError(f"{origin}: contains {named}; choose one: {' or '.join(f'source: {origin}#{container}' for container in rivals)}")
    return rivals[0]


def _averaged(container: str) -> str:
    """Of the names that training programs give to a moving average of the weights (timm's state_dict_ema)."""
    return ", a moving average of the weights" if "ema" in re.split(r"[^a-z]+", container.lower()) or "averaged" in container.lower() else ""


def by_key(content: Any, key: str, origin: str) -> dict[str, torch.Tensor]:
    """The tensors under a key of the user's, as `find_state_dict` takes it; a prefix of names chooses among the names."""
    found = find_state_dict(content, key=key, origin=origin)
    return {name: value for name, value in found.tensors.items() if name.startswith(found.prefix)}


def _by_key(candidates: dict[str, int], key: str, origin: str) -> tuple[str, str]:
    """(container, prefix of names): `model_ema`, `model/state_dict`, `encoder_q.` or `state_dict/encoder_q.`."""
    if key in candidates:
        return key, ""
    outer, _, inner = key.rpartition("/")
    ending = [container for container in candidates if container.split("/")[-1] == key]
    if len(ending) == 1:
        return ending[0], ""
    if inner.endswith("."):
        if outer in candidates:
            return outer, inner
        if not outer:
            return _choose(candidates, origin), inner
    names = ", ".join(f"'{container}'" for container in candidates if container) or "none"
    raise UserError(f"{origin}: no state dict under '{key}'; found: {names}. A prefix of names ends in a dot, as in #encoder_q.")


def _descend(loaded: Mapping[Any, Any], container: str) -> Mapping[Any, Any]:
    inner: Any = loaded
    for word in container.split("/") if container else []:
        inner = inner[word]
    result: Mapping[Any, Any] = inner
    return result


def _list(loaded: Mapping[Any, Any]) -> str:
    return ", ".join(repr(key) for key in list(loaded)[:8]) or "none"


# ---- weights in parts: a network multiplies them at each forward pass, and one without the parametrisation needs the product. A part alone
# (`original1`, `weight_v`) has the shape of a weight and is none.


_PARAMETRISED = re.compile(r"^(?:(?P<path>.*)\.)?parametrizations\.(?P<name>\w+)\.(?P<part>original\d?|\d+\..+)$")
_OLD = re.compile(r"^(?P<whole>.*\w)_(?P<part>orig|mask|g|u|v)$")
Parts = dict[str, torch.Tensor]


def computed(tensors: Mapping[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """The tensors with each weight in place of its parts. UserError where the parts are not known."""
    parts = _parts(tensors)
    whole = {name: value for name, found in parts.items() if (value := _product(name, found, origin)) is not None}
    used = {key for name in whole for key in _keys(tensors, name)}
    out: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if key not in used:
            out[key] = value
            continue
        name = _whole(key)
        if name is not None and name not in out:
            out[name] = whole[name]
    return out


def _whole(key: str) -> str | None:
    """The tensor that a part belongs to."""
    if found := _PARAMETRISED.match(key):
        return f"{found['path']}.{found['name']}" if found["path"] else found["name"]
    return found["whole"] if (found := _OLD.match(key)) else None


def _part(key: str) -> str:
    found = _PARAMETRISED.match(key) or _OLD.match(key)
    assert found is not None
    return found["part"]


def _keys(tensors: Mapping[str, torch.Tensor], name: str) -> list[str]:
    return [key for key in tensors if _whole(key) == name]


def _parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for key, value in tensors.items():
        name = _whole(key)
        if name is not None and name not in tensors:
            found.setdefault(name, {})[_part(key)] = value
    return found


def _product(name: str, parts: Parts, origin: str) -> torch.Tensor | None:
    """None for names that only look like parts: `gate_v` alone is nothing of the kind."""
    for needed, compute in _KINDS.items():
        if set(parts) == set(needed) and all(value.is_floating_point() for value in parts.values()):
            return compute(*(parts[part] for part in needed))
    if any(part.startswith("original") for part in parts):
        raise UserError(
            f"{origin}: {name} is stored in parts ({some(sorted(parts))}), and what makes a weight of them is not known here; "
            "call torch.nn.utils.parametrize.remove_parametrizations on the network that they are from, and save its state_dict again"
        )
    return None


def _weight_norm(size: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """w = g * v / |v|, the norm over all dimensions that g does not have."""
    dims = [dim for dim in range(direction.dim()) if size.dim() == 0 or size.shape[dim] == 1]
    norm: torch.Tensor = torch.linalg.vector_norm(direction.float(), dim=dims, keepdim=True)
    whole: torch.Tensor = direction.float() * (size.float() / norm)
    return whole.to(direction.dtype)


def _spectral_norm(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """w / sigma with sigma = u' W v, as an eval pass computes it."""
    matrix = weight.float()
    if len(u) != weight.shape[0]:  # transposed convolutions are normalised by their outputs, which are dimension 1
        matrix = matrix.transpose(0, 1)
    sigma = torch.dot(u.float(), matrix.flatten(1).mv(v.float()))
    return (weight.float() / sigma).to(weight.dtype)


def _masked(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return weight * mask


_KINDS: dict[tuple[str, ...], Callable[..., torch.Tensor]] = {
    ("original0", "original1"): _weight_norm,
    ("g", "v"): _weight_norm,
    ("original", "0._u", "0._v"): _spectral_norm,
    ("orig", "u", "v"): _spectral_norm,
    ("orig", "mask"): _masked,
}
