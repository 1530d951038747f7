"""A LoRA adapter of PEFT, merged into the weights that it was trained on: W + scale * B A.

The user gives both. The base that an adapter's own file names is shown where it helps, and never opened or fetched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from dtl.checkpoint.transfer.match.dialects import spoken
from dtl.checkpoint.transfer.source.read import SourceWeights, read_weights
from dtl.errors import UserError
from dtl.files import expand_home
from dtl.text import counted, near_path, some
from dtl.untrusted import Count, Record, Text, parse_json, read_regular

_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_WAY_OUT = "merge it where it was trained (PEFT: model.merge_and_unload()) and save the result"
_NO_CHANGE = {
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_bias", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
"""What an adapter's config says that changes nothing of the merge: how it was trained, and what its tensors say themselves."""
_MAX_CONFIG_BYTES, _MOST_PATTERNS = 1 << 20, 4096
_PLAIN_START = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base as it is. PiSSA, OLoRA, LoftQ and others change it, so that the adapter belongs to other weights."""


class _Config(Record):
    """adapter_config.json of a LoRA adapter. `*_pattern`: ends of the names of layers -> their own rank or alpha."""

    peft_type: Text
    r: Count = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None


@dataclass
class _Layer:
    """What the adapter has for one layer. `table`: of an embedding, whose weight is turned."""

    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    table: bool = False


Find = Callable[[str], str | None]
_PART = re.compile(r"^(?P<path>.+)\.lora_(?P<table>embedding_)?(?P<part>A|B|magnitude_vector)(?:\.default)?(?:\.(?P<role>weight|bias))?$")


def with_adapter(base: SourceWeights, adapter: str | Path) -> SourceWeights:
    """The weights with a LoRA adapter merged into them: a folder of PEFT, or its file of weights with adapter_config.json beside it.

    UserError unless every tensor of the adapter has its place in the base, in the right shape, and everything that its config sets is understood.
    """
    folder, file = _found(Path(adapter))
    text = read_regular(folder / _CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    config = _understood(text, str(folder / _CONFIG))
    read = read_weights(file)
    layers, plain = _sorted_out(read.tensors)
    if not layers:
        raise UserError(f"{file}: contains no LoRA layers (lora_A, lora_B); the first of its tensors is {next(iter(read.tensors), 'none')}")
    find = _names(base, [module + ".weight" for module in layers], file, config)
    tensors = dict(base.tensors)
    for module, layer in layers.items():
        if of_attention := next((of for of in (module, module.rpartition(".")[0]) if find(f"{of}.in_proj_weight")), None):
            # PEFT 0.21 adds what belongs to its out_proj twice, in the forward pass too; where out_proj alone was targeted, its forward pass leaves it out.
            raise UserError(f"{file}: {of_attention} is a torch.nn.MultiheadAttention, and PEFT's own merge is not W + scale * B A there; {_WAY_OUT}")
        weight = find(f"{module}.weight")
        assert weight is not None
        tensors[weight] = _merged(tensors[weight], layer, config, file, module)
        if (shift := layer.parts.get("B.bias")) is not None:
            bias = find(f"{module}.bias")
            if bias is None or tensors[bias].shape != shift.shape:
                raise UserError(f"{file}: {module}.lora_B has a bias, but the base has none of its shape for this layer; {_WAY_OUT}")
            tensors[bias] = (tensors[bias].float() + _scale(layer, config, module) * shift.float()).to(tensors[bias].dtype)
    new_modules = _replace(tensors, plain, find, config, file)
    digest = None if base.sha256 is None else hashlib.sha256("".join([base.sha256, str(read.sha256), hashlib.sha256(text).hexdigest()]).encode()).hexdigest()
    facts = {name: value for name, value in base.facts.items() if not (new_modules and name == "classes")}
    said = f"{adapter}: {counted(len(layers), 'layer')} changed" + (f", {counted(len(plain), 'tensor')} replaced ({some(list(plain))})" if plain else "")
    return replace(base, tensors=tensors, sha256=digest, facts=facts, adapter=said)


def _found(path: Path) -> tuple[Path, Path]:
    """(folder, file of weights)"""
    path = expand_home(path)
    if not path.exists():
        raise UserError(f"no adapter at {path}{near_path(path) or '; give a folder that PEFT has saved'}")
    folder = path if path.is_dir() else path.parent
    if not (folder / _CONFIG).is_file():
        raise UserError(
            f"{path}: no {_CONFIG} {'in it' if path.is_dir() else 'beside it'}: the scale of the adapter stands there; give the folder that PEFT saved"
        )
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None) if path.is_dir() else path
    if file is None:
        raise UserError(f"{folder}: contains no {' or '.join(_WEIGHTS)}")
    return folder, file


def _understood(text: bytes, origin: str) -> _Config:
    values = parse_json(text, origin)
    config = _Config.from_values(values, origin)
    if config.peft_type != "LORA":
        raise UserError(f"{origin}: an adapter of the kind {config.peft_type}; only LoRA is merged here; {_WAY_OUT}")
    if config.init_lora_weights not in _PLAIN_START:
        raise UserError(
            f"{origin}: init_lora_weights is {config.init_lora_weights}, which may have changed the base before the training, so that the adapter does not "
            f"belong to the weights as published; {_WAY_OUT}"
        )
    known = {*_NO_CHANGE, *_Config.__dataclass_fields__}
    of_start = {"corda_config", "eva_config", "loftq_config", "lora_ga_config"}
    if unknown := next((name for name, value in values.items() if name not in known | of_start and value), None):
        raise UserError(f"{origin}: sets {unknown}, and how that is merged is not known here; {_WAY_OUT}")
    for name, patterns in (("rank_pattern", config.rank_pattern or {}), ("alpha_pattern", config.alpha_pattern or {})):
        if len(patterns) > _MOST_PATTERNS:
            raise UserError(f"{origin}: {name} has {len(patterns):,} entries; {_MOST_PATTERNS:,} are the most")
        for pattern in patterns:
            if not re.fullmatch(r"\^?[\w\\.-]+", pattern):  # a stranger's regular expression may run for ever
                raise UserError(f"{origin}: {name} has the regular expression {pattern!r}; here only names of layers are understood; {_WAY_OUT}")
            try:
                _ending_in(pattern)
            except re.error as error:
                raise UserError(f"{origin}: {name} has {pattern!r}: {error}") from None
    return config


def _clean(name: str) -> str:
    """Without what PEFT puts around the network's own name."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", name.replace(".base_layer.", "."))


def _sorted_out(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, _Layer], dict[str, torch.Tensor]]:
    """(LoRA's layers by the name of their module, tensors that stand for themselves)"""
    layers: dict[str, _Layer] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        found = _PART.match(name)
        if found is None:
            plain[_clean(name)] = tensor
            continue
        layer = layers.setdefault(_clean(found["path"] + ".")[:-1], _Layer())
        layer.table |= found["table"] is not None
        layer.parts[found["part"] + (".bias" if found["role"] == "bias" else "")] = tensor
    return layers, plain


def _readings(base: SourceWeights) -> Iterator[Callable[[str], str]]:
    """Names as they are; then in the words of a dialect of the base (transformers 5 calls modules otherwise than the tensors of its files)."""
    yield lambda name: name
    for dialect in spoken(list(base.tensors)):
        yield dialect.translated


def _names(base: SourceWeights, wanted: list[str], file: Path, config: _Config) -> Find:
    """What finds a tensor of the base by the adapter's name for it: one reading of the names and one prefix for all layers (their `wanted` weights)."""
    fewest = wanted
    for reading in _readings(base):
        own = {reading(_clean(name)): name for name in base.tensors}
        if len(own) < len(base.tensors):
            continue
        for old, new in _swaps(own, reading(wanted[0])):

            def find(name: str, own: dict[str, str] = own, read: Callable[[str], str] = reading, old: str = old, new: str = new) -> str | None:
                now = read(name)
                return own.get(new + now[len(old) :]) if now.startswith(old) else own.get(now)

            missing = [name for name in wanted if find(name) is None and find(name.replace(".weight", ".in_proj_weight")) is None]
            if not missing:
                return find
            fewest = min(fewest, missing, key=len)
    named = f" ({_CONFIG} names {config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    raise UserError(
        f"{file}: {base.origin} has no layer {fewest[0].removesuffix('.weight')}, so it is not what this adapter was trained on; give its base{named} as source"
    )


def _swaps(own: Mapping[str, str], name: str) -> Iterator[tuple[str, str]]:
    """(prefix of the adapter's names, prefix of the base's): none, then those that a wrapper of either side makes."""
    yield "", ""
    parts = name.split(".")
    yield from ((f"{'.'.join(parts[:depth])}.", "") for depth in range(1, min(4, len(parts) - 1)))
    longer = {other[: -len(name)] for other in own if other.endswith(f".{name}")}
    if len(longer) == 1:  # of two the adapter may mean either
        yield "", longer.pop()


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _ending_in(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _own(patterns: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    """As PEFT looks a layer up: the first pattern that is its name, or the end of it after a dot."""
    return next((value for pattern, value in (patterns or {}).items() if _ending_in(pattern).match(module)), otherwise)


def _scale(layer: _Layer, config: _Config, module: str) -> float:
    rank = layer.parts["A"].shape[0]
    return float(_own(config.alpha_pattern, module, config.lora_alpha)) / (rank**0.5 if config.use_rslora else rank)


def _merged(weight: torch.Tensor, layer: _Layer, config: _Config, file: Path, module: str) -> torch.Tensor:
    """W + scale * B A in float32, in the base's dtype; with DoRA each output of it at its own length."""
    if unfit := next((name for name in ("A", "B") if name not in layer.parts or layer.parts[name].dim() < 2), None):
        raise UserError(f"{file}: {module}: has no matrix lora_{unfit}; the adapter is damaged or was saved in parts (DeepSpeed, FSDP)")
    if not all(tensor.is_floating_point() and tensor.element_size() > 1 for tensor in (weight, *layer.parts.values())):
        raise UserError(f"{file}: {module}: quantised tensors are not merged; use the floating-point weights that the base was quantised from")
    turned = layer.table or (config.fan_in_fan_out and weight.dim() == 2)
    whole, (a, b) = (weight.T if turned else weight).float(), (layer.parts[name].float() for name in ("A", "B"))
    rank = int(_own(config.rank_pattern, module, config.r))
    if a.shape != (rank, *whole.shape[1:]) or b.shape != (whole.shape[0], rank, *(1,) * (whole.dim() - 2)):
        raise UserError(
            f"{file}: {module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of rank {rank} do not fit the base's weight {list(weight.shape)}"
            f"{', perhaps of a grouped convolution, which cannot be merged' if whole.dim() > 2 else ''}"
        )
    length = layer.parts.get("magnitude_vector")
    if (length is not None) != config.use_dora or (length is not None and length.numel() != whole.shape[0]):
        raise UserError(
            f"{file}: {module}: use_dora is {str(config.use_dora).lower()} in {_CONFIG}, which its lora_magnitude_vector contradicts; the adapter is damaged"
        )
    whole = whole + _scale(layer, config, module) * (b.flatten(1) @ a.flatten(1)).reshape(whole.shape)
    if length is not None:
        norm = torch.linalg.vector_norm(whole, dim=tuple(range(1, whole.dim())), keepdim=True)
        whole = whole * (length.float().reshape(norm.shape) / norm)
    return (whole.T if turned else whole).to(weight.dtype)


def _replace(tensors: dict[str, torch.Tensor], plain: Mapping[str, torch.Tensor], find: Find, config: _Config, file: Path) -> bool:
    """What was trained whole beside LoRA: biases and statistics in place of the base's, and the modules of `modules_to_save`, which may be new.

    Whether there are any of these.
    """
    any_new = False
    for name, tensor in plain.items():
        new = any(f".{module}." in f".{name}" for module in config.modules_to_save or ())
        place = find(name)
        if place is None and not new:
            raise UserError(f"{file}: {name} is no part of LoRA, and the base has no tensor of this name; {_WAY_OUT}")
        if place is not None and not new and tensors[place].shape != tensor.shape:
            raise UserError(f"{file}: {name} {list(tensor.shape)} would replace the base's, which is {list(tensors[place].shape)}; it is another base")
        tensors[place or name] = tensor
        any_new |= new
    return any_new
