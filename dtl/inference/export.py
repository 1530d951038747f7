"""A model in the formats that other programs read, each compared with PyTorch on real images before it gets its name.

The exported network takes normalised images, float32 [B, 3, S, S] with any B, and gives logits, float32 [B, K]. How an image becomes
such an input, and what the classes are, is stored in the file and in a JSON file beside it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from dtl.config.models import sides
from dtl.data.decoding.decode import DecodeError
from dtl.data.sources.digits import read_digits
from dtl.errors import UserError
from dtl.files import write_whole
from dtl.inference.images import ImageInputs
from dtl.inference.model import StoredModel
from dtl.models.build import forward_logits
from dtl.models.strict_load import strict_load
from dtl.version import __version__

FORMATS = ("onnx", "torch-export", "safetensors")
NUM_CHECKED = 8
# Of the largest logit: runtimes fuse and reorder float32 sums; a wrong weight or a lost layer is off by a thousand times more.
TOLERANCE = 1e-3
SMALLEST = 1e-5
_METADATA = "dtl"


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from PyTorch."""

    path: Path
    num_images: int
    difference: float | None
    """Largest difference of a logit; None where nothing here can run the file."""
    note: str = ""


class _Logits(nn.Module):
    """One tensor in, one tensor out, whatever else the network gives."""

    def __init__(self, module: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.module, self.temperature = module, temperature

    def forward(self, images: Tensor) -> Tensor:
        logits = forward_logits(self.module, images)[0]
        return logits if self.temperature == 1 else logits / self.temperature


def export(model: StoredModel, target: Path, *, to: str, images: Tensor, opset: int | None = None) -> Exported:
    """Write `model` (on the CPU) to `target`. `images` float32 [n, 3, H, W] are normalised, and what the check runs on.

    UserError where the format's package is missing, the network cannot be exported, or the result differs from PyTorch: then
    nothing is written.
    """
    facts = _describe(model, divided=to != "safetensors")
    # A file of weights alone has nowhere to divide; its description says what to divide by.
    module = _Logits(model.network.module, 1.0 if to == "safetensors" else model.temperature).eval()
    with torch.inference_mode():
        expected = module(images).numpy()
    note, difference = "", None

    def write(file: BinaryIO) -> None:
        nonlocal note, difference
        place = Path(file.name)  # some exporters want a path
        # Exporters warn of their own deprecations; the comparison shows what matters.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if to == "onnx":
                run, note = _to_onnx(module, images, place, facts, opset)
            elif to == "torch-export":
                run, note = _to_torch_export(module, images, place, facts)
            else:
                run, note = _to_safetensors(model, place, facts)
            difference = None if run is None else _compare(run, images, expected, to)

    try:
        write_whole(target, write)
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        write_whole(target.with_name(target.name + ".json"), lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    return Exported(target, len(images), difference, note)


def _describe(model: StoredModel, *, divided: bool) -> dict[str, Any]:
    """What a program needs beside the network: the input, the classes, where it came from. `divided`: the network divides by the temperature itself."""
    calibration = model.facts.calibration
    size = model.transform.image_size
    values = model.network.preprocessing
    return {
        "classes": list(model.classes),
        "display_names": dict(model.facts.display_names),
        "input": {
            "name": "images",
            "dtype": "float32",
            "shape": ["batch", values.reading.channels, *sides(size)],
            "channels": "RGB" if values.reading.channels == 3 else values.reading.channels,
            "values": "(pixel / 255 - mean) / std",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(model.classes)]},
        **(
            {}
            if calibration is None
            else {
                "temperature": {"value": calibration.temperature, "applied": divided},
                "threshold": None if calibration.threshold is None else vars(calibration.threshold),
            }
        ),
        "preprocessing": {
            "mean": list(values.mean),
            "std": list(values.std),
            "image_size": size if isinstance(size, int) else list(size),
            "interpolation": values.interpolation,
            "crop_ratio": values.crop_ratio,
            "pixels": values.reading.to_json(),
            "transform": model.transform.describe(),
        },
        "architecture": model.facts.architecture,
        "metrics": model.facts.metrics,
        "made_by": {
            **{key: value for key, value in model.facts.made_by.items() if key != "settings"},
            "exported_by": f"dtl {__version__}, torch {torch.__version__}",
        },
    }


def real_images(model: StoredModel, inputs: ImageInputs | None) -> Tensor:
    """Up to 8 readable images as the network takes them, [n, 3, H, W]; of the built-in digits where none are given."""
    found: list[np.ndarray] = []
    problem = ""
    if inputs is None:
        found = [np.repeat(image[:, :, None], model.transform.reading.channels, axis=2) for image in read_digits()[0][:NUM_CHECKED]]
    else:
        for number in range(len(inputs)):
            try:
                found.append(inputs.pixels(number, model.transform.reading))
            except DecodeError as error:
                problem = problem or f"{inputs.name(number)}: {error}"
            if len(found) == NUM_CHECKED:
                break
    if not found:
        raise UserError(f"none of the images for the check can be read ({problem})")
    pixels = torch.empty((len(found), model.transform.reading.channels, *sides(model.transform.image_size)), dtype=torch.uint8)
    heights, widths = zip(*(image.shape[:2] for image in found))
    draws = model.transform.draw(range(len(found)), widths, heights, seed=0, epoch=0)
    for row, image in enumerate(found):
        model.transform.apply(image, draws, row, pixels[row])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.network.preprocessing.mean, model.network.preprocessing.std))
    return (pixels / 255.0 - mean) / std


Run = Callable[[Tensor], np.ndarray]


def _to_onnx(module: nn.Module, images: Tensor, path: Path, facts: dict[str, Any], opset: int | None) -> tuple[Run | None, str]:
    need("onnx", "onnxscript")
    import onnx

    with_any_batch = _exported_program(module, images)
    try:
        program = torch.onnx.export(with_any_batch, (), input_names=["images"], output_names=["logits"], opset_version=opset, dynamo=True, verbose=False)
    except Exception as error:  # the exporter's own errors share no base class
        raise UserError(f"this network cannot be exported to ONNX{_at(opset)}: {_first_line(error)}") from error
    assert program is not None
    proto = program.model_proto
    written = next(one.version for one in proto.opset_import if one.domain in ("", "ai.onnx"))
    if opset is not None and written != opset:
        raise UserError(f"--opset {opset}: the exporter could only write opset {written} for this network; leave out --opset, or use {written}")
    for key, value in {_METADATA: json.dumps(facts), "classes": json.dumps(facts["classes"])}.items():
        proto.metadata_props.add(key=key, value=value)
    try:
        onnx.save(proto, str(path))
    except ValueError as error:
        raise UserError(f"this network is too large for one ONNX file (2 GB): {_first_line(error)}; use --to torch-export") from error
    if importlib.util.find_spec("onnxruntime") is None:
        onnx.checker.check_model(str(path))
        return None, f"opset {written}; onnxruntime is not installed, so the file was not run"
    return _onnx_run(path), f"opset {written}"


def _onnx_run(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": images.numpy()})[0])


def _to_torch_export(module: nn.Module, images: Tensor, path: Path, facts: dict[str, Any]) -> tuple[Run, str]:
    program = _exported_program(module, images)
    with path.open("wb") as file:  # a file object: a path must end in .pt2 by torch's taste
        torch.export.save(program, file, extra_files={"dtl.json": json.dumps(facts)})
    with path.open("rb") as file:
        loaded = torch.export.load(file).module()
    return _torch_run(loaded), "read it with torch.export.load"


def _exported_program(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The graph for any number of images: traced with two, since one would be taken for a constant."""
    example = images[:1].repeat(2, 1, 1, 1)
    try:
        return torch.export.export(module, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    except Exception as error:  # torch raises its users' errors under many classes
        raise UserError(f"this network cannot be exported with torch.export: {_first_line(error)}") from error


def _to_safetensors(model: StoredModel, path: Path, facts: dict[str, Any]) -> tuple[Run, str]:
    from safetensors.torch import load_file, save

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.network.module.state_dict().items()}
    # The library's own writer of files makes them readable only by their owner, whatever the umask is.
    path.write_bytes(save(tensors, metadata={"format": "pt", _METADATA: json.dumps(facts)}))
    fresh = copy.deepcopy(model.network.module)
    strict_load(fresh, load_file(str(path)), str(path))
    return _torch_run(_Logits(fresh.eval())), "a state dict with the network's own parameter names"


def _torch_run(module: nn.Module) -> Run:
    def run(images: Tensor) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(images).numpy())

    return run


def _compare(run: Run, images: Tensor, expected: np.ndarray, to: str) -> float:
    """Largest difference of a logit, all images at once and one alone; UserError where it is more than rounding."""
    try:
        together, alone = run(images), run(images[:1])
    except Exception as error:  # whatever the runtime raises, the file is of no use
        raise UserError(f"the exported {to} file does not run: {_first_line(error)}; nothing was written") from error
    if together.shape != expected.shape:
        raise UserError(f"the exported {to} file gives logits of shape {together.shape}, PyTorch of {expected.shape}; nothing was written")
    if not np.isfinite(together).all():
        raise UserError(f"the exported {to} file gives logits that are not finite; nothing was written")
    difference = float(max(np.abs(together - expected).max(), np.abs(alone - expected[:1]).max()))
    limit = SMALLEST + TOLERANCE * float(np.abs(expected).max())
    if difference > limit:
        raise UserError(f"the exported {to} file differs from PyTorch by {difference:.2g} (the tolerance is {limit:.2g}); nothing was written")
    return difference


def need(*packages: str) -> None:
    """UserError with the way to install what is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def _at(opset: int | None) -> str:
    return f" with opset {opset}" if opset is not None else ""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
