"""The configuration of a run: one model per section, each key documented by the text under it.

Only values that are wrong by themselves, or contradict another of their section, are refused here; dtl.config.load reads files and options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from dtl.credentials import bare
from dtl.errors import UserError
from dtl.reading import MAX_CHANNELS
from dtl.text import nearest
from dtl.untrusted import in_words

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Strength = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=8)]
Address = Annotated[str, AfterValidator(bare)]
"""A source of data or weights. Of a web address the config keeps no password and no token: see dtl.credentials."""
TransferBy = Literal["auto", "name", "order", "strict", "map"]
Interpolation = Literal["bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic")
ImageSize = int | tuple[int, int]
"""Pixels: the side of a square, or (height, width) that differ."""


def sides(size: ImageSize) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def as_size(height: int, width: int) -> ImageSize:
    return height if height == width else (height, width)


def num_pixels(size: ImageSize) -> int:
    return sides(size)[0] * sides(size)[1]


def shown_size(size: ImageSize) -> str:
    """As the config takes it: `224`, `[160, 224]`."""
    return str(size) if isinstance(size, int) else str(list(size))


def _square_as_one(value: Any) -> Any:
    return as_size(*value) if isinstance(value, tuple) else value


RECALL_OF = "recall:"
BESIDE_SOLVE = frozenset({"task", "train", "image_size", "optimizer", "class_weights", "label_smoothing", "keep"})
Metric = Literal["top1", "top5", "loss", "balanced_accuracy", "macro_f1", "auroc", "average_precision"]


def _monitor(value: str) -> str:
    if value not in get_args(Metric) and not (value.startswith(RECALL_OF) and len(value) > len(RECALL_OF)):
        raise ValueError(f"{value!r} must be one of {', '.join(get_args(Metric))}, {RECALL_OF}CLASS{nearest(value, get_args(Metric))}")
    return value


def _names_as_text(value: Any) -> Any:
    """Class names that YAML reads as numbers (digits) become text."""
    if isinstance(value, Mapping):
        return {str(name): _names_as_text(old) for name, old in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    return str(value) if isinstance(value, (int, Path)) and not isinstance(value, bool) else value


def _no_single_text(value: Any) -> Any:
    """A text is a sequence of its letters, and nobody means those."""
    if isinstance(value, str):
        raise ValueError(f"must be a list: ['{value}']")
    return value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_no_single_text)]


def check_device(value: Any) -> Any:
    """ValueError for a device that dtl does not use, by its name; any other value as it is."""
    kind, colon, number = str(value).lower().partition(":")
    if kind in ("mps", "xpu", "hpu", "npu", "tpu", "xla", "mlu", "musa"):
        raise ValueError(f"dtl has not been tried on {kind} and does not use it; use cuda (NVIDIA GPUs, and AMD's with ROCm) or cpu")
    if kind in ("rocm", "hip"):
        raise ValueError(f"PyTorch's name for {kind} is cuda; use cuda")
    if kind == "cuda" and colon:
        raise ValueError(f"use cuda, and CUDA_VISIBLE_DEVICES={number} to choose a GPU")
    return value


class Section(BaseModel):
    """Base of every section: frozen, strict about names, documented by the docstring under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)


@contextmanager
def arguments_checked() -> Iterator[None]:
    """For sections that are made from a caller's arguments: the first wrong one becomes a UserError."""
    try:
        yield
    except ValidationError as error:
        first, *others = error.errors()
        place = first["loc"][: 2 if first["loc"][:1] == ("fill",) else 1]
        said = [in_words(one) for one in (first, *others) if one["loc"][: len(place)] == place]  # a value of several kinds has a fault for each
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UserError(f"{'.'.join(map(str, place))}{': ' if place else ''}{'; or '.join(dict.fromkeys(said))}{got}") from None


class RunConfig(Section):
    name: str | None = None
    """Name of the run folder; default: the name of the config file (digits for the built-in example)."""
    dir: str = "runs"
    """Folder that contains the run folders."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the data order, the augmentations, the initial weights and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue this run where it stopped, or start it; never: start again from the beginning; must: refuse to start without a checkpoint."""
    debug: bool = False
    """One process, no workers, few samples, anomaly detection, deterministic algorithms, no tracker, full traceback; overfits one batch first."""
    device: Annotated[Literal["auto", "cpu", "cuda"], BeforeValidator(check_device)] = "auto"
    """auto: the GPU if there is one; cuda: NVIDIA GPUs, and AMD's with ROCm. Other kinds are refused: dtl has not been tried on them."""
    deterministic: bool = False
    """Deterministic kernels, so that a run on GPUs is bit-identical when it is repeated or resumed; slower. On CPUs it is so either way."""
    profile: Count | None = None
    """Trace this many steps of each phase with torch.profiler into runs/NAME/profile/, and print what they spend their time on."""
    gradient_compression: Literal["no", "bf16", "fp16"] = "no"
    """Communicate gradients between processes in 16 bits: half the bytes, for slow interconnects. Gradients are rounded, so results change a little."""
    timeout_minutes: Positive = 30.0
    """End a run that makes no progress for this long. The message names the rank that the others waited for, its stage and its samples."""


class AugmentConfig(Section):
    """A preset and what is added to it, in this order: function, crop, flips, turns, rotation, randaugment or trivial, color_jitter, grayscale, erasing."""

    preset: Literal["imagenet", "cifar", "light", "none"] = "imagenet"
    """imagenet: random resized crop and flip; cifar: pad, random crop, flip; light: random crop near the full size, flip; none: as in evaluation."""
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """Largest rotation, in degrees to either side; bilinear, black outside of the image."""
    color_jitter: Strength | tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0.0, le=0.5)]] = 0.0
    """One strength s for brightness, contrast and saturation (factors within 1 +- s), or four: these three and hue (up to 0.5 of a turn)."""
    horizontal_flip: bool | None = None
    """Flip half of the images horizontally; by default the preset decides. Set it to false if left and right differ (digits, text)."""
    vertical_flip: Fraction = 0.0
    """Probability of flipping an image vertically."""
    turns: bool = False
    """Turn images by 0, 90, 180 or 270 degrees, without loss, for images that have no up (microscopes, satellites). With the horizontal flip, which is then
    on with any preset, all eight positions are equally likely; set that to false if left and right differ."""
    function: str | None = None
    """A function of your own, as package.module:function, that is called on each training image before the preset: it takes and gives uint8 [3, H, W]."""
    grayscale: Fraction = 0.0
    """Probability of converting an image to grayscale."""
    erasing: Fraction = 0.0
    """Probability of erasing a random rectangle of 2 % to 33 % of the area (Zhong et al. 2017)."""
    randaugment: tuple[Count, Annotated[int, Field(ge=0, le=30)]] | None = None
    """[number of operations, magnitude out of 30] (Cubuk et al. 2019); [2, 9] is common."""
    trivial: bool = False
    """TrivialAugment Wide: one operation with random strength (Mueller and Hutter 2021)."""
    reduced_decode: bool = True
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size if the random crop is at least that many times larger than `image_size`."""

    @model_validator(mode="after")
    def _one_policy(self) -> AugmentConfig:
        if self.randaugment is not None and self.trivial:
            raise ValueError("randaugment and trivial are both on; use one of them")
        if self.function is not None and ":" not in self.function:
            raise ValueError(f"function is named as package.module:function, got '{self.function}'")
        return self


Fit = Literal["crop", "stretch", "pad"]
Pool = Literal["token", "avg", "token+avg"]


class GroupConfig(Section):
    """What says which images belong together: one of these three."""

    regex: str | None = None
    """Regular expression for the path of an image; its first part in parentheses is the name of the group: `(patient[0-9]+)_`."""
    column: str | None = None
    """Column of the list that names the images, or that it had when it was packed with --group-column."""
    file: Address | None = None
    """CSV file with the columns path and group; paths as in the packed data."""

    @model_validator(mode="after")
    def _one_of_three(self) -> GroupConfig:
        if sum(one is not None for one in (self.regex, self.column, self.file)) != 1:
            raise ValueError("group needs one of regex, column and file")
        return self


class FoldConfig(Section):
    """One fold of a cross-validation: see `dtl folds`."""

    number: Annotated[int, Field(ge=0)] = 1
    """Which fold of the training images is the test set, from 1 on; 0: none, all images are trained on."""
    of: Annotated[int, Field(ge=2)] = 5
    """Number of folds."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the folds; with another one other images are together."""

    @model_validator(mode="after")
    def _one_of_them(self) -> FoldConfig:
        if self.number > self.of:
            raise ValueError(f"there is no fold {self.number} of {self.of}")
        return self


class ColumnsConfig(Section):
    """The columns of a list or a table, by their names, where they are not found by themselves: `path=file,label=species`."""

    path: str | None = None
    """Column of the images: of a list their paths, of Parquet and Arrow files the images themselves."""
    label: str | None = None
    """Column of the classes."""
    split: str | None = None
    """Column of the splits, of a list: train, val, test (or valid, testing ...) in each row."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        found = dict[str, str]()
        for part in value.split(","):
            role, _, name = (piece.strip() for piece in part.partition("="))
            if role not in ("path", "label", "split") or not name or role in found:
                raise ValueError(f"columns are `path=COLUMN,label=COLUMN,split=COLUMN`, each at most once; got `{part.strip()}`")
            found[role] = name
        return found

    def given(self) -> dict[str, str]:
        return self.model_dump(exclude_none=True)


class DataConfig(Section):
    train: Address | None = None
    """Training data: an image folder (one folder per class), a zip or tar of one, a list file, CIFAR batches, packed shards, WebDataset tars, or `digits`."""
    val: Address | None = None
    """Validation data; not needed if `train` contains a train/ and a val/ folder, or with `val_fraction`."""
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training images that is used for validation; split by content, stratified by class."""
    test: Address | None = None
    """Test data, measured once, after the last phase; not needed if `train` contains a test/ folder. It never chooses weights: without `val`, a tenth of
    the training images (20 or more) is validated on."""
    test_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training images that is used as the test set; split by content, stratified by class."""
    columns: ColumnsConfig | None = None
    """Columns of a list, or of Parquet and Arrow files, whose names are not found by themselves: `path=file,label=species,split=fold`."""
    group: GroupConfig | None = None
    """Images that belong together (a patient, a camera, a session): a group is in one split only. `regex: R`, `column: C` or `file: F`."""
    group_check: Literal["refuse", "warn"] = "refuse"
    """What happens if splits that were made by hand have a group in common."""
    audit: str | None = None
    """The CSV file of `dtl audit`, with your decisions about single images. Its column `action` is drop, relabel:CLASS, group (with `other`) or keep;
    nothing else in it has an effect."""
    fold: FoldConfig | None = None
    """Hold out one fold of the training images as the test set; stratified by class, groups in one fold. `dtl folds` sets it for each of its runs."""
    image_size: Annotated[Literal["auto"] | Side | tuple[Side, Side], AfterValidator(_square_as_one)] = "auto"
    """Size of the input image in pixels: the side of a square, or [height, width]. auto: that of the pretrained weights, else of the network, else 224."""
    fit: Fit = "crop"
    """How an image gets the shape of the input. crop: its middle; stretch: all of it, with other proportions; pad: all of it, with bars of the mean colour."""
    range: Literal["auto"] | tuple[float, float] = "auto"
    """Of images with more than 8 bits a channel (16-bit, float): [LOW, HIGH], the values that become black and white; auto: as found in the training images."""
    exif: Literal["auto", "apply", "ignore"] = "auto"
    """Whether images are turned as their EXIF orientation says; auto: yes, but for shards that an older dtl packed, where it is not known."""
    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] = 3
    """Of the images: 3 are red, green and blue; 1 is gray; others are what the files hold (TIFF with so many pages, .npy). Then mean and std are measured."""
    global_batch_size: Literal["auto"] | Count = 64
    """Samples per step, over all ranks and all gradient accumulation; auto: 64, or 32 or 16 where 64 would leave an epoch fewer than 20 steps."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Samples per forward pass on one rank; auto: its whole share of the global batch, halved until it fits into memory (on GPUs with 5 % to spare)."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Loader processes per rank; auto: from the CPU cores and the memory that this rank may use; 0: load in the training process."""
    decode: Literal["workers", "device"] = "workers"
    """Where JPEGs are decoded: in the loader processes, or on the GPU (nvJPEG through torchcodec; then crop, resize, flips and erasing run there too)."""
    on_error: Literal["fail", "skip"] = "fail"
    """What happens at a damaged sample. fail: the run ends; skip: the sample is masked (its weight in the loss is 0) and listed."""
    max_bad: Annotated[int, Field(ge=0)] = 0
    """With `on_error: skip`: the run ends if there are more damaged samples than this."""
    augment: AugmentConfig = AugmentConfig()
    last: Literal["keep", "drop"] = "keep"
    """keep: every sample once per epoch, in steps of nearly equal size; drop: leave out the samples that do not fill a global batch."""
    window: Count = 65_536
    """Shards come in random order, and samples are shuffled within windows of this many samples."""
    balance: Literal["none", "sqrt", "uniform"] = "none"
    """none: each sample once per epoch; sqrt: draw classes in proportion to the square roots of their sizes; uniform: draw all classes equally often."""
    cache_dir: str | None = None
    """Folder for packed image folders and downloaded shards; default: $DTL_CACHE, or else the user's cache folder."""
    cache_shared: bool = False
    """The cache belongs to several users: downloaded shards are shared, and verified by their SHA-256 before use; packed data stays private in it."""
    cache_gb: Positive | None = None
    """Largest size of the downloaded shards on the disk of each node, in 10^9 bytes; by default all shards are kept."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often a failed download is retried, with increasing pauses; an attempt that received some data does not count."""
    timeout: Positive = 60.0
    """Seconds without data after which a download counts as failed."""
    allow_pipe: bool = False
    """Run the `pipe:` commands in a manifest; those in `train` and `val` themselves are always run."""
    max_pixels: Count = 178_956_970
    """Largest image in pixels, width times height; larger ones count as damaged. Decoding one takes up to 9 bytes per pixel."""
    max_file_bytes: Count = 1 << 30
    """Largest file that is read into memory as a whole: an image (also inside of a tar), a list, a CSV. Larger images count as damaged."""
    names: Address | None = None
    """JSON file with display names of the classes, {folder name: display name}."""
    crop_ratio: Literal["auto"] | Annotated[float, Field(gt=0.0, le=1.0)] = "auto"
    """Evaluation with `fit: crop`: the centre crop, as a share of the resized short side; auto: that of the pretrained weights, or the whole image
    for `cifar`. The preset `light` crops by it too."""

    @model_validator(mode="after")
    def _one_range(self) -> DataConfig:
        if self.range != "auto" and self.range[0] >= self.range[1]:
            raise ValueError(f"range {list(self.range)} must be [LOW, HIGH], with LOW below HIGH")
        return self

    @model_validator(mode="after")
    def _one_crop(self) -> DataConfig:
        if self.fit != "crop" and self.crop_ratio != "auto" and self.augment.preset != "light":
            raise ValueError(f"crop_ratio {self.crop_ratio} has no effect with fit {self.fit}, which shows the whole image; leave out one of them")
        return self


class ModelConfig(Section):
    name: str = "torchvision/resnet18"
    """torchvision/NAME, timm/NAME, timm/hf-hub:ORG/NAME, dtl/NAME, or package.module:function."""
    init: Literal["default", "library", "xavier", "kaiming"] = "default"
    """Initialisation of new layers, or of the whole network if no weights are transferred. default: as the network's library does it, but a new linear head
    beside transferred weights starts at zero; library: such a head too."""
    options: dict[str, Any] = {}
    """Keyword arguments for the network's constructor."""
    pool: Pool | None = None
    """What the head of one of timm's vision transformers sees: the class token, the mean of the patch tokens, or both one behind the other (DINOv2's linear
    evaluation). By default what the network itself does."""
    freeze_norm: bool = True
    """Freeze the running statistics of normalisation layers in frozen parts; false: they are updated with the new images."""
    sync_bn: Literal["auto"] | bool = "auto"
    """SyncBatchNorm: batch statistics over all ranks (GPU only); auto: if norms are trained with fewer than 16 samples per rank."""
    channels_last: Literal["auto"] | bool = "auto"
    """channels_last memory format for images and convolutions; auto: if the network has convolutions."""
    compile: bool = False
    """Compile the network with torch.compile, for training. Evaluations run it as written, as `dtl evaluate` does: compiling it once more takes longer."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass (activation checkpointing): less memory, about a third more time."""


class FillConfig(Section):
    conv_bias: Literal["keep", "zero"] = "keep"
    """Convolution biases that the source does not have: keep their initial values, or set them to zero."""


class TransferSource(Section):
    source: Address
    """FILE, model FOLDER, run folder, URL, torchvision:WEIGHTS, timm:NAME, hf-hub:ORG/NAME, or pretrained (the default weights of model.name)."""
    adapter: str | None = None
    """A LoRA adapter of PEFT (the folder that it saved) that was trained on `source`: it is merged into those weights."""
    map: str | None = None
    """YAML or JSON file that maps names, target: source. With `by: map` it pairs all layers, with `by: auto` only the layers that it names."""
    source_arch: str | None = None
    """Name of the network that the source was saved from, if dtl can build it, or transformers:CLASS. It decides pairs that the file alone cannot decide."""


class TransferOptions(Section):
    """How weights are transferred: the options that the section `transfer` and `dtl.load_pretrained` have in common."""

    by: TransferBy = "auto"
    """How tensors are paired; strict: by order, only if both sequences of shapes are equal."""
    assume_order: bool = False
    """Trust the order of registration if nothing else distinguishes layers of the same shape."""
    on_ambiguous: Literal["error", "fresh"] = "error"
    """If a pair is not certain. error: refuse the transfer; fresh: leave those layers at their initial values."""
    fresh: Patterns = ()
    """Patterns of names in the network (`blocks.3.*`) that may stay newly initialised though loaded layers follow; without it that is refused."""
    min_coverage: Fraction = 0.6
    """Refuse weights of another network: those of which a smaller share of the convolution and linear layers would be used, of the network or of the source."""
    ignore: Patterns = ()
    """Patterns of names in the source (`decoder.*`) to leave out: not loaded, and not counted by min_coverage."""
    keep_head: Literal["auto", "rows"] | bool = "auto"
    """auto: load the source's head if it is for exactly the same classes; rows: choose its rows by class names."""
    head_rows: Annotated[str | dict[str, str | tuple[str, ...]] | None, BeforeValidator(_names_as_text)] = None
    """With `keep_head: rows`: `new class: class of the source`, or a list of classes to average; or a YAML or JSON file with such entries."""
    source_classes: Annotated[str | tuple[str, ...] | None, BeforeValidator(_names_as_text)] = None
    """Class names of the source's head, if the source does not contain them: a list, a file with one name per line, a run or a model folder."""
    fill: FillConfig = FillConfig()
    fold_norms: bool = False
    """If the network lacks a norm of the source, fold the norm into the convolution before it."""

    @model_validator(mode="after")
    def _rows_belong_to_keep_head(self) -> TransferOptions:
        if self.head_rows is not None and self.keep_head != "rows":
            raise ValueError("`head_rows` needs `keep_head: rows`")
        return self


class TransferConfig(TransferOptions, TransferSource):
    @model_validator(mode="after")
    def _map_belongs_to_by_map(self) -> TransferConfig:
        if self.by == "map" and self.map is None:
            raise ValueError("`by: map` needs `map: FILE`")
        if self.map is not None and self.by not in ("map", "auto"):
            raise ValueError(f"`map: FILE` needs `by: map` or `by: auto`, not `by: {self.by}`")
        return self


class EarlyStopConfig(Section):
    threshold: float | None = None
    """End the phase when the monitored metric reaches this value."""
    patience: Count | None = None
    """End the phase after this many evaluations without an improvement."""


class PhaseConfig(Section):
    task: Literal["classify", "rotate"] = "classify"
    """classify: predict the label; rotate: predict which of four rotations was applied to the image (labels are not used)."""
    train: str | tuple[str, ...] = "all"
    """all, head, last:N (the last N groups of layers, including the head), or patterns of parameter names."""
    epochs: Positive | None = None
    """Duration in epochs; fractions are allowed."""
    steps: Count | None = None
    """Duration in steps, instead of epochs."""
    norm_statistics: Literal["batch", "frozen"] = "batch"
    """Batch norms of what is trained. batch: by the statistics of each batch, which the running ones follow (train mode); frozen: by the running statistics
    that came with the weights (eval mode), which stay; scale and shift are trained."""
    image_size: Annotated[Side | tuple[Side, Side] | None, AfterValidator(_square_as_one)] = None
    """Size of the input images in this phase; by default `data.image_size`. A phase trains and evaluates at its size; the model has that of the last phase."""
    lr: NotNegative = 0.01
    """Learning rate."""
    head_lr_scale: NotNegative = 1.0
    """The head's learning rate, as a multiple of `lr`."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Layer-wise learning rate decay: each group of layers has this multiple of the learning rate of the next group towards the head."""
    optimizer: Literal["auto", "sgd", "adam", "adamw", "solve"] = "sgd"
    """SGD with momentum, Adam, or AdamW (Adam with decoupled weight decay). auto: optimizer, lr, weight_decay, layer_decay and stochastic depth by the
    network's family, where they are not given; a line says which, and whose they are. solve, with `train: head`: logistic regression on the cached features
    of clean images, its strength by cross-validation on the training images; one step, without lr, epochs and views."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """SGD with Nesterov momentum; needs `momentum` above 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of Adam and AdamW."""
    weight_decay: NotNegative = 0.0
    """Weight decay: this times the weight is added to its gradient (AdamW: lr times this times the weight is subtracted from it); not for norms and biases."""
    decay_norms_and_biases: bool = False
    """Apply weight decay to norms and biases too."""
    schedule: Literal["constant", "step", "cosine", "linear", "one_cycle"] = "cosine"
    """Learning rate schedule of the phase."""
    step_epochs: Positive | tuple[Positive, ...] = 7.0
    """`schedule: step`: the learning rate is multiplied by `gamma` every this many epochs, or at each epoch of a list."""
    gamma: Positive = 0.1
    """`schedule: step`: factor by which the learning rate is multiplied."""
    final_lr: Fraction = 0.0
    """`schedule: cosine | linear`: final learning rate, as a multiple of `lr`."""
    warmup: NotNegative = 0.0
    """Warm-up: number of epochs in which the learning rate rises from a hundredth of `lr`."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """Training loss; focal gives less weight to easy images (Lin et al. 2017). Validation always reports the cross-entropy."""
    focal_gamma: NotNegative = 2.0
    """Exponent of the focal loss: with a larger value easy images count less; 0: cross-entropy."""
    focal_alpha: Positive | tuple[Positive, ...] | None = None
    """Weight of the focal loss: one number, or one per class."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target that is spread evenly over all classes; 0: off."""
    class_weights: str = "none"
    """Weights of the classes in the loss: none, inverse, sqrt (of the class counts), or a JSON file {class: weight}."""
    mixup: NotNegative = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0: off."""
    cutmix: NotNegative = 0.0
    """Alpha of cutmix (Yun et al. 2019); 0: off. With mixup and cutmix, each pair of images gets one of them."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay per step of the exponential moving average of the weights; 0: off. The average is evaluated and kept."""
    clip_norm: Positive | None = None
    """Gradient clipping: largest norm of the gradients of all parameters together."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    eval_every: Positive = 1.0
    """Epochs between evaluations; the end of the phase is always evaluated."""
    cache_features: Literal["auto"] | bool = "auto"
    """Compute the features of a frozen backbone once; auto: if the images are the same in each epoch, or with `views`."""
    views: Count = 1
    """Cached features: number of augmented views of each image, used in turn, one per epoch; 1: the images without augmentation."""
    keep: Literal["one_se", "best", "last"] = "one_se"
    """Weights passed to the next phase. one_se: of the evaluations within one standard error of the best metric the one with the lowest validation loss, those
    before the first step included; best: of the best evaluation; last: the last ones."""
    after: Literal["none", "blend"] = "none"
    """blend: nine points between the weights that entered the phase (with a trained head) and its last ones are candidates of `keep: one_se`, too (WiSE-FT)."""

    @model_validator(mode="after")
    def _go_together(self) -> PhaseConfig:
        if self.optimizer == "solve":
            if self.train == "all":
                raise ValueError("`optimizer: solve` fits the head alone, not `train: all`; use `train: head`, or `optimizer: sgd`")
            fits = BESIDE_SOLVE | ({"cache_features"} if self.cache_features else set())
            if given := [name for name, field in type(self).model_fields.items() if name not in fits and getattr(self, name) != field.default]:
                raise ValueError(f"`optimizer: solve` has no use for {', '.join(given)}; leave that out, or use `optimizer: sgd`")
            if self.task != "classify":
                raise ValueError(f"`optimizer: solve` is for `task: classify`, not for `task: {self.task}`")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        if self.task == "rotate" and (self.mixup or self.cutmix):
            raise ValueError("mixup and cutmix cannot be used with `task: rotate`")
        if self.after == "blend" and self.keep != "one_se":
            raise ValueError(f"`after: blend` chooses by `keep: one_se`, not by `keep: {self.keep}`; leave out one of them")
        if isinstance(self.step_epochs, tuple) and any(later <= earlier for earlier, later in pairwise(self.step_epochs)):
            raise ValueError(f"step_epochs must be increasing, got {list(self.step_epochs)}")
        return self

    def num_steps(self, steps_per_epoch: int) -> int:
        """The phase's duration in optimizer steps."""
        return 1 if self.optimizer == "solve" else self.steps or max(1, round((self.epochs or 1.0) * steps_per_epoch))


class CheckpointConfig(Section):
    every_steps: Count | None = None
    """Save every this many steps. Also saved: the end of each phase, and each evaluation unless the last save was less than 15 s ago."""
    every_minutes: Positive | None = 10.0
    """Save if the last save was this many minutes ago."""
    deadline_seconds: Positive | None = None
    """Save, stop and exit with status 75 in time to have exited this long after the start. Under Slurm the time limit is found without this option."""
    max_failures: Count = 3
    """The run ends after this many failed saves in a row (full disk, deleted folder)."""
    keep: Count = 3
    """Number of checkpoints kept on the disk while the run trains; the second is read if the newest is damaged."""
    keep_done: Count = 1
    """Number of checkpoints kept when the run is done. The last one is enough to train longer."""
    asynchronous: Annotated[bool, Field(alias="async")] = True
    """Write checkpoints in the background while training continues."""
    monitor: Annotated[Metric | str, AfterValidator(_monitor)] = "top1"
    """Validation metric that decides which weights are kept (`keep`), and that early stopping follows; or the recall of one class: `recall:CLASS`."""

    model_config = ConfigDict(populate_by_name=True)


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online if an API key is found, otherwise offline; never asks for one."""
    wandb_model: bool = False
    """Upload the model folder to wandb as an artifact at the end of the run."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the package tensorboard)."""
    report: bool = True
    """Create the plots and the HTML page in report/ at the end of the run."""
    log_every: Count = 10
    """Steps between lines in history.jsonl."""


class Config(Section):
    _notes: tuple[object, ...] = PrivateAttr(())
    _shipped: frozenset[str] = PrivateAttr(frozenset())
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    transfer: TransferConfig | None = None
    phases: dict[str, PhaseConfig] = {}
    """The phases of the run, in order: NAME: {task, train, epochs or steps, lr, ...}."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: the value of the launch file, or else bf16 if the hardware supports it. Operations left in float32 use TF32 on GPUs (not with run.debug)."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def notes(self) -> tuple[str, ...]:
        """What its reader should be told of how the options were understood."""
        return tuple(map(str, self._notes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names that the YAML file uses."""
        return self.model_dump(mode="json", by_alias=True)

    def flat(self) -> dict[str, Any]:
        return flat(self.to_dict())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.workers": 2, ...} of nested sections. An empty section has no key; tuples become lists, as in JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": _listed(value)}
    return found


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
