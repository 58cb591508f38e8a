"""Commands as workers: what they are given, how they fail, and that none of them outlives its run."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from async_recovery import CommandFailed, UsageError, command, run_resumable, shell
from async_recovery.checkpoint import Job
from async_recovery.command_worker import CommandWorker
from async_recovery.file_ledger import command_line
from tests.support.commands import COMMAND, Ended, Folder, children_of, end_of, kill, read_committed, wait_until

ODD = [
    "plain",
    "two words",
    " spaces around ",
    "it's",
    'say "hello"',
    "back\\slash",
    "-n",
    "--help",
    "; touch canary",
    ";rm -rf .",
    "$(touch canary)",
    "`touch canary`",
    "&& touch canary",
    "| touch canary",
    "> canary",
    "'; touch canary; '",
    '"; touch canary; "',
    "*",
    "~",
    "$HOME",
    "${IFS}",
    "{}",
    "{.name}",
    "%s",
    "😀 naïve",
    "a\nb",
    "tab\there",
    "#",
    "",
]
HELD = "echo $$ > began.{}; flock -s gate echo {}"  # waits as long as somebody holds the gate


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """A folder with ten items."""
    path = tmp_path / "here"
    path.mkdir()
    with Folder(path) as folder:
        folder.write_items(10)
        yield folder


def run(folder: Folder, *more: str, items: str = "items.txt") -> Ended:
    return folder.run("run", "--input", items, "--output", "out.jsonl", *more)


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_json(folder: Folder, items: list[Any]) -> None:
    folder.write("odd.jsonl", "".join(json.dumps(item) + "\n" for item in items))


@contextmanager
def gate(folder: Folder) -> Iterator[None]:
    """Commands like `HELD` wait until the block ends."""
    with (folder / "gate").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def groups_of(folder: Folder) -> list[int]:
    """The process group of each command like `HELD` that has begun."""
    return [int(text) for path in folder.path.glob("began.*") if (text := path.read_text().strip())]


def running_in(groups: list[int]) -> list[str]:
    """The processes in these groups, but those that have died and wait for somebody to ask how."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) in groups and state not in "ZX":
            found.append(str(path))
    return found


def begun(folder: Folder, count: int) -> list[int]:
    """The same, once there are so many and each has its child; nothing before."""
    groups = groups_of(folder)
    return groups if len(groups) == count and len(running_in(groups)) >= 2 * count else []


# --- what a command is given ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "begins", "ends"),
    [
        (["--exec", "printf [%s] {}"], "", ""),
        (["--exec", "printf [%s]"], "", ""),
        (["--exec", "printf '[%s]' 'a b{}c'"], "a b", "c"),
        (["--shell", "printf '[%s]' {}"], "", ""),
        (["--shell", "printf '[%s]' a{}'c'"], "a", "c"),
        (["--shell", 'x="$1"; printf "[%s]" "$x"'], "", ""),
    ],
)
def test_whatever_an_item_holds_it_is_one_argument(folder: Folder, how: list[str], begins: str, ends: str) -> None:
    """Items with spaces, quotes, line ends, dashes and words of a shell arrive as they are, in one argument each."""
    write_json(folder, ODD)
    ended = run(folder, *how, items="odd.jsonl")
    assert ended.code == 0, ended.err
    assert [(record["index"], record["stdout"]) for record in records_of(folder / "out.jsonl")] == [
        (index, f"[{begins}{item}{ends}]") for index, item in enumerate(ODD)
    ]
    assert {path.name for path in folder.path.iterdir()} == {"items.txt", "odd.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    "how", [["--exec", "printf [%s] {.name} x{.name}"], ["--shell", "printf [%s] {.name} x{.name}"]]
)
def test_fields_of_a_csv_are_one_argument_each(folder: Folder, how: list[str]) -> None:
    """A field of a row, with quotes and line ends in it, stays inside one argument wherever the command has it."""
    names = [name for name in ODD if name]
    quoted = ['"' + name.replace('"', '""') + '"' for name in names]
    (folder / "odd.csv").write_bytes("\n".join(["name,other", *(f"{name},x" for name in quoted)]).encode())
    assert run(folder, *how, items="odd.csv").code == 0
    assert [record["stdout"] for record in records_of(folder / "out.jsonl")] == [f"[{n}][x{n}]" for n in names]
    assert not (folder / "canary").exists()


def test_items_of_a_text_file_are_one_argument_each(folder: Folder) -> None:
    """The lines of a text file, too."""
    lines = [item for item in ODD if item and "\n" not in item and item == item.strip()]
    (folder / "odd.txt").write_text("\n".join(lines))
    assert run(folder, "--exec", "printf [%s] {} {}", items="odd.txt").code == 0
    assert [record["stdout"] for record in records_of(folder / "out.jsonl")] == [f"[{n}][{n}]" for n in lines]


def test_lines_are_items_exactly_as_they_are(folder: Folder) -> None:
    """With `--format lines` each line is an item with its blanks, an empty one too; the same after a kill."""
    folder.write("names.txt", " a\nb \n\n\tc\t\r\nstop\n \n")
    words = ("run", "--input", "names.txt", "--output", "out.jsonl", "--format", "lines", "--concurrency", "1")
    how = ("--shell", "test ! -e gate || test {} != stop || kill -9 $PPID; printf [%s] {}", "--batch-size", "1")
    (folder / "gate").touch()
    assert folder.run(*words, *how).code == 1
    assert read_committed(folder / "out.jsonl.checkpoint").mark == 4
    (folder / "gate").unlink()
    ended = folder.run(*words, *how)
    assert (ended.code, ended.summary["executed"]) == (0, 2), ended.err
    assert "--format" not in ended.err
    records = [json.loads(line)["stdout"] for line in (folder / "out.jsonl").read_text().splitlines()]
    assert records == ["[ a]", "[b ]", "[]", "[\tc\t]", "[stop]", "[ ]"]


@pytest.mark.parametrize("how", [["--exec", "echo {}"], ["--shell", "echo {}"], ["--worker", "text"]])
@pytest.mark.parametrize("input_", ["names.txt", "-"])
def test_blanks_that_a_command_does_not_get_are_told_of_once(folder: Folder, how: list[str], input_: str) -> None:
    """A line of text that loses its outer blanks may have named another file: one warning, for commands."""
    names = folder.write("names.txt", "a\r\n\n b\n c\n")
    with names.open() as stdin:
        ended = folder.run("run", "--input", input_, "--output", "out.jsonl", *how, stdin=stdin)
    assert ended.code == 0, ended.err
    told = [line for line in ended.err.splitlines() if "--format lines" in line]
    assert len(told) == (0 if how[0] == "--worker" else 1), ended.err
    assert all("WARNING" in line and "the line ' b' is taken for the item 'b'" in line for line in told)


@pytest.mark.parametrize(
    ("words", "item", "given"),
    [
        ("echo", 5, ["echo", "5"]),
        ("echo a", "b c", ["echo", "a", "b c"]),
        ("echo {} {}", "x", ["echo", "x", "x"]),
        ("echo --name={}.txt end", "x", ["echo", "--name=x.txt", "end"]),
        (["echo", "{.a}{}"], {"a": "é"}, ["echo", 'é{"a":"é"}']),
        (["echo", "{.a b}", "{.n}"], {"a b": None, "n": [1, "x"]}, ["echo", "null", '[1,"x"]']),
        ("awk '{print $1}' {}", "f", ["awk", "{print $1}", "f"]),
        ("echo {print} {.} {a,b}", "x", ["echo", "{print}", "{.}", "{a,b}", "x"]),
        ("echo '{} {}'", "{.a}", ["echo", "{.a} {.a}"]),
    ],
)
def test_what_stands_for_the_item(words: Any, item: Any, given: list[str]) -> None:
    """`{}` is the item, a string as it is and else its JSON text; `{.name}` is a field; other braces are left alone."""
    assert command(words).words(item) == [word.encode() for word in given]


@pytest.mark.parametrize(
    ("words", "item", "said"),
    [
        ("echo {.a}", "x", "no object"),
        ("echo {.a}", {"b": 1}, "no field of that name"),
        ("echo {}", "a\0b", "NUL byte"),
    ],
)
def test_an_item_without_its_command(words: str, item: Any, said: str) -> None:
    """An item that lacks a field, or can be in no argument, fails; no other command runs in its place."""
    with pytest.raises(ValueError, match=said):
        command(words).words(item)


def test_the_shell_gets_the_item_as_a_parameter() -> None:
    """The text of the script is the same for each item."""
    found = shell("cat {} {.a} '{x}' {.a}")
    script = b"""cat "${1}" "${2}" '{x}' "${2}\""""
    assert found.words({"a": 1}) == [b"/bin/sh", b"-c", script, b"sh", b'{"a":1}', b"1"]
    assert shell("echo $1").words("x") == [b"/bin/sh", b"-c", b"echo $1", b"sh", b"x"]


@pytest.mark.parametrize(
    ("make", "words", "said"),
    [
        (command, "", "a program and its arguments"),
        (command, [], "a program and its arguments"),
        (command, ["echo", 5], "a program and its arguments"),
        (command, None, "a program and its arguments"),
        (command, "echo 'a", "No closing quotation"),
        (command, "{} x", "would depend on the item"),
        (command, ["echo", "a\0b"], "NUL byte"),
        (shell, "echo", "write {} there"),
        (shell, "echo '{}'", "in quotes"),
        (shell, 'echo "a {} b"', "in quotes"),
        (shell, "echo \\{}", "in quotes"),
        (shell, 5, "must be a string"),
    ],
)
def test_a_command_that_can_not_be_meant(make: Any, words: Any, said: str) -> None:
    """A command that can not be run, or would not do what it looks like, is refused before anything begins."""
    with pytest.raises(UsageError, match=said):
        make(words)


# --- what comes of it -----------------------------------------------------------------------------------------------


async def outcome(worker: CommandWorker, tmp_path: Path, item: Any = "x", **more: Any) -> dict[str, Any]:
    """The one record of a run over one item."""
    output = tmp_path / "outcome.jsonl"
    await run_resumable(worker, [item], output=output, on_error="record", **more)
    return records_of(output)[0]


@pytest.mark.parametrize(
    ("worker", "stdout"),
    [
        (shell("printf 'é\\n\\n'; : {}"), "é\n\n"),
        (shell("printf 'a\\377\\0b'; : {}"), "a\\xff\0b"),
        (shell("cat; echo {}"), "x\n"),
        (shell("echo said >&2; : {}"), ""),
        (shell("exec <&- >&-; : {}"), ""),
        (shell("head -c 300000 /dev/zero | tr '\\0' y; : {}"), "y" * 300_000),
        (shell("ps -o pgid= $$ | tr -d ' ' | grep -qx $$ && echo own {}"), "own x\n"),
        (shell("trap '' INT; kill -PIPE $$; echo no {}"), None),
    ],
)
async def test_result_of_a_command(tmp_path: Path, worker: CommandWorker, stdout: str | None) -> None:
    """Its output is text, odd bytes escaped, with nothing on standard input, in a group and with signals of its own."""
    record = await outcome(worker, tmp_path)
    if stdout is None:
        assert record["error"]["message"] == "the shell command was killed by SIGPIPE"
    else:
        assert record == {"index": 0, "stdout": stdout, "exit_status": 0}


@pytest.mark.parametrize(
    ("worker", "item", "message", "status"),
    [
        (command("false"), "x", "false ended with exit status 1", 1),
        (shell("echo $$ >&2; exit 22 # {}"), "x", "the shell command ended with exit status 22", 22),
        (shell("kill -KILL $$ # {}"), "x", "the shell command was killed by SIGKILL", -9),
        (command("echo"), "x" * 200_000, "echo can not be started: Argument list too long", None),
        (command("/not/there"), "x", "there can not be started: No such file or directory", None),
        (
            shell("exec yes {}", max_output_bytes=1000),
            "x",
            "the shell command wrote more than 1000 bytes to standard output (--max-output)",
            None,
        ),
    ],
)
async def test_failure_of_a_command(
    tmp_path: Path, worker: CommandWorker, item: str, message: str, status: int | None
) -> None:
    """Any exit status but 0, death by a signal, too much output: the item's failure, in words that never differ."""
    assert await outcome(worker, tmp_path, item) == {
        "index": 0,
        "error": {"type": "CommandFailed", "message": message},
        "item": item,
    }
    with pytest.raises(CommandFailed) as failed:
        await worker(item)
    assert failed.value.exit_status == status


async def test_output_of_just_the_bound_is_kept(tmp_path: Path) -> None:
    """The bound is the most that is allowed."""
    assert (await outcome(command("printf 12345{}", max_output_bytes=6), tmp_path))["stdout"] == "12345x"
    assert "error" in await outcome(command("printf 123456{}", max_output_bytes=6), tmp_path)


async def test_standard_error_is_told_and_not_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The end of what a failed command says goes to the log alone, as one line without control characters."""
    caplog.set_level("INFO", "async_recovery")
    record = await outcome(
        shell("head -c 9000 /dev/zero | tr '\\0' - >&2; printf 'a\\nb\\033[1m' >&2; exit {}"), tmp_path, 3
    )
    said = [entry.getMessage() for entry in caplog.records if " said: " in entry.getMessage()]
    assert record["error"]["message"] == "the shell command ended with exit status 3"
    assert len(said) == 1
    assert said[0].endswith("--a\\nb\\x1b[1m")
    assert len(said[0]) < 2500


async def test_a_command_that_fails_is_tried_again(tmp_path: Path) -> None:
    """The policies of a run hold for commands as for any worker."""
    (tmp_path / "count").touch()
    worker = shell(f"cd {tmp_path}; echo {{}} >> count; [ $(wc -l < count) -ge 3 ]")
    summary = await run_resumable(worker, ["x"], output=tmp_path / "out.jsonl", retry=5)
    assert (summary.executed, summary.failed) == (3, 0)


def test_a_failed_command_stops_the_run_and_says_how(folder: Folder) -> None:
    """With nothing else said, the first failure ends the run, with what the command said just before."""
    ended = run(folder, "--shell", "echo $1 is bad >&2; [ $1 -ne 3 ]", "--concurrency", "1")
    assert ended.code == 1
    assert "item '3') said: 3 is bad" in ended.err
    assert "CommandFailed: the shell command ended with exit status 1" in ended.err.splitlines()[-1]


async def test_a_dead_keeper_fails_what_it_ran_and_nothing_else(tmp_path: Path) -> None:
    """Items whose keeper is killed have failed by the usual policy; the next ones get a new one."""
    worker = shell("[ $1 -ne 3 ] || kill -KILL $PPID; echo $1")
    await run_resumable(worker, range(6), output=tmp_path / "out.jsonl", concurrency=1, on_error="record")
    records = records_of(tmp_path / "out.jsonl")
    assert [record.get("stdout") for record in records] == ["0\n", "1\n", "2\n", None, "4\n", "5\n"]
    assert records[3]["error"]["message"] == "the process that runs the commands was killed"


async def test_one_worker_in_two_runs_at_once(tmp_path: Path) -> None:
    """The end of one run does not end the commands of the other."""
    worker = shell(f"cd {tmp_path}; [ $1 = quick ] || until [ -e go ]; do sleep 0.05; done; echo {{}}")
    slow = asyncio.create_task(run_resumable(worker, ["slow"], output=tmp_path / "slow.jsonl"))
    await run_resumable(worker, ["quick"], output=tmp_path / "quick.jsonl")
    (tmp_path / "go").touch()
    assert (await slow).failed == 0


# --- which job it is ------------------------------------------------------------------------------------------------


def test_another_command_does_not_resume_the_job(folder: Folder) -> None:
    """The command is part of the job: one that differs in a word is refused with code 4, and the right one goes on."""
    secret = "[ {} -ne 5 ] || [ -e mended ] && echo s3cret"
    assert run(folder, "--shell", secret, "--concurrency", "1").code == 1
    journal = (folder / "out.jsonl.checkpoint").read_bytes()
    assert b"s3cret" not in journal
    other = run(folder, "--shell", f"{secret} ", "--concurrency", "1")
    assert other.code == 4
    assert "worker 'shell sha256:" in other.err
    assert (folder / "out.jsonl.checkpoint").read_bytes() == journal
    shown = json.loads(folder.run("status", "out.jsonl", "--json").out)
    assert shown["worker"].startswith("shell sha256:")
    assert folder.run("verify", "out.jsonl").code == 0
    (folder / "mended").touch()
    again = run(folder, "--shell", secret, "--concurrency", "1")
    assert (again.code, again.summary["resumed_from"], again.summary["executed"]) == (0, 5, 5)


def test_names_of_commands() -> None:
    """Commands that differ in words, in where they are split or in their kind are different jobs; a bound is not."""
    commands = [command("echo a b"), command(["echo", "a b"]), command("echo a b x"), shell("echo a b {}")]
    assert len({one.name for one in commands}) == 4
    assert command("echo 'a' b {}").name == command("echo a b", max_output_bytes=5).name


def test_hints_name_the_option() -> None:
    """A command line that a message proposes has the option that the job was given."""
    jobs = [Job("text", name, None, "jsonl") for name in (command("echo").name, shell("echo {}").name, "jobs:work")]
    assert [command_line("retry-failed", "out", job=job).split(" ", 3)[3] for job in jobs] == [
        "--exec COMMAND",
        "--shell COMMAND",
        "--worker jobs:work",
    ]


def test_failed_commands_are_retried(folder: Folder) -> None:
    """`retry-failed` takes a command as `run` does."""
    words = ("--shell", "[ {} -ne 5 ] || [ -e mended ]")
    assert run(folder, *words, "--on-error", "record").code == 3
    (folder / "mended").touch()
    assert folder.run("retry-failed", "out.jsonl", *words).code == 0
    assert [record["exit_status"] for record in records_of(folder / "out.jsonl")] == [0] * 10


@pytest.mark.parametrize(("words", "told"), [("echo {} | wc", "|"), ("echo {} > f_{}", ">"), ("echo 'a|b' {}", None)])
def test_words_of_a_shell_that_nothing_interprets_are_told_of(folder: Folder, words: str, told: str | None) -> None:
    """They are arguments all the same; one warning names `--shell`."""
    ended = run(folder, "--exec", words)
    assert ended.code == 0, ended.err
    warned = [line for line in ended.err.splitlines() if "WARNING" in line]
    assert len(warned) == (1 if told else 0), ended.err
    assert all(f"--exec: {told} is given to echo as it is" in line and "--shell" in line for line in warned)
    assert records_of(folder / "out.jsonl")[3]["stdout"].startswith(words.split()[1].replace("{}", "3").strip("'"))


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "worker and command": (["--worker", "text", "--exec", "echo"], ["--worker and --exec", "leave one of them"]),
    "command and script": (["--exec", "echo", "--shell", "echo {}"], ["--exec and --shell", "leave one of them"]),
    "no such program": (["--exec", "crul {}"], ["no program 'crul'", "PATH"]),
    "word of a shell": (["--exec", "set -e {}"], ["no program 'set'", "--shell"]),
    "open quote": (["--exec", "echo 'a"], ["No closing quotation"]),
    "no command": (["--exec", ""], ["a program and its arguments"]),
    "script without the item": (["--shell", "echo"], ["write {} there"]),
    "item in quotes": (["--shell", "echo '{}'"], ["outside of them"]),
    "command in several words": (["--exec", "echo", "{}", "a b"], ["quote it: --exec 'echo {} a b'"]),
    "script in several words": (["--shell", "wc", "<", "{}"], ["quote it: --shell 'wc < {}'"]),
    "no folder": (["--worker", "http", "--save-dir", ""], ["save_dir (--save-dir) is ''", "name a folder"]),
    "negative bound": (["--exec", "echo", "--max-output", "-1"], ["--max-output", "-1"]),
    "bound without a command": (["--max-output", "5"], ["--max-output", "leave it out"]),
    "folder that is a file": (["--worker", "http", "--save-dir", "items.txt"], ["items.txt is no folder"]),
    "folder without http": (["--save-dir", "x"], ["--save-dir", "--worker http"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_changes_nothing(folder: Folder, mistake: str) -> None:
    """A mistake in the command is one clear line with code 2, before any work, and leaves the folder as it was."""
    words, said = MISTAKES[mistake]
    before = folder.snapshot()
    ended = run(folder, *words)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1), ended.err
    assert [part for part in said if part not in ended.err] == []
    assert folder.snapshot() == before


# --- and that none outlives its run ---------------------------------------------------------------------------------


def start_held(folder: Folder, *more: str, **options: Any) -> Any:
    words = ("run", "--input", "items.txt", "--output", "out.jsonl", "--shell", HELD, "--concurrency", "4", *more)
    return folder.start(*words, **options)


def test_kill_9_leaves_no_command_behind(folder: Folder) -> None:
    """What a killed run had started is killed with it, whole groups, and the same line carries on."""
    with gate(folder):
        process = start_held(folder)
        groups = wait_until(lambda: begun(folder, 4), process)
        kill(process)
        wait_until(lambda: not running_in(groups))
    ended = end_of(start_held(folder))
    assert ended.code == 0, ended.err
    assert [record["stdout"] for record in records_of(folder / "out.jsonl")] == [f"{n}\n" for n in range(10)]


AWAY = "setsid -f sh -c 'echo $$ > began.$1; sleep 600 & sleep 600' sh {}; until [ -s began.{} ]; do sleep 0.01; done"


def test_what_has_left_the_session_of_its_command_ends_with_the_run(folder: Folder) -> None:
    """A daemon that a command has left is killed when the run ends, with what the daemon has started."""
    ended = run(folder, "--shell", AWAY)
    assert ended.code == 0, ended.err
    daemons = groups_of(folder)
    assert len(daemons) == 10
    assert not running_in(daemons)


def test_kill_9_leaves_no_daemon_behind(folder: Folder) -> None:
    """What has left the session of a command is killed with the run, too."""
    with gate(folder):
        process = folder.start(
            *("run", "--input", "items.txt", "--output", "out.jsonl", "--concurrency", "4"),
            *("--shell", f"{AWAY}; flock -s gate true"),
        )
        daemons = wait_until(lambda: begun(folder, 4), process)
        kill(process)
        wait_until(lambda: not running_in(daemons))


@pytest.mark.parametrize("killed", ["keeper", "guard"])
@pytest.mark.parametrize("script", [HELD, f"{AWAY}; flock -s gate echo {{}}"], ids=["commands", "daemons"])
def test_kill_9_of_the_keeper_leaves_no_command_behind(folder: Folder, killed: str, script: str) -> None:
    """When one of the processes that keep the commands is killed, none of those runs on once the run has ended."""
    words = ("run", "--input", "items.txt", "--output", "out.jsonl", "--shell", script, "--concurrency", "4")
    with gate(folder):
        process = folder.start(*words)
        groups = wait_until(lambda: begun(folder, 4), process)
        (guard,) = children_of(process.pid)
        (keeper,) = children_of(guard)
        os.kill(keeper if killed == "keeper" else guard, signal.SIGKILL)
        ended = end_of(process)
        assert (ended.code, running_in([*groups, guard])) == (1, [])
        assert "the process that runs the commands was killed" in ended.err
    assert folder.run(*words).code == 0
    assert [record["stdout"] for record in records_of(folder / "out.jsonl")] == [f"{n}\n" for n in range(10)]


def test_kill_9_of_a_run_whose_fork_lives_on(folder: Folder) -> None:
    """A child that the killed process had forked holds its end of the socket open; the commands die all the same."""
    folder.write(
        "job.py",
        "import asyncio, os, sys, time\n"
        "from async_recovery import run_resumable, shell\n"
        "async def fork():\n"
        "    while len([n for n in os.listdir('.') if n.startswith('began.')]) < 4: await asyncio.sleep(0.01)\n"
        "    if os.fork() == 0:\n"
        "        os.setsid(); os.close(1); os.close(2)\n"
        "        open('forked', 'w').write(str(os.getpid()))\n"
        "        time.sleep(600)\n"
        "async def main():\n"
        "    forking = asyncio.create_task(fork())\n"
        f"    await run_resumable(shell({HELD!r}), range(10), output='out.jsonl', concurrency=4)\n"
        "asyncio.run(main())\n",
    )
    with gate(folder):
        process = folder.start(command=(sys.executable, "job.py"))
        groups = wait_until(lambda: begun(folder, 4), process)
        fork = int(wait_until(lambda: (folder / "forked").exists() and (folder / "forked").read_text(), process))
        try:
            kill(process)
            wait_until(lambda: not running_in(groups))
            assert running_in([fork])
        finally:
            os.kill(fork, signal.SIGKILL)


def test_ctrl_c_drains(folder: Folder) -> None:
    """A Ctrl-C of the terminal reaches the run alone: its commands come to their ends and are not repeated."""
    with gate(folder):
        process = start_held(folder, start_new_session=True)
        wait_until(lambda: begun(folder, 4), process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        said = [process.stderr.readline()]
        while "stopping" not in said[-1]:
            said.append(process.stderr.readline())
    ended = end_of(process)
    assert ended.code == 130, ended.err
    committed = read_committed(folder / "out.jsonl.checkpoint")
    assert committed.mark + len(committed.ahead) == 4
    assert end_of(start_held(folder)).summary["executed"] == 6


@pytest.mark.parametrize("signals", [2, 3])
def test_more_ctrl_c_kills_the_commands(folder: Folder, signals: int) -> None:
    """The second one cancels, the third one leaves at once; with either, no command goes on."""
    with gate(folder):
        process = start_held(folder, start_new_session=True)
        groups = wait_until(lambda: begun(folder, 4), process)
        for count in range(signals):
            os.killpg(process.pid, signal.SIGINT)
            while count < 2 and "again to" not in process.stderr.readline():  # signals that come together are one
                pass
        assert end_of(process).code == 130
        wait_until(lambda: not running_in(groups))


async def test_cancelling_kills_the_whole_group(folder: Folder) -> None:
    """When a cancelled run has ended, no process of its commands runs any more."""
    with gate(folder):
        worker = shell(f"cd {folder.path}; {HELD}")
        task = asyncio.create_task(
            run_resumable(worker, range(4), output=folder / "out.jsonl", concurrency=4, drain_timeout=0)
        )
        groups = await asyncio.to_thread(wait_until, lambda: begun(folder, 4))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_until, lambda: not running_in(groups))


async def test_a_cancelled_attempt_kills_its_group_alone(folder: Folder) -> None:
    """Which is what a timeout does: that command is gone when the attempt has ended, and the others go on."""
    session = shell(f"cd {folder.path}; {HELD}").begin()
    with gate(folder):
        first, second = (asyncio.ensure_future(session(item)) for item in (1, 2))
        await asyncio.to_thread(wait_until, lambda: begun(folder, 2))
        group = int((folder / "began.1").read_text())
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.to_thread(wait_until, lambda: not running_in([group]))
        assert not second.done()
    assert await second == {"stdout": "2\n", "exit_status": 0}
    await session.aclose()


async def test_what_a_command_leaves_in_the_background_is_killed(folder: Folder) -> None:
    """A command has ended when its own process has: what it has started holds up nothing, and does not go on."""
    worker = shell(f"cd {folder.path}; echo $$ > began.{{}}; sleep 600 & sleep 600 & echo done")
    assert await worker("x") == {"stdout": "done\n", "exit_status": 0}
    groups = groups_of(folder)
    assert groups
    await asyncio.to_thread(wait_until, lambda: not running_in(groups))


async def test_a_process_that_has_left_the_group_holds_up_nothing(folder: Folder) -> None:
    """One in a session of its own that holds standard output open is not waited for, but ends with the run."""
    leave = "setsid sh -c 'echo $$ > left; exec sleep 600' & until [ -s left ]; do :; done; echo {}"
    session = shell(f"cd {folder.path}; {leave}").begin()
    try:
        assert await session("done") == {"stdout": "done\n", "exit_status": 0}
        assert running_in([int((folder / "left").read_text())])
    finally:
        await session.aclose()
    assert not running_in([int((folder / "left").read_text())])


def test_more_commands_at_once_than_open_files_are_allowed(folder: Folder) -> None:
    """The keeper raises the soft limit when it meets it."""
    folder.write_items(60)
    limited = ("prlimit", "--nofile=64:4096", *COMMAND)
    with gate(folder):
        process = start_held(folder, "--concurrency", "60", command=limited)
        wait_until(lambda: begun(folder, 60), process)
    ended = end_of(process)
    assert ended.code == 0, ended.err
