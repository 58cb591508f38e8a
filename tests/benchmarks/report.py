"""What the benchmarks say: a table in the terminal, a JSON file for later comparison, a plot for each table."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.figures import Figure, Scale, shown

PEERS = ("aiostream", "aiometer", "pypeln", "bytewax", "dbos", "diskcache", "redis")
VERSIONS = ("msgspec", "anyio", "uvloop", *PEERS)
WIDTH = 1000  # no line is broken
WORDS = {True: "yes", False: "NO", None: ""}

Key = tuple[str, str]
Before = dict[Key, Figure]


def bound_of(figure: Figure) -> str:
    """What it has to reach."""
    return "" if figure.bound is None else f"{'≥' if figure.at_least else '≤'} {figure.bound:g}"


def change_of(figure: Figure, before: Before) -> str:
    """By how much it is more than before."""
    old = before.get((figure.table, figure.row))
    if old is None:
        return "new"
    if not old.value or math.isnan(old.value) or math.isnan(figure.value):
        return f"was {shown(old.value)}"
    return f"{figure.value / old.value - 1:+.1%} (was {shown(old.value)})"


def print_table(title: str, figures: Iterable[Figure], before: Before | None = None) -> None:
    """One table of Markdown; with the change, if there is something to compare it with."""
    names = ["row", "value", "bound", "reached", *(["change"] if before is not None else []), "note"]
    table = Table(*names, box=box.MARKDOWN)
    for figure in figures:
        change = [change_of(figure, before)] if before is not None else []
        value = f"{shown(figure.value)} {'' if math.isnan(figure.value) else figure.unit}".strip()
        table.add_row(figure.row, value, bound_of(figure), WORDS[figure.reached], *change, figure.note)
    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False, color_system=None)
    with console.capture() as drawn:
        console.print(table)
    lines = [line.rstrip() for line in drawn.get().splitlines()]
    print("", title, *filter(None, lines), sep="\n", flush=True)


def gone(figures: Iterable[Figure], before: Before) -> list[Key]:
    """Rows that were there before and are not any more, in tables that are."""
    now = {(figure.table, figure.row) for figure in figures}
    tables = {table for table, _ in now}
    return [key for key in before if key[0] in tables and key not in now]


def setting(scale: Scale) -> dict[str, Any]:
    """Where and how it was measured."""
    here, words = Path(__file__).parent, ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    git = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
    return {
        "rounds": scale.rounds,
        "factor": scale.factor,
        "commit": git.stdout.strip(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: version for name in VERSIONS if (version := version_of(name))},
    }


def version_of(distribution: str) -> str | None:
    """Which one is installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write_json(path: Path, where: dict[str, Any], figures: Sequence[Figure]) -> None:
    """Keep them for later; a figure that was not measured is null."""
    rows: list[dict[str, Any]] = [
        {**figure._asdict(), "value": None if math.isnan(figure.value) else figure.value, "reached": figure.reached}
        for figure in figures
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**where, "figures": rows}, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> tuple[dict[str, Any], Before]:
    """What `write_json` has kept: where it was measured, and the figures."""
    where = json.loads(path.read_text())
    before = {}
    for row in where.pop("figures"):
        del row["reached"]
        figure = Figure(**{**row, "value": math.nan if row["value"] is None else row["value"]})
        before[figure.table, figure.row] = figure
    return where, before


def plot(path: Path, title: str, figures: Sequence[Figure]) -> None:
    """Bars, one diagram a unit, and a mark at each bound; nothing, if nothing was measured."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure as Sheet

    rcParams["svg.hashsalt"] = "async_recovery"  # the same figures make the same file
    rcParams["svg.fonttype"] = "none"  # text stays text: a quarter of the size
    figures = [figure for figure in figures if math.isfinite(figure.value)]
    if not figures:
        return
    units = sorted({figure.unit for figure in figures}, reverse=True)
    heights = [sum(figure.unit == unit for figure in figures) for unit in units]
    sheet = Sheet(figsize=(11, 1.5 + 0.32 * len(figures) + 0.6 * len(units)), layout="constrained")
    sheet.suptitle(title)
    for unit, axes in zip(units, sheet.subplots(len(units), squeeze=False, height_ratios=heights)[:, 0], strict=True):
        rows = [figure for figure in figures if figure.unit == unit][::-1]
        colors = ["tab:red" if figure.reached is False else "tab:blue" for figure in rows]
        bars = axes.barh([figure.row for figure in rows], [figure.value for figure in rows], color=colors)
        axes.bar_label(bars, [shown(figure.value) for figure in rows], padding=3)
        bounds = [(figure.bound, place) for place, figure in enumerate(rows) if figure.bound is not None]
        axes.plot([bound for bound, _ in bounds], [place for _, place in bounds], "k|", markersize=18)
        values = [figure.value for figure in rows if figure.value > 0]
        if values and max(values) > 50 * min(values):
            axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.set_xlabel(f"{unit} (a mark is a bound, red misses it)")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(path, format="svg", metadata={"Date": None})
