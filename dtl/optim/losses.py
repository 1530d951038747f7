"""Classification losses, one number per sample, and class weights with a denominator that is the same at any world size.

B samples, K classes. The math is float32 even where the logits come out of autocast in half precision. Targets are either class
numbers int64 [B] or shares float [B,K] (mixup, cutmix), rows adding up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from dtl.errors import UserError
from dtl.untrusted import read_json

_MOST_WEIGHT = 1_000_000_000  # of a class; sums of float32 hold it


@dataclass(frozen=True)
class Loss:
    """A loss; call it as `loss(logits, targets) -> (weighted losses [B], weights [B])`.

    A step's loss is the sum of the first over the sum of the second, both over the real samples of the *global* batch: with class
    weights that is torch's weighted mean of the whole batch, whatever part of it this rank holds. Without them the weights are 1.
    A sample's class weight is the mean of the weights of its classes by its target's shares; label smoothing does not enter it.
    """

    name: str = "cross_entropy"
    """One of LOSSES."""
    smoothing: float = 0.0
    gamma: float = 2.0
    alpha: float | Tensor = 1.0
    class_weights: Tensor | None = None

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = self.losses(logits, targets)
        if self.class_weights is None:
            return losses, torch.ones_like(losses)
        return losses, self._weights(as_shares(targets, logits.shape[1]), self.class_weights)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The weighted losses [B] alone."""
        if self._is_plain(targets):
            # The usual case: the same values, a quarter of the operations.
            return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        shares = as_shares(targets, logits.shape[1])
        losses = LOSSES[self.name](logits, smoothed(shares, self.smoothing), self)
        return losses if self.class_weights is None else losses * self._weights(shares, self.class_weights)

    def total(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of the weighted losses, where every sample of the batch counts."""
        if self._is_plain(targets):
            return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return self.losses(logits, targets).sum()

    def _is_plain(self, targets: Tensor) -> bool:
        return targets.ndim == 1 and self.name == "cross_entropy" and self.smoothing == 0 and self.class_weights is None

    def _weights(self, shares: Tensor, class_weights: Tensor) -> Tensor:
        return (shares * class_weights.to(shares)).sum(dim=1)

    def to(self, device: torch.device | str) -> Loss:
        """The same loss with its tensors on `device`, so that no step copies them."""
        alpha = self.alpha.to(device) if isinstance(self.alpha, Tensor) else self.alpha
        weights = None if self.class_weights is None else self.class_weights.to(device)
        return Loss(name=self.name, smoothing=self.smoothing, gamma=self.gamma, alpha=alpha, class_weights=weights)


def build_loss(
    name: str = "cross_entropy",
    *,
    smoothing: float = 0.0,
    gamma: float = 2.0,
    alpha: float | Sequence[float] | None = None,
    class_weights: Tensor | None = None,
) -> Loss:
    """A loss by name; `alpha` (focal: one factor, or one per class) and `gamma` are the focal loss's, the rest is for both."""
    if name not in LOSSES:
        raise UserError(f"loss is {name!r}; it must be one of {', '.join(LOSSES)}")
    if not 0 <= smoothing < 1:
        raise UserError(f"label_smoothing is {smoothing}; it must be 0 or more and less than 1")
    if not (math.isfinite(gamma) and gamma >= 0):
        raise UserError(f"gamma of the focal loss is {gamma}; it must be 0 or more (0 is cross entropy)")
    factors: float | Tensor
    if alpha is None:
        factors = 1.0
    elif isinstance(alpha, (int, float)):
        factors = float(alpha)
    else:
        factors = torch.tensor(list(alpha), dtype=torch.float32)
    values = factors.tolist() if isinstance(factors, Tensor) else [factors]
    if any(not math.isfinite(value) or value < 0 for value in values) or not any(values):
        raise UserError(f"alpha of the focal loss is {alpha}; give one number above 0, or one of 0 or more for each class")
    return Loss(name=name, smoothing=smoothing, gamma=gamma, alpha=factors, class_weights=class_weights)


def cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """- sum_k share_k log p_k per sample, float32 [B]; logits [B,K], shares [B,K]."""
    return -_expectation(shares, log_softmax(logits.float(), dim=1))


def focal(logits: Tensor, shares: Tensor, *, gamma: float = 2.0, alpha: float | Tensor = 1.0) -> Tensor:
    """- sum_k share_k alpha_k (1 - p_k)^gamma log p_k per sample, float32 [B] (Lin et al. 2017, arXiv 1708.02002, softmax form).

    gamma 0 and alpha 1 is cross entropy. `alpha` is one factor or one per class [K].
    """
    if isinstance(alpha, Tensor) and alpha.shape != logits.shape[1:]:
        raise UserError(f"alpha of the focal loss has {alpha.numel()} numbers for {logits.shape[1]} classes; give one for each class")
    log_p = log_softmax(logits.float(), dim=1)
    factors = alpha.to(log_p) if isinstance(alpha, Tensor) else alpha
    if gamma == 0:
        return -_expectation(shares * factors, log_p)
    # 1 - p = -expm1(log p): exact for p near 1, where 1 - exp loses all digits. Its floor keeps the slope of the power finite
    # there (for gamma below 1 it is infinite at 0, and 0 * infinity would be NaN).
    missed = (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny if gamma >= 1 else 1e-12)
    return -_expectation(shares * factors, missed.pow(gamma) * log_p)


# By their names in phases.NAME.loss: logits [B,K], shares [B,K] and the settings -> one float32 number a sample.
LOSSES: dict[str, Callable[[Tensor, Tensor, Loss], Tensor]] = {
    "cross_entropy": lambda logits, shares, loss: cross_entropy(logits, shares),
    "focal": lambda logits, shares, loss: focal(logits, shares, gamma=loss.gamma, alpha=loss.alpha),
}


def as_shares(targets: Tensor, num_classes: int) -> Tensor:
    """Float32 shares [B,K] of class numbers [B]; shares stay as they are."""
    if targets.ndim == 2:
        assert targets.shape[1] == num_classes, f"targets of {targets.shape[1]} classes, logits of {num_classes}"
        return targets.float()
    return one_hot(targets, num_classes).float()


def smoothed(shares: Tensor, smoothing: float) -> Tensor:
    """A share `smoothing` of the target spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567), as torch does."""
    return shares if smoothing == 0 else shares * (1 - smoothing) + smoothing / shares.shape[1]


def class_weights(rule: str | None, class_counts: Sequence[int], classes: Sequence[str]) -> Tensor | None:
    """Weights float32 [K]: `none`, `inverse` (1 / count), `sqrt` (1 / square root of count), or the path of a JSON file.

    Those by rule have mean 1 over the training *samples* (sum of count x weight = number of samples), so the loss keeps its usual
    size and weight decay its meaning. A class without a sample gets the weight of a class with one. A file holds {class name:
    weight} for every class, and is taken as written.
    """
    if rule is None or rule == "none":
        return None
    if rule in ("inverse", "sqrt"):
        counts = torch.tensor(list(class_counts), dtype=torch.float64)
        if counts.sum() == 0:
            raise UserError(f"class_weights is {rule}, but the training data has no samples to count")
        weights = counts.clamp_min(1).pow(-1.0 if rule == "inverse" else -0.5)
        return (weights * counts.sum() / (counts * weights).sum()).float()
    return _weights_of_file(Path(rule), classes)


def _weights_of_file(path: Path, classes: Sequence[str]) -> Tensor:
    if not path.is_file():
        raise UserError(f"class_weights is {str(path)!r}: neither none, inverse or sqrt, nor a file")
    try:
        given = read_json(path, by_hand=True)
    except OSError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); it must hold {{class name: weight}}") from error
    if not isinstance(given, dict):
        raise UserError(f"{path}: must hold {{class name: weight}}, not a {type(given).__name__}")
    for what, names in (
        ("has no weight for", [name for name in classes if name not in given]),
        ("names unknown", [name for name in given if name not in set(classes)]),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(f"{path}: {what} class {', '.join(map(repr, names[:5]))}{more}; it must name every class once")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST_WEIGHT:
            raise UserError(f"{path}: the weight of class {name!r} is {repr(value)[:40]}; it must be a number from 0 to {_MOST_WEIGHT:,}")
    if not any(given.values()):
        raise UserError(f"{path}: every weight is 0; at least one class must count")
    return torch.tensor([float(given[name]) for name in classes], dtype=torch.float32)


def _expectation(shares: Tensor, values: Tensor) -> Tensor:
    """sum_k share_k value_k, where a share of 0 counts nothing even of an infinite value (log p of an impossible class)."""
    return torch.where(shares == 0, 0, shares * values).sum(dim=1)
