"""What is measured in processes of its own."""

from __future__ import annotations

import pytest

from dtl.doctor import probe


def test_two_real_processes_add_their_numbers() -> None:
    results, seconds, problem = probe.two_process_sum("gloo")
    assert problem == ""
    assert results is not None
    assert [result["sum"] for result in results] == [3.0, 3.0]
    assert seconds < 60


def test_a_measurement_that_hangs_is_ended_and_one_that_fails_says_why() -> None:
    hanging = probe.Measurement("reduce", {"rank": 0, "backend": "gloo", "store": "/nonexistent/store", "seconds": 30}, seconds=0.3)
    with pytest.raises(probe.Unanswered, match=r"no answer within 0 s"):
        hanging.result()
    failing = probe.Measurement("nothing", {}, seconds=60)
    with pytest.raises(probe.Unanswered, match="KeyError: 'nothing'"):
        failing.result()
