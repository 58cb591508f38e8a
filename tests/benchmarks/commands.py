"""Commands under GNU parallel and under ``--exec``, side by side.

    python -m tests.benchmarks.commands [--items 2000] [--concurrency 50] [--rounds 5]

1. Speed: the same ``true ITEM`` for each item of a file, under ``parallel --joblog --resume`` (Debian's package
   `parallel`) and under ``async-recovery run --exec``, in turns.
2. Kill -9 in the middle, once half of the commands have run, and the same line again: both have to come to their ends.
   Ours has to have every item in its output, in order, and what was committed must not run again.

The exit code is 1 if ours is slower, or something is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

Words = list[str]
OURS, PARALLEL = "async-recovery", "parallel"


def lines_of(folder: Path, concurrency: int, program: str) -> dict[str, Words]:
    """The two command lines that run `program` with each item as its argument."""
    parallel = [PARALLEL, "--will-cite", "-j", str(concurrency), "--joblog", "joblog", "--resume", program, "{}"]
    ours = [sys.executable, "-m", "async_recovery", "run", "--input", "items.txt", "--output", "out.jsonl"]
    return {
        PARALLEL: [*parallel, "::::", "items.txt"],
        OURS: [*ours, "--exec", f"{program} {{}}", "--concurrency", str(concurrency)],
    }


def run(words: Words, folder: Path) -> float:
    """Run it to its end; the seconds that it took."""
    start = time.perf_counter()
    subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def write_items(folder: Path, count: int, round_number: int) -> None:
    """Items that are new in each round; nothing is left of the round before."""
    for name in ("joblog", "out.jsonl", "ran"):
        (folder / name).unlink(missing_ok=True)
    (folder / "items.txt").write_text("".join(f"{round_number}-{number}\n" for number in range(count)))


def compare(folder: Path, items: int, concurrency: int, rounds: int) -> bool:
    """Print what an item costs under both; whether ours is at least as fast."""
    took: dict[str, list[float]] = {PARALLEL: [], OURS: []}
    for number in range(rounds):
        for name, words in sorted(lines_of(folder, concurrency, "true").items(), reverse=number % 2 == 1):
            write_items(folder, items, number)
            took[name].append(run(words, folder))
    ratios = [theirs / ours for theirs, ours in zip(took[PARALLEL], took[OURS], strict=True)]
    print(f"{items} commands `true ITEM`, {concurrency} at once, median of {rounds} rounds")
    for name, seconds in took.items():
        median = statistics.median(seconds)
        print(f"{name:15} {median:7.2f} s {median / items * 1e6:8.0f} µs a command {items / median:8.0f} a second")
    print(f"ours is {statistics.median(ratios):.1f} times as fast; each round: {' '.join(f'{r:.1f}' for r in ratios)}")
    return statistics.median(ratios) >= 1


def killed_in_the_middle(folder: Path, items: int, concurrency: int) -> bool:
    """Print what comes of a kill -9 of each; whether nothing is lost."""
    program = folder / "ran.sh"
    program.write_text('#!/bin/sh\necho "$1" >> ran\n')
    program.chmod(0o755)
    is_whole = True
    for name, words in lines_of(folder, concurrency, str(program)).items():
        write_items(folder, items, 0)
        process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and ran_in(folder).total() < items // 2:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        was_killed = process.wait() == -signal.SIGKILL
        before = ran_in(folder).total()
        run(words, folder)
        ran = ran_in(folder)
        lost = items - len(ran)
        print(
            f"{name:15} killed after {before} commands; then complete: {lost} lost, {ran.total() - len(ran)} run twice"
        )
        is_whole &= was_killed and (lost == 0 or name == PARALLEL)
    records = [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    is_ordered = [record["index"] for record in records] == list(range(items))
    print(f"{OURS:15} output: {len(records)} records, {'in order' if is_ordered else 'NOT whole and in order'}")
    return is_whole and is_ordered


def ran_in(folder: Path) -> Counter[str]:
    """How often each command has run."""
    ran = folder / "ran"
    return Counter(ran.read_text().split()) if ran.exists() else Counter()


def main() -> int:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if shutil.which(PARALLEL) is None:
        print("there is no parallel here: apt-get install parallel", file=sys.stderr)
        return 2
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory() as name:
        is_fast = compare(Path(name), arguments.items, arguments.concurrency, arguments.rounds)
        is_whole = killed_in_the_middle(Path(name), arguments.items, arguments.concurrency)
    return 0 if is_fast and is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
