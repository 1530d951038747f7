"""The configuration of a run: one model a section, each key documented by the text under it.

Only values that are wrong by themselves, or beside another of their section, are refused here; dtl.config reads files and options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dtl.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Strength = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
TransferBy = Literal["auto", "name", "order", "strict", "map"]


def _word_of(word: str) -> BeforeValidator:
    """YAML 1.1 reads a bare `no` or `off` as false."""
    return BeforeValidator(lambda value: word if value is False else value)


def _names_as_text(value: Any) -> Any:
    """Class names that are numbers in YAML (digits) are names all the same."""
    if isinstance(value, Mapping):
        return {str(name): _names_as_text(old) for name, old in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    return str(value) if isinstance(value, (int, Path)) and not isinstance(value, bool) else value


class Section(BaseModel):
    """Base of every section: frozen, strict about names, documented by the docstring under each field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


@contextmanager
def arguments_checked() -> Iterator[None]:
    """Sections that are made of a caller's arguments: the first that is wrong becomes a UserError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:1]))
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UserError(f"{name}{': ' if name else ''}{first['msg'].removeprefix('Value error, ')}{got}") from None


class RunConfig(Section):
    name: str | None = None
    """Name of the run's folder; by default the config file's name (digits for the built-in example)."""
    dir: str = "runs"
    """Where run folders lie."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the data order, the augmentations, the initial values and dropout."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on where this run stopped; never: start it afresh; must: refuse to start from nothing."""
    debug: bool = False
    """One process, no workers, few samples, anomaly detection, deterministic algorithms, no tracker, full traceback; overfits one batch first."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    gradient_compression: Literal["no", "bf16", "fp16"] = "no"
    """Send gradients between processes as 16 bits: half the bytes, for slow networks. Gradients are rounded, so results change a little."""
    timeout_minutes: Positive = 30.0
    """A run that makes no progress for this long ends, and names the rank that the others waited for, its stage and its samples."""


class AugmentConfig(Section):
    """A preset and what is added to it, in this order: crop, flips, rotation, randaugment or trivial, color_jitter, grayscale, erasing."""

    preset: Literal["imagenet", "cifar", "light", "none"] = "imagenet"
    """imagenet: random resized crop and flip; cifar: pad, random crop, flip; light: random crop near the full size, flip; none: as in evaluation."""
    rotation: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """Largest rotation, in degrees to either side; bilinear, black outside of the image."""
    color_jitter: Strength | tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0.0, le=0.5)]] = 0.0
    """One strength s for brightness, contrast and saturation (factors within 1 +- s), or four: the same three and hue (up to 0.5 of a turn)."""
    horizontal_flip: bool | None = None
    """Mirror half of the images; by default the preset decides. Set it to false where left and right differ (digits, text)."""
    vertical_flip: Fraction = 0.0
    """Probability of turning an image upside down."""
    grayscale: Fraction = 0.0
    """Probability of dropping the colours."""
    erasing: Fraction = 0.0
    """Probability of erasing a random rectangle of 2 % to 33 % of the area (Zhong et al. 2017)."""
    randaugment: tuple[Count, Annotated[int, Field(ge=0, le=30)]] | None = None
    """[number of operations, magnitude of 30] (Cubuk et al. 2019); [2, 9] is usual."""
    trivial: bool = False
    """TrivialAugment Wide: one operation of random strength (Mueller and Hutter 2021)."""
    reduced_decode: bool = True
    """Decode large JPEGs at a half, a quarter or an eighth of their size where the random crop is as many times larger than `image_size`."""

    @model_validator(mode="after")
    def _one_policy(self) -> AugmentConfig:
        if self.randaugment is not None and self.trivial:
            raise ValueError("randaugment and trivial are both on; take one of them")
        return self


class DataConfig(Section):
    train: str | None = None
    """Training data: an image folder (a folder a class), a list file, CIFAR batches, packed shards, WebDataset tars (also remote ones), or the word digits."""
    val: str | None = None
    """Validation data; not needed where `train` holds a train/ and a val/ folder, or with `val_fraction`."""
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training images to validate on, split by content and stratified by class."""
    image_size: Annotated[int, Field(ge=8)] = 224
    """Side of the square that the network sees, in pixels."""
    global_batch_size: Count = 64
    """Samples a step, all ranks and all accumulation together."""
    micro_batch_size: Literal["auto"] | Count = "auto"
    """Samples that one rank passes forward at once; auto: its whole share of the global batch, halved until it fits into memory."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes of each rank; 0: load in the training process."""
    decode: Literal["workers", "device"] = "workers"
    """Where JPEGs become pixels: in the loader processes, or on the GPU (nvJPEG, by torchcodec; crop, resize, flips and erasing follow there)."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a damaged sample does: end the run, or keep its place with weight 0."""
    max_bad: Annotated[int, Field(ge=0)] = 0
    """With `on_error: skip`: more damaged samples than this end the run."""
    augment: AugmentConfig = AugmentConfig()
    last: Literal["keep", "drop"] = "keep"
    """keep: every sample once an epoch, in steps of nearly equal size; drop: leave out what does not fill a global batch."""
    window: Count = 65_536
    """Samples are shuffled within windows of this many, over shards in random order."""
    balance: Literal["none", "sqrt", "uniform"] = "none"
    """Draw classes alike (uniform), in proportion to the roots of their sizes (sqrt), or each sample once an epoch (none)."""
    cache_dir: str | None = None
    """Where image folders are packed once and remote shards are kept; by default $DTL_CACHE, else the user's cache folder."""
    cache_gb: Positive | None = None
    """The most that remote shards take on each node's disk, in 10^9 bytes; by default all of them are kept."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often a failed download is tried again, with growing pauses; a try that brought something does not count."""
    timeout: Positive = 60.0
    """Seconds without a byte after which a download counts as failed."""
    allow_pipe: bool = False
    """Run the `pipe:` commands that a manifest names; those in `train` and `val` themselves are run anyhow."""
    names: str | None = None
    """JSON file of display names of the classes, {folder name: name}."""
    crop_ratio: Literal["auto"] | Annotated[float, Field(gt=0.0, le=1.0)] = "auto"
    """Evaluation: the centre crop's share of the resized short side; auto: that of the pretrained weights, or the whole image for `cifar`."""


class ModelConfig(Section):
    name: str = "torchvision/resnet18"
    """torchvision/NAME, timm/NAME, timm/hf-hub:ORG/NAME, dtl/NAME, or package.module:function."""
    init: Literal["default", "xavier", "kaiming"] = "default"
    """Initial values of new layers; of the whole network only when nothing is transferred."""
    options: dict[str, Any] = {}
    """Keyword arguments for the network's constructor."""
    freeze_norm: bool = True
    """Normalisation layers of frozen parts keep their statistics; false lets the statistics adapt to the new images."""
    sync_bn: Literal["auto"] | bool = "auto"
    """Batch statistics over all ranks (GPU only); auto: where norms are trained with fewer than 16 samples a rank."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory layout of images and convolutions; auto: channels last where the network has convolutions."""
    compile: bool = False
    """torch.compile the network."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""


class FillConfig(Section):
    conv_bias: Literal["keep", "zero"] = "keep"
    """Biases of convolutions that the source does not have: keep the initial values, or zero."""


class TransferSource(Section):
    source: str
    """FILE, model FOLDER, run folder, URL, torchvision:WEIGHTS, timm:NAME, hf-hub:ORG/NAME, or pretrained: the default weights of model.name."""
    map: str | None = None
    """YAML or JSON file of names: all of them with `by: map`; with `by: auto` those that settle single layers."""
    source_arch: str | None = None
    """Name of the network that the source was saved from, where it can be built: settles what the file alone cannot."""


class TransferOptions(Section):
    """How weights are transferred, wherever they come from: what the section `transfer` and `dtl.load_pretrained` have in common."""

    by: TransferBy = "auto"
    """How tensors find each other; strict: by order, of equal sequences of shapes only."""
    assume_order: bool = False
    """Trust the order of registration where nothing else tells layers of one shape apart."""
    on_ambiguous: Literal["error", "fresh"] = "error"
    """What is not certain: refuse the transfer, or leave those layers at their initial values."""
    min_coverage: Fraction = 0.6
    """Refuse when a smaller share of the network's, or of the source's, convolution and linear layers would be used."""
    ignore: tuple[str, ...] = ()
    """Patterns of names in the source (`decoder.*`) that are not meant: not loaded, and not counted by min_coverage."""
    keep_head: Literal["auto", "rows"] | bool = "auto"
    """auto: the source's head is kept when it is for the very same classes; rows: its rows are chosen by class names."""
    head_rows: Annotated[str | dict[str, str | tuple[str, ...]] | None, BeforeValidator(_names_as_text)] = None
    """For keep_head rows: `class here: class of the source`, or a list of classes to average; or a YAML or JSON file of that."""
    source_classes: Annotated[str | tuple[str, ...] | None, BeforeValidator(_names_as_text)] = None
    """Class names of the source's head, where the source does not have them: a list, a file of one name a line, a run, a model folder."""
    fill: FillConfig = FillConfig()
    fold_norms: bool = False
    """Fold a norm that the network lacks into the convolution before it."""

    @model_validator(mode="after")
    def _rows_belong_to_keep_head(self) -> TransferOptions:
        if self.head_rows is not None and self.keep_head != "rows":
            raise ValueError("`head_rows` needs `keep_head: rows`")
        return self


class TransferConfig(TransferOptions, TransferSource):
    @model_validator(mode="after")
    def _map_belongs_to_by_map(self) -> TransferConfig:
        if (self.by == "map" and self.map is None) or (self.map is not None and self.by not in ("map", "auto")):
            raise ValueError("`by: map` and `map: FILE` go together; with `by: auto` the file settles single layers")
        return self


class EarlyStopConfig(Section):
    threshold: float | None = None
    """End the phase once the monitored metric reaches this."""
    patience: Count | None = None
    """End the phase after this many evaluations without a better value."""


class PhaseConfig(Section):
    task: Literal["classify", "rotate"] = "classify"
    """classify: the labels; rotate: which of four rotations an image was given (labels unused)."""
    train: str | tuple[str, ...] = "all"
    """all, head, last:N (the N last groups of layers, the head counted), or patterns of parameter names."""
    epochs: Positive | None = None
    """Duration in epochs; fractions are allowed."""
    steps: Count | None = None
    """Duration in steps, instead of epochs."""
    lr: NotNegative = 0.01
    """Learning rate."""
    head_lr_scale: NotNegative = 1.0
    """The head's learning rate, as a multiple of `lr`."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each group of layers further from the head learns at this share of the next one's rate."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """How gradients become steps: SGD with momentum, Adam, or AdamW (Adam with weight decay beside the gradient)."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Of SGD."""
    nesterov: bool = False
    """SGD with Nesterov's momentum, which looks a step ahead; needs `momentum` over 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam and AdamW."""
    weight_decay: NotNegative = 0.0
    """Pull of the weights towards zero: this times the weight joins its gradient (AdamW: times lr, goes off the weight); not for norms and biases."""
    decay_norms_and_biases: bool = False
    """Weight decay on norms and biases too."""
    schedule: Literal["constant", "step", "cosine", "linear", "one_cycle"] = "cosine"
    """Course of the learning rate over the phase."""
    step_epochs: Positive | tuple[Positive, ...] = 7.0
    """`schedule: step`: every so many epochs, or at these epochs, the rate is multiplied by `gamma`."""
    gamma: Positive = 0.1
    """`schedule: step`: factor on the learning rate at each of its steps."""
    final_lr: Fraction = 0.0
    """`schedule: cosine | linear`: last learning rate, as a share of `lr`."""
    warmup: NotNegative = 0.0
    """Epochs over which the learning rate rises from a hundredth of `lr`."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """What training minimises; focal counts easy images less (Lin et al. 2017). Validation always measures the cross-entropy."""
    focal_gamma: NotNegative = 2.0
    """Exponent of the focal loss: the larger, the less easy images count; 0: cross-entropy."""
    focal_alpha: Positive | tuple[Positive, ...] | None = None
    """Weight of the focal loss: one number, or one a class."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target that is spread over all classes alike; 0: off."""
    class_weights: str = "none"
    """none, inverse, sqrt (of the class counts), or a JSON file {class: weight}."""
    mixup: NotNegative = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0: off."""
    cutmix: NotNegative = 0.0
    """Alpha of cutmix (Yun et al. 2019); 0: off. With both, each pair of images takes one of them."""
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Decay of the moving average of the weights, a step; 0: off. The average is what is evaluated and kept."""
    clip_norm: Positive | None = None
    """Largest norm of the gradient of all parameters together."""
    early_stop: EarlyStopConfig = EarlyStopConfig()
    eval_every: Positive = 1.0
    """Epochs between evaluations; the phase's end is always evaluated."""
    cache_features: Literal["auto"] | bool = "auto"
    """Compute what a frozen backbone gives the head once; auto: where the images are the same each epoch, or with `views`."""
    views: Count = 1
    """Cached features: augmented views of each image, one an epoch, in turn; 1: the images as they are, without augmentation."""
    keep: Literal["best", "last"] = "best"
    """Which weights the phase hands on: those of its best evaluation, or its last."""

    @model_validator(mode="after")
    def _one_duration(self) -> PhaseConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give `epochs` or `steps`, not both")
        if self.task == "rotate" and (self.mixup or self.cutmix):
            raise ValueError("mixup and cutmix do not go with the rotation task")
        if isinstance(self.step_epochs, tuple) and any(later <= earlier for earlier, later in pairwise(self.step_epochs)):
            raise ValueError(f"step_epochs must rise, not {list(self.step_epochs)}")
        return self


class CheckpointConfig(Section):
    every_steps: Count | None = None
    """Save each so many steps, besides the end of each phase, and each evaluation unless the last save is less than 15 s ago."""
    every_minutes: Positive | None = 10.0
    """Save when the last save is this long ago."""
    deadline_seconds: Positive | None = None
    """Stop by itself, with a checkpoint and status 75, so as to have left this long after the start. Slurm's time limit is known without it."""
    max_failures: Count = 3
    """How many saves in a row may fail (full disk, vanished folder) before the run ends."""
    keep: Count = 3
    """How many checkpoints stay on disk."""
    asynchronous: Annotated[bool, Field(alias="async")] = True
    """Write in the background while training goes on."""
    monitor: Literal["top1", "top5", "loss"] = "top1"
    """The metric of validation that says which weights are best."""

    model_config = ConfigDict(populate_by_name=True)


class TrackingConfig(Section):
    wandb: Annotated[Literal["auto", "online", "offline", "off"], _word_of("off")] = "auto"
    """auto: online where a key is known, else offline; never a prompt."""
    wandb_model: bool = False
    """Give wandb the model folder as an artifact when the run is done."""
    tensorboard: bool = False
    """Write TensorBoard files too (needs the package tensorboard)."""
    report: bool = True
    """Make the pictures and the page in report/ at the end of the run."""
    log_every: Count = 10
    """Steps between the lines of history.jsonl."""


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    transfer: TransferConfig | None = None
    phases: dict[str, PhaseConfig] = {}
    """The run, in order: NAME: {task, train, epochs or steps, lr, ...}."""
    precision: Annotated[Literal["auto", "no", "bf16", "fp16"], _word_of("no")] = "auto"
    """auto: the launch file's value, else bf16 where the hardware has it. What is left in float32 uses TF32 on GPUs (not with run.debug)."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the names that the YAML file uses."""
        return self.model_dump(mode="json", by_alias=True)

    def flat(self) -> dict[str, Any]:
        """The values of `to_dict` under dotted keys."""
        return flat(self.to_dict())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data.workers": 2, ...} of nested sections. An empty section has no key; tuples become lists, as JSON gives them back."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": _listed(value)}
    return found


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
