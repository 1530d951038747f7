"""What a run imports: no compiler, unless it compiles; and what stands in for it does what it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from recipes import write_images

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from dtl.cli import main
status = main(sys.argv[1:])
print(json.dumps([status, sorted(sys.modules)]))
"""
MOST = 2600
"""Modules of a run on cached features that logs to wandb, offline, and draws its report. It was 3,463; a module takes about a millisecond of CPU time."""


def test_a_run_imports_no_compiler(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", {"cat": 12, "dog": 12})
    recipe = {
        "data": {"train": str(images), "val_fraction": 0.25, "global_batch_size": 8, "augment": {"preset": "none"}, "workers": 0, "image_size": 96},
        "model": {"name": "torchvision/mobilenet_v3_small"},
        "phases": {
            "trained": {"train": "head", "epochs": 2, "lr": 0.01},
            "solved": {"train": "head", "optimizer": "solve"},
            "all": {"train": "all", "optimizer": "auto", "norm_statistics": "frozen", "after": "blend"},
        },
        "tracking": {"wandb": "offline"},
    }
    (tmp_path / "cached.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    variables = {**outside, "PYTHONPATH": str(ROOT), "DTL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, "train", "--config", "cached.yaml"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "computed once" in done.stderr
    status, modules = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    packages = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "timm", "wandb.apis.public", "pandas", "scipy"}
    assert sorted(packages & set(modules)) == []
    assert "wandb" in modules
    assert "matplotlib" in modules
    assert len(modules) <= MOST, f"{len(modules)} modules: what is new? Import it where it is used"


LATER = """
import sys
from dtl.imports import optimizers_without_compiler, plain_step, without_compiler
with without_compiler():
    import torchvision.models
import torch
def trained(step_of, context, kind, **options):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    with context:
        optimizer = kind(layer.parameters(), lr=0.1, **options)
    step = step_of(optimizer)
    for number in range(3):
        layer(torch.randn(4, 5, generator=torch.Generator().manual_seed(number))).square().sum().backward()
        step()
    return layer.weight.detach()
from contextlib import nullcontext
cases = [(torch.optim.SGD, dict(momentum=0.9, fused=True)), (torch.optim.Adam, dict(fused=True)), (torch.optim.AdamW, dict(fused=False, weight_decay=0.1))]
lean = [trained(plain_step, optimizers_without_compiler(), kind, **options) for kind, options in cases]
assert "torch._dynamo" not in sys.modules
assert not any(hasattr(getattr(method, "__wrapped__", None), "__dynamo_disable") for method in vars(torch.optim.Optimizer).values())
usual = [trained(lambda optimizer: optimizer.step, nullcontext(), kind, **options) for kind, options in cases]
assert "torch._dynamo" in sys.modules
assert all(torch.equal(one, other) for one, other in zip(lean, usual))
with without_compiler():
    import torch._dynamo.utils
assert torch._dynamo.utils.is_compile_supported.__module__ == "torch._dynamo.utils"
"""
ROI = """
import sys
from dtl.imports import without_compiler
with without_compiler():
    import torchvision
    assert "torch._dynamo" not in sys.modules
assert "torch._dynamo.utils" not in sys.modules
from torchvision.ops import roi_align
assert roi_align.__globals__["is_compile_supported"]("cpu") in (True, False)
assert "torch._dynamo" in sys.modules
import torch
assert roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]]), 2).shape == (1, 1, 2, 2)
"""

DDP = """
import sys, torch
from contextlib import nullcontext
from dtl.imports import ddp_without_compiler, plain_forward
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
def trained(context, lean):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    with context:
        wrapped = torch.nn.parallel.DistributedDataParallel(layers)
    if lean:
        plain_forward(wrapped)
    active = []
    layers.register_forward_hook(lambda *_: active.append(wrapped._get_active_ddp_module() is wrapped))
    for number in range(3):
        wrapped(torch.randn(4, 5, generator=torch.Generator().manual_seed(number))).square().sum().backward()
    assert active == [True] * 3
    assert wrapped._get_active_ddp_module() is None
    return [parameter.grad for parameter in layers.parameters()], wrapped._use_python_reducer
gradients, python_reducer = trained(ddp_without_compiler(), True)
assert "torch._dynamo" not in sys.modules
usual, as_torch_decides = trained(nullcontext(), False)
assert "torch._dynamo" in sys.modules
assert python_reducer == as_torch_decides
assert all(torch.equal(one, other) for one, other in zip(gradients, usual))
"""
LATER_COMPILER = """
import sys
from dtl.imports import ddp_without_compiler
import torch
with ddp_without_compiler():
    assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
    real = torch._dynamo.eval_frame
    assert real is sys.modules["torch._dynamo"].eval_frame
assert torch._dynamo.utils.get_optimize_ddp_mode.__module__ == "torch._dynamo.utils"
assert torch._dynamo.utils.get_optimize_ddp_mode() == "ddp_optimizer"
"""
PACKAGE = """
import sys
from dtl.imports import ddp_without_compiler
with ddp_without_compiler():
    from torch._dynamo.eval_frame import OptimizedModule
import torch
assert torch._dynamo.eval_frame.OptimizedModule is OptimizedModule
"""


@pytest.mark.parametrize("code", [LATER, ROI, DDP, LATER_COMPILER, PACKAGE], ids=["optimizers", "roi_align", "ddp", "its other names", "its modules"])
def test_what_stands_in_for_the_compiler_does_the_same(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
