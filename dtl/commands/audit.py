"""`dtl audit SRC|RUN`: twins, leaks between splits, and labels that are probably wrong. The work is `dtl.inference.audit`; this is its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtl.errors import UserError
from dtl.files import user_path
from dtl.text import TRUST, OptionParser, to_nobody, to_stderr, to_stdout

if TYPE_CHECKING:
    from dtl.config import Config
    from dtl.data.shards.index import Shards
    from dtl.inference.audit import Audit

_DESCRIPTION = """\
Look for what is wrong with a set of images, in all of its splits: the same photo twice (recompressed, resized, cropped a little, mirrored, brighter), two shots
of one scene, one image under two labels, labels that are probably wrong, classes with very few images.

Of a run, its own network and its own splits are used. Of a source of images, the network of --model with the weights of --weights; without weights only pixels
are compared, and neither scenes nor labels are judged. Features are computed once and cached.

It writes audit.csv (path,kind,score,other,suggestion,action) and a page with the images side by side. Nothing is changed. Set the column action to drop,
relabel:CLASS, group or keep where you agree, and train with --data.audit audit.csv: exactly those actions are honoured.
"""
_EPILOG = """\
examples:
  dtl audit runs/flowers
  dtl audit photos --model torchvision/mobilenet_v2 --weights mobilenet_v2.pt
  dtl audit photos --fail-on twins
  dtl train --data.train photos --data.audit audit.csv

exit status: 0 done; 1 something of --fail-on was found; 2 the data or the weights cannot be used
"""
_FAIL = {
    "twins": ("same photo", "same scene", "two labels"),
    "leaks": (),
    "labels": ("label", "two labels"),
    "any": ("same photo", "same scene", "two labels", "label"),
}


def run(arguments: Sequence[str]) -> int:
    """The command. UserError if the images or the weights cannot be used."""
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    if rest and "." not in rest[0].partition("=")[0]:
        parser.error(f"unrecognized arguments: {rest[0]}")
    out = user_path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if (options.model is None) != (options.weights is None):
        raise UserError("--model names the network, and --weights its weights: give both, or none of them to compare pixels alone")
    found = _audited(options, rest)
    if found is None:
        return 0
    to_stdout(*found.notes, *found.lines(), "", f"each finding  {out}/audit.csv", f"side by side  {out}/index.html")
    return _status(found, options.fail_on)


def _audited(options: argparse.Namespace, rest: Sequence[str]) -> Audit | None:
    """The audit, written to its folder, on the main process; None on the others."""
    if _is_run(user_path(options.source)):
        return _of_run(options, rest)
    return _of_source(options, rest)


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() or (path / "model" / "model.json").is_file()


def _of_run(options: argparse.Namespace, rest: Sequence[str]) -> Audit | None:
    from dtl.config.own import stored_config
    from dtl.data.splits_of_run import open_splits
    from dtl.inference.model import running_model

    if options.model is not None or rest:
        raise UserError(
            f"{options.source} is a run, whose own network and settings are used: leave out {'--model and --weights' if options.model else rest[0]}"
        )
    with running_model(options.source, device=options.device, trust=options.trust, log=to_stderr) as model:
        runtime, stored = model.runtime, model.stored
        assert model.run is not None
        kept = stored_config(model.run)
        with runtime.together("data"):
            kept.require("data.train", "data.val", "data.test", "data.group.regex")
            if stored.task.name != "classify":
                raise UserError(f"{options.source} was trained for the task {stored.task.name}; an audit needs a classifier")
        splits = _shared(runtime, kept.config, lambda found: open_splits(kept.config.data, log=to_stderr if runtime.is_main else to_nobody, found=found).all())
        return _write(options, splits, runtime, stored.transform.reading, (stored.network, stored.transform), kept.config)


def _of_source(options: argparse.Namespace, rest: Sequence[str]) -> Audit | None:
    from dtl.config import load_config
    from dtl.data.open import reading_of
    from dtl.data.splits_of_run import open_every_image
    from dtl.distributed.runtime import Runtime

    network = [] if options.model is None else ["--model.name", options.model, "--transfer.source", options.weights]
    config = load_config(["--config", "finetune", "--data.train", options.source, *network, *rest])[0]
    with Runtime(device=options.device) as runtime:
        runtime.signals.release()

        def opened(found: dict[str, str] | None) -> dict[str, Shards]:
            from dtl.data.open import open_split

            if found is not None:
                return {name: open_split(place, config.data, split=name, found=place) for name, place in found.items()}
            return open_every_image(config.data, log=to_stderr if runtime.is_main else to_nobody)

        splits = _shared(runtime, config, opened)
        made = None if options.model is None else _pretrained(config, splits["train"], runtime)
        with runtime.together("data"):
            reading = reading_of(splits["train"], config.data)
        return _write(options, splits, runtime, reading, made, config)


def _shared(runtime: Any, config: Config, opened: Any) -> dict[str, Shards]:
    """The splits on every rank; one process of each node opens them first."""
    with runtime.together("data"):
        first = runtime.once_a_node(lambda: [f"{name}={shards.place}" for name, shards in opened(None).items()])
        found: dict[str, Shards] = opened(dict(entry.split("=", 1) for entry in first))
    for name, shards in found.items():
        runtime.same(f"the images of {name}", shards.dataset_id)
    return found


def _pretrained(config: Config, train: Shards, runtime: Any) -> Any:
    """(network, how it sees images), with the weights of --weights but for its head."""
    from dtl.checkpoint.transfer.source.read import preprocessing_for
    from dtl.data.splits_of_run import Splits
    from dtl.training import build

    network = build.build_network(config, max(2, train.num_classes), runtime)
    weights = build.read_pretrained(config, network, runtime)
    facts = build.data_facts(config, runtime, Splits(train, train))
    found = build.with_data(config, preprocessing_for(network.preprocessing, weights), facts)
    network = build.network_for(found, config, network, runtime, pretrained=True)
    loaders = build.build_dataloaders(config, runtime, Splits(train, train), network)
    build.load_pretrained(config, network, runtime, train, to_nobody, weights)
    network.module.eval()
    build.place_network(config, network, runtime)
    return network, loaders.val_transform


def _write(options: argparse.Namespace, splits: dict[str, Shards], runtime: Any, reading: Any, network: Any, config: Config) -> Audit | None:
    from dtl.data.remote.address import cache_place
    from dtl.inference.audit import audit

    found = audit(
        splits,
        runtime,
        reading=reading,
        network=network,
        data=config.data,
        cache=cache_place(config.data.cache_dir, shared=config.data.cache_shared),
        threshold=options.threshold,
        log=to_stderr,
    )
    if found is not None:
        _page(found, user_path(options.out), options.source, network)
        found.write_csv(user_path(options.out) / "audit.csv")
    return found


def _page(found: Audit, out: Path, title: str, network: Any) -> None:
    from dtl.inference.audit import FEW, KINDS
    from dtl.report.audit import MOST_SHOWN, TILE_SIDE, Shown, make_audit_page
    from dtl.report.style import percent
    from dtl.text import counted

    images = found.images
    kinds = []
    for kind, heading in KINDS.items():
        every = found.of_kind(kind)
        rows = [
            (one.image, one.other, one.score, "" if one.alternative is None else f"{found.class_name(one.alternative[0])}, {percent(one.alternative[1], 0)}")
            for one in every[:MOST_SHOWN]
        ]
        kinds.append((kind, heading, len(every), rows))
    facts = [(f"Images of {name}", f"{shards.num_samples:,}") for name, shards in images.splits.items()]
    facts.append(("Network", "none: only pixels were compared" if network is None else network[0].name))
    small = [f"class {name} has {counted(count, 'training image')}, fewer than {FEW}" for name, count in found.small]

    def shown(image: int) -> Shown:
        return Shown(images.place(image)[0], images.names[image], found.label(image), found.tile(image, TILE_SIDE))

    make_audit_page(out, title, facts, kinds, shown, [*found.notes, *small])


def _status(found: Audit, fail_on: str | None) -> int:
    if fail_on is None:
        return 0
    splits = found.images.split_of
    bad = [one for one in found.findings if one.kind in _FAIL[fail_on] or (fail_on == "leaks" and one.other >= 0 and splits[one.image] != splits[one.other])]
    return int(bool(bad))


def _cosine(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _parser() -> OptionParser:
    parser = OptionParser(prog="dtl audit", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SRC|RUN", help="a run (runs/NAME), or images: whatever data.train takes; their other splits are looked at too")
    add("--model", metavar="NAME", help="the network that --weights belong to, as model.name")
    add("--weights", metavar="FILE", help="pretrained weights, as transfer.source; keys of a recipe are options too (--data.image_size 96)")
    add("--out", metavar="FOLDER", default="audit", help="where audit.csv and index.html are written (default: audit)")
    add(
        "--threshold", type=_cosine, default=0.55, metavar="X", help="cosine of the whitened features from which on two images are of one scene (default: 0.55)"
    )
    add("--fail-on", choices=tuple(_FAIL), help="exit with status 1 where such a finding is there (leaks: twins in two splits)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto, the GPU if there is one)")
    add("--trust", action="store_true", help=TRUST)
    return parser
