"""A resume over an output of 10 GB: how soon its first item begins, and what a flipped byte does.

::

    .venv/bin/python -m tests.benchmarks.big_output [GIGABYTES] [FOLDER]

Ends with an error unless the first item begins within 2 s while the output is still being compared, a byte flipped in
the middle is found before the output is published, and one flipped in the last megabyte before the first item.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.support.commands import Folder, end_of, kill, read_committed, wait_until

WORKER = """
import asyncio, os, random
LOG = os.open("ran.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
NOISE = random.Random(1).randbytes(1 << 20).hex()

async def work(item):
    os.write(LOG, (item + "\\n").encode())
    while item == "last" and not os.path.exists("go"):
        await asyncio.sleep(0.001)
    start = hash(item) % 1000
    return {"text": NOISE[start : start + 1_000_000]}
"""
WORDS = ["run", "--input", "items.txt", "--output", "out.jsonl", "--worker", "jobs:work", "--concurrency", "64"]
FIRST_ITEM_S = 2.0
FOUND = "are not those that were written"


def begun(folder: Folder) -> int:
    """How often the last item has begun."""
    return (folder / "ran.log").read_text().split().count("last")


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def first_item_s(folder: Folder, *, then: str) -> tuple[float, str, int]:
    """Seconds from the start of the process until its first item begins; what it said; and how it ended."""
    before, began = begun(folder), time.monotonic()
    process = folder.start(*WORDS, env={"PYTHONHASHSEED": "0"})
    wait_until(lambda: begun(folder) > before, process)
    seconds = time.monotonic() - began
    if then == "kill":
        ended = kill(process)
    else:
        folder.write("go", "")
        ended = end_of(process, within_s=600)
    return seconds, ended.err, ended.code


def measure(folder: Folder, gigabytes: float) -> None:
    items, partial = int(gigabytes * 1000), folder / "out.jsonl.partial"
    folder.write("jobs.py", WORKER)
    folder.write("items.txt", "".join(f"{number}\n" for number in range(items)) + "last\n")
    began = time.monotonic()
    process = folder.start(*WORDS, env={"PYTHONHASHSEED": "0"})
    wait_until(lambda: read_committed(folder / "out.jsonl.checkpoint").mark == items, process, within_s=1800)
    kill(process)
    size = partial.stat().st_size
    print(f"{size / 1e9:.1f} GB written in {time.monotonic() - began:.0f} s")

    seconds, _, _ = first_item_s(folder, then="kill")
    print(f"first item of a resume after {seconds:.2f} s (process start included)")
    assert seconds < FIRST_ITEM_S

    flip(partial, size // 2)
    began = time.monotonic()
    seconds, said, code = first_item_s(folder, then="go on")
    assert (code, FOUND in said) == (4, True), said
    assert not (folder / "out.jsonl").exists()
    compared_s = time.monotonic() - began
    print(
        f"byte flipped in the middle: first item after {seconds:.2f} s, refused after {compared_s:.1f} s: {said[-160:]}"
    )
    assert seconds < FIRST_ITEM_S < compared_s, "the first item began while the output was compared"
    flip(partial, size // 2)
    (folder / "go").unlink()

    flip(partial, size - 1000)
    before = begun(folder)
    refused = folder.run(*WORDS, env={"PYTHONHASHSEED": "0"})
    assert (refused.code, FOUND in refused.err, begun(folder)) == (4, True, before), refused.err
    print(f"byte flipped in the last megabyte: refused before the first item: {refused.err[-160:]}")
    flip(partial, size - 1000)

    began = time.monotonic()
    ended = end_of(folder.start(*WORDS), within_s=600)
    assert ended.code == 0, ended.err
    print(f"mended: complete after {time.monotonic() - began:.1f} s")
    assert (folder / "out.jsonl").stat().st_size > size


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    where = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else None))
    try:
        with Folder(where) as folder:
            measure(folder, gigabytes)
    finally:
        shutil.rmtree(where)


if __name__ == "__main__":
    main()
