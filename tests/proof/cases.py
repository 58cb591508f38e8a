"""The jobs of the crash model: each is small, and each goes another way through the durable path."""

from __future__ import annotations

from .crash_model import MemoryFiles, World, settled
from .explorer import NOTHING, OUT, Case, Life, in_memory

FEW = [[0, 1, 4], [6], [2, 7], [3, 5]]
MANY = [[0, 9], [1], [2, 8], [3], [4], [5], [6], [7]]


def left_after(case: Case, generation: int) -> World:
    """What an old job left: the old script, stopped in peace after the commit of `generation`."""
    from async_recovery.checkpoint import Job
    from async_recovery.file_ledger import FileLedger

    from .explorer import now

    files = MemoryFiles(settled({}), "ext4")
    script = case.scripts()[0]
    with in_memory(case):
        ledger = FileLedger(case.output, case.checkpoint, files=files)
        now(ledger.open(Job("t", "w", None, ledger.form)))
        for step in script.steps[: generation + 1]:
            now(ledger.commit(step.commit))
    files.fsync_directory("/")
    return settled({path: files.world.read(path) or b"" for path in files.world.names})


def kept_by_old(case: Case) -> World:
    """What a finished old job left that keeps its checkpoint, in the same place."""
    keeping = Case(case.name, [[0, 1]], output=case.output, checkpoint=case.checkpoint, keep=True)
    old = case.scripts()[0]
    files = MemoryFiles(settled({}), "ext4")
    with in_memory(keeping):
        Life(keeping, [old, old], files, NOTHING).live(first=True)
    files.fsync_directory("/")
    return settled({path: files.world.read(path) or b"" for path in files.world.names})


GARBAGE = {f"{OUT}.checkpoint": b"no line of this\ncan be read\n", f"{OUT}.partial": b'{"index":0}\n{"ind'}
ELSEWHERE = "/tmp/async-recovery-model.checkpoint"
GARBAGE_ELSEWHERE = {ELSEWHERE: b"no line of this\ncan be read\n", f"{OUT}.partial": b'{"index":0}\n{"ind'}

CASES = [
    Case("fresh-start", FEW),
    Case("array", FEW, output="/async-recovery-model.json"),
    Case("empty", []),
    Case("keep", FEW[:2], keep=True),
    Case("elsewhere", FEW, checkpoint=ELSEWHERE),
    Case("no-output", FEW, output=None, checkpoint=ELSEWHERE),
    Case("compaction", MANY, compacts=True),
    Case("compaction-elsewhere", MANY, compacts=True, checkpoint=ELSEWHERE),
    Case("fresh-over-old", FEW[:2], fresh=True, old=FEW, start=lambda case: left_after(case, 3)),
    Case(
        "fresh-over-lone-partial",
        FEW[:1],
        fresh=True,
        fresh_again=True,
        start=lambda case: settled({f"{OUT}.partial": b"left behind\n"}),
    ),
    Case("over-kept", FEW[:2], old=[[0, 1]], start=kept_by_old),
    Case("damaged", FEW[:2], start=lambda case: settled(GARBAGE), old_bytes=GARBAGE),
    Case(
        "damaged-elsewhere",
        FEW[:1],
        checkpoint=ELSEWHERE,
        start=lambda case: settled(GARBAGE_ELSEWHERE),
        old_bytes=GARBAGE_ELSEWHERE,
    ),
    Case("other-order", [[0], [1, 2, 3]], otherwise=[[0], [2], [1, 3]]),
    Case("in-lines", [[1], [0]], in_lines=True),
    Case("abandoned", FEW[:1], abandoned=True),
]


def case_named(name: str) -> Case:
    """The case of that name: what other processes are told."""
    return next(case for case in CASES if case.name == name)
