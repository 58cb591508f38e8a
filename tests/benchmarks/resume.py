"""How soon a job that is done for nine tenths goes on: from the start of the process to the first call of the worker.

The job was really run that far, and stopped by a signal as anybody would stop it. Each measurement ends the process at
the first call of its worker, before it has committed anything: the next one finds the same state.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.rounds import interleave, middle, ratio
from tests.support.commands import Folder, end_of, read_committed

TITLE = "A job of 10,000,000 lines at 90 %: from process start to the first call of the worker, over a fresh start"
ITEMS, BOUND = 10_000_000, 1.3
IN_A_ROUND = 10
WORKER = """
import asyncio, json, os, signal, time

IS_STOPPING = False
FIRST_CALL, STOP_AT = os.environ.get("FIRST_CALL"), os.environ.get("STOP_AT")

async def work(item):
    global IS_STOPPING
    if FIRST_CALL:
        note = json.dumps([time.monotonic(), time.process_time(), item])
        with open(FIRST_CALL, "w") as file:
            file.write(note)
        os._exit(9)
    if item == STOP_AT:
        os.kill(os.getpid(), signal.SIGTERM)
        IS_STOPPING = True
    if IS_STOPPING:
        await asyncio.sleep(0.1)
    return {"text": item}
"""


class Took(NamedTuple):
    """From the start of the process to the first call: seconds by the clock, and of the processor."""

    seconds: float
    cpu_s: float


def words_of(output: str) -> list[str]:
    """The command."""
    files = ["--input", "items.txt", "--output", output]
    return ["run", *files, "--worker", "jobs:work", "--concurrency", "64", "--progress", "never", "--quiet"]


def interrupt(folder: Folder, items: int) -> int:
    """Run the job to nine tenths; the mark that it was stopped at."""
    folder.write("jobs.py", WORKER)
    with (folder / "items.txt").open("w") as lines:
        for start in range(0, items, 1000):
            lines.writelines(f"https://example.org/page/{item}\n" for item in range(start, min(start + 1000, items)))
    stop_at = f"https://example.org/page/{items * 9 // 10}"
    ended = end_of(folder.start(*words_of("old.jsonl"), env={"STOP_AT": stop_at}), within_s=3600)
    assert ended.code == 143, ended.err
    mark = read_committed(folder / "old.jsonl.checkpoint").mark
    assert abs(mark - items * 9 // 10) <= max(100, items // 100), mark
    return mark


def first_call(folder: Folder, output: str, is_right: Callable[[int], bool], round_number: int) -> Took:
    """Start it and wait for its first call.

    :param is_right: whether the item of that call is one that may come first.
    """
    note = folder / "first_call.json"
    start = time.monotonic()
    process = folder.start(*words_of(output), env={"FIRST_CALL": note.name, "PYTHONDONTWRITEBYTECODE": ""})
    assert end_of(process).code == 9
    called, cpu_s, item = json.loads(note.read_text())
    assert is_right(int(item.rsplit("/", 1)[1])), item
    note.unlink()
    return Took(called - start, cpu_s)


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """Resumed and fresh starts in turns, over the same input."""
    items = scale.of(ITEMS)
    with Folder(folder) as here:
        mark = interrupt(here, items)
        done = read_committed(here / "old.jsonl.checkpoint")

        def resumed(item: int) -> bool:
            return item >= mark and not done.has(item)

        rows: dict[str, Callable[[int], Took]] = {
            "resumed": partial(first_call, here, "old.jsonl", resumed),
            "fresh": lambda number: first_call(here, f"new-{number}.jsonl", lambda item: item < 64, number),
        }
        costs = interleave(1 + scale.rounds * IN_A_ROUND, rows)
    figures = []
    for unit in Took._fields:
        old, new = ([getattr(cost, unit) for cost in costs[name][1:]] for name in ("resumed", "fresh"))
        found, row = ratio(old, new), "by the clock" if unit == "seconds" else "time of the processor"
        note = f"{middle(old).value * 1e3:.0f} over {middle(new).value * 1e3:.0f} ms; {items:,} lines; {found.spread}"
        figures.append(Figure("resume", row, found.value, BOUND, at_least=False, note=note))
    return figures
