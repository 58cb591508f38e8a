"""Layer 9: whatever is damaged in a journal or an output, a start refuses it by name, or falls back as documented.

Never anything else: no other exception, no wrong output, nothing lost that a whole line of the journal holds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import anyio
import msgspec
import pytest

from async_recovery import checkpoint, file_ledger
from async_recovery.checkpoint import Replay, decode_line
from async_recovery.errors import InputChanged, Mismatch
from async_recovery.file_ledger import FileLedger
from async_recovery.output_file import OutputFile
from async_recovery.verify import locate, verify
from tests.support.file_jobs import Worker, committed, records, snapshot
from tests.test_changes import FORMATS, NAMES, interrupt, resume, small_pages

from . import report
from .damage import HEAD_BYTES, SCENES, Inspector, Tally, damages, inspected, require
from .mutants import Patch, instead, nothing, offset_of_stat, together
from .parallel import in_processes

CI_DAMAGES = 35_000
OUTCOMES = {"resumed", "refused", "moved aside", "found by the audit"}


def check_damages(shares: int, *, every_value: bool) -> None:
    """All scenes, each in so many shares."""
    work = [(name, share, shares) for name in sorted(SCENES) for share in range(shares)]
    total = sum(in_processes(functools.partial(inspected, every_value), work), Tally())
    print(dict(total.outcomes))
    report.add(9, "damages", total.outcomes.total(), violations=len(total.wrong))
    assert total.wrong == []
    assert total.outcomes.total() >= CI_DAMAGES
    assert total.outcomes.keys() == OUTCOMES


def test_no_damage_is_wrong() -> None:
    """Bytes changed, cuts, growth, lines out of order: refused with nothing changed, or ended with the right output."""
    check_damages(1, every_value=False)


@pytest.mark.slow
def test_no_byte_is_wrong_whatever_it_is_changed_to() -> None:
    """The same with every byte changed to every other value."""
    check_damages(4, every_value=True)


# Real files, the real engine and source


@contextlib.contextmanager
def left_on_disk(pages: str, output: str, batch_size: int | None) -> Iterator[tuple[Path, str]]:
    """A folder in memory with an interrupted job, and the name of its input in it."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        folder = Path(name) / "left"
        folder.mkdir()
        text = folder / "in.txt"
        text.write_bytes(FORMATS[pages].bytes(NAMES))
        interrupt(text, folder, output=output, batch_size=batch_size)
        yield folder, output


def finished(output: str) -> bytes:
    """The output of an undisturbed run."""
    lines = [msgspec.json.encode(record) for record in records(NAMES)]
    return b"[\n" + b",\n".join(lines) + b"\n]\n" if output.endswith(".json") else b"\n".join(lines) + b"\n"


def wounded(data: bytes, dice: random.Random) -> bytes:
    """`data` after one to three damages of any kind."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        at, length = dice.randrange(len(data) + 1), dice.choice((1, 1, 8, 100, 512))
        noise = dice.choice((bytes(length), dice.randbytes(length), b"\n" * length, data[at - length : at]))
        data = data[:at] + dice.choice((noise, b"")) + data[dice.choice((at, at + length, at + length, len(data))) :]
    return data


def outcome_on_disk(folder: Path, output: str) -> str:
    """What comes of a run of the job that lies there, and whether `verify` foretold it.

    :raises AssertionError: if anything is not as it must be.
    """
    journal, before = folder / f"{output}.checkpoint", snapshot(folder)
    done, worker = committed(journal), Worker()
    foretold = anyio.run(partial(verify, locate(str(folder / output))))
    assert snapshot(folder) == before, "verify has changed something"
    try:
        summary = resume(worker, folder / "in.txt", folder, output=output)
    except Mismatch as error:
        require(error.exit_code == 4 and not worker.calls, "refused late, or with another exit code")
        require(snapshot(folder) == before, "refused, and something has changed")
        require(foretold.next.startswith("is refused"), f"refused, but foretold was: {foretold.next}")
        return "refused"
    assert not foretold.next.startswith("is refused"), foretold.next
    assert (folder / output).read_bytes() == finished(output), "the output is wrong"
    assert not {NAMES[index] for index in done} & set(worker.calls), "what was committed ran again"
    assert summary.executed == len(worker.calls) == len(NAMES) - len(done)
    after = snapshot(folder)
    if f"{output}.checkpoint.damaged-1" not in after:
        assert after.keys() == {"in.txt", output}
        return "resumed"
    aside = {name: after.get(f"{name}.damaged-1") for name in (journal.name, f"{output}.partial")}
    assert all(aside[name] == before.get(name) for name in aside), "old bytes are gone"
    return "moved aside"


JOBS = [("text", "out.jsonl", None), ("text, tiny pages", "out.json", 1), ("text, tiny pages", "out.jsonl", 2)]


WOUNDED = ([".checkpoint"], [".checkpoint"], [".partial"], [".checkpoint", ".partial"])


def wounded_on_disk(count: int, seed: str) -> Tally:
    """So many wounds, of journals and outputs by turns."""
    logging.disable(logging.CRITICAL)
    total, dice = Tally(), random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        small_pages(patch)
        for number, job in enumerate(JOBS):
            with left_on_disk(*job) as (folder, output):
                for wound in range(number, count, len(JOBS)):
                    work = folder.parent / "work"
                    shutil.copytree(folder, work)
                    for name in dice.choice(
                        ([".checkpoint"], [".checkpoint"], [".partial"], [".checkpoint", ".partial"])
                    ):
                        damaged = work / f"{output}{name}"
                        damaged.write_bytes(wounded(damaged.read_bytes(), dice))
                    try:
                        total.outcomes[outcome_on_disk(work, output)] += 1
                    except Exception as error:
                        total.outcomes["wrong"] += 1
                        total.wrong.append(f"seed {seed!r}, wound {wound}: {type(error).__name__}: {error}")
                    shutil.rmtree(work)
    return total


def check_wounds(count: int) -> None:
    """Half of them on each of two cores; `WOUND_SEED` in the environment repeats them."""
    seed = os.environ.get("WOUND_SEED", "layer 9")
    total = sum(in_processes(partial(wounded_on_disk, count // 2), [f"{seed} a", f"{seed} b"]), Tally())
    print(dict(total.outcomes))
    report.add(9, "damages on disk", total.outcomes.total(), violations=len(total.wrong))
    assert total.wrong == []
    assert total.outcomes.keys() == {"resumed", "refused", "moved aside"}


def test_no_wound_of_a_real_job_is_wrong() -> None:
    """Through the whole engine: refused, as `verify` foretells, or right, and nothing that is committed runs again."""
    check_wounds(400)


@pytest.mark.slow
def test_no_wound_of_many_is_wrong() -> None:
    """The same for ten thousand."""
    check_wounds(10_000)


def forged(line: bytes, place: str, change: Callable[[Any], Any]) -> bytes:
    """The line with one value changed, and its checksum right again."""
    said = msgspec.json.decode(b"{" + line[HEAD_BYTES:])
    *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
    inner = functools.reduce(lambda value, step: value[step], way, said)
    inner[last] = change(inner[last])
    body = msgspec.json.encode(said)[1:]
    return b'{"crc":"%08x",' % crc32(body) + body


NUMBERS: list[Callable[[int], int]] = [lambda n: n + 1, lambda n: n + 3, lambda n: n ^ 0x4000, lambda n: n - 1]
FORGERIES: dict[str, list[Callable[[Any], Any]]] = {
    "job.source": [lambda text: "jsonl"],
    "job.worker": [lambda text: text + "2"],
    "job.version": [lambda text: "2"],
    "job.output": [lambda text: "json"],
    "format": NUMBERS[:3],
    "mark": NUMBERS[:3],
    "source.first_index": [NUMBERS[0], NUMBERS[1], NUMBERS[3]],
    **dict.fromkeys(("source.items_crc", "source.position.offset", "source.position.crc"), NUMBERS),
    **dict.fromkeys((f"source.position.{end}.{n}" for end in ("head", "tail") for n in (0, 1)), NUMBERS),
    **dict.fromkeys(("output.offset", "output.crc"), NUMBERS),
    **dict.fromkeys(("output.tail.0", "output.tail.1"), NUMBERS[:3]),
}


def test_what_a_line_says_of_job_input_and_output_is_compared_with_them() -> None:
    """A state line whose checksum is right, but not what it says: refused before the first item, nothing changed."""
    refused = 0
    with pytest.MonkeyPatch.context() as patch:
        small_pages(patch)
        with left_on_disk("text, tiny pages", "out.jsonl", None) as (folder, output):
            journal = folder / f"{output}.checkpoint"
            *lines, state, _ = journal.read_bytes().split(b"\n")
            for place, changes in FORGERIES.items():
                for change in changes:
                    journal.write_bytes(b"\n".join([*lines, forged(state, place, change), b""]))
                    before, worker = snapshot(folder), Worker()
                    with pytest.raises(Mismatch):
                        resume(worker, folder / "in.txt", folder)
                    assert (worker.calls, snapshot(folder)) == ([], before), place
                    refused += 1
    report.add(9, "forged lines", refused)


def test_what_an_ahead_line_says_of_an_item_is_compared_with_it() -> None:
    """An ahead line whose item CRC is another: refused when that item comes by, and nothing is published."""
    refused = 0
    for number, change in enumerate(NUMBERS * 5):
        with left_on_disk("text", "out.jsonl", None) as (folder, output):
            journal = folder / f"{output}.checkpoint"
            *lines, ahead, state, _ = journal.read_bytes().split(b"\n")
            journal.write_bytes(b"\n".join([*lines, forged(ahead, f"items.{number // 4}.1", change), state, b""]))
            before = (folder / f"{output}.partial").read_bytes()
            with pytest.raises(InputChanged):
                resume(Worker(), folder / "in.txt", folder)
            assert (folder / f"{output}.partial").read_bytes().startswith(before)
            assert not (folder / output).exists()
            refused += 1
    report.add(9, "forged lines", refused)


# Controls


def without_checksum(line: bytes) -> Any:
    """Believes what it can read."""
    body = line[HEAD_BYTES:]
    return decode_line(b'{"crc":"%08x",' % crc32(body) + body)


def not_encoded_again(line: bytes) -> Any:
    """Believes whatever has a checksum."""
    body = line[HEAD_BYTES:]
    if line[:HEAD_BYTES] != b'{"crc":"%08x",' % crc32(body):
        return None
    try:
        return checkpoint._decode_line(b"{" + body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def line_without_end(self: Replay, data: bytes) -> None:
    """Believes a last line that lacks its line end."""
    self._rest += data
    *lines, rest = bytes(self._rest).split(b"\n")
    self._rest = bytearray(rest)
    for line in lines:
        self._offset += len(line) + 1
        self._line(line)
    if decode_line(rest) is not None:
        self._offset += len(rest)
        self._line(rest)


def uncompared(resume: Callable[..., None]) -> Callable[..., None]:
    """Compares an empty tail."""

    def resume_at_once(self: OutputFile, state: checkpoint.OutputState) -> None:
        resume(self, msgspec.structs.replace(state, tail=(state.offset, state.crc)))

    return resume_at_once


async def no_audit(self: FileLedger) -> None:
    """Finds nothing."""


def always_right(self: OutputFile, start: int, end: int, crc: int) -> int:
    """The CRC that is expected, whatever lies there."""
    return self._crc.value


def always(*_: Any) -> bool:
    """The comparison has nothing to say."""
    return True


def removed(files: Any, path: str) -> None:
    """In the place of `move_aside`."""
    files.unlink(path)


class Mutant(NamedTuple):
    """A defect, the scene that shows it, and by which of its damages."""

    name: str
    scene: str
    by: str
    patch: Patch


MUTANTS = [
    Mutant("no checksum of a line", "small", "journal/flip", instead(checkpoint, "decode_line", without_checksum)),
    Mutant(
        "a line is not encoded again",
        "small",
        "journal/respell",
        instead(checkpoint, "decode_line", not_encoded_again),
    ),
    Mutant("a line without its end counts", "ahead", "journal/cut", instead(Replay, "feed", line_without_end)),
    Mutant("bytes beyond the offset adopted", "torn", "output/grown", instead(OutputFile, "cut", offset_of_stat)),
    Mutant("bytes beyond the offset left there", "torn", "output/grown", instead(OutputFile, "cut", nothing)),
    Mutant("no CRC of the tail", "small", "output/flip", instead(OutputFile, "resume", uncompared(OutputFile.resume))),
    Mutant("no audit of the prefix", "long-output", "output/flip", instead(FileLedger, "audit", no_audit)),
    Mutant(
        "no CRC of the prefix at all",
        "long-output",
        "output/flip",
        together(instead(FileLedger, "audit", no_audit), instead(OutputFile, "crc_of", always_right)),
    ),
    Mutant(
        "no CRC of a complete output", "complete", "output/flip", instead(OutputFile, "_is_complete", lambda *_: True)
    ),
    Mutant("a damaged journal is removed", "small", "journal/cut", instead(file_ledger, "move_aside", removed)),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant: Mutant) -> None:
    """A loader that does not look at one of the things that it has to look at is wrong for some damage."""
    scene = SCENES[mutant.scene]
    assert scene.files[scene.case.journal], "what lies there was written without the mutant"
    chosen = (damage for damage in damages(scene, every_value=False) if damage.words.startswith(mutant.by))
    with mutant.patch():
        wrong = next(Inspector(mutant.scene).wrongs(chosen, Counter()), None)
    report.control(9, caught=wrong is not None)
    assert wrong is not None
    print(wrong[:200])
