"""`dtl transfer`: show what a transfer of pretrained weights would load, tensor by tensor, without allocating the network; without --model, which network
the weights are for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtl.errors import UserError
from dtl.text import OptionParser, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.checkpoint.transfer.apply import TransferReport
    from dtl.checkpoint.transfer.source.read import SourceWeights
    from dtl.config import Config
    from dtl.config.models import DataConfig, ImageSize, TransferOptions
    from dtl.models.build import Network
    from dtl.models.preprocessing import Preprocessing

_EPILOG = """\
examples:
  dtl transfer --model torchvision/resnet18 --num-classes 10 --source resnet18.pth
  dtl transfer --model dtl/resnet18_plain --num-classes 10 --source torchvision:resnet18 --save-map map.yaml
  dtl transfer --config configs/finetune.yaml --data.train photos/train
  dtl transfer --source unknown.pth          (the three networks of torchvision and timm whose shapes are most like it)
  dtl transfer --model timm/resnet18 --source weights.safetensors --source-arch torchvision/resnet18 --verify

exit status: 0 the weights would be loaded; 2 they would be refused (the reason is on stderr, the table on stdout)
"""


def parser() -> argparse.ArgumentParser:
    parse = OptionParser(prog="dtl transfer", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    add("--config", metavar="FILE", help="a recipe: its model, transfer and classes of data.train; the options here, and --section.key VALUE, replace them")
    add("--model", help="the network that gets the weights: torchvision/NAME, timm/NAME, dtl/NAME, package.module:function")
    add("--model.options", metavar="MAPPING", dest="model_options", help="arguments of the network's constructor, such as '{num_blocks: 2}'")
    add("--model.pool", choices=("token", "avg", "token+avg"), dest="model_pool", help="what the head of a vision transformer sees (as in a config)")
    add(
        "--source",
        help="file, folder, address, torchvision:WEIGHTS or timm:NAME; FILE#KEY: one of several state dicts. Without --model: which network it is for",
    )
    add("--adapter", metavar="FOLDER", help="a LoRA adapter of PEFT that was trained on the source, to be merged into it")
    add("--num-classes", type=int, metavar="K", help="outputs of the network's head (default: as many as --classes, else 1000)")
    add("--classes", metavar="NAMES", help="classes of the network: a,b,c, a file with one name per line, an image folder, packed shards")
    add("--by", choices=("auto", "name", "order", "strict", "map"), help="how layers are paired (default: map with --map, else auto)")
    add("--map", metavar="FILE", help="YAML or JSON file of names, target: source; with --by auto it pairs only the layers that it names")
    add("--save-map", metavar="FILE", help="write the plan as a map, to edit and to pass to --map")
    add("--source-arch", metavar="NAME", help="the network that the weights were saved from, to decide uncertain pairs (or transformers:CLASS)")
    add("--source-classes", metavar="NAMES|K", help="classes of the source's head, as --classes, or how many (default: found in the weights)")
    add("--assume-order", action="store_true", help="trust the order of registration if nothing else distinguishes layers")
    add("--on-ambiguous", choices=("error", "fresh"), help="uncertain pairs: refuse, or leave layers at initial values (default: error)")
    add("--fresh", action="append", default=[], metavar="PATTERN", help="names in the network that may stay random, 'blocks.3.*' (may be repeated)")
    add("--min-coverage", type=float, metavar="X", help="refuse weights of which fewer layers, of either side, would be used (default: 0.6)")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="names in the source to leave out, 'decoder.*' (may be repeated)")
    heads = ("auto", "true", "false", "rows")
    add("--keep-head", choices=heads, help="load the source's head (auto: if its classes are the same), or its rows by class names")
    rows = "with --keep-head rows: classes of the source that are averaged for a new class (may be repeated)"
    add("--head-rows", action="append", metavar="NEW=OLD,...|FILE", help=rows)
    add("--fold-norms", action="store_true", help="if the network lacks a norm of the source, fold the norm into the convolution before it")
    add("--zero-conv-bias", action="store_true", help="set convolution biases that the source does not have to zero")
    add("--image-size", type=int, metavar="PIXELS", help="input size for the forward pass on the meta device (default: that of the network)")
    add("--verify", action="store_true", help="build both networks (needs --source-arch) and compare their outputs")
    add("--report", metavar="F.json", help="write the report as JSON")
    return parse


@dataclass(frozen=True)
class _Wanted:
    """What to transfer into which network: the options, on top of the recipe where there is one."""

    model: str
    model_options: dict[str, Any]
    source: str
    adapter: str | None
    map: str | None
    source_arch: str | None
    transfer: TransferOptions
    classes: Sequence[str] | None
    """Names, or where to find them."""
    num_classes: int
    source_classes: str | None
    image_size: ImageSize | None
    """Of `--image-size` or the recipe; None: as in a run of its own."""


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parse = parser()
    options, rest = parse.parse_known_args(argv)
    if rest and (options.config is None or "." not in rest[0].partition("=")[0]):
        parse.error(f"unrecognized arguments: {rest[0]}")
    if options.source and not (options.model or options.config):
        return _which_network(parse, options)
    if options.head_rows and options.keep_head != "rows":
        raise UserError("--head-rows needs --keep-head rows")
    wanted = _wanted(options, rest)
    if options.verify and not wanted.source_arch:
        raise UserError("--verify needs --source-arch, the network that the weights were saved from")

    from dtl.checkpoint.transfer.source.read import read_weights

    weights = read_weights(wanted.source)
    if wanted.adapter is not None:
        from dtl.checkpoint.transfer.source.adapter import with_adapter

        weights = with_adapter(weights, wanted.adapter)
    report, preprocessing = _plan(wanted, weights)
    if options.verify and report.plan.ok:
        report = _verify(wanted, report, weights)
    to_stdout(*report.lines(), preprocessing.line())
    if options.save_map:
        from dtl.checkpoint.transfer.apply import save_map

        save_map(report.plan, options.save_map)
        to_stdout(f"map written to {options.save_map}")
    if options.report:
        report.to_json(options.report)
    if report.plan.refusals:
        from dtl.checkpoint.transfer.layers.layer import specs_of
        from dtl.checkpoint.transfer.which import looks_like

        for refusal in report.plan.refusals[:5]:
            to_stderr(f"dtl: transfer refused: {refusal}")
        if (likely := looks_like(specs_of(weights.tensors), wanted.model)) is not None:
            to_stdout(f"the weights look like {likely}")
        return 2
    return 0


def _which_network(parse: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Without a network: what the weights look like."""
    from dtl.checkpoint.transfer.layers.layer import specs_of
    from dtl.checkpoint.transfer.source.read import read_weights
    from dtl.checkpoint.transfer.which import summary, which
    from dtl.files import write_json_whole, written

    alone = parse.parse_args(["--source", options.source, *(["--report", options.report] if options.report else [])])
    if alone != options:
        raise UserError("no network: give --model NAME, or --config FILE; without a network, --source FILE alone says which one the weights look like")
    weights = read_weights(options.source)
    specs = specs_of(weights.tensors)
    found = which(specs, log=to_stderr)
    to_stdout(f"{weights.origin}: {summary(specs, found)}")
    if options.report:
        with written(options.report):
            write_json_whole(Path(options.report), {"source": weights.origin, "networks": [{**asdict(each), "share": each.share} for each in found]})
    return 0


def _wanted(options: argparse.Namespace, rest: Sequence[str]) -> _Wanted:
    from dtl.checkpoint.transfer.source.hubs import source_named
    from dtl.config.models import TransferOptions, arguments_checked
    from dtl.models.build import options_of
    from dtl.models.catalog import find

    config = _config(options, rest)
    of_recipe = config.transfer if options.config else None
    model = options.model or (config.model.name if options.config else None)
    source = options.source or (of_recipe.source if of_recipe else None)
    if model is None:
        raise UserError("no network: give --model NAME, or --config FILE")
    if source is None:
        raise UserError("no source of weights: give --source" + (f"; {options.config} has no transfer section" if options.config else ""))
    map_file = options.map or (of_recipe.map if of_recipe else None)
    given: dict[str, Any] = {
        "by": options.by or ("map" if options.map else None),
        "assume_order": options.assume_order or None,
        "on_ambiguous": options.on_ambiguous,
        "min_coverage": options.min_coverage,
        "ignore": tuple(options.ignore) or None,
        "fresh": tuple(options.fresh) or None,
        "keep_head": {"true": True, "false": False}.get(options.keep_head, options.keep_head),
        "head_rows": _head_rows(options.head_rows),
        "source_classes": None if _number(options.source_classes) else options.source_classes,
        "fill": {"conv_bias": "zero"} if options.zero_conv_bias else None,
        "fold_norms": options.fold_norms or None,
    }
    base = {} if of_recipe is None else {name: getattr(of_recipe, name) for name in TransferOptions.model_fields}
    with arguments_checked():
        transfer = TransferOptions.model_validate({**base, **{name: value for name, value in given.items() if value is not None}})
    classes = options.classes
    if options.config and not (options.classes or options.num_classes):
        classes = _classes_of_data(config.data)
    return _Wanted(
        model=model,
        model_options=options_of(config.model.model_copy(update={"name": model})),
        source=source_named(source, find(model, own=True).name, named=model) if source == "pretrained" else source,
        adapter=options.adapter or (of_recipe.adapter if of_recipe else None),
        map=map_file,
        source_arch=options.source_arch or (of_recipe.source_arch if of_recipe else None),
        transfer=transfer,
        classes=classes,
        num_classes=_outputs(classes, options.num_classes),
        source_classes=options.source_classes,
        image_size=options.image_size or _size_of_model(config) if options.config else options.image_size,
    )


def _config(options: argparse.Namespace, rest: Sequence[str]) -> Config:
    """The recipe; without one the defaults of the network's options."""
    from dtl.config import load_config

    arguments = ["--config", options.config, *rest] if options.config else []
    if options.model_options is not None:
        arguments += ["--model.options", options.model_options]
    if options.model_pool is not None:
        arguments += ["--model.pool", options.model_pool]
    if options.config and (options.classes or options.num_classes):
        arguments += ["--data.train", "digits"]  # never opened: its classes are given
    return load_config(arguments)[0]


def _size_of_model(config: Config) -> ImageSize | None:
    """Of the images of a recipe's last phase, where the recipe says it."""
    size = list(config.phases.values())[-1].image_size or config.data.image_size
    return None if size == "auto" else size


def _classes_of_data(data: DataConfig) -> list[str]:
    """The class names of a recipe's training data, without packing it."""
    from dtl.checkpoint.transfer.source.class_names import read_class_names
    from dtl.data.open import packed_folder
    from dtl.data.remote.address import is_remote
    from dtl.data.sources.open import open_source

    train = str(data.train)
    if is_remote(train):
        raise UserError(f"the classes of {train} are known once it is packed or indexed: give --num-classes K or --classes NAMES")
    packed = packed_folder(train, "train")
    columns = None if data.columns is None else data.columns.given()
    return list(open_source(train, on_error="skip", columns=columns).classes) if packed is None else read_class_names(packed, "data.train")


def _plan(wanted: _Wanted, weights: SourceWeights) -> tuple[TransferReport, Preprocessing]:
    from dtl.checkpoint.transfer.apply import preview
    from dtl.checkpoint.transfer.plan import plan_weights
    from dtl.checkpoint.transfer.source.arch import source_network

    network = _network(wanted, weights, meta=True)
    source_model = None
    if wanted.source_arch:
        source_model = source_network(wanted.source_arch, weights, wanted.num_classes, num_classes=_number(wanted.source_classes))
    plan = plan_weights(
        weights,
        network.module,
        wanted.transfer,
        mapping=wanted.map,
        source_model=source_model,
        heads=network.heads,
        target_classes=wanted.classes,
        image_size=wanted.image_size or network.preprocessing.image_size,
    )
    return preview(plan, weights, network.module), network.preprocessing


def _network(wanted: _Wanted, weights: SourceWeights, *, meta: bool) -> Network:
    """For images of the size that a run would choose, with the preprocessing of that run."""
    from dtl.checkpoint.transfer.source.read import preprocessing_for
    from dtl.models.build import build, size_in, sized

    def again(options: dict[str, Any], *, meta: bool = meta) -> Network:
        return build(wanted.model, num_classes=wanted.num_classes, options=options, meta=meta, own=True)

    network = again(wanted.model_options)
    found = preprocessing_for(network.preprocessing, weights)
    network = sized(network, wanted.image_size or size_in(wanted.model_options) or found.image_size, again, pretrained=True)
    network.preprocessing = found
    return network


def _number(given: str | None) -> int | None:
    return int(given) if given and given.isdigit() else None


def _outputs(given: str | Sequence[str] | None, num_classes: int | None) -> int:
    """Outputs of the network's head: as given, or one per class."""
    from dtl.checkpoint.transfer.source.class_names import read_class_names

    classes = read_class_names(given, "--classes") if given else None
    if classes and num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes is {num_classes}, but --classes has {len(classes)} names")
    return len(classes) if classes else num_classes or 1000


def _head_rows(given: list[str] | None) -> dict[str, Any] | str | None:
    """`insect=ant,bee`, several times, or one file."""
    if not given:
        return None
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    wrong = [text for text in given if "=" not in text]
    if wrong:
        raise UserError(f"--head-rows {wrong[0]}: expected NEW=OLD or NEW=OLD,OLD, or one file")
    pairs = (text.split("=", 1) for text in given)
    return {new.strip(): [old.strip() for old in names.split(",")] for new, names in pairs}


def _verify(wanted: _Wanted, report: TransferReport, weights: SourceWeights) -> TransferReport:
    """Both networks with memory this time, random values, the same images."""
    from dataclasses import replace

    from dtl.checkpoint.transfer.source.arch import source_network
    from dtl.checkpoint.transfer.verify import verify_plan

    assert wanted.source_arch is not None
    target = _network(wanted, weights, meta=False)
    source = source_network(wanted.source_arch, weights, wanted.num_classes, num_classes=_number(wanted.source_classes), meta=False)
    size = wanted.image_size or target.preprocessing.image_size
    verification = verify_plan(report.plan, source, target.module, image_size=size)
    to_stdout(*str(verification).split("\n"))
    return replace(report, verification=verification.to_dict())
