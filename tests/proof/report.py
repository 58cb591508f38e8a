"""The table at the end of a run of the proof: what each layer counted, and what its negative controls were worth.

A layer's tests call `add`, `control` and `missing`; `tests/conftest.py` prints the table, of all processes together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import pytest

TITLES = {
    1: "crash model",
    2: "mutants of the durable path",
    3: "failed fsync, then a restart in the same boot",
    4: "schedules of the engine",
    5: "schedule x crash x state of the disk",
    6: "every I/O call x kill or error",
    7: "SIGKILL at random times",
    8: "power cuts",
    9: "damaged journal and output",
    10: "conformance of the seam with the system calls",
    11: "full and forbidden disks",
    12: "SQLite: power cuts",
    13: "PostgreSQL: client, session, server lost; a writer that wakes up",
    14: "signals and cancellations",
    15: "locks",
}


@dataclass
class Figures:
    """What one layer has to say.

    :ivar counts: what was counted, by its unit ("states", "cycles" …).
    :ivar violations: broken invariants.
    :ivar controls: negative controls that were run, and `caught` how many of them were noticed.
    :ivar missing: why a part of it could not run here.
    """

    counts: dict[str, int] = field(default_factory=dict)
    violations: int = 0
    controls: int = 0
    caught: int = 0
    missing: list[str] = field(default_factory=list)


table: dict[int, Figures] = {}


def _figures(layer: int) -> Figures:
    assert layer in TITLES
    return table.setdefault(layer, Figures())


def add(layer: int, unit: str, count: int, *, violations: int = 0) -> None:
    """Count `count` more of `unit` for a layer, with the violations found in them."""
    figures = _figures(layer)
    figures.counts[unit] = figures.counts.get(unit, 0) + count
    figures.violations += violations


def control(layer: int, *, caught: bool) -> None:
    """One negative control of a layer: a defect put in on purpose; `caught`: whether the layer noticed it."""
    figures = _figures(layer)
    figures.controls += 1
    figures.caught += caught


def missing(layer: int, why: str) -> NoReturn:
    """A part of a layer can not run on this machine: said in the last lines of the run, and a failure in CI."""
    _figures(layer).missing.append(why)
    if os.environ.get("CI"):
        pytest.fail(f"layer {layer} can not run: {why}")
    pytest.skip(f"layer {layer} can not run: {why}")


def as_builtins() -> dict[int, dict[str, Any]]:
    """The table, for another process to `merge`."""
    return {layer: asdict(figures) for layer, figures in table.items()}


def merge(more: Mapping[int, Mapping[str, Any]]) -> None:
    """Add what the tests of another process counted."""
    for layer, given in more.items():
        figures = _figures(layer)
        for unit, count in given["counts"].items():
            add(layer, unit, count)
        figures.violations += given["violations"]
        figures.controls += given["controls"]
        figures.caught += given["caught"]
        figures.missing += given["missing"]


def lines() -> list[str]:
    """The table, a line each."""
    rows = [("layer", "", "counted", "violations", "controls caught")]
    for layer, figures in sorted(table.items()):
        counted = ", ".join(f"{count:,} {unit}" for unit, count in figures.counts.items()) or "-"
        controls = f"{figures.caught} of {figures.controls}" if figures.controls else "-"
        rows.append((str(layer), TITLES[layer], counted, str(figures.violations), controls))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shown += [f"NOT RUN: layer {n} ({TITLES[n]}): {why}" for n, f in sorted(table.items()) for why in f.missing]
    return shown
