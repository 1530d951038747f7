"""The table of findings."""

from __future__ import annotations

from dtl.doctor.finding import Finding, table


def test_the_table_names_each_remedy() -> None:
    text = table([Finding("gpu", "ok", "none"), Finding("shm", "fail", "too small", "docker run --shm-size=8g")])
    assert "FAIL  shm" in text
    assert "-> docker run --shm-size=8g" in text
