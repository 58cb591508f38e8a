"""The command line on a terminal: real processes, and the screen that a person would see."""

from __future__ import annotations

import json
import os
import re

import pytest

from tests.support.commands import COMMAND, Folder, end_of, read_committed, wait_until
from tests.support.terminals import Terminal

JOB = ("run", "--input", "items.txt", "--output", "out.jsonl", "--concurrency", "2", "--checkpoint-interval", "0.01")
HELD = (*JOB, "--worker", "jobs:held_at_3")
HELD_FROM = (*JOB, "--worker", "jobs:held_from_3", "--drain-timeout", "600")
AT_THE_ITEM = "mark 3, 6 ahead of it"

IMPATIENT = """
from async_recovery import readout
from jobs import held_at_3

readout.STILL_S = 2.0
"""

TALKING = """
import asyncio, logging, os, sys

async def work(item):
    if item == "3":
        print("printed by the worker")
        print("and to standard error", file=sys.stderr)
        sys.stdout.write("no end of line")
        logging.getLogger("theirs").warning("w" * 100)
        logging.getLogger("theirs").info("of no interest")
    while item == "5" and not os.path.exists("go"):
        await asyncio.sleep(0.005)
    return {"number": int(item)}
"""


def test_progress_is_drawn_and_is_gone_in_the_end(folder: Folder) -> None:
    """While it runs: percent, counts, the mark and what is ahead; after its end, the summary and nothing else."""
    with Terminal(folder, *HELD) as terminal:
        shown = terminal.wait_until(lambda shown: AT_THE_ITEM in shown)
        bar, counts = shown.splitlines()
        assert re.fullmatch(r" 90\.0 % ━+─+( \d+ s left)?", bar), shown
        assert re.fullmatch(r"9 finished, [\d.,]+ a second, mark 3, 6 ahead of it", counts), shown
        folder.write("go", "")
        assert terminal.end() == 0
        assert json.loads(terminal.shown)["total_items"] == 10
        assert b"\x1b[?25l" not in terminal.raw, "the cursor is never hidden"


def test_right_after_a_resume_the_counts_go_on(folder: Folder) -> None:
    """What earlier runs finished counts from the first frame on; the log above says where it resumes."""
    with Terminal(folder, *HELD) as terminal:
        terminal.wait_until(lambda shown: AT_THE_ITEM in shown)
    with Terminal(folder, *HELD) as terminal:
        shown = terminal.wait_until(lambda shown: "9 finished" in shown)
        assert "resuming at index 3, with 6 items ahead of it" in shown
        assert "9 finished, 0.0 a second, mark 3, 6 ahead of it" in shown
        frames = re.findall(rb"([\d,]+) finished", terminal.raw)
        assert set(frames) == {b"9"}


def test_the_item_that_holds_the_mark_is_shown(folder: Folder) -> None:
    """When the mark stands still, the item that holds it is named: after 10 s, here after 2."""
    folder.write("impatient.py", IMPATIENT)
    with Terminal(folder, *JOB, "--worker", "impatient:held_at_3") as terminal:
        shown = terminal.wait_until(lambda shown: "holds the mark" in shown)
        assert re.search(r"^item 3 holds the mark for \d+ s, attempt 1$", shown, re.MULTILINE)
        assert "left" not in shown


def test_what_is_logged_and_printed_goes_above_and_stays_whole(folder: Folder) -> None:
    """Lines of the log and of the worker, long or not ended, are whole, in order, and above the display."""
    folder.write("talking.py", TALKING)
    with Terminal(folder, *JOB, "--worker", "talking:work", "--concurrency", "1") as terminal:
        shown = terminal.wait_until(lambda shown: "mark 5" in shown)
        *above, bar, counts = shown.splitlines()
        assert ("%" in bar, "5 finished" in counts) == (True, True)
        assert above[:2] == ["printed by the worker", "and to standard error"]
        assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING w{100}", "".join(above[2:]))
        folder.write("go", "")
        assert terminal.end() == 0
        lines = terminal.shown.splitlines()
        assert lines[: len(above)] == above
        assert lines[len(above)] == "no end of line"
        assert json.loads("".join(lines[len(above) + 1 :]))["executed"] == 10


def check_stopped(terminal: Terminal) -> None:
    """The process ended by Ctrl-C, nothing is drawn any more, and the cursor is where a prompt belongs."""
    assert terminal.end() == 130
    assert "finished, " not in terminal.shown
    assert "%" not in terminal.shown
    assert terminal.column == 0


def test_one_ctrl_c_drains(folder: Folder) -> None:
    """The message about the drain is above the display, which stays until the end; then the line that resumes."""
    with Terminal(folder, *HELD_FROM) as terminal:
        terminal.wait_until(lambda shown: "mark 3" in shown)
        terminal.press("\x03")
        shown = terminal.wait_until(lambda shown: "again to" in shown and "mark 3" in shown)
        assert "INFO stopping: waiting for the items in flight; again to cancel them" in shown.replace("\n", "")
        folder.write("go", "")
        check_stopped(terminal)
        lines = "\n".join(terminal.shown.splitlines())
        assert "stopping: " in lines
        assert "stopped at the mark 5" in lines
        assert lines.replace("\n", "").endswith("--drain-timeout 600")


def test_two_ctrl_c_cancel(folder: Folder) -> None:
    """Both messages are seen, and then the line that resumes."""
    with Terminal(folder, *HELD_FROM) as terminal:
        terminal.wait_until(lambda shown: "mark 3" in shown)
        terminal.press("\x03")
        terminal.wait_until(lambda shown: "stopping:" in shown)
        terminal.press("\x03")
        check_stopped(terminal)
        assert "cancelling the items in flight; again to leave at once" in terminal.shown
        assert "stopped at the mark 3" in terminal.shown


def test_three_ctrl_c_leave_at_once_and_nothing_drawn(folder: Folder) -> None:
    """Even a worker that swallows its cancellation: what is drawn goes, both messages stay, and the job resumes."""
    with Terminal(folder, *JOB, "--worker", "jobs:stubborn_from_3", "--drain-timeout", "600") as terminal:
        terminal.wait_until(lambda shown: "mark 3" in shown)
        terminal.press("\x03")
        terminal.wait_until(lambda shown: "stopping:" in shown)
        terminal.press("\x03")
        terminal.wait_until(lambda shown: "cancelling" in shown and "mark 3" in shown)
        terminal.press("\x03")
        check_stopped(terminal)
        assert "again to leave at once" in terminal.shown
    assert read_committed(folder / "out.jsonl.checkpoint").mark == 3


def test_sigterm_clears_the_display(folder: Folder) -> None:
    """SIGTERM is as Ctrl-C: message, line that resumes, nothing drawn, code 143."""
    with Terminal(folder, *HELD_FROM) as terminal:
        terminal.wait_until(lambda shown: "mark 3" in shown)
        terminal.process.terminate()
        terminal.wait_until(lambda shown: "stopping:" in shown)
        folder.write("go", "")
        assert terminal.end() == 143
        assert "stopped at the mark 5" in terminal.shown
        assert "finished, " not in terminal.shown


def test_an_error_clears_the_display(folder: Folder) -> None:
    """What remains of a run that failed is its one line of error."""
    folder.write(
        "fails.py",
        "import asyncio, os\n"
        "async def work(item):\n"
        "    while item == '3' and not os.path.exists('go'): await asyncio.sleep(0.005)\n"
        "    if item == '3': raise ValueError('no such page')\n"
        "    return item\n",
    )
    with Terminal(folder, *JOB, "--worker", "fails:work") as terminal:
        terminal.wait_until(lambda shown: "mark 3" in shown)
        folder.write("go", "")
        assert terminal.end() == 1
        shown = terminal.shown.replace("\n", "")
        assert shown.startswith("Error: item 3 ('3') failed: ValueError: no such page")
        assert "ahead of it" not in shown
        assert terminal.column == 0


@pytest.mark.parametrize("columns", [120, 40, 20])
def test_a_resized_window_is_drawn_anew(folder: Folder, columns: int) -> None:
    """After the window got another size, the display has lines of that width."""
    with Terminal(folder, *HELD) as terminal:
        terminal.wait_until(lambda shown: AT_THE_ITEM in shown)
        already = len(terminal.raw)
        terminal.resize(columns, 30)
        terminal.wait_until(lambda _: terminal.raw[already:].count(b"9 finished") >= 3)
        *_, frame = terminal.raw.decode().split("\r\x1b[2K")
        frame = re.sub(r"\x1b\[[0-9;]*[a-zA-Z]", "", frame)
        assert max(map(len, frame.splitlines())) <= columns - 2
        folder.write("go", "")
        assert terminal.end() == 0


@pytest.mark.parametrize("columns", [40, 20])
def test_a_narrow_terminal(folder: Folder, columns: int) -> None:
    """Every count is there on a narrow screen as well, over more lines, redrawn in place."""
    with Terminal(folder, *HELD, columns=columns) as terminal:
        terminal.wait_until(lambda shown: AT_THE_ITEM in shown.replace("\n", " "))
        already = len(terminal.raw)
        shown = terminal.wait_until(lambda _: terminal.raw[already:].count(b"9 finished") >= 3)
        assert shown.count("9 finished") == 1
        assert ("━" in shown) == (columns == 40)


def colors(raw: bytes) -> set[bytes]:
    """The sequences that set a color or a style."""
    return set(re.findall(rb"\x1b\[[0-9;]*m", raw))


@pytest.mark.parametrize(
    ("words", "env", "colored"),
    [
        ((), {}, True),
        ((), {"NO_COLOR": "1"}, False),
        (("--color", "never"), {}, False),
        (("--color", "always"), {"NO_COLOR": "1"}, True),
    ],
)
def test_colors(folder: Folder, words: tuple[str, ...], env: dict[str, str], colored: bool) -> None:
    """NO_COLOR and --color never leave a display without any color or style; the option has the last word."""
    with Terminal(folder, *HELD, *words, env=env) as terminal:
        terminal.wait_until(lambda shown: AT_THE_ITEM in shown)
        assert bool(colors(terminal.raw)) == colored


def test_output_is_piped(folder: Folder) -> None:
    """Standard output in a pipe: progress on the terminal all the same, and in the pipe what belongs there alone."""
    folder.write("talking.py", TALKING)
    words = (*JOB, "--worker", "talking:work", "--concurrency", "1")
    with (folder / "piped").open("wb") as piped, Terminal(folder, *words, stdout=piped) as terminal:
        shown = terminal.wait_until(lambda shown: "mark 5" in shown)
        assert "printed by the worker" not in shown
        folder.write("go", "")
        assert terminal.end() == 0
        assert "finished, " not in terminal.shown
    printed, _, summary = (folder / "piped").read_text().partition("\n")
    assert (printed, summary[:14]) == ("printed by the worker", "no end of line")
    assert json.loads(summary[14:])["executed"] == 10


def test_a_closed_pipe_ends_quietly(folder: Folder) -> None:
    """`run | head -0` on a terminal: the job is complete, code 0, and not a word about it."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with Terminal(folder, *JOB, "--worker", "jobs:quick", stdout=write_end) as terminal:
        os.close(write_end)
        assert terminal.end() == 0
        assert terminal.shown == ""


def test_a_terminal_that_goes_away_does_not_end_the_run(folder: Folder) -> None:
    """Under nohup the window may be closed: what can not be shown any more is not, and the job is done."""
    nohup = ("sh", "-c", "trap '' HUP && exec \"$@\"", "sh", *COMMAND)
    with Terminal(folder, *HELD, command=nohup) as terminal:
        terminal.wait_until(lambda shown: AT_THE_ITEM in shown)
        process = terminal.process
        terminal.hang_up()
        folder.write("go", "")
        assert process.wait(60) == 0
    assert len((folder / "out.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("words", "env"), [(("--progress", "never"), {}), (("-q",), {}), ((), {"TERM": "dumb"}), (("--log-json",), {})]
)
def test_where_nothing_is_drawn(folder: Folder, words: tuple[str, ...], env: dict[str, str]) -> None:
    """Not with --progress never or --quiet, not on a dumb terminal, and not between lines of JSON."""
    with Terminal(folder, *HELD, *words, env=env) as terminal:
        wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, terminal.process)
        folder.write("go", "")
        assert terminal.end() == 0
        assert b"\x1b" not in terminal.raw
        assert json.loads(terminal.shown)["executed"] == 10


def test_progress_always_is_drawn_into_a_pipe(folder: Folder) -> None:
    """With --progress always it is drawn where there is no terminal, too, and without colors."""
    process = folder.start(*HELD, "--progress", "always")
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, process)
    folder.write("go", "")
    ended = end_of(process)
    assert ended.code == 0
    assert "finished, " in ended.err
    assert not colors(ended.err.encode())


def test_watching_draws_in_place_and_ends_with_the_job(folder: Folder) -> None:
    """`status --watch`: one table, drawn anew each second; when the job ends, the last one stays."""
    job = folder.start(*HELD)
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, job)
    with Terminal(folder, "status", "out.jsonl", "--watch") as terminal:
        # Not in the middle of a frame: the holder is in its lower half.
        shown = terminal.wait_until(lambda shown: terminal.raw.count(b"running") >= 3 and "process " in shown)
        assert (shown.count("state"), shown.count("process ")) == (1, 1)
        folder.write("go", "")
        assert terminal.end() == 0
        assert re.search(r"^state +complete; its checkpoint has been removed$", terminal.shown, re.MULTILINE)
        assert terminal.shown.count("state") == 1
        assert "mark" not in terminal.shown
        assert terminal.column == 0
    assert end_of(job).code == 0


def test_ctrl_c_ends_watching_quietly(folder: Folder) -> None:
    """The table stays, nothing is said, the prompt goes below it, and the job goes on."""
    job = folder.start(*HELD)
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, job)
    with Terminal(folder, "status", "out.jsonl", "--watch") as terminal:
        terminal.wait_until(lambda shown: "held by" in shown)
        terminal.press("\x03")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown
        assert terminal.shown.count("state") == 1
        assert terminal.column == 0
        assert job.poll() is None
