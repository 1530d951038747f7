"""What the harness's server imports once, before it forks the processes of the tests."""

import gc
import warnings

warnings.filterwarnings("ignore")

import accelerate  # noqa: E402, F401
import torch  # noqa: E402

from dtl.imports import without_compiler  # noqa: E402

with without_compiler():  # as in a user's process, which steps without it (dtl.imports.plain_step)
    import torchvision  # noqa: F401

import dtl.cli  # noqa: E402
import dtl.commands.train  # noqa: E402
import dtl.training.run  # noqa: E402, F401

warnings.resetwarnings()
torch.set_num_threads(1)
gc.collect()
gc.freeze()
