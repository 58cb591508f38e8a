"""The command line, as a user runs it: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import async_recovery
from async_recovery.chosen_worker import taken_for_installed
from tests.support.commands import COMMAND, Ended, Folder, check_one_line, end_of, kill, read_committed, wait_until
from tests.support.jobs import LOG, runs_in

PROJECT = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("async-recovery")
OPTIONS = (
    "input", "output", "checkpoint", "batch-size", "concurrency", "window", "checkpoint-interval", "worker", "format",
    "fresh", "keep-checkpoint", "on-damage", "job-version", "drain-timeout", "retries", "retry-initial",
    "retry-maximum", "deadline", "breaker", "quarantine-after", "timeout", "on-error", "max-failures", "rate", "burst",
    "dry-run", "exec", "shell", "max-output", "save-dir", "keep-header",
)  # fmt: skip
SUMMARY_KEYS = {
    "total_items",
    "processed",
    "checkpoint_cleared",
    "resumed_from",
    "executed",
    "failed",
    "elapsed_s",
    "output",
}
NOBODY = 65534
JOB = ("run", "--input", "items.txt", "--output", "out.jsonl", "--worker", "jobs:quick")


def job(worker: str, *more: str) -> list[str]:
    """The words of a run of that worker."""
    return [*JOB[:-1], worker, *more]


def expected_output(count: int) -> list[dict[str, Any]]:
    """Index and number of each record of a whole output."""
    return [{"index": index, "number": index} for index in range(count)]


def records_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [{"index": record["index"], "number": record["number"]} for record in records]


# --- what it prints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [COMMAND, (str(SCRIPT),)], ids=["module", "script"])
def test_sample_runs_with_no_option_at_all(folder: Folder, command: tuple[str, ...]) -> None:
    """`run` alone works on the sample in data/, and standard output is the summary, valid JSON, and nothing else."""
    shutil.copytree(PROJECT / "data", folder / "data", ignore=shutil.ignore_patterns("processed_output*"))
    ended = folder.run("run", command=command)
    assert ended.code == 0, ended.err
    assert ended.summary.keys() == SUMMARY_KEYS
    assert (ended.summary["total_items"], ended.summary["processed"], ended.summary["checkpoint_cleared"]) == (
        12,
        12,
        True,
    )
    records = json.loads((folder / "data" / "processed_output.json").read_text())
    assert records[5] == {
        "index": 5,
        "original": "naïve café — Unicode is counted in characters, not in bytes",
        "length": 59,
        "word_count": 11,
        "uppercase": "NAÏVE CAFÉ — UNICODE IS COUNTED IN CHARACTERS, NOT IN BYTES",
    }
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["processed_output.json", "sample_input.txt"]


def test_version_and_help(folder: Folder) -> None:
    """`--version`, `--help` and `-h` go to standard output with code 0; each command's help names the exit codes."""
    assert folder.run("--version").out == f"async-recovery, version {async_recovery.__version__}\n"
    for words in ([], ["run"], ["status"]):
        for option in ("--help", "-h"):
            ended = folder.run(*words, option)
            assert (ended.code, ended.err) == (0, "")
            assert "143  stopped by SIGTERM: resumable" in ended.out


def test_no_command_shows_the_help(folder: Folder) -> None:
    """With no command at all, the help is shown, and the code is that of a mistake."""
    ended = folder.run()
    assert ended.code == 2
    assert "Do the work:" in ended.err + ended.out


def test_every_documented_option_is_there(folder: Folder) -> None:
    """The help of `run` has every option of the design."""
    text = folder.run("run", "--help").out
    for option in OPTIONS:
        assert f"--{option} " in text


@pytest.mark.parametrize("output", ["out.json", "deep/er/out.jsonl"])
def test_output_is_one_record_an_item_in_order(folder: Folder, output: str) -> None:
    """The output has one record an item in the input's order, in folders made for it, and nothing lies beside it."""
    ended = folder.run("run", "--input", "items.txt", "--output", output, "--worker", "jobs:random_latency")
    assert ended.code == 0, ended.err
    assert records_of(folder / output) == expected_output(10)
    assert [path.name for path in (folder / output).parent.iterdir() if path.name.startswith("out")] == [
        Path(output).name
    ]


def test_same_line_after_completion_starts_anew(folder: Folder) -> None:
    """Without --keep-checkpoint, the same line runs everything again, and the old output stays until then."""
    assert folder.run(*JOB).code == 0
    before = (folder / "out.jsonl").read_bytes()
    again = folder.run(*JOB)
    assert (again.code, again.summary["executed"], again.summary["checkpoint_cleared"]) == (0, 10, True)
    assert (folder / "out.jsonl").read_bytes() == before
    assert len(runs_in(folder / LOG)) == 20


def test_same_line_after_completion_does_nothing_if_it_was_kept(folder: Folder) -> None:
    """With --keep-checkpoint, the same line gives the same summary with no worker run, and touches no file."""
    words = (*JOB, "--keep-checkpoint")
    first = folder.run(*words)
    assert (first.code, first.summary["checkpoint_cleared"]) == (0, False)
    before = folder.snapshot(times=True)
    again = folder.run(*words)
    assert again.code == 0, again.err
    assert again.summary == {**first.summary, "executed": 0}
    assert folder.snapshot(times=True) == before


def test_kept_job_refuses_an_input_that_has_grown(folder: Folder) -> None:
    """A job that was kept as complete does not pass over items that were added since: it names --fresh, which works."""
    assert folder.run(*JOB, "--keep-checkpoint").code == 0
    folder.write_items(12)
    before = folder.snapshot()
    check_one_line(folder.run(*JOB, "--keep-checkpoint"), 4, "grown beyond the 10 items that were done", "--fresh")
    assert folder.snapshot() == before
    assert folder.run(*JOB, "--keep-checkpoint", "--fresh").summary["executed"] == 12
    assert records_of(folder / "out.jsonl") == expected_output(12)


def test_names_that_are_not_utf_8(folder: Folder) -> None:
    """Files whose names are not valid UTF-8 are files like others; JSON that tells of them has the odd byte escaped."""
    name = os.fsdecode(b"odd\xff.txt")
    (folder / "items.txt").rename(folder / name)
    ended = folder.run(
        "run", "--input", name, "--output", f"{name}.jsonl", "--worker", "jobs:quick", "--keep-checkpoint"
    )
    assert ended.code == 0, ended.err
    assert ended.summary["output"] == "odd\\udcff.txt.jsonl"
    assert records_of(folder / f"{name}.jsonl") == expected_output(10)
    found = status(folder, f"{name}.jsonl")
    assert (found["input"], found["checkpoint"]) == ("odd\\udcff.txt", "odd\\udcff.txt.jsonl.checkpoint")


# --- mistakes -------------------------------------------------------------------------------------------------------

WORKERS = {
    "good.py": "async def work(item):\n    return item\nNUMBER = 5\nanonymous = lambda item: item\n",
    "broken.py": "def work(item)\n    return item\n",
    "explodes.py": "1 / 0\n",
    "leaves.py": "import sys\nsys.exit(0)\n",
    "random.py": "def work(item):\n    return item\n",
    "mailbox.py": "",
    "mails.py": "from mailbox import Maildir as work\n",
    "needs.py": "import a_package_that_is_not_there\n",
}

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "batch size 0": (["--batch-size", "0"], ["batch_size is 0", "1 or more"]),
    "negative batch size": (["--batch-size", "-5"], ["batch_size is -5", "1 or more"]),
    "concurrency 0": (["--concurrency", "0"], ["concurrency is 0", "from 1 to 100000"]),
    "negative concurrency": (["--concurrency", "-3"], ["concurrency is -3", "from 1 to 100000"]),
    "window 0": (["--window", "0"], ["window is 0", "1 or more"]),
    "negative interval": (["--checkpoint-interval", "-1"], ["checkpoint_interval is -1.0", "0 or more"]),
    "interval not a number": (["--checkpoint-interval", "nan"], ["checkpoint_interval is nan", "0 or more"]),
    "negative drain timeout": (["--drain-timeout", "-1"], ["drain_timeout is -1.0", "0 or more"]),
    "bad number": (["--concurrency", "many"], ["--concurrency", "'many'", "integer"]),
    "misspelt option": (["--concurency", "5"], ["--concurency", "--concurrency"]),
    "wrong format": (["--format", "xml"], ["--format", "'xml'", "jsonl", "csv"]),
    "format json": (["--format", "json"], ["--format", "`jq -c '.[]'`", "jsonl"]),
    "input is an array": (
        ["--input", "array.json"],
        ["array.json", "`jq -c '.[]' array.json > items.jsonl`", "--format"],
    ),
    "wrong on-damage": (["--on-damage", "panic"], ["--on-damage", "'panic'", "refuse"]),
    "word too many": (["items.txt"], ["items.txt", "--input items.txt"]),
    "two words too many": (["items.txt", "a b"], ["items.txt 'a b'", "--input items.txt"]),
    "input is a URL": (
        ["--input", "https://a.b/c.csv?d=1&e"],
        ["is a URL", "curl -sf 'https://a.b/c.csv?d=1&e' | async-recovery run --input -"],
    ),
    "input in a bucket": (["--input", "s3://a/b.jsonl"], ["s3://a/b.jsonl is a URL", "load it down"]),
    "missing input": (["--input", "missing.txt"], ["missing.txt", "no input file"]),
    "missing input, folder to be made": (["--input", "missing.txt", "--output", "a/b/out.jsonl"], ["missing.txt"]),
    "input is a folder": (["--input", "folder"], ["folder", "not a regular file"]),
    "output is a folder": (["--output", "folder"], ["folder is a folder", "name a file in it"]),
    "output is standard output": (["--output", "/dev/stdout"], ["standard output", "--output - with --checkpoint"]),
    "output is a descriptor": (["--output", "/dev/fd/1"], ["descriptor", "--output - with --checkpoint"]),
    "output is a descriptor of /proc": (["--output", "/proc/self/fd/1"], ["--output - with --checkpoint"]),
    "checkpoint is a descriptor": (["--checkpoint", "/dev/stdout"], ["/dev/stdout", "descriptor"]),
    "output is a folder to be made": (["--output", "new/"], ["new/ names a folder", "name a file in it"]),
    "checkpoint is a folder to be made": (["--checkpoint", "new/"], ["new/ names a folder", "name a file in it"]),
    "no output named": (["--output", ""], ["output is ''"]),
    "no input named": (["--input", ""], ["the input is ''", "name a file"]),
    "gzip by another name": (
        ["--input", "packed"],
        ["packed is compressed with gzip", "add .gz to it"],
    ),
    "zstd by another name": (["--input", "zpacked"], ["zpacked is compressed with zstd", "add .zst to it"]),
    "input is standard input": (["--input", "/dev/stdin"], ["/dev/stdin", "use --input -"]),
    "input is a descriptor": (["--input", "/dev/fd/0"], ["/dev/fd/0", "use --input -"]),
    "input is a pipe": (["--input", "pipe"], ["pipe", "not a regular file: use --input -"]),
    "checkpoint is a folder": (["--checkpoint", "folder"], ["folder is a folder", "name a file in it"]),
    "output below a file": (["--output", "good.py/out.jsonl"], ["good.py", "can not be written to"]),
    "output is the input": (["--output", "items.txt"], ["items.txt", "would be overwritten", "--output"]),
    "output is the input, by a symlink": (["--output", "symlink.txt"], ["items.txt", "would be overwritten"]),
    "output is the input, by a hard link": (["--output", "hardlink.txt"], ["items.txt", "would be overwritten"]),
    "input is a symlink to the output": (["--input", "symlink.txt", "--output", "items.txt"], ["would be overwritten"]),
    "input is the partial output": (["--input", "x.partial", "--output", "x"], ["x.partial", "would be overwritten"]),
    "input is the lock": (["--input", "x.lock", "--output", "x"], ["x.lock", "would be overwritten"]),
    "input is the checkpoint's lock": (["--input", "x.lock", "--checkpoint", "x"], ["x.lock", "would be overwritten"]),
    "checkpoint is the input": (["--checkpoint", "items.txt"], ["items.txt", "would be overwritten"]),
    "checkpoint is the output": (["--checkpoint", "out.jsonl"], ["out.jsonl would overwrite each other"]),
    "checkpoint is the partial output": (
        ["--checkpoint", "out.jsonl.partial"],
        ["would overwrite each other"],
    ),
    "unknown module": (["--worker", "nowhere:work"], ["no module 'nowhere'"]),
    "unknown submodule": (["--worker", "good.deeper:work"], ["no module 'good.deeper'"]),
    "unknown function": (["--worker", "good:wrok"], ["'good'", "'wrok'"]),
    "not callable": (["--worker", "good:NUMBER"], ["good:NUMBER is 5, not a function"]),
    "lambda": (["--worker", "good:anonymous"], ["lambda", "--job-version"]),
    "no function named": (["--worker", "good"], ["'good'", "module:function"]),
    "file": (["--worker", "good.py:work"], ["'good.py:work' names a file", "write good:work"]),
    "file in this folder": (["--worker", "./good.py:work"], ["names a file", "write good:work"]),
    "file in a folder": (["--worker", "folder/good.py:work"], ["names a file", "write folder.good:work"]),
    "file elsewhere": (["--worker", "../a/good.py:work"], ["/a, where good.py lies", "write good:work"]),
    "name of a module of Python": (["--worker", "random:work"], ["has no 'work'", "not random.py: give that another"]),
    "module of Python, replaced": (
        ["--worker", "mails:work"],
        ["'mails' can not be imported: ImportError", "mailbox.py was imported for the installed module 'mailbox'"],
    ),
    "relative module": (["--worker", ".good:work"], ["write good:work"]),
    "empty function name": (["--worker", "good:"], ["'good:'", "module:function"]),
    "no worker named": (["--worker", ""], ["module:function"]),
    "syntax error": (["--worker", "broken:work"], ["'broken'", "SyntaxError", "broken.py, line 1"]),
    "error at import": (["--worker", "explodes:work"], ["'explodes'", "ZeroDivisionError"]),
    "module that exits": (["--worker", "leaves:work"], ["'leaves'", "SystemExit"]),
    "negative retries": (["--retries", "-1"], ["--retries is -1", "0 or more"]),
    "negative first wait": (["--retries", "1", "--retry-initial", "-1"], ["initial is -1.0", "0 or more"]),
    "timeout 0": (["--timeout", "0"], ["timeout is 0", "must be more"]),
    "negative deadline": (["--deadline", "-2"], ["deadline is -2.0", "0 or more"]),
    "negative breaker": (["--retries", "1", "--breaker", "-5"], ["breaker is -5", "1 or more"]),
    "negative breaker without retries": (["--breaker", "-1"], ["breaker is -1", "1 or more"]),
    "negative first wait without retries": (["--retry-initial", "-1"], ["initial is -1.0", "0 or more"]),
    "quarantine after 0": (["--quarantine-after", "0"], ["quarantine_after is 0", "1 or more"]),
    "wrong on-error": (["--on-error", "ignore"], ["--on-error", "'ignore'", "record"]),
    "failures that are no number": (["--max-failures", "few"], ["max_failures is 'few'", "share"]),
    "more than all failures": (["--max-failures", "101%"], ["max_failures is '101%'", "100%"]),
    "failures and a stop": (["--max-failures", "5", "--on-error", "stop"], ["--max-failures", "--on-error stop"]),
    "rate 0": (["--rate", "0"], ["per_second is 0", "more than 0"]),
    "burst without a rate": (["--burst", "5"], ["--burst without --rate"]),
    "burst above the rate": (["--rate", "5", "--burst", "6"], ["burst is 6", "5"]),
    "missing dependency": (["--worker", "needs:work"], ["a_package_that_is_not_there", "'needs'"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_changes_nothing(folder: Folder, mistake: str) -> None:
    """A mistake in the command is one clear line with code 2, before any work, and leaves the folder as it was."""
    more, said = MISTAKES[mistake]
    for name, text in WORKERS.items():
        folder.write(name, text)
    folder.write("x.partial", "1\n")
    (folder / "packed").write_bytes(gzip.compress(b"1\n"))
    (folder / "zpacked").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00\n")
    folder.write("array.json", "[\n1\n]\n")
    folder.write("x.lock", "1\n")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "symlink.txt").symlink_to("items.txt")
    (folder / "hardlink.txt").hardlink_to(folder / "items.txt")
    before = folder.snapshot()
    ended = folder.run("run", "--input", "items.txt", "--output", "out.jsonl", "--worker", "good:work", *more)
    check_one_line(ended, 2, *said)
    assert folder.snapshot() == before


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_the_file_behind_standard_output_is_not_replaced(folder: Folder, name: str) -> None:
    """An output that names standard output is refused, and the file that this is redirected to stays the same one."""
    (folder / "link").symlink_to("/dev/stdout")
    with folder.write("log", "before\n").open("a") as log:
        inode = os.fstat(log.fileno()).st_ino
        ended = folder.run("run", "--input", "items.txt", "--output", name, stdout=log)
    check_one_line(ended, 2, name, "use --output - with --checkpoint")
    assert ((folder / "log").stat().st_ino, (folder / "log").read_text()) == (inode, "before\n")


def test_a_module_of_a_subfolder_is_not_taken_for_an_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that PYTHONPATH names, say: it is the only one of its name."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "heavy_model.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "sub")
    monkeypatch.setitem(sys.modules, "heavy_model", importlib.import_module("heavy_model"))
    assert taken_for_installed() == ""


def test_gzip_on_standard_input_is_one_line_and_leaves_nothing(folder: Folder) -> None:
    """Said with its cure before it is taken for the input of a job."""
    (folder / "packed").write_bytes(gzip.compress(b"1\n"))
    before = folder.snapshot()
    with (folder / "packed").open("rb") as stdin:
        ended = folder.run("run", "--input", "-", "--output", "out.jsonl", stdin=stdin)
    check_one_line(ended, 2, "standard input is compressed with gzip: pipe it through `gzip -dc` first")
    assert folder.snapshot() == before


NEEDED_BEFORE_US = "import __future__, pkgutil, runpy, sys, typing; print(*sys.modules)"


@pytest.mark.parametrize("command", [COMMAND, (str(SCRIPT),)], ids=["module", "script"])
@pytest.mark.parametrize("worker", ["text", "jobs:quick", "jobs:with_neighbour"])
def test_no_file_of_the_folder_is_taken_for_a_module_of_ours(
    folder: Folder, worker: str, command: tuple[str, ...]
) -> None:
    """A module of Python, or of a dependency, is that also where a file of that name lies in the folder."""
    names = {*sys.stdlib_module_names, "anyio", "aiofiles", "click", "idna", "msgspec", "rich", "uvloop"}
    if command == COMMAND:  # Python itself looks for what -m needs, and the folder is the first place: not ours to mend
        before = subprocess.check_output([sys.executable, "-Ic", NEEDED_BEFORE_US], text=True)
        names -= set(before.split())
    for name in names:
        folder.write(f"{name}.py", "raise ImportError(f'this is {__file__}')\n")
    folder.write("neighbour.py", "FOUND = True\n")
    with (folder / "jobs.py").open("a") as jobs:
        jobs.write("def with_neighbour(item):\n    import neighbour\n    return {'found': neighbour.FOUND}\n")
    ended = folder.run(*job(worker), command=command)
    assert ended.code == 0, ended.err
    assert ended.summary["executed"] == 10


def test_a_file_that_was_imported_for_an_installed_module_is_named(folder: Folder) -> None:
    """Where the worker's module itself has imported it, and something of ours breaks for that: in one line."""
    folder.write("uvloop.py", "")
    with (folder / "jobs.py").open("a") as jobs:
        jobs.write("import uvloop\n")
    ended = folder.run(*JOB, "--loop", "uvloop")
    check_one_line(ended, 2, "uvloop.py was imported for the installed module 'uvloop': give it another name")


@pytest.mark.parametrize("command", [COMMAND, (str(SCRIPT),)], ids=["module", "script"])
@pytest.mark.parametrize("words", [["run"], ["status", "x"], ["--help"]])
def test_ctrl_c_while_it_is_still_imported(folder: Folder, words: list[str], command: tuple[str, ...]) -> None:
    """It ends as it does later, and not in a traceback of Python."""
    (folder / "early").mkdir()
    folder.write("early/click.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    ended = folder.run(*words, command=command, env={"PYTHONPATH": "early"})
    assert (ended.code, ended.out, ended.err) == (130, "", "")


def test_ctrl_c_when_all_is_said(folder: Folder) -> None:
    """Python's own way out, on which it would still end the process, is not taken: the help was shown."""
    (folder / "late").mkdir()
    late = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
    folder.write("late/sitecustomize.py", late)
    ended = folder.run("run", "--help", env={"PYTHONPATH": "late"})
    assert (ended.code, ended.err) == (0, "")
    assert "143  stopped by SIGTERM" in ended.out


@pytest.mark.parametrize("option", ["--resume", "--threads", "--force", "--fresch"])
def test_fresh_is_never_suggested(folder: Folder, option: str) -> None:
    """It would throw away what an interrupted run has done; who wants to resume is told that the same line does."""
    ended = folder.run(*JOB, option)
    check_one_line(ended, 2, option, *(["the same line resumes by itself"] if option == "--resume" else []))
    assert "--fresh" not in ended.err


def test_completion_without_a_shell_is_one_line(folder: Folder) -> None:
    """It names the shells."""
    check_one_line(folder.run("completion"), 2, "bash", "zsh", "fish")


def test_unknown_command_is_one_line(folder: Folder) -> None:
    """A command that does not exist is a mistake."""
    check_one_line(folder.run("rum"), 2, "'rum'")


@pytest.mark.parametrize("where", ["locked/out.jsonl", "locked/deeper/out.jsonl", "open/out.jsonl"])
def test_unwritable_folder_is_one_line_and_changes_nothing(folder: Folder, bound: tuple[str, ...], where: str) -> None:
    """A folder of the output or of the checkpoint that can not be written to is said so, with code 2."""
    (folder / "locked").mkdir(0o555)
    (folder / "open").mkdir()
    more = ["--checkpoint", "locked/job.checkpoint"] if where.startswith("open") else []
    before = folder.snapshot()
    ended = folder.run("run", "--input", "items.txt", "--output", where, *more, command=bound)
    check_one_line(ended, 2, "locked", "can not be written to", "Permission denied")
    assert folder.snapshot() == before


def test_unreadable_input_is_one_line(folder: Folder, bound: tuple[str, ...]) -> None:
    """An input that may not be read is said so, with code 2, and nothing is left behind."""
    (folder / "secret.txt").touch(0o000)
    before = sorted(folder.path.iterdir())
    ended = folder.run("run", "--input", "secret.txt", "--output", "out.jsonl", command=bound)
    check_one_line(ended, 2, "secret.txt", "can not be read", "Permission denied")
    assert sorted(folder.path.iterdir()) == before


@pytest.mark.parametrize("suffix", ["checkpoint", "partial"])
def test_job_of_somebody_else_is_one_line(folder: Folder, bound: tuple[str, ...], suffix: str) -> None:
    """A checkpoint or a partial output that may not be read is said so, with code 2, and nothing is changed."""
    interrupt(folder)
    (folder / f"out.jsonl.{suffix}").chmod(0)
    before = sorted(folder.path.iterdir())
    ended = folder.run(*job("jobs:held_at_3"), command=bound)
    check_one_line(ended, 2, f"out.jsonl.{suffix} can not be used", "Permission denied")
    assert {path.name for path in folder.path.iterdir()} == {path.name for path in before} - {"out.jsonl.lock"}


def test_unreadable_checkpoint_is_one_line_for_status(folder: Folder, bound: tuple[str, ...]) -> None:
    """`status` of a checkpoint that may not be read says so, with code 2."""
    (folder / "job.checkpoint").touch(0o000)
    for path in ("job", "job.checkpoint"):
        check_one_line(folder.run("status", path, command=bound), 2, "job.checkpoint", "Permission denied")


# --- workers that fail ----------------------------------------------------------------------------------------------

FAILING = """
import asyncio
import os
import sys

LOG = os.open("ran.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def fails(item):
    os.write(LOG, b"%d\\n" % int(item))
    return item == "5" and not os.path.exists("mended")


async def work(item):
    if fails(item):
        {bad}
    return {{"number": int(item)}}


def plain(item):
    if fails(item):
        raise ValueError("no such page")
    return {{"number": int(item)}}
"""

FAILURES: dict[str, tuple[str, str]] = {
    "raises": ("raise ValueError('no such page')", "ValueError: no such page"),
    "raises many lines": ("raise ValueError('no\\nsuch\\npage')", "ValueError: no such page"),
    "cancels itself": ("raise asyncio.CancelledError", "CancelledError"),
    "exits": ("sys.exit(0)", "SystemExit: 0"),
    "set": ("return {'tags': {1, 2}}", "holds a set"),
    "NaN": ("return {'ratio': float('nan')}", "holds nan"),
    "infinity in a list": ("return [1.0, float('inf')]", "holds inf"),
    "no JSON form": ("return {'file': sys.stdin}", "can not be written as JSON"),
    "index of its own": ("return {'index': 7}", '"index"'),
    "form of a failure": ("return {'error': {'type': 'A', 'message': 'b'}, 'item': 1}", "recorded failure"),
}


@pytest.mark.parametrize(("worker", "failure"), [*(("work", name) for name in FAILURES), ("plain", "raises")])
def test_failing_item_loses_nothing(folder: Folder, worker: str, failure: str) -> None:
    """A worker that fails on an item: one line, code 1, all else is kept; when mended, only what is missing runs."""
    bad, said = FAILURES[failure]
    folder.write("jobs.py", FAILING.format(bad=bad))
    ended = folder.run(*job(f"jobs:{worker}", "--concurrency", "2"))
    check_one_line(ended, 1, "item 5 ('5') failed", said, "run the same line again")
    assert not (folder / "out.jsonl").exists()
    assert not (folder / "out.jsonl.lock").exists()
    committed, before = read_committed(folder / "out.jsonl.checkpoint"), runs_in(folder / LOG)
    assert {index for index in range(10) if committed.has(index)} == set(before) - {5}, "what finished is committed"

    folder.write("mended", "")
    resumed = folder.run(*job(f"jobs:{worker}", "--concurrency", "2"))
    assert resumed.code == 0, resumed.err
    assert "resuming at index" in resumed.err
    after = runs_in(folder / LOG)[len(before) :]
    assert sorted(after) == [index for index in range(10) if not committed.has(index)]
    assert resumed.summary["executed"] == len(after)
    assert records_of(folder / "out.jsonl") == expected_output(10)


def test_failures_are_tried_again_recorded_and_counted(folder: Folder) -> None:
    """The options of `run`: as often as they say, in their places, exit code 3 while there are any, 1 for too many."""
    folder.write(
        "jobs.py",
        "async def work(item):\n"
        "    print(item, file=open('began', 'a'))\n"
        "    if int(item) % 4 == 3: raise ValueError('bad')\n",
    )
    more = ["--on-error", "record", "--retries", "2", "--retry-initial", "0", "--timeout", "30", "--rate", "1000"]
    ended = folder.run(*job("jobs:work", *more))
    assert (ended.code, ended.summary["failed"], ended.summary["executed"]) == (3, 2, 14)
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines if "error" in line] == [3, 7]
    assert lines[3] == {"index": 3, "error": {"type": "ValueError", "message": "bad"}, "item": "3"}
    assert sorted((folder / "began").read_text().split()).count("3") == 3
    assert folder.run(*job("jobs:work", "--max-failures", "2")).code == 3
    check_one_line_of_error(folder.run(*job("jobs:work", "--max-failures", "1", "--concurrency", "1")))
    assert (folder / "out.jsonl").exists()


def check_one_line_of_error(ended: Ended) -> None:
    """Too many failures: what was found, and what to do."""
    assert ended.code == 1
    (said,) = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert "failed items: 2, more than max_failures=1 allows" in said
    assert "higher bound" in said


def test_what_a_worker_raises_does_not_steer_the_terminal(folder: Folder) -> None:
    """Control characters of an exception are escaped in the log, and stay as they are in the output."""
    folder.write(
        "steering.py",
        "def work(item): raise ValueError('\\x1b[31mred\\x07\\x9b')\n",
    )
    words = ["run", "--input", "items.txt", "--output", "out.jsonl", "--worker", "steering:work"]
    for more in (["--on-error", "record"], []):
        ended = folder.run(*words, *more)
        assert "ValueError: \\x1b[31mred\\x07\\x9b" in ended.err
        assert not set(ended.err) & {"\x1b", "\x07", "\x9b"}
        if more:
            assert json.loads((folder / "out.jsonl").read_text().splitlines()[0])["error"]["message"].startswith("\x1b")


def test_plain_function_that_returns_an_awaitable(folder: Folder) -> None:
    """A `def` that returns a coroutine is an error that says what to write; no warning of Python's beside it."""
    folder.write("jobs.py", "async def inner(item):\n    return item\ndef work(item):\n    return inner(item)\n")
    ended = folder.run(*job("jobs:work", "--concurrency", "1"), env={"PYTHONWARNINGS": "always"})
    check_one_line(
        ended,
        1,
        "item 0",
        "the worker jobs:work is a plain function",
        "returned an awaitable",
        "async def worker(item): return await",
    )


def test_worker_that_raises_keyboard_interrupt(folder: Folder) -> None:
    """It is the failure of its item: one line, code 1, what finished is committed, and the same line resumes."""
    folder.write("jobs.py", FAILING.format(bad="raise KeyboardInterrupt"))
    words = job("jobs:work", "--concurrency", "1")
    check_one_line(folder.run(*words), 1, "item 5 ('5') failed", "KeyboardInterrupt", "run the same line again")
    assert not (folder / "out.jsonl.lock").exists()
    assert read_committed(folder / "out.jsonl.checkpoint").mark == 5
    folder.write("mended", "")
    resumed = folder.run(*words)
    assert (resumed.code, resumed.summary["executed"]) == (0, 5), resumed.err
    assert records_of(folder / "out.jsonl") == expected_output(10)


@pytest.mark.parametrize("deed", ["asyncio.get_running_loop().stop()", "[t.cancel() for t in asyncio.all_tasks()]"])
def test_worker_that_takes_the_loop_away(folder: Folder, deed: str) -> None:
    """It stops the loop, or cancels the run itself: a line that says so, no traceback, and the same line resumes."""
    folder.write("jobs.py", FAILING.format(bad=f"{deed}; await asyncio.sleep(0.01)"))
    words = job("jobs:work", "--concurrency", "1")
    ended = folder.run(*words)
    assert (ended.code, ended.out, "Traceback" in ended.err) == (1, "", False), ended.err
    assert "the worker must stop no loop" in ended.err.splitlines()[-1]
    folder.write("mended", "")
    resumed = folder.run(*words)
    assert resumed.code == 0, resumed.err
    assert records_of(folder / "out.jsonl") == expected_output(10)


def test_full_disk(folder: Folder) -> None:
    """When the output can not grow, one line says what failed and what is safe, code 74; with room, the job goes on."""
    folder.write_items(2000)
    words = job("jobs:quick", "--checkpoint-interval", "0.001")
    limited = ("sh", "-c", 'ulimit -f 98 && exec "$@"', "sh", *COMMAND)  # blocks of 512 or 1024 bytes
    ended = folder.run(*words, command=limited)
    check_one_line(ended, 74, "storage failed", "File too large", "run the same line again")
    assert not (folder / "out.jsonl").exists()
    committed, before = read_committed(folder / "out.jsonl.checkpoint"), len(runs_in(folder / LOG))
    resumed = folder.run(*words)
    assert resumed.code == 0, resumed.err
    assert records_of(folder / "out.jsonl") == expected_output(2000)
    assert not [index for index in runs_in(folder / LOG)[before:] if committed.has(index)]


def test_line_that_is_no_item_is_named(folder: Folder) -> None:
    """A line that can not be read names file, line and byte; what comes before is kept, and a mended file goes on."""
    folder.write("items.jsonl", "1\n2\n{oops\n4\n")
    words = ["run", "--input", "items.jsonl", "--output", "out.jsonl", "--worker", "jobs:quick"]
    check_one_line(folder.run(*words), 1, "items.jsonl, line 3, byte 4", "not valid JSON")
    folder.write("items.jsonl", "1\n2\n3\n4\n")
    resumed = folder.run(*words)
    assert (resumed.code, resumed.summary["executed"], resumed.summary["resumed_from"]) == (0, 2, 2)


# --- what was left by others ----------------------------------------------------------------------------------------


def interrupt(folder: Folder, *more: str) -> None:
    """Leave a job that was killed while item 3 of 10 was in flight; all others are committed."""
    process = folder.start(*job("jobs:held_at_3", "--checkpoint-interval", "0.01", *more))
    journal = folder / "out.jsonl.checkpoint"
    wait_until(lambda: len(read_committed(journal).ahead) == 6, process)
    kill(process)


def without_locks(folder: Folder, *, times: bool = False) -> dict[str, tuple[object, ...]]:
    """What is in the folder, but for lock files: they tell people who ran last."""
    return {name: there for name, there in folder.snapshot(times=times).items() if not name.endswith(".lock")}


MISMATCHES: dict[str, tuple[list[str], list[str]]] = {
    "other worker": (["--worker", "jobs:quick"], ["another job", "jobs:held_at_3", "jobs:quick"]),
    "other version": (["--job-version", "2"], ["another job", "version None", "'2'"]),
    "other format": (["--format", "jsonl"], ["another job", "'text'", "'jsonl'"]),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_checkpoint_of_another_job_is_refused(folder: Folder, mismatch: str) -> None:
    """A job that is not the one that was interrupted is refused with code 4, names both, and changes nothing."""
    more, said = MISMATCHES[mismatch]
    interrupt(folder)
    before = without_locks(folder)
    check_one_line(folder.run(*job("jobs:held_at_3", *more)), 4, *said, "--fresh")
    assert without_locks(folder) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0\n1\nX\n3\n4\n5\n6\n7\n8\n9\n", "index 0 to 3"),
        ("0\n1\n2\n3\n4\n5\nX\n7\n8\n9\n", "index 6"),
        ("", "index 9"),
    ],
    ids=["before the mark", "ahead of the mark", "empty"],
)
def test_changed_input_is_refused(folder: Folder, text: str, said: str) -> None:
    """An input that is no longer what was done is refused with code 4, says where, and changes nothing."""
    interrupt(folder)
    folder.write("items.txt", text)
    before = without_locks(folder)
    check_mismatch(folder.run(*job("jobs:held_at_3")), "input", said, "--fresh")
    assert without_locks(folder) == before


def test_shortened_input_is_refused(folder: Folder) -> None:
    """An input that ends before what was finished ahead is refused with code 4; restored, it resumes."""
    interrupt(folder)
    folder.write_items(9)
    folder.write("go", "")
    check_mismatch(folder.run(*job("jobs:held_at_3")), "input", "9 items", "index 9", "--fresh")
    assert not (folder / "out.jsonl").exists()
    folder.write_items(10)
    ended = folder.run(*job("jobs:held_at_3"))
    assert ended.code == 0, ended.err
    assert records_of(folder / "out.jsonl") == expected_output(10)


def check_mismatch(ended: Ended, *said: str) -> None:
    """Code 4 and one line of error, beside what the log tells."""
    assert (ended.code, ended.out) == (4, ""), ended.err
    assert "Traceback" not in ended.err
    errors = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, ended.err
    for words in said:
        assert words in errors[0]


def test_changed_output_is_refused(folder: Folder) -> None:
    """A partial output that was written to by others is refused with code 4, and nothing is changed."""
    interrupt(folder)
    partial = folder / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes().replace(b'"number":1', b'"number":7'))
    before = without_locks(folder)
    check_mismatch(folder.run(*job("jobs:held_at_3")), "out.jsonl.partial", "not those that were written", "--fresh")
    assert without_locks(folder) == before


def test_partial_output_without_checkpoint_is_refused(folder: Folder) -> None:
    """A partial output that no checkpoint explains is refused with code 4; --fresh starts anew."""
    interrupt(folder)
    (folder / "out.jsonl.checkpoint").unlink()
    before = without_locks(folder)
    check_mismatch(folder.run(*job("jobs:held_at_3")), "out.jsonl.partial", "--checkpoint", "--fresh")
    assert without_locks(folder) == before
    folder.write("go", "")
    assert folder.run(*job("jobs:held_at_3", "--fresh")).summary["executed"] == 10


def test_damaged_checkpoint(folder: Folder) -> None:
    """A checkpoint of which nothing can be read: `refuse` stops with code 4, else it is moved aside and all is done."""
    interrupt(folder)
    (folder / "out.jsonl.checkpoint").write_text("not a checkpoint\n")
    partial = (folder / "out.jsonl.partial").read_bytes()
    before = without_locks(folder)
    check_mismatch(folder.run(*job("jobs:held_at_3", "--on-damage", "refuse")), "damaged", "--fresh")
    assert without_locks(folder) == before
    folder.write("go", "")
    ended = folder.run(*job("jobs:held_at_3"))
    assert (ended.code, ended.summary["executed"]) == (0, 10)
    assert "damaged" in ended.err
    assert records_of(folder / "out.jsonl") == expected_output(10)
    assert (folder / "out.jsonl.checkpoint.damaged-1").read_text() == "not a checkpoint\n"
    assert (folder / "out.jsonl.partial.damaged-1").read_bytes() == partial


def test_second_run_at_the_same_time_is_refused(folder: Folder) -> None:
    """Of two runs of one output, or of one checkpoint, the second is told who holds it, code 75; the first goes on."""
    words = job("jobs:held_at_3", "--checkpoint", "job.checkpoint", "--checkpoint-interval", "0.01")
    first = folder.start(*words)
    wait_until(lambda: len(read_committed(folder / "job.checkpoint").ahead) == 6, first)
    before = without_locks(folder)
    for second in (words, job("jobs:held_at_3"), [*words, "--output", "other.jsonl"], [*words, "--fresh"]):
        check_one_line(folder.run(*second), 75, f"process {first.pid} ", "another run", "--output")
        assert without_locks(folder) == before
    folder.write("go", "")
    ended = end_of(first)
    assert (ended.code, ended.summary["executed"]) == (0, 10), ended.err
    assert not list(folder.path.glob("*.lock"))


def test_stale_lock_holds_nobody(folder: Folder) -> None:
    """A lock file that a killed run left behind stops nobody, and goes with the next run."""
    interrupt(folder)
    assert (folder / "out.jsonl.lock").exists()
    folder.write("go", "")
    ended = folder.run(*job("jobs:held_at_3"))
    assert (ended.code, ended.summary["executed"]) == (0, 1), ended.err
    assert not (folder / "out.jsonl.lock").exists()


# --- standard output and error that nobody takes ----------------------------------------------------------------------


def closed_pipe() -> int:
    """The write end of a pipe that nobody reads."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def run_with(folder: Folder, stream: str, descriptor: int, *words: str, **options: Any) -> Ended:
    """Run with that descriptor as standard output or error, and close it here."""
    try:
        return folder.run(*words, **{stream: descriptor}, **options)
    finally:
        os.close(descriptor)


def test_nobody_reads_the_summary(folder: Folder) -> None:
    """`run | head` ends quietly: the job is complete, and that is what the code says."""
    ended = run_with(folder, "stdout", closed_pipe(), *JOB)
    assert (ended.code, ended.err) == (0, "")
    assert records_of(folder / "out.jsonl") == expected_output(10)


def test_summary_can_not_be_written(folder: Folder) -> None:
    """When standard output is a full disk, the job is complete all the same, and a line says what is missing."""
    ended = run_with(folder, "stdout", os.open("/dev/full", os.O_WRONLY), *JOB)
    assert ended.code == 0
    assert len(ended.err.splitlines()) == 1
    assert "summary" in ended.err
    assert "No space left on device" in ended.err


def test_status_can_not_be_written(folder: Folder) -> None:
    """`status | head` ends quietly; on a full disk, one line says so, with code 74."""
    interrupt(folder)
    ended = run_with(folder, "stdout", closed_pipe(), "status", "out.jsonl")
    assert (ended.code, ended.err) == (1, "")
    check_one_line(
        run_with(folder, "stdout", os.open("/dev/full", os.O_WRONLY), "status", "out.jsonl")._replace(out=""),
        74,
        "No space left on device",
    )


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(folder: Folder, closing: str) -> None:
    """Standard streams that are closed change neither the job nor the exit code."""
    command = ("sh", "-c", f'exec "$@" {closing}', "sh", *COMMAND)
    assert folder.run(*JOB, command=command).code == 0
    assert records_of(folder / "out.jsonl") == expected_output(10)
    assert folder.run(*JOB, "--concurrency", "0", command=command).code == 2


def test_nobody_reads_the_log(folder: Folder) -> None:
    """`run 2>&1 >summary | head`: an error that nobody reads keeps its exit code."""
    assert run_with(folder, "stderr", closed_pipe(), *JOB, "--input", "missing.txt").code == 2
    assert run_with(folder, "stderr", closed_pipe(), *JOB, "--concurrency", "0").code == 2
    folder.write("jobs.py", FAILING.format(bad="return {1}"))
    assert run_with(folder, "stderr", closed_pipe(), *job("jobs:work")).code == 1


# --- signals ----------------------------------------------------------------------------------------------------------

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
HELD = ("--concurrency", "2", "--checkpoint-interval", "0.01")


def start_held(folder: Folder, worker: str, *more: str, **options: Any) -> subprocess.Popen[str]:
    """Start that worker, standard error in a file, and wait until items 0 to 2 are committed, 3 and 4 in flight."""
    with (folder / "stderr.txt").open("w") as errors:
        process = folder.start(*job(worker, *HELD, *more), stderr=errors, **options)
    journal = folder / "out.jsonl.checkpoint"
    wait_until(lambda: read_committed(journal).mark == 3 and len(runs_in(folder / LOG)) == 5, process)
    return process


def send(folder: Folder, process: subprocess.Popen[str], number: int, answer: str) -> None:
    """Send a signal and wait until the log says what it does."""
    process.send_signal(number)
    wait_until(lambda: answer in (folder / "stderr.txt").read_text(), process)


def end_of_stopped(folder: Folder, process: subprocess.Popen[str]) -> Ended:
    ended = end_of(process)._replace(err=(folder / "stderr.txt").read_text())
    assert "Traceback" not in ended.err
    assert ended.out == ""
    return ended


def check_the_printed_line_resumes(folder: Folder, ended: Ended, left: list[int]) -> None:
    """The last line on standard error, given to a shell as it stands, does what is left and nothing else."""
    line = ended.err.splitlines()[-1]
    assert line.startswith("  ")
    before = len(runs_in(folder / LOG))
    folder.write("go", "")
    resumed = folder.run(line, command=("sh", "-c"))
    assert resumed.code == 0, resumed.err
    assert sorted(runs_in(folder / LOG)[before:]) == left
    assert resumed.summary["executed"] == len(left)
    assert records_of(folder / "out.jsonl") == expected_output(10)


@pytest.mark.parametrize("command", [COMMAND, (str(SCRIPT),)], ids=["module", "script"])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_first_signal_drains(folder: Folder, number: int, code: int, command: tuple[str, ...]) -> None:
    """The first signal hands out nothing more, lets what is in flight finish, and prints the line that resumes."""
    process = start_held(folder, "jobs:held_from_3", "--fresh", "--job-version", "it's 1", command=command)
    send(folder, process, number, "stopping")
    assert process.poll() is None
    folder.write("go", "")
    ended = end_of_stopped(folder, process)
    assert ended.code == code
    assert "stopped at the mark 5" in ended.err
    assert "--fresh" not in ended.err
    assert read_committed(folder / "out.jsonl.checkpoint").mark == 5
    assert not (folder / "out.jsonl.lock").exists()
    check_the_printed_line_resumes(folder, ended, [5, 6, 7, 8, 9])


def test_printed_line_is_short_where_the_command_is_on_the_path(folder: Folder) -> None:
    """Where a shell finds the command by its name, the line that resumes has that name."""
    env = {"PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}"}
    process = start_held(folder, "jobs:held_from_3", "--drain-timeout", "0", command=(str(SCRIPT),), env=env)
    process.send_signal(signal.SIGINT)
    line = end_of_stopped(folder, process).err.splitlines()[-1]
    assert shlex.split(line) == ["async-recovery", *job("jobs:held_from_3", *HELD, "--drain-timeout", "0")]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_second_signal_cancels(folder: Folder, number: int, code: int) -> None:
    """The second signal cancels what is in flight, and what has finished is committed all the same."""
    process = start_held(folder, "jobs:held_from_3", "--drain-timeout", "600")
    send(folder, process, number, "stopping")
    process.send_signal(number)
    ended = end_of_stopped(folder, process)
    assert ended.code == code
    assert "stopped at the mark 3" in ended.err
    check_the_printed_line_resumes(folder, ended, [3, 4, 5, 6, 7, 8, 9])


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_third_signal_ends_at_once(folder: Folder, number: int, code: int) -> None:
    """The third signal ends even a worker that swallows its cancellation; nothing committed is lost."""
    process = start_held(folder, "jobs:stubborn_from_3", "--drain-timeout", "600")
    send(folder, process, number, "stopping")
    send(folder, process, number, "cancelling")
    assert process.poll() is None
    process.send_signal(number)
    assert end_of_stopped(folder, process).code == code
    folder.write("go", "")
    ended = folder.run(*job("jobs:stubborn_from_3", *HELD))
    assert (ended.code, ended.summary["executed"], ended.summary["resumed_from"]) == (0, 7, 3), ended.err
    assert records_of(folder / "out.jsonl") == expected_output(10)


def test_signals_end_a_worker_that_blocks_the_loop(folder: Folder) -> None:
    """Three signals end a process whose worker never gives the loop back; nothing committed is lost."""
    process = folder.start(*job("jobs:blocks_loop_at_3", "--concurrency", "1", "--checkpoint-interval", "0"))
    wait_until(lambda: runs_in(folder / LOG)[-1:] == [3], process)

    def has_ended() -> bool:
        process.send_signal(signal.SIGINT)
        return process.poll() is not None

    wait_until(has_ended)
    ended = end_of(process)
    assert (ended.code, ended.err) == (130, "")
    committed = read_committed(folder / "out.jsonl.checkpoint")
    folder.write("go", "")
    resumed = folder.run(*job("jobs:blocks_loop_at_3", "--concurrency", "1"))
    assert (resumed.code, resumed.summary["executed"]) == (0, 10 - committed.mark), resumed.err


@pytest.mark.parametrize("worker", ["blocks_thread_from_3", "awaits_thread_from_3"])
def test_stopping_does_not_wait_for_threads(folder: Folder, worker: str) -> None:
    """A worker that blocks in a thread for ten minutes holds the end no longer than the drain timeout."""
    process = start_held(folder, f"jobs:{worker}", "--drain-timeout", "0.2")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    ended = end_of_stopped(folder, process)
    assert ended.code == 130
    assert 0.2 <= time.monotonic() - began < 30
    check_the_printed_line_resumes(folder, ended, [3, 4, 5, 6, 7, 8, 9])


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signal_before_the_run_begins(folder: Folder, number: int, code: int) -> None:
    """A signal while the worker's module is imported ends the process at once, and nothing is left behind."""
    folder.write("slow.py", "import time\nopen('importing', 'w').close()\ntime.sleep(600)\n")
    before = folder.snapshot()
    process = folder.start(*job("slow:work"))
    wait_until((folder / "importing").exists, process)
    process.send_signal(number)
    ended = end_of(process)
    assert (ended.code, ended.out, ended.err) == (code, "", "")
    (folder / "importing").unlink()
    assert folder.snapshot() == before


def test_signal_at_any_moment(folder: Folder) -> None:
    """One signal at any moment of a short run: it is stopped and resumable, or complete; never a traceback."""
    folder.write_items(60)
    words = job("jobs:random_latency", "--checkpoint-interval", "0.01", "--drain-timeout", "0.05")
    codes = []
    for step in range(14):
        process = folder.start(*words)
        wait_until((folder / LOG).exists, process)  # made when the worker's module is imported
        time.sleep(0.012 * step)
        process.send_signal(signal.SIGINT)
        ended = end_of(process)
        codes.append(ended.code)
        assert "Traceback" not in ended.err
        assert (ended.code, bool(ended.out), (folder / "out.jsonl").exists()) in [(130, False, False), (0, True, True)]
        if ended.code == 130:
            resumed = folder.run(*words, env={"SLOWNESS": "0"})
            assert resumed.code == 0, resumed.err
        assert records_of(folder / "out.jsonl") == expected_output(60)
        (folder / "out.jsonl").unlink()
        (folder / LOG).unlink()
    assert 130 in codes


def test_fresh_run_that_was_stopped_before_it_began_is_resumed_afresh(folder: Folder) -> None:
    """The printed line keeps --fresh as long as the old checkpoint still lies there: it would be resumed otherwise."""
    interrupt(folder)
    before = read_committed(folder / "out.jsonl.checkpoint")
    process = folder.start(*job("jobs:held_at_3", "--fresh"), command=(sys.executable, "-c", STOPPED_AT_ONCE))
    ended = end_of(process)
    assert ended.code == 130, ended.err
    assert read_committed(folder / "out.jsonl.checkpoint") == before
    assert ended.err.splitlines()[-1].endswith(" --fresh")


STOPPED_AT_ONCE = """
import os
import signal
from async_recovery import FileLedger, cli

opening = FileLedger.open

async def open(self, job):
    os.kill(os.getpid(), signal.SIGINT)
    return await opening(self, job)

FileLedger.open = open
cli.main()
"""


def test_signal_wakes_the_loop(folder: Folder) -> None:
    """A signal is obeyed at once even where nothing else wakes the loop, whichever thread the kernel gives it to."""
    interrupt(folder)
    folder.write("go", "")
    ended = end_of(folder.start(*job("jobs:held_at_3"), command=(sys.executable, "-c", TAKEN_BY_ANOTHER_THREAD)))
    assert ended.code == 130, ended.err
    assert "stopped at the mark 10" in ended.err
    resumed = folder.run(*job("jobs:held_at_3"))
    assert (resumed.code, resumed.summary["executed"]) == (0, 0), resumed.err
    assert records_of(folder / "out.jsonl") == expected_output(10)


TAKEN_BY_ANOTHER_THREAD = """
import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from async_recovery import FileLedger, cli

def take():
    asleep = 0
    while asleep < 30:  # all is done but this audit
        asleep = asleep + 1 if Path(f"/proc/self/task/{os.getpid()}/stat").read_text().split()[2] == "S" else 0
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    time.sleep(600)

async def audit(self):
    await asyncio.to_thread(take)

FileLedger.audit = audit
cli.main()
"""


def test_children_of_the_worker_obey_signals(folder: Folder) -> None:
    """A process that the worker forks does not inherit what signals mean to the run."""
    ended = folder.run(*job("jobs:terminates_child", "--concurrency", "1"))
    assert ended.code == 0, ended.err
    lines = (folder / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["signal"] for line in lines] == [signal.SIGTERM] * 10


# --- status -----------------------------------------------------------------------------------------------------------


def status(folder: Folder, path: str) -> dict[str, Any]:
    """`status --json` of a path, having seen that it touches nothing, and that the plain form says the same state."""
    before = without_locks(folder, times=True)
    ended, plain = folder.run("status", path, "--json"), folder.run("status", path)
    assert without_locks(folder, times=True) == before
    assert (ended.code, ended.err, plain.code, plain.err) == (0, "", 0, "")
    assert plain.out.split()[:2] == ["state", ended.summary["state"]]
    return ended.summary


def test_status_of_a_running_job(folder: Folder) -> None:
    """While a job runs, `status` says so, who holds it and where it stands."""
    process = start_held(folder, "jobs:held_from_3")
    for path in ("out.jsonl", "out.jsonl.checkpoint"):
        found = status(folder, path)
        assert (found["state"], found["mark"], found["ahead"], found["finished"]) == ("running", 3, 0, 3)
        assert found["running"]["pid"] == process.pid
        assert (found["input"], found["source"], found["worker"]) == ("items.txt", "text", "jobs:held_from_3")
    assert f"process {process.pid} on" in folder.run("status", "out.jsonl").out
    wait_until(lambda: status(folder, "out.jsonl")["running"].get("progress"), process)
    progress = status(folder, "out.jsonl")["running"]["progress"]
    assert (progress["finished"], progress["in_flight"]) == (3, 2)
    assert (progress["held_by"], progress["held_attempt"]) == (3, 1)
    assert "item 3 for" in folder.run("status", "out.jsonl").out
    folder.write("go", "")
    assert end_of(process).code == 0


def test_status_of_an_interrupted_job(folder: Folder) -> None:
    """After a kill, `status` tells the mark and what is ahead, and that nobody holds the job."""
    interrupt(folder)
    committed = read_committed(folder / "out.jsonl.checkpoint")
    for path in ("out.jsonl", "out.jsonl.checkpoint", str(folder / "out.jsonl")):
        found = status(folder, path)
        assert (found["state"], found["running"], found["damaged_lines"]) == ("interrupted", None, 0)
        assert (found["mark"], found["ahead"], found["finished"]) == (3, 6, 9)
        assert (found["commits"], found["output_bytes"]) == (committed.commits, committed.offset)


def test_status_of_a_complete_job(folder: Folder) -> None:
    """A complete job that was kept is `complete`; one that was not has no checkpoint, and that is said, with code 2."""
    assert folder.run(*JOB, "--keep-checkpoint").code == 0
    found = status(folder, "out.jsonl")
    assert (found["state"], found["mark"], found["finished"], found["failed"]) == ("complete", 10, 10, 0)
    assert found["output_bytes"] == (folder / "out.jsonl").stat().st_size
    assert folder.run(*JOB).code == 0
    check_one_line(folder.run("status", "out.jsonl"), 2, "no checkpoint out.jsonl.checkpoint", "complete")


def test_status_of_a_damaged_checkpoint(folder: Folder) -> None:
    """A checkpoint with nothing readable is `damaged`; one with a torn last line says where a resume would begin."""
    interrupt(folder)
    journal = folder / "out.jsonl.checkpoint"
    whole = journal.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    journal.write_bytes(whole + last.replace(b'"mark":3', b'"mark":9') + last[:50])
    found = status(folder, "out.jsonl")
    assert (found["state"], found["mark"], found["ahead"], found["damaged_lines"]) == ("interrupted", 3, 6, 1)
    journal.write_bytes(b"not\na checkpoint\n")
    found = status(folder, "out.jsonl")
    assert (found["state"], found["mark"], found["damaged_lines"]) == ("damaged", 0, 2)
    journal.write_bytes(b"")
    assert status(folder, "out.jsonl")["state"] == "damaged"


def test_status_of_a_missing_job(folder: Folder) -> None:
    """Where there is no checkpoint, `status` says what it looked for, with code 2."""
    before = folder.snapshot(times=True)
    check_one_line(folder.run("status", "nothing.jsonl"), 2, "neither nothing.jsonl nor nothing.jsonl.checkpoint")
    check_one_line(folder.run("status", "items.txt"), 2, "items.txt has no checkpoint")
    check_one_line(folder.run("status", "."), 2, ". has no checkpoint")
    check_one_line(folder.run("status"), 2, "PATH")
    assert folder.snapshot(times=True) == before


def test_status_shows_paths_as_they_are(folder: Folder) -> None:
    """What looks like markup in a path is a path."""
    (folder / "a[").mkdir()
    words = [*JOB, "--output", "a[/b].jsonl", "--keep-checkpoint"]
    assert folder.run(*words).code == 0
    assert "a[/b].jsonl.checkpoint" in folder.run("status", "a[/b].jsonl").out


def test_status_where_the_terminal_can_not_show_a_path(folder: Folder) -> None:
    """A path that the terminal's encoding does not have is shown escaped; the JSON form has it as it is."""
    assert folder.run(*JOB, "--output", "é.jsonl", "--keep-checkpoint").code == 0
    env = {"PYTHONIOENCODING": "ascii"}
    ended = folder.run("status", "é.jsonl", env=env)
    assert (ended.code, "\\xe9.jsonl.checkpoint" in ended.out) == (0, True), ended.err
    ended = folder.run("status", "é.jsonl", "--json", env=env)
    assert (ended.code, ended.summary["checkpoint"]) == (0, "é.jsonl.checkpoint"), ended.err
    assert folder.run(*JOB, "--output", "é.jsonl", env=env).summary["output"] == "é.jsonl"
