"""`dtl transfer`: what a transfer of pretrained weights would do, tensor by tensor, without allocating the network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtl.errors import UserError

if TYPE_CHECKING:
    from dtl.checkpoint.read import SourceWeights
    from dtl.checkpoint.transfer_report import TransferReport

_EPILOG = """\
examples:
  dtl transfer --model torchvision/resnet18 --num-classes 10 --source resnet18.pth
  dtl transfer --model dtl/resnet18_plain --num-classes 10 --source torchvision:resnet18 --save-map map.yaml
  dtl transfer --model timm/resnet18 --source weights.safetensors --source-arch torchvision/resnet18 --verify

exit status: 0 the weights would be loaded; 2 they would be refused (the reason is on stderr, the table on stdout)
"""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="dtl transfer", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--model", required=True, help="the network to fill: torchvision/NAME, timm/NAME, dtl/NAME, package.module:function")
    parse.add_argument("--source", required=True, help="file, folder, address, torchvision:WEIGHTS or timm:NAME; FILE#KEY chooses inside")
    parse.add_argument("--num-classes", type=int, default=1000, metavar="K", help="outputs of the network's head (default: 1000)")
    parse.add_argument("--by", choices=("auto", "name", "order", "map"), help="how layers are paired (default: auto, or map with --map)")
    parse.add_argument("--map", metavar="FILE", help="YAML or JSON, target: source; with --by auto it settles single layers")
    parse.add_argument("--save-map", metavar="FILE", help="write the plan as a map, to edit and to feed back")
    parse.add_argument("--source-arch", metavar="NAME", help="the network that the weights were made for: its dataflow is then known")
    parse.add_argument("--source-classes", type=int, metavar="K", help="outputs of the source's head (default: found in the weights)")
    parse.add_argument("--assume-order", action="store_true", help="accept pairs that only the order of registration tells apart")
    parse.add_argument("--on-ambiguous", choices=("error", "fresh"), default="error", help="undecided layers: refuse, or leave fresh")
    parse.add_argument("--min-coverage", type=float, default=0.6, metavar="X", help="least share of layers to be loaded (default: 0.6)")
    parse.add_argument("--keep-head", choices=("auto", "true", "false"), default="auto", help="load the head (default: if it fits)")
    parse.add_argument("--fold-norms", action="store_true", help="fold norms that have no place into their convolutions")
    parse.add_argument("--zero-conv-bias", action="store_true", help="biases that the source does not have are zero")
    parse.add_argument("--image-size", type=int, metavar="PIXELS", help="input size for the run on the meta device (default: found)")
    parse.add_argument("--verify", action="store_true", help="build both networks (--source-arch) and compare what they compute")
    parse.add_argument("--report", metavar="F.json", help="write the report as JSON")
    return parse


def run(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    options = parser().parse_args(argv)
    if options.verify and not options.source_arch:
        raise UserError("--verify needs --source-arch, the network that the weights were made for")
    by = options.by or ("map" if options.map else "auto")

    from dtl.checkpoint.read import read_weights

    weights = read_weights(options.source)
    report = _plan(options, by, weights)
    if options.verify and report.plan.ok:
        report = _verify(options, report, weights)
    print(report)
    if options.save_map:
        from dtl.checkpoint.mapping import save_map

        save_map(report.plan, options.save_map)
        print(f"map written to {options.save_map}")
    if options.report:
        report.to_json(options.report)
    if report.plan.refusals:
        for refusal in report.plan.refusals[:5]:
            print(f"dtl: transfer refused: {refusal}", file=sys.stderr)
        return 2
    return 0


def _plan(options: argparse.Namespace, by: Any, weights: SourceWeights) -> TransferReport:
    from dtl.checkpoint.plan import plan_transfer
    from dtl.checkpoint.transfer_report import TransferReport
    from dtl.models.build import build

    network = build(options.model, num_classes=options.num_classes, meta=True)
    source_model = None
    if options.source_arch:
        source_model = build(options.source_arch, num_classes=_source_outputs(options, weights), meta=True).module
    plan = plan_transfer(
        weights.tensors,
        network.module,
        by=by,
        assume_order=options.assume_order,
        source_model=source_model,
        mapping=options.map,
        heads=network.heads,
        keep_head={"auto": None, "true": True, "false": False}[options.keep_head],
        on_ambiguous=options.on_ambiguous,
        min_coverage=options.min_coverage,
        ordered=weights.ordered,
        prefix=weights.prefix or None,
        fill={"conv_bias": "zero"} if options.zero_conv_bias else None,
        fold_norms=options.fold_norms,
        image_size=options.image_size or network.preprocessing.image_size,
    )
    return TransferReport.of(plan, weights)


def _source_outputs(options: argparse.Namespace, weights: SourceWeights) -> int:
    """As many outputs as the source's head has, so that its network can be built."""
    from dtl.checkpoint.heads import num_source_classes
    from dtl.checkpoint.units import entries_of, units_of

    return int(options.source_classes or num_source_classes(units_of(entries_of(weights.tensors)), options.num_classes))


def _verify(options: argparse.Namespace, report: TransferReport, weights: SourceWeights) -> TransferReport:
    """Both networks with memory this time, random values, the same images."""
    from dataclasses import replace

    from dtl.checkpoint.verify import verify_plan
    from dtl.models.build import build

    target = build(options.model, num_classes=options.num_classes)
    source = build(options.source_arch, num_classes=_source_outputs(options, weights))
    size = options.image_size or target.preprocessing.image_size
    verification = verify_plan(report.plan, source.module, target.module, image_size=size)
    print(verification)
    return replace(report, verification=verification.to_dict())
