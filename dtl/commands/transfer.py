"""`dtl transfer`: show what a transfer of pretrained weights would load, tensor by tensor, without allocating the network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtl.errors import UserError
from dtl.text import OptionParser, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.checkpoint.transfer.apply import TransferReport
    from dtl.checkpoint.transfer.source.read import SourceWeights

_EPILOG = """\
examples:
  dtl transfer --model torchvision/resnet18 --num-classes 10 --source resnet18.pth
  dtl transfer --model dtl/resnet18_plain --num-classes 10 --source torchvision:resnet18 --save-map map.yaml
  dtl transfer --model timm/resnet18 --source weights.safetensors --source-arch torchvision/resnet18 --verify

exit status: 0 the weights would be loaded; 2 they would be refused (the reason is on stderr, the table on stdout)
"""


def parser() -> argparse.ArgumentParser:
    parse = OptionParser(prog="dtl transfer", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parse.add_argument
    add("--model", required=True, help="the network that gets the weights: torchvision/NAME, timm/NAME, dtl/NAME, package.module:function")
    add("--source", required=True, help="file, folder, address, torchvision:WEIGHTS or timm:NAME; FILE#KEY selects one of several state dicts")
    add("--num-classes", type=int, metavar="K", help="outputs of the network's head (default: as many as --classes, else 1000)")
    add("--classes", metavar="NAMES", help="classes of the network: a,b,c, a file with one name per line, an image folder, packed shards")
    add("--by", choices=("auto", "name", "order", "strict", "map"), help="how layers are paired (default: map with --map, else auto)")
    add("--map", metavar="FILE", help="YAML or JSON file of names, target: source; with --by auto it pairs only the layers that it names")
    add("--save-map", metavar="FILE", help="write the plan as a map, to edit and to pass to --map")
    add("--source-arch", metavar="NAME", help="the network that the weights were saved from, to decide uncertain pairs")
    add("--source-classes", metavar="NAMES|K", help="classes of the source's head, as --classes, or how many (default: found in the weights)")
    add("--assume-order", action="store_true", help="trust the order of registration if nothing else distinguishes layers")
    add("--on-ambiguous", choices=("error", "fresh"), default="error", help="uncertain pairs: refuse, or leave layers at initial values (default: error)")
    add("--min-coverage", type=float, default=0.6, metavar="X", help="refuse if a smaller share of layers, of either side, would be used (default: 0.6)")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="names in the source to leave out, 'decoder.*' (may be repeated)")
    heads = ("auto", "true", "false", "rows")
    add("--keep-head", choices=heads, default="auto", help="load the source's head (auto: if its classes are the same), or its rows by class names")
    rows = "with --keep-head rows: classes of the source that are averaged for a new class (may be repeated)"
    add("--head-rows", action="append", metavar="NEW=OLD,...|FILE", help=rows)
    add("--fold-norms", action="store_true", help="if the network lacks a norm of the source, fold the norm into the convolution before it")
    add("--zero-conv-bias", action="store_true", help="set convolution biases that the source does not have to zero")
    add("--image-size", type=int, metavar="PIXELS", help="input size for the forward pass on the meta device (default: that of the network)")
    add("--verify", action="store_true", help="build both networks (needs --source-arch) and compare their outputs")
    add("--report", metavar="F.json", help="write the report as JSON")
    return parse


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    options = parser().parse_args(argv)
    if options.verify and not options.source_arch:
        raise UserError("--verify needs --source-arch, the network that the weights were saved from")
    if options.head_rows and options.keep_head != "rows":
        raise UserError("--head-rows needs --keep-head rows")
    by = options.by or ("map" if options.map else "auto")

    from dtl.checkpoint.transfer.source.read import read_weights

    weights = read_weights(options.source)
    report = _plan(options, by, weights)
    if options.verify and report.plan.ok:
        report = _verify(options, report, weights)
    to_stdout(*report.lines())
    if options.save_map:
        from dtl.checkpoint.transfer.apply import save_map

        save_map(report.plan, options.save_map)
        to_stdout(f"map written to {options.save_map}")
    if options.report:
        report.to_json(options.report)
    if report.plan.refusals:
        for refusal in report.plan.refusals[:5]:
            to_stderr(f"dtl: transfer refused: {refusal}")
        return 2
    return 0


def _plan(options: argparse.Namespace, by: Any, weights: SourceWeights) -> TransferReport:
    from dtl.checkpoint.transfer.apply import preview
    from dtl.checkpoint.transfer.plan import plan_weights
    from dtl.config.models import FillConfig, TransferOptions, arguments_checked
    from dtl.models.build import build

    network = build(options.model, num_classes=_outputs(options), meta=True, own=True)
    source_model = None
    if options.source_arch:
        source_model = build(options.source_arch, num_classes=_source_outputs(options, weights), meta=True, own=True).module
    with arguments_checked():
        transfer = TransferOptions(
            by=by,
            assume_order=options.assume_order,
            on_ambiguous=options.on_ambiguous,
            min_coverage=options.min_coverage,
            ignore=tuple(options.ignore),
            keep_head={"true": True, "false": False}.get(options.keep_head, options.keep_head),
            head_rows=_head_rows(options.head_rows),
            source_classes=None if _number(options.source_classes) else options.source_classes,
            fill=FillConfig(conv_bias="zero" if options.zero_conv_bias else "keep"),
            fold_norms=options.fold_norms,
        )
    plan = plan_weights(
        weights,
        network.module,
        transfer,
        mapping=options.map,
        source_model=source_model,
        heads=network.heads,
        target_classes=options.classes,
        image_size=options.image_size or network.preprocessing.image_size,
    )
    normalisation = {"mean": network.preprocessing.mean, "std": network.preprocessing.std}
    return preview(plan, weights, network.module, target_preprocessing=normalisation)


def _number(given: str | None) -> int | None:
    return int(given) if given and given.isdigit() else None


def _outputs(options: argparse.Namespace) -> int:
    """Outputs of the network's head: as given, or one per class."""
    from dtl.checkpoint.transfer.source.class_names import read_class_names

    classes = read_class_names(options.classes, "--classes") if options.classes else None
    if classes and options.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes is {options.num_classes}, but --classes has {len(classes)} names")
    return len(classes) if classes else options.num_classes or 1000


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


def _source_outputs(options: argparse.Namespace, weights: SourceWeights) -> int:
    """As many outputs as the source's head has, so that its network can be built."""
    from dtl.checkpoint.transfer.layers.layer import layers_of, num_source_classes, specs_of

    given = _number(options.source_classes)
    return given or num_source_classes(layers_of(specs_of(weights.tensors)), _outputs(options))


def _verify(options: argparse.Namespace, report: TransferReport, weights: SourceWeights) -> TransferReport:
    """Both networks with memory this time, random values, the same images."""
    from dataclasses import replace

    from dtl.checkpoint.transfer.verify import verify_plan
    from dtl.models.build import build

    target = build(options.model, num_classes=_outputs(options), own=True)
    source = build(options.source_arch, num_classes=_source_outputs(options, weights), own=True)
    size = options.image_size or target.preprocessing.image_size
    verification = verify_plan(report.plan, source.module, target.module, image_size=size)
    to_stdout(*str(verification).split("\n"))
    return replace(report, verification=verification.to_dict())
