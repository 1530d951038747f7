"""What a phase does with cached features: decide, compute, feed. The features themselves are `dtl.training.features`' work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtl.data.loading.batch import Batch
from dtl.distributed.runtime import Runtime
from dtl.models.network import Network
from dtl.models.normalise import Normalise
from dtl.training.active import ActivePhase
from dtl.training.dataloaders import DataLoaders
from dtl.training.feature_data import FeatureDataset
from dtl.training.features import FeatureCache, Part, decide, find_cut
from dtl.training.phases import Phase

# Features need no gradients: a rank can take more at once than a training step's share, and small shares would waste the machine.
_LEAST_BATCH = 32


@dataclass
class PhaseFeatures:
    """Of one run; `cache_dir` None turns caching off (debugging)."""

    runtime: Runtime
    network: Network
    loaders: DataLoaders
    normalise: Normalise
    seed: int
    cache_dir: Path | None
    say: Callable[[str], None]

    def choose_cut(self, phase: Phase, trainable: frozenset[str]) -> str | None:
        """The module that `phase` should train on cached features; None to train on images. The same on all ranks."""
        config = phase.config
        if self.cache_dir is None or config.cache_features is False:
            return None
        cut, why_not = find_cut(self.network, trainable, image_size=self.loaders.image_size)
        cut, why_not = self.runtime.agree((cut, why_not))
        num_epochs = phase.num_steps / phase.steps_per_epoch
        views, line = decide(phase.name, config, why_not=why_not, fixed=self.loaders.train_transform.is_fixed, num_epochs=num_epochs)
        if line:
            self.say(f"phase {phase.name}: {line}")
        return cut if views else None

    def fill(self, active: ActivePhase, before_step: Callable[[list[Batch]], bool]) -> bool:
        """Compute or find the features of the phase, and feed them from now on. False: all ranks are to stop."""
        phase, loaders = active.phase, self.loaders
        if active.cut is None:
            return True
        assert self.cache_dir is not None
        fixed = loaders.train_transform.is_fixed
        epochs: tuple[int, ...] = (0,)
        if fixed or phase.config.views == 1:
            transform = loaders.train_transform if fixed else loaders.val_transform
        else:
            epochs, transform = tuple(range(phase.first_epoch, phase.first_epoch + phase.config.views)), loaders.train_transform
        cache = FeatureCache(
            place=self.cache_dir / "features",
            runtime=self.runtime,
            normalise=self.normalise,
            seed=self.seed,
            image_size=loaders.image_size,
            workers=loaders.workers,
            batch_size=max(_LEAST_BATCH, loaders.layout(phase).micro_batch_size),
            before_step=before_step,
            say=self.say,
        )
        parts = [Part("train", loaders.train, transform, epochs), Part("val", loaders.val, loaders.val_transform, (0,))]
        folder = cache.folder(self.network.module, active.cut, parts, frozen=active.frozen_checksum)
        if folder is None:
            return False
        # The views are those of the phase's first epochs, and go round. Evaluation is epoch 0 of its own.
        loaders.cached = {"train": FeatureDataset(loaders.train, folder, "train", phase.first_epoch), "val": FeatureDataset(loaders.val, folder, "val", 0)}
        return True
