"""A network by name, with its head found, ready for any number of classes. Nothing is downloaded.

The classification head is found by one rule for every family, without a table: build the network on the meta device with a number of
classes that no layer has as its width, and the layers with that many outputs are the heads. A function that takes no number of classes is
traced instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from shlex import quote
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from dtl.config.functions import raised
from dtl.config.models import ImageSize, ModelConfig, Pool, as_size, shown_size, sides
from dtl.config.own import is_function
from dtl.errors import UserError
from dtl.models import catalog
from dtl.models.catalog import model_names
from dtl.models.hub import hub_name
from dtl.models.init import Init, initialize
from dtl.models.meta import build_on_meta, meta_copy
from dtl.models.network import CHANNELS, Network, forward_logits, image_shape, num_outputs
from dtl.models.preprocessing import Preprocessing
from dtl.reading import MAX_CHANNELS

__all__ = ["Network", "Preprocessing", "build", "forward_logits", "model_names", "replace_head"]

# What constructors call the size of the images: timm's; torchvision's ViT; its MaxViT.
_SIZE_OPTIONS = ("img_size", "image_size", "input_size")
# With which constructors make a network that takes any size: timm's ViTs, which then resize their table at each step; its Swin.
_ANY_SIZE = ({"dynamic_img_size": True}, {"strict_img_size": False})
# A prime that is no width of any network we know.
_SENTINEL_CLASSES = 1511
# Parameters, and values of two images: what runs in memory in less time than the compiler takes to be imported.
_SMALL_NETWORK, _SMALL_IMAGES = 1 << 25, 2 * 3 * 400**2
# Options of a network that only a file names. The largest networks there are have 12,288 features and 3,000 layers.
_MAX_OPTIONS, _MAX_NUMBER, _MAX_MODULES = 1000, 1 << 14, 100_000


def build(
    name: str,
    *,
    num_classes: int,
    init: Init = "default",
    options: dict[str, Any] | None = None,
    meta: bool = False,
    own: bool = False,
    max_values: int | None = None,
) -> Network:
    """Build the network `name`, newly initialised.

    `options` go to its constructor, except `head`: the dotted name of the head's layer, for a function whose head is not found, and `pool`: see `model.pool`.
    With `meta` all tensors are on the meta device: for plans and tables that need no memory.
    `own`: the user has named it, or trusts who did. Otherwise it must be in a catalogue, and have plain options of sensible size and at most `max_values`
    parameters.
    """
    if num_classes < 1:
        raise UserError(f"model {name!r}: the number of classes must be at least 1, not {num_classes}")
    if init not in ("default", "library", "xavier", "kaiming"):
        raise UserError(f"model.init must be default, library, xavier or kaiming, not {init!r}")
    entry = catalog.find(name, own=own)
    options = {**entry.options, **(options or {})}
    pool = None if entry.library == "function" else options.get("pool")
    if pool not in (None, *get_args(Pool)):
        raise UserError(f"model {name!r}: the option pool is {pool!r}; it must be one of {', '.join(get_args(Pool))}")
    arguments = {key: value for key, value in options.items() if key != "head" and not (key == "pool" and entry.library != "function")}
    bounded = not own and bool(arguments)
    if bounded:
        _check_sizes(entry.name, arguments)

    # torchvision's networks have no such option, nor have dtl's own.
    channels = arguments.pop(CHANNELS, None) if entry.library in ("torchvision", "dtl") else None

    def construct(count: int) -> nn.Module:
        with within_bounds(entry.name, max_values) if bounded else nullcontext():
            made = _construct(entry, count, arguments)
        return made if channels is None else _with_channels(made, entry.name, channels)

    with _named_when_it_raises(entry, arguments):
        if bounded and not meta:
            build_on_meta(lambda: construct(num_classes))  # sizes that no machine has are found before memory is taken
        module = build_on_meta(lambda: construct(num_classes)) if meta else construct(num_classes)
    if isinstance(options.get(CHANNELS), int):
        module.__dict__[CHANNELS] = options[CHANNELS]
    preprocessing = entry.preprocessing(module)
    if entry.library != "function" and (given := size_in(options)) is not None:
        preprocessing = replace(preprocessing, image_size=given)
    heads = _find_heads(entry, module, construct, options, image_size=preprocessing.image_size)
    network = Network(module=module, name=entry.name, heads=heads, preprocessing=preprocessing, options=options)
    if pool is not None:
        _pool_tokens(network, pool)
    if network.num_outputs != num_classes:
        replace_head(network, num_classes)
    if not meta:
        initialize([module], init)
    return network


def _with_channels(module: nn.Module, name: str, channels: object) -> nn.Module:
    """Images of so many channels: the first convolution is a new one."""
    if not isinstance(channels, int) or not 1 <= channels <= MAX_CHANNELS:
        raise UserError(f"model {name!r}: the option {CHANNELS} is {str(channels)[:40]}; it must be a number of channels, from 1 to {MAX_CHANNELS}")
    found = next(((place, layer) for place, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and layer.in_channels == 3), None)
    if found is None or found[1].groups != 1:
        raise UserError(f"model {name!r} has no first convolution of three channels, so it cannot take images of {channels}; use a network of timm's")
    place, old = found
    like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    sizes: dict[str, Any] = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    new = nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **like, **sizes)
    parent, _, attribute = place.rpartition(".")
    setattr(module.get_submodule(parent), attribute, new)
    module.__dict__[CHANNELS] = channels
    if getattr(module, "transform_input", False):  # Inception's, of colours
        module.__dict__["transform_input"] = False
    return module


def options_of(model: ModelConfig, channels: int = 3) -> dict[str, Any]:
    """What `build` takes as the options of the network that a config names. `channels`: of the images."""
    if channels != 3:
        model = model.model_copy(update={"options": {CHANNELS: channels, **model.options}})
    if model.pool is None:
        return dict(model.options)
    if is_function(model.name) and hub_name(model.name) is None:
        raise UserError(f"model.pool {model.pool}: {model.name} is a function of your own, which pools itself; leave out model.pool")
    return {**model.options, "pool": model.pool}


class _Pooled(nn.Module):
    """Beside the class of a vision transformer of timm's, whose head it feeds otherwise. The modules and their names stay what they are."""

    pool_of_head: Pool

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens [B, N, D], those that are no patches in front, to logits [B, K]."""
        parts = [x[:, 0]] if "token" in self.pool_of_head else []
        if "avg" in self.pool_of_head:
            parts.append(x[:, self.num_prefix_tokens :].mean(dim=1))
        norm, drop = getattr(self, "fc_norm", None), getattr(self, "head_drop", None)
        x = torch.cat([part if norm is None else norm(part) for part in parts], dim=1)
        x = x if drop is None else drop(x)
        return x if pre_logits else self.get_submodule("head")(x)


def _pool_tokens(network: Network, pool: Pool) -> None:
    """Feed the head with the class token, the mean of the patch tokens, or both one behind the other, whatever the network does by itself."""
    module, refused = network.module, f"model.pool {pool}: {network.name}"
    head = module.get_submodule(network.heads[0])
    if network.heads != ("head",) or not isinstance(head, nn.Linear) or not _gives_tokens(module, head.in_features, network.preprocessing.image_size):
        raise UserError(f"{refused} is no vision transformer of timm's with one linear head, so there are no tokens to pool; leave out model.pool")
    if "token" in pool and getattr(module, "cls_token", None) is None:
        raise UserError(f"{refused} has no class token; use model.pool avg, or leave it out: the network then pools as it was made to")
    if getattr(module, "attn_pool", None) is not None:
        setattr(module, "attn_pool", None)  # noqa: B010  # a module's attributes are modules to mypy
    if pool == "token+avg":
        like = {"device": head.weight.device, "dtype": head.weight.dtype}
        module.head = nn.Linear(2 * head.in_features, head.out_features, bias=head.bias is not None, **like)
    module.__class__ = type(f"Pooled{type(module).__name__}", (_Pooled, type(module)), {"pool_of_head": pool})


def _gives_tokens(module: nn.Module, width: int, image_size: ImageSize) -> bool:
    """Whether it has timm's two halves, and the first one gives tokens [B, N, width]."""
    if not all(hasattr(module, name) for name in ("forward_features", "forward_head", "num_prefix_tokens")):
        return False
    try:
        with torch.no_grad():
            tokens: Any = meta_copy(module).eval().forward_features(torch.empty(image_shape(module, 2, image_size), device="meta"))  # type: ignore[operator]
    except Exception:  # it takes something else
        return False
    return isinstance(tokens, torch.Tensor) and tokens.dim() == 3 and tokens.shape[2] == width


def size_in(options: Mapping[str, Any]) -> ImageSize | None:
    """The size of images that a network of a catalogue is told by its constructor's options."""
    size = next((options[name] for name in _SIZE_OPTIONS if name in options), None)
    pair: list[Any] = list(size) if isinstance(size, list | tuple) else [size, size]
    return as_size(*pair) if len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair) else None


def sized(network: Network, image_size: ImageSize, again: Callable[..., Network], *, pretrained: bool = False, setting: str = "data.image_size") -> Network:
    """A network of a catalogue for images of this size: itself if it takes them, else as its constructor makes it when it is told the size.

    `again(options, meta=...)` builds it once more. `pretrained`: it gets weights of its own size, whose tables of positions can be resized, and layers cannot.
    UserError where it takes one size only, which names `setting`.
    """
    own = network.preprocessing.image_size
    if image_size == own or ":" in network.name or not (why := _why_not_at(network.module, image_size)) or _why_not_at(network.module, own):
        return network  # what does not run on shapes alone at its own size either is not known
    for option in _SIZE_OPTIONS:
        pair = option == "input_size" or not isinstance(image_size, int)
        options = {**network.options, option: list(sides(image_size)) if pair else image_size}
        if option in network.options:
            break
        try:
            told = again(options, meta=True)
        except UserError:  # no such option, or a size that it cannot have
            continue
        if _why_not_at(told.module, image_size):
            continue
        if not pretrained or (layer := _layer_of_other_shape(network.module, told.module)) is None:
            return again(options, meta=False)
        raise UserError(
            f"{network.name} takes images of {shown_size(own)} pixels with pretrained weights, not of {shown_size(image_size)} (its layer {layer} has one "
            f"input for each patch); use --{setting} {quote(shown_size(own))}, another network, or no pretrained weights"
        )
    raise UserError(
        f"{network.name} takes images of {shown_size(own)} pixels, not of {shown_size(image_size)} ({why}); "
        f"use --{setting} {quote(shown_size(own))}, or another network"
    )


def for_phases(network: Network, sizes: Mapping[str, ImageSize], again: Callable[..., Network]) -> Network:
    """A network for images of all these sizes, by phase, the last of which `network` takes: itself, else one that is built to take any size.

    UserError where there is none.
    """
    *others, (_, last) = sizes.items()
    if not (other := next(((phase, size) for phase, size in others if size != last and _why_not_at(network.module, size, last)), None)):
        return network
    for option in _ANY_SIZE:
        options = {**network.options, **option}
        try:
            told = again(options, meta=True)
        except UserError:  # no such option
            continue
        if not any(_why_not_at(told.module, size, last) for size in {size for _, size in others}):
            return again(options, meta=False)
    raise UserError(
        f"phase {other[0]} has images of {shown_size(other[1])} pixels, which {network.name} does not take in a run whose last phase has "
        f"{shown_size(last)} ({_why_not_at(network.module, other[1], last)}); give all phases one size, or use another network"
    )


def _layer_of_other_shape(one: nn.Module, other: nn.Module) -> str | None:
    """The first linear layer or convolution whose weight has another shape in the other network of the same layers."""
    shapes = {name: layer.weight.shape for name, layer in other.named_modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)}
    layers = ((name, layer) for name, layer in one.named_modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd))
    return next((name for name, layer in layers if shapes.get(name, layer.weight.shape) != layer.weight.shape), None)


def _why_not_at(module: nn.Module, image_size: ImageSize, known: ImageSize | None = None) -> str:
    """Why the network cannot run at this size; empty where it can. A small one runs in memory; others on the meta device, whose first use imports PyTorch's
    compiler (2 CPU seconds). `known`: a size that it takes; a network that does not run on the meta device at that is run in memory."""

    def why_not(copied: nn.Module, images: torch.Tensor) -> str:
        try:
            with torch.no_grad():
                forward_logits(copied.train(), images)  # auxiliary heads too
        except Exception as error:  # any layer may refuse a size, in its own way
            return raised(error).partition(" (/")[0][:200]
        return ""

    def why_not_in_memory(device: torch.device) -> str:
        with torch.random.fork_rng(devices=[]):
            return why_not(copy.deepcopy(module), torch.zeros(shape, device=device))

    shape = image_shape(module, 2, image_size)
    parameters = list(module.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    in_memory = not any(parameter.is_meta for parameter in parameters)
    if in_memory and sum(parameter.numel() for parameter in parameters) <= _SMALL_NETWORK and math.prod(shape) <= _SMALL_IMAGES:
        return why_not_in_memory(device)
    found = why_not(meta_copy(module), torch.empty(shape, device="meta"))
    if not found or known is None or not in_memory or not parameters or not _why_not_at(module, known):
        return found
    return why_not_in_memory(device)


def replace_head(network: Network, num_outputs: int, *, init: Init = "default") -> None:
    """Replace every head by a newly initialised layer with `num_outputs` outputs, of the same kind, inputs, bias, dtype and device."""
    module = network.module
    for name in network.heads:
        new = _resized(module.get_submodule(name), num_outputs, name=name)
        parent_name, _, attribute = name.rpartition(".")
        parent = module.get_submodule(parent_name)
        setattr(parent, attribute, new)
        initialize([new], init)
        for owner in (parent, module):
            # timm, SqueezeNet and others keep the number beside the layer.
            if isinstance(getattr(owner, "num_classes", None), int):
                owner.__dict__["num_classes"] = num_outputs


def _construct(entry: catalog.Entry, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    count = {"num_classes": num_classes} if entry.takes_num_classes else {}
    if entry.library != "function" and (loading := [key for key in arguments if key.startswith(("pretrained", "checkpoint", "weights", "cache_dir"))]):
        raise UserError(f"model {entry.name!r}: the option {loading[0]} would load weights outside of the section `transfer`: use --transfer.source instead")
    try:
        module = entry.construct(**count, **arguments)
    except (TypeError, ValueError) as error:
        if not arguments:
            raise
        raise UserError(f"model {entry.name!r} cannot be built with the options {str(arguments)[:300]}: {str(error)[:300]}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"model {entry.name!r}: the function returned a {type(module).__name__}, not a torch.nn.Module")
    return module


@contextmanager
def _named_when_it_raises(entry: catalog.Entry, arguments: dict[str, Any]) -> Iterator[None]:
    """Errors of a user's function, and of a network with options, as UserError. Around `build_on_meta`, which needs to see them as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if entry.library == "function":
            raise UserError(f"model {entry.name!r}: the function raised {raised(error)}") from error
        if not arguments:
            raise
        raise UserError(f"model {entry.name!r} cannot be built with the options {str(arguments)[:300]}: {raised(error)[:300]}") from error


def _check_sizes(name: str, options: dict[str, Any]) -> None:
    """UserError for options of a file that are too many, or too large for any network."""
    rest, count = list(options.values()), 0
    while rest:
        value, count = rest.pop(), count + 1
        rest += value if isinstance(value, list | tuple) else [*value, *value.values()] if isinstance(value, dict) else []
        too_large = isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER
        if too_large or count > _MAX_OPTIONS:
            raise UserError(f"model {name!r}: {f'the option value {value:,}' if too_large else 'the number of its options'} is too large")


@contextmanager
def within_bounds(name: str, max_values: int | None) -> Iterator[None]:
    """Refuse a network with too many modules, or more than `max_values` parameters, while it is being built."""
    modules, values = 0, 0

    def count_module(*_: object) -> None:
        nonlocal modules
        modules += 1
        if modules > _MAX_MODULES:
            raise UserError(f"model {name!r} with the options in its file has more than {_MAX_MODULES:,} modules")

    def count_values(_module: nn.Module, _name: str, value: torch.Tensor | None) -> None:
        nonlocal values
        values += 0 if value is None else value.numel()
        if max_values is not None and values > max_values:
            raise UserError(f"model {name!r} with the options in its file has more parameters than its weights")

    with ExitStack() as stack:
        for handle in (
            torch_modules.register_module_module_registration_hook(count_module),
            torch_modules.register_module_parameter_registration_hook(count_values),
            torch_modules.register_module_buffer_registration_hook(count_values),
        ):
            stack.callback(handle.remove)
        yield


def _find_heads(
    entry: catalog.Entry, module: nn.Module, construct: Callable[[int], nn.Module], options: dict[str, Any], *, image_size: ImageSize
) -> tuple[str, ...]:
    advice = "name its layer with the option head, for instance {head: fc}"
    if "head" in options:
        return _chosen_head(entry.name, module, str(options["head"]))
    heads: tuple[str, ...] = ()
    if entry.takes_num_classes:
        with _named_when_it_raises(entry, options):
            heads = _known_heads(entry.name, repr(sorted(options.items())), construct)
    if not heads:
        try:
            heads = _heads_by_tracing(module, image_size)
        except Exception as error:
            raise UserError(f"model {entry.name!r}: its head was not found ({type(error).__name__}: {error}); {advice}") from error
    if not heads:
        if entry.library != "function":
            raise UserError(f"model {entry.name!r} gives no logits: its output does not come from a linear layer or 1x1 convolution; use another network")
        raise UserError(f"model {entry.name!r}: its output does not come from a linear layer or 1x1 convolution; {advice}")
    return heads


_heads_of: dict[tuple[str, str], tuple[str, ...]] = {}


def _known_heads(name: str, options: str, construct: Callable[[int], nn.Module]) -> tuple[str, ...]:
    """Found once a process for each network and its options."""
    if (name, options) not in _heads_of:
        _heads_of[name, options] = _heads_by_sentinel(construct)
    return _heads_of[name, options]


def _chosen_head(name: str, module: nn.Module, head: str) -> tuple[str, ...]:
    layers = dict(module.named_modules())
    if head not in layers or not _is_classifier(layers[head]):
        near = catalog.nearest(head, [key for key, layer in layers.items() if _is_classifier(layer)])
        raise UserError(f"model {name!r}: the option head names {head!r}, which is not a linear layer or 1x1 convolution of this network{near}")
    return (head,)


def _is_classifier(module: nn.Module) -> bool:
    """A layer that can be a head: linear, or a 1x1 convolution (SqueezeNet)."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1)


def _heads_by_sentinel(constructor: Callable[[int], nn.Module]) -> tuple[str, ...]:
    """Names of the layers whose output count follows the number of classes; the main head first. `constructor` takes that number."""
    module = build_on_meta(lambda: constructor(_SENTINEL_CLASSES))
    found = [name for name, layer in module.named_modules() if _is_classifier(layer) and num_outputs(layer) == _SENTINEL_CLASSES]
    return _main_first(found, main=_declared_main(module))


def _heads_by_tracing(module: nn.Module, image_size: ImageSize) -> tuple[str, ...]:
    """The name of the last classifier layer that runs, if the network's output count follows it; empty when there is none."""
    ran: list[str] = []
    traced = meta_copy(module).eval()
    for name, layer in traced.named_modules():
        if _is_classifier(layer):
            layer.register_forward_hook(lambda _module, _inputs, _output, name=name: ran.append(name))
    with torch.no_grad():
        output = traced(torch.empty(image_shape(module, 2, image_size), device="meta"))
    layers = dict(traced.named_modules())
    matching = [name for name in ran if isinstance(output, torch.Tensor) and num_outputs(layers[name]) == output.shape[-1]]
    if not matching or not _is_followed(traced, matching[-1], image_size):
        return ()
    return (matching[-1],)


def _is_followed(traced: nn.Module, name: str, image_size: ImageSize) -> bool:
    """Whether a network on the meta device gives as many outputs as this layer is made to give: an encoder's last layer only looks like a head."""
    parent, _, attribute = name.rpartition(".")
    setattr(traced.get_submodule(parent), attribute, _resized(traced.get_submodule(name), _SENTINEL_CLASSES, name=name))
    try:
        with torch.no_grad():
            output = traced(torch.empty(image_shape(traced, 2, image_size), device="meta"))
    except RuntimeError:  # what follows wants another number
        return False
    return isinstance(output, torch.Tensor) and tuple(output.shape) == (2, _SENTINEL_CLASSES)


def _declared_main(module: nn.Module) -> str | None:
    """timm says which layer is the classifier, and names the main one first."""
    declared = getattr(module, "pretrained_cfg", {}).get("classifier") if hasattr(module, "pretrained_cfg") else None
    if isinstance(declared, (tuple, list)):
        declared = declared[0] if declared else None
    return declared if isinstance(declared, str) else None


def _main_first(names: list[str], *, main: str | None) -> tuple[str, ...]:
    if not names:
        return ()
    # torchvision registers auxiliary heads, which branch off half-way, before the last layer.
    first = main if main in names else names[-1]
    return (first, *(name for name in names if name != first))


def _resized(layer: nn.Module, num_classes: int, *, name: str) -> nn.Module:
    if not _is_classifier(layer):
        raise UserError(f"the head {name!r} is a {type(layer).__name__}; a head must be a Linear layer or a 1x1 convolution")
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    # A shallow copy keeps the layer's class and all its settings; only what has the number of outputs in it is made anew.
    new: nn.Linear | nn.Conv2d = copy.copy(layer)
    new._parameters = dict(layer._parameters)
    new.__dict__.pop("train", None)  # a frozen layer's, see freeze.py
    weight = layer.weight
    new.weight = nn.Parameter(weight.new_empty((num_classes, *weight.shape[1:])))
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.new_empty(num_classes))
    if isinstance(new, nn.Linear):
        new.out_features = num_classes
    else:
        new.out_channels = num_classes
    new.reset_parameters()
    return new
