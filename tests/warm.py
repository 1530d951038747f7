"""What the harness's server imports once, before it forks the processes of the tests."""

import gc
import warnings

warnings.filterwarnings("ignore")

import accelerate  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402  (optimizers pull it in: 4 s)
import torchvision  # noqa: E402, F401

import dtl.cli  # noqa: E402
import dtl.commands.train  # noqa: E402
import dtl.training.run  # noqa: E402, F401

warnings.resetwarnings()
torch.set_num_threads(1)
gc.collect()
gc.freeze()
