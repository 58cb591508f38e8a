"""`verify` for a run in a database: what is remembered, the records, the input. Touches nothing, also while it runs."""

from __future__ import annotations

from .checkpoint import Checkpoint, Job
from .contracts import Source
from .database import NOTHING_WRITTEN, Snapshot, is_whole, written_of
from .errors import CheckpointUnusable, UsageError
from .file_ledger import differences, retry_of
from .ledgers import NoSuchRun, is_address, look_at, public
from .verify import WITH_KEEPING, Report, check_items, locate, source_of, verify


async def verify_left(path: str, checkpoint: str | None, *, input: str | None = None) -> Report:
    """Compare all that the job left whose output is `path`: a run in a database, or files."""
    if not is_address(path):
        return await verify(locate(path, checkpoint), input=input)
    if checkpoint is not None:
        raise UsageError(f"--checkpoint with {public(path)}: its progress lies in the database; leave it out")
    return await verify_database(path, input=input)


async def verify_database(
    address: str, *, input: str | None = None, source: Source | None = None, job: Job | None = None
) -> Report:
    """Compare what a run has left in a database with itself and with its input; see `verify`.

    :param address: of the database, with the name of the run.
    :raises UsageError: if there is no such run and no `job` to be run, or it can not be read.
    """

    shown = public(address)

    async def look(snapshot: Snapshot) -> tuple[Report, Checkpoint]:
        report = Report(checkpoint=shown, output=shown)
        report.facts, report.problems = [], []
        return report, await _look(report, snapshot, job)

    try:
        report, found = await look_at(address, look, whole=True)
    except NoSuchRun:
        if job is None:
            raise
        report, found = Report(checkpoint=shown, output=shown), Checkpoint()
        report.facts, report.problems = [], []
    except CheckpointUnusable as error:
        report, found = Report(checkpoint=shown, output=shown, state="damaged"), Checkpoint()
        report.facts, report.problems = [], []
        report.wrong("checkpoint", str(error))
    left = found.complete or found.state
    if found.is_over and source is not None:
        left = None  # the run to be starts anew, and compares nothing
    if left is not None:
        given = source is not None
        await check_items(report, found, left, source or source_of(left.job.source, input or left.input), given=given)
    elif source is not None:
        await source.check(None, whole=False)
    return report


async def _look(report: Report, snapshot: Snapshot, job: Job | None) -> Checkpoint:
    left = snapshot.left
    state, complete = left.state, left.complete if left.line is None else None
    found = complete or state
    if found is None:
        report.state = "damaged"
        report.next = "puts the run aside under another name and starts anew (--on-damage refuse: exit code 4)"
        report.wrong("checkpoint", "what is remembered of the run can not be read", stops=False)
        return Checkpoint()
    report.input = found.input
    ahead = left.whole_ahead
    if complete is not None:
        report.state, report.next = "complete", "starts anew"
        if left.kept:
            report.next = f"{WITH_KEEPING} compares the input and runs nothing, without it starts anew"
        report.right("checkpoint", "the job is complete")
    elif state is not None:
        report.state = "interrupted"
        report.next = f"resumes at index {state.mark}, passing over {len(ahead)} items finished ahead of it"
        report.right("checkpoint", f"the mark is {state.mark}, {len(ahead)} items are finished ahead of it")
    if snapshot.holder is not None:
        report.state, holder = "running", snapshot.holder
        report.next = f"is refused while process {holder.pid} on {holder.host} runs the job (exit code 75)"
    if len(ahead) < len(left.ahead):
        text = f"damaged rows: {len(left.ahead) - len(ahead)}; the items that they remembered are done again"
        report.wrong("checkpoint", text, stops=False)
    if job is not None and found.job != job and (complete is None or left.kept):
        report.wrong("checkpoint", f"it is that of another job: it has {differences(found.job, job)}")
    checkpoint = Checkpoint(state, ahead) if complete is None else Checkpoint(complete=complete, kept=left.kept)
    if job is None or not checkpoint.is_over:
        await _look_at_records(report, snapshot, checkpoint)
    if retry_of(snapshot.run) in snapshot.runs:
        text = "its failed items are being run again, and that is not finished: `async-recovery retry-failed` goes on"
        report.wrong("retry", f"{text} with it, --fresh drops it")
    return checkpoint


async def _look_at_records(report: Report, snapshot: Snapshot, found: Checkpoint) -> None:
    state, complete = found.state, found.complete
    if complete is not None:
        records, written = complete.summary["total_items"], written_of(complete)
    elif state is not None:
        records, written = state.mark, state.output or NOTHING_WRITTEN
        there = (snapshot.left.records, snapshot.left.last)
        if there != (records, records - 1):
            report.wrong("output", f"it has {there[0]} records, {records} were written")
            return
    else:
        return

    async def joined(first: int, end: int) -> bytes:
        return await snapshot.joined(first, end, complete=complete is not None)

    report.records = records
    if await is_whole(joined, records, written):
        report.right("output", f"{records} records, as they were written")
    else:
        text = f"the first {records} records are not those that were written"
        report.wrong("output", text, stops=not found.is_over)
