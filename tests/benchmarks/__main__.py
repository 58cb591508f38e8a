"""The figures of async_recovery: ratios in one run, each with the bound that it has to reach.

    python -m tests.benchmarks [TABLE...] [--rounds 5] [--quick] [--json FILE] [--compare FILE] [--plots FOLDER]

It measures on the disk of the current folder. What a table compares is interleaved; a figure is the median over the
rounds. Peers come from the extra `bench`; one that is missing is a row that says so. The exit code is 1 if a bound is
missed or a table fails; with --quick only if a table fails: tiny sizes prove that it runs, and nothing else.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.report import Before, gone, plot, print_table, read_json, setting, write_json

TABLES = [
    *("engine", "instructions", "simple", "durable", "latency"),
    *("slow_disk", "bytes_written", "memory", "growth", "resume", "loop_gaps", "imports", "databases"),
]
QUICK, QUICK_ROUNDS, ROUNDS = 0.01, 1, 5


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; without one, all")
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS}; with --quick, {QUICK_ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the sizes")
    parser.add_argument("--json", type=Path, help="write the figures to this file, after every table")
    parser.add_argument("--compare", type=Path, help="print the change since this file was written")
    parser.add_argument("--plots", type=Path, help="draw each table into this folder")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.tables if name not in TABLES]
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}: there are {', '.join(TABLES)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: it must be at least 1")
    if arguments.plots is not None and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install 'async-recovery[bench]'")
    if arguments.compare is not None and not arguments.compare.is_file():
        parser.error(f"--compare {arguments.compare}: there is no such file")
    if arguments.json is not None and arguments.json.is_dir():
        parser.error(f"--json {arguments.json} is a folder: name a file")
    if arguments.plots is not None and arguments.plots.is_file():
        parser.error(f"--plots {arguments.plots} is a file: name a folder")
    arguments.tables = list(dict.fromkeys(arguments.tables))
    return arguments


def measure(name: str, scale: Scale, before: Before | None) -> list[Figure]:
    """Measure and print one table."""
    print(f"measuring {name} …", file=sys.stderr, flush=True)
    table = import_module(f"tests.benchmarks.{name}")
    parent = Path.cwd() / ".benchmarks"
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        figures: list[Figure] = table.measure(scale, Path(folder))
    print_table(f"{name}: {table.TITLE}", figures, before)
    return figures


def draw(figures: Sequence[Figure], plots: Path) -> None:
    """A plot for each table; at the end, since the library that draws weighs on what is measured after it."""
    for name in dict.fromkeys(figure.table for figure in figures):
        title = import_module(f"tests.benchmarks.{name}").TITLE
        plot(plots / f"{name}.svg", title, [figure for figure in figures if figure.table == name])


def judge(figures: Sequence[Figure], failed: Sequence[str]) -> bool:
    """Print how many bounds are reached, and which are not; whether all are."""
    judged = [figure for figure in figures if figure.reached is not None]
    missed = [f"{figure.table}: {figure.row}" for figure in judged if not figure.reached]
    print(f"\n{len(judged) - len(missed)} of {len(judged)} bounds reached")
    for row in missed:
        print(f"  missed: {row}")
    for figure in figures:
        if math.isnan(figure.value):
            print(f"  not measured: {figure.table}: {figure.row}: {figure.note}")
    for name in failed:
        print(f"  failed: {name}: see above")
    return not missed


def main(words: Sequence[str] | None = None) -> int:
    """Measure what was asked for."""
    arguments = arguments_of(words)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    scale = Scale(rounds, QUICK if arguments.quick else 1.0)
    where, before = setting(scale), None
    print(f"Python {where['python']}, {where['processors']} processors, load {where['load']:.1f}; rounds: {rounds}")
    if arguments.compare is not None:
        then, before = read_json(arguments.compare)
        print(f"compared with {then['at']}, {then['commit']}, {then['rounds']} rounds, load {then['load']:.1f}")
        if then["factor"] != scale.factor:
            print(f"the sizes are not the same: {scale.factor:g} here, {then['factor']:g} there")
    figures, failed = list[Figure](), list[str]()
    for name in arguments.tables or TABLES:
        try:
            figures += measure(name, scale, before)
        except Exception:  # hours may go by: the other tables are worth having
            traceback.print_exc()
            failed.append(name)
        if arguments.json is not None:
            write_json(arguments.json, where, figures)
    if arguments.plots is not None:
        draw(figures, arguments.plots)
    are_reached = judge(figures, failed)
    for table, row in gone(figures, before or {}):
        print(f"  gone since: {table}: {row}")
    return 1 if failed or not (are_reached or arguments.quick) else 0


if __name__ == "__main__":
    logging.getLogger("async_recovery").setLevel(logging.CRITICAL)
    sys.exit(main())
