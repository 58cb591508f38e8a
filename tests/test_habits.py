"""What people expect of any command: help, completion, quiet and loud, JSON for machines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from async_recovery.cli import cli
from async_recovery.command_worker import MAX_OUTPUT_BYTES
from async_recovery.help import OTHER
from async_recovery.progress import Progress
from tests.support.commands import COMMAND, Folder, end_of, kill, read_committed, wait_until

SCRIPT = Path(sys.executable).with_name("async-recovery")
JOB = ("run", "--input", "items.txt", "--output", "out.jsonl", "--checkpoint-interval", "0.01")
QUICK = (*JOB, "--worker", "jobs:quick")
HELD = (*JOB, "--worker", "jobs:held_at_3")
LOGGING = """
import logging
log = logging.getLogger("theirs")

async def work(item):
    if item == "3":
        log.debug("their debug")
        log.info("their info")
        log.warning("their %s\\n%s", "warning", {1})
        try:
            1 / 0
        except ZeroDivisionError:
            log.exception("their error")
    return item
"""


@pytest.fixture
def folder(folder: Folder) -> Folder:
    """A folder with ten items and the modules of workers."""
    folder.write("loud.py", LOGGING)
    return folder


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *cli.commands])
def test_help_is_grouped_and_has_two_examples_and_the_exit_codes(name: str | None) -> None:
    """Every command: each option in a group of its purpose, two examples at least, all exit codes."""
    command: click.Command = cli if name is None else cli.commands[name]
    text = command.get_help(click.Context(command, info_name="async-recovery", **command.context_settings))
    assert OTHER not in text
    assert "Other commands" not in text
    examples = text.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) >= 2
    assert all("async-recovery " in line for line in examples)
    if name is not None:
        assert all(f"async-recovery {name} " in f"{line} " for line in examples)
    codes = ["0", "1", "2", "3", "4", "74", "75", "130", "143"]
    # Some end with their own, never with those of the runs that they begin.
    codes = {"torture": codes[:3], "serve": ["0", "2", "4", "74", "75"]}.get(name or "", codes)
    assert re.findall(r"^ +(\d+)  ", text.partition("Exit codes:")[2], re.MULTILINE) == codes


@pytest.mark.parametrize("name", cli.commands)
def test_help_has_every_option_once(name: str) -> None:
    """No option is lost between the groups, and none is in two of them."""
    command = cli.commands[name]
    text = command.get_help(click.Context(command, help_option_names=["-h", "--help"]))
    shown = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    options = [max(option.opts, key=len) for option in command.params if isinstance(option, click.Option)]
    assert sorted(shown) == sorted([*options, "--help"])


def test_help_tells_the_true_default_of_the_output_of_a_command() -> None:
    """Written out in the help, so that help need not load what runs commands."""
    assert f"[default: {MAX_OUTPUT_BYTES}]" in cli.commands["run"].get_help(click.Context(cli.commands["run"]))


def test_misspelt_words_are_answered_with_what_was_meant(folder: Folder) -> None:
    """A command or an option that is nearly right: one line, and the right word in it."""
    for words, meant in [
        (["rum"], "'run'"),
        (["statsu", "x"], "'status'"),
        (["retry_failed"], "'retry-failed'"),
        (["run", "--ouput", "x"], "'--output'"),
        (["status", "--wacth"], "'--watch'"),
    ]:
        ended = folder.run(*words)
        assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1), ended.err
        assert re.search(rf"Did you mean (one of: .*)?{meant}.*\?", ended.err)


# --- completion -------------------------------------------------------------------------------------------------------


def completed(folder: Folder, *words: str) -> list[str]:
    """What the tab key offers behind these words, the last of which has only been begun."""
    env = {
        "_ASYNC_RECOVERY_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["async-recovery", *words]),
        "COMP_CWORD": str(len(words)),
    }
    ended = folder.run(command=(str(SCRIPT),), env=env)
    assert (ended.code, ended.err) == (0, "")
    return ended.out.split()


def test_completion_offers_commands_options_values_and_files(folder: Folder) -> None:
    """What can come next: the commands, the options of a command, the values of an option, or names of files."""
    assert completed(folder, "re") == ["plain,retry-failed"]
    assert completed(folder, "run", "--dra") == ["plain,--drain-timeout"]
    assert completed(folder, "run", "--progress", "a") == ["plain,auto", "plain,always"]
    for words in (["run", "--input"], ["run", "--output"], ["status"], ["verify"], ["retry-failed"]):
        assert completed(folder, *words, "it") == ["file,it"]
    assert list(folder.path.glob("*.lock")) == []


def test_completion_is_known_to_bash(folder: Folder) -> None:
    """The script, evaluated as the help says, makes bash complete the command."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    folder.write("rc", folder.run("completion", "bash").out)
    ask = "source rc; COMP_WORDS=(async-recovery ver); COMP_CWORD=1; _async_recovery_completion async-recovery"
    env = {**os.environ, "PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(
        [bash, "--norc", "-c", f"{ask}; echo $COMPREPLY; complete -p async-recovery"],
        cwd=folder.path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines()[0] == "verify"
    assert said.stdout.endswith(" async-recovery\n")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_of_other_shells(folder: Folder, shell: str) -> None:
    """A script comes for them, too; another shell is a mistake that names those that there are."""
    ended = folder.run("completion", shell)
    assert (ended.code, ended.err) == (0, "")
    assert f"_ASYNC_RECOVERY_COMPLETE={shell}_complete" in ended.out
    ended = folder.run("completion", "tcsh")
    assert (ended.code, ended.out, "'bash', 'zsh', 'fish'" in ended.err) == (2, "", True)


# --- quiet, loud, JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "heard"),
    [
        (("-q",), {"error"}),
        ((), {"warning", "error"}),
        (("-v",), {"info", "warning", "error"}),
        (("-vv",), {"debug", "info", "warning", "error"}),
    ],
)
def test_quiet_and_verbose(folder: Folder, words: tuple[str, ...], heard: set[str]) -> None:
    """-q: errors only; -v: what the worker and its libraries log for information, too; -vv: everything."""
    ended = folder.run(*JOB, "--worker", "loud:work", *words)
    assert ended.code == 0
    assert {level for level in ("debug", "info", "warning", "error") if f"their {level}" in ended.err} == heard


def test_quiet_leaves_out_what_the_run_tells(folder: Folder) -> None:
    """-q: a run that resumes says nothing of it, and a failure is still one line; with -v it is a mistake."""
    process = folder.start(*HELD)
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, process)
    kill(process)
    folder.write("go", "")
    ended = folder.run(*HELD, "-q")
    assert (ended.code, ended.err, ended.summary["executed"]) == (0, "", 1)
    assert len(folder.run(*QUICK, "-q", "--input", "missing.txt").err.splitlines()) == 1
    ended = folder.run(*QUICK, "-q", "-v")
    assert (ended.code, ended.err) == (2, "Error: --quiet with --verbose: leave one of them out\n")


def objects(text: str) -> list[dict[str, object]]:
    """Each line as the JSON object that it has to be."""
    return [json.loads(line) for line in text.splitlines()]


def test_the_log_as_json(folder: Folder) -> None:
    """--log-json: every line on standard error is an object, long messages, exceptions and the end included."""
    folder.write("loud.py", LOGGING.replace("return item", "assert item != '9', 'nine'"))
    ended = folder.run(*JOB, "--worker", "loud:work", "--log-json", "--concurrency", "1")
    assert ended.code == 1
    warning, error, end = objects(ended.err)
    assert (warning["level"], warning["logger"], warning["message"]) == ("warning", "theirs", "their warning\n{1}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", str(warning["time"]))
    assert "ZeroDivisionError" in str(error["exception"])
    assert (end["level"], str(end["message"])[:30]) == ("error", "Error: item 9 ('9') failed: As")


def test_the_log_as_json_when_it_is_stopped(folder: Folder) -> None:
    """The words after a signal, with the line that resumes, are an object as well."""
    process = folder.start(*HELD, "--log-json", "--drain-timeout", "0")
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, process)
    process.terminate()
    ended = end_of(process)
    assert ended.code == 143
    *_, stopping, stopped = objects(ended.err)
    assert "stopping" in str(stopping["message"])
    assert "stopped at the mark 3" in str(stopped["message"])
    assert "--log-json" in str(stopped["message"])


SCREEN = """
import logging, msgspec, sys
from async_recovery.progress import NOT_BEGUN
from async_recovery.screen import Screen

with Screen(level=logging.INFO, others=logging.WARNING, log_json=sys.argv[1] == "json") as screen:
    for second in range(100):
        screen.show(msgspec.structs.replace(NOT_BEGUN, elapsed_s=float(second), executed=second, finished=500 + second))
"""


def test_progress_without_a_terminal_is_a_line_every_thirty_seconds(folder: Folder) -> None:
    """Three lines in a hundred seconds, with the speed of the last ten; as JSON, each number has a field of its own."""
    ended = folder.run("plain", command=(sys.executable, "-c", SCREEN))
    shown = [line.partition(" INFO ")[2] for line in ended.err.splitlines()]
    assert shown == [f"{number} finished, 1.0 a second, mark 0" for number in (530, 560, 590)]
    ended = folder.run("json", command=(sys.executable, "-c", SCREEN))
    assert [line["message"] for line in objects(ended.err)] == shown
    assert [msgspec.convert(line["progress"], Progress).finished for line in objects(ended.err)] == [530, 560, 590]


def test_a_closed_standard_error_shows_nothing(folder: Folder) -> None:
    """Whatever should be drawn there: the job is done."""
    command = ("sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND)
    for words in (["--progress", "always", "--color", "always"], ["--log-json"]):
        assert folder.run(*QUICK, *words, command=command).summary["executed"] == 10


def test_the_summary_on_one_line(folder: Folder) -> None:
    """--json: the summary is one line; without, it is the same over many."""
    ended = folder.run(*QUICK, "--json")
    assert (ended.code, len(ended.out.splitlines())) == (0, 1)
    plain = folder.run(*QUICK)
    assert len(plain.out.splitlines()) > 1
    assert ended.summary.keys() == plain.summary.keys()


# --- watching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--json",)])
@pytest.mark.parametrize("keep", [(), ("--keep-checkpoint",)])
def test_watching_tells_each_change_and_ends_with_the_job(
    folder: Folder, words: tuple[str, ...], keep: tuple[str, ...]
) -> None:
    """Lines while the job runs, the last one that it is complete, with no count of an earlier moment; code 0."""
    job = folder.start(*HELD, *keep)
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, job)
    with (folder / "watched").open("w") as watched:
        watching = folder.start("status", "out.jsonl", "--watch", *words, stdout=watched)
    seen = '"finished":9' if words else "9 finished"
    wait_until(lambda: seen in (folder / "watched").read_text(), watching)
    folder.write("go", "")
    assert end_of(job).code == 0
    ended = end_of(watching)
    assert (ended.code, ended.err) == (0, "")
    lines = (folder / "watched").read_text().splitlines()
    states = [json.loads(line)["state"] if words else re.split("[:;]", line)[0] for line in lines]
    assert states == ["running"] * (len(lines) - 1) + ["complete"]
    assert len(set(lines)) == len(lines)
    if words:
        last = json.loads(lines[-1])
        assert [last[name] for name in ("mark", "ahead", "finished", "failed")] == (
            [10, 0, 10, 0] if keep else [None] * 4
        )
    else:
        kept, removed = "complete: 10 finished, mark 10, 0 ahead of it", "complete; its checkpoint has been removed"
        assert lines[-1] == (kept if keep else removed)


def test_watching_a_job_that_is_killed(folder: Folder) -> None:
    """It ends when the job has ended in any way, and tells which."""
    job = folder.start(*HELD)
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, job)
    with (folder / "watched").open("w") as watched:
        watching = folder.start("status", "out.jsonl", "--watch", stdout=watched)
    wait_until(lambda: "running" in (folder / "watched").read_text(), watching)
    kill(job)
    assert end_of(watching).code == 0
    assert (folder / "watched").read_text().splitlines()[-1] == "interrupted: 9 finished, mark 3, 6 ahead of it"


def test_watching_nothing_is_a_mistake(folder: Folder) -> None:
    """Where there is no job to watch: one line, code 2; a job that does not run is shown once."""
    ended = folder.run("status", "nothing.jsonl", "--watch")
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert folder.run(*QUICK, "--keep-checkpoint").code == 0
    ended = folder.run("status", "out.jsonl", "--watch")
    assert (ended.code, ended.out) == (0, "complete: 10 finished, mark 10, 0 ahead of it\n")


def test_watching_into_a_closed_pipe(folder: Folder) -> None:
    """`status --watch | head -1` ends quietly."""
    job = folder.start(*HELD)
    wait_until(lambda: len(read_committed(folder / "out.jsonl.checkpoint").ahead) == 6, job)
    words = '"$@" status out.jsonl --watch | head -1; true'
    ended = folder.run(command=("sh", "-c", words, "sh", *COMMAND))
    assert (len(ended.out.splitlines()), ended.err) == (1, "")
