"""What a table of the benchmarks is made of: rows with a value, and the bound that the value has to reach.

A table is a module of this package, named in `tests.benchmarks.__main__`, with::

    TITLE: str                                                   # what is measured, in a line
    def measure(scale: Scale, folder: Path) -> list[Figure]: ... # `folder` is empty, on the disk to be measured
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Figure(NamedTuple):
    """One row of a table.

    :param table: the name of its module.
    :param row: what was measured; with `table` it names the figure in a comparison.
    :param value: in `unit`; not a number (``math.nan``) if it could not be measured: `note` says why.
    :param bound: what it has to reach; None: shown, never judged.
    :param at_least: whether more is better.
    """

    table: str
    row: str
    value: float
    bound: float | None
    at_least: bool
    unit: str = "×"
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the bound is reached; None if there is none. What could not be measured reaches nothing."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Scale(NamedTuple):
    """How long to measure.

    :param rounds: how often each row runs; the figure is the median.
    :param factor: of the sizes that the issue names: 1.0, or 0.01 with ``--quick``.
    """

    rounds: int
    factor: float

    def of(self, size: int, least: int = 1) -> int:
        """`size` at this scale, `least` at the least."""
        return max(least, round(size * self.factor))


def shown(value: float) -> str:
    """A value as people read it."""
    if math.isnan(value):
        return "not measured"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
