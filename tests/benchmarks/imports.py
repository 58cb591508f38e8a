"""What ``import async_recovery`` costs beside its libraries alone, in processes of their own.

The processor's time of the import statement, without the start of the interpreter. The package imports its parts at
their first use: so there is a row that uses them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.rounds import interleave, middle, ratio

TITLE = "Importing the package over importing anyio, aiofiles and msgspec alone (time of the processor)"
BOUND = 1.3
IN_A_ROUND = 10
ALONE = "import anyio, aiofiles, msgspec"
OURS = ("import async_recovery", "from async_recovery import run_resumable")
MEASURE = """
import sys, time
start = time.process_time()
{statement}
print(time.process_time() - start)
assert {part!r} in sys.modules
"""


def cpu_s(statement: str, round_number: int) -> float:
    """Seconds of the processor that a fresh interpreter takes for the statement."""
    part = "async_recovery.engine" if statement == OURS[1] else statement.split()[1].strip(",")
    script = MEASURE.format(statement=statement, part=part)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # what is imported was compiled before
    ended = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return float(ended.stdout)


def measure(scale: Scale, folder: Path) -> list[Figure]:
    """Interleaved, in many processes: a single one says little."""
    rows = {statement: partial(cpu_s, statement) for statement in (ALONE, *OURS)}
    costs = interleave(1 + scale.rounds * IN_A_ROUND, rows)  # the first one writes the bytecode
    costs = {name: values[1:] for name, values in costs.items()}
    alone_s = middle(costs[ALONE]).value
    figures = []
    for name in OURS:
        found, our_s = ratio(costs[name], costs[ALONE]), middle(costs[name]).value
        note = f"{our_s * 1e3:.1f} over {alone_s * 1e3:.1f} ms; {found.spread}"
        figures.append(Figure("imports", name, found.value, BOUND, at_least=False, note=note))
    return figures
