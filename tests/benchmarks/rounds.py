"""Rows measured side by side: each once in every round, and compared within the round.

What else the machine does is not the same from round to round: the ratio of two rows is the median of their ratios
within a round, never the ratio of two medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple, TypeVar

from tests.benchmarks.figures import shown

Costs = dict[str, list[float]]
Cost = TypeVar("Cost")
INSTALL = "pip install 'async-recovery[bench]' ({})"


class Middle(NamedTuple):
    """The median over the rounds, and how far they lie apart."""

    value: float
    spread: str


def interleave(rounds: int, rows: Mapping[str, Callable[[int], Cost]]) -> dict[str, list[Cost]]:
    """What each row costs in each round, as the row says it; every other round goes backwards."""
    costs: dict[str, list[Cost]] = {name: [] for name in rows}
    for number in range(rounds):
        for name in list(rows) if number % 2 == 0 else reversed(list(rows)):
            costs[name].append(rows[name](number))
    return costs


def middle(values: list[float]) -> Middle:
    """Their median and spread."""
    spread = f"rounds {shown(min(values))}–{shown(max(values))}" if len(values) > 1 else "one round"
    return Middle(statistics.median(values), spread)


def ratio(over: list[float], under: list[float]) -> Middle:
    """The median of the ratios within a round."""
    return middle([one / other for one, other in zip(over, under, strict=True)])


def missing(module: str) -> str | None:
    """Why a peer can not take part; None if it can, and has been imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own business, such as pypeln's about pkg_resources
        try:
            import_module(module)
        except ImportError as error:
            return INSTALL.format(f"{type(error).__name__}: {error}")
    return None


def missing_apart(module: str) -> str | None:
    """The same for a peer that runs in a process of its own, and is not to weigh on this one."""
    words = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    return INSTALL.format(ended.stderr.strip().splitlines()[-1]) if ended.returncode else None
