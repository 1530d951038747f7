"""What counts as out of memory."""

from __future__ import annotations

import pytest

from dtl.training.micro_batch import _is_out_of_memory


@pytest.mark.parametrize(
    ("error", "it_is"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("could not create a primitive"), True),  # oneDNN under `ulimit -v`, as seen with torch 2.14
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
    ],
)
def test_what_counts_as_out_of_memory_on_a_cpu(error: BaseException, it_is: bool) -> None:
    assert _is_out_of_memory(error) == it_is
