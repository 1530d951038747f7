"""`run.deterministic`: what it sets and puts back, what it refuses, and what of a machine is compared at a resume."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from dtl.distributed.determinism import changed_facts, deterministic_kernels, kernel_facts, operators_noted
from dtl.errors import UserError

VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def switches() -> tuple[bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory


def test_everything_is_set_for_child_processes_too_and_put_back() -> None:
    before = switches()
    with deterministic_kernels(False):
        assert switches() == before
    with deterministic_kernels(True):
        assert switches() == (True, True, False, False)
        child = subprocess.run([sys.executable, "-c", f"import os; print(*map(os.environ.get, {VARIABLES}))"], capture_output=True, text=True, check=True)
        assert child.stdout.split() == [":4096:8", "Ring", "Simple"]
    assert switches() == before
    assert not any(name in os.environ for name in VARIABLES)


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_kernels(True):
        assert [os.environ[name] for name in VARIABLES] == [":16:8", "Tree", "Simple"]
    assert os.environ["NCCL_ALGO"] == "Tree"


def test_what_cannot_be_deterministic_any_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with (
        pytest.raises(UserError, match="this process has used CUDA already; set CUBLAS_WORKSPACE_CONFIG=:4096:8 before it starts"),
        deterministic_kernels(True),
    ):
        pass
    with deterministic_kernels(True, strict=False):  # for run.debug it is no promise
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="needs CUBLAS_WORKSPACE_CONFIG=:4096:8, but it is ':0:0'"), deterministic_kernels(True):
        pass


def test_operators_without_a_deterministic_kernel_are_noted_once_and_other_warnings_stay() -> None:
    pool, unpool, images = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2), torch.zeros(1, 1, 4, 4)
    found: list[str] = []

    def work() -> None:
        with operators_noted(found):
            for _ in range(2):
                unpool(*pool(images))
            warnings.warn("another one", stacklevel=1)

    with deterministic_kernels(True), pytest.warns(UserWarning, match="another one") as warned:
        work()
    assert found == ["max_unpooling2d_forward_out"]
    assert len(warned) == 1


def test_what_bits_depend_on_is_compared() -> None:
    now = kernel_facts(True, torch.device("cpu"))
    assert now == {"run.deterministic": "true", "torch": torch.__version__}
    assert changed_facts(now, now) == changed_facts({}, now) == []
    before = {"run.deterministic": "true", "torch": "2.0.0", "GPU": "A100"}
    assert changed_facts(before, now) == [f"torch was 2.0.0 and is now {torch.__version__}: the rounding of sums may differ"]
    gpus = {"GPU": "A100", "NCCL_ALGO": "Ring"}, {"GPU": "H100", "NCCL_ALGO": "unset"}
    assert changed_facts(*gpus) == ["GPU was A100 and is now H100, NCCL_ALGO was Ring and is now unset: the rounding of sums may differ"]
