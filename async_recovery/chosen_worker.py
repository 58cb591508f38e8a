"""The options of the command line that say what is done with an item."""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

import click

from .errors import UsageError

if TYPE_CHECKING:
    from .contracts import Source
    from .workers import Worker

logger = logging.getLogger("async_recovery")

SHELL_WORDS = frozenset({"|", ">", ">>", "<", "&&", "||", ";", "&", "2>", "2>&1"})

_OPTIONS = (
    click.option(
        "--worker",
        help="module:function, looked for in this folder too; or a built-in one: text, http (GET).  [default: text]",
    ),
    click.option(
        "--exec",
        "exec_",
        metavar="COMMAND",
        help="Run a command for each item, without a shell. {} inside a word is the item (its JSON text if it is no "
        "string), {.name} a field of it; with neither, the item is added as the last argument. Whatever an item holds, "
        "it stays inside one argument; put -- before one that may begin with a dash.",
    ),
    click.option(
        "--shell",
        metavar="SCRIPT",
        help="Run a script of /bin/sh for each item. {} outside of quotes is the item, as one word; it never becomes a "
        "part of the script.",
    ),
    click.option(
        "--max-output",
        type=int,
        help="Bytes that a command, or an answer to http, may have for an item.  [default: 10485760]",
    ),
    click.option("--save-dir", metavar="DIR", help="With http: write each body to a file in DIR."),
    click.option(
        "--keep-header",
        multiple=True,
        metavar="NAME",
        help="With http: keep this header of the answer; can be repeated.  [default: content-type]",
    ),
)


def chosen_worker(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options; the command gets as `worker` a function that loads what they name."""

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        if words := click.get_current_context().args:
            raise _too_many(words, given)
        names = ("worker", "exec_", "shell", "max_output", "save_dir", "keep_header")
        command(worker=functools.partial(_load, **{name: given.pop(name) for name in names}), **given)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _too_many(words: list[str], given: dict[str, Any]) -> UsageError:
    """What may have been meant by words that belong to no option."""
    shown = shlex.join(words)
    for option in ("exec", "shell"):
        if (command := given["exec_" if option == "exec" else option]) is not None:
            quoted = shlex.quote(" ".join([command, *words]))
            return UsageError(f"unexpected words {shown}: the command is one word, quote it: --{option} {quoted}")
    cure = f"the file of items is given as --input {shlex.quote(words[0])}" if "input_" in given else "leave them out"
    return UsageError(f"unexpected words {shown}: {cure}")


def tell_of_blanks(source: Source, worker: Worker) -> None:
    """What an item of a command says may name a file, and another one without its outer blanks: say that they go."""
    from .command_worker import CommandWorker
    from .sources import TextSource
    from .standard_input import StandardInput

    lines = source.file if isinstance(source, StandardInput) else source
    if isinstance(worker, CommandWorker) and isinstance(lines, TextSource):
        lines.tells_of_blanks = True


def _load(
    worker: str | None,
    exec_: str | None,
    shell: str | None,
    max_output: int | None,
    save_dir: str | None,
    keep_header: tuple[str, ...],
) -> Worker:
    from . import command_worker
    from .checkpoint import printable
    from .workers import load

    given = {"--worker": worker, "--exec": exec_, "--shell": shell}
    several = [name for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise UsageError(f"{' and '.join(several)} each say what is done with an item: leave one of them")
    if worker != "http" and (save_dir is not None or keep_header):
        raise UsageError("--save-dir and --keep-header belong to --worker http: add it, or leave them out")
    if max_output is not None and worker != "http" and exec_ is None and shell is None:
        raise UsageError("--max-output belongs to --exec, --shell and --worker http: leave it out")
    most = command_worker.MAX_OUTPUT_BYTES if max_output is None else max_output
    if exec_ is not None:
        chosen = command_worker.command(exec_, max_output_bytes=most)
        if shutil.which(chosen.program) is None:
            raise UsageError(
                f"there is no program {printable(chosen.program)!r}: check its name and PATH; what only a shell knows "
                "needs --shell"
            )
        for_a_shell = sorted(SHELL_WORDS.intersection(shlex.split(exec_)))
        if for_a_shell:
            logger.warning(
                "--exec: %s is given to %s as it is, nothing interprets it: a pipe or a redirection needs --shell",
                " ".join(for_a_shell),
                printable(chosen.program),
            )
        return chosen
    if shell is not None:
        return command_worker.shell(shell, max_output_bytes=most)
    if worker == "http":
        if save_dir is not None and os.path.exists(save_dir) and not os.path.isdir(save_dir):
            raise UsageError(f"{printable(save_dir)} is no folder: give --save-dir one; it is made if it is not there")
        from .http_worker import KEEP_HEADERS, HttpWorker

        return HttpWorker(keep_headers=keep_header or KEEP_HEADERS, save_dir=save_dir, max_body_bytes=most)
    return load("text") if worker is None else load_from_here(worker)


def load_from_here(name: str) -> Worker:
    """The worker, also from a module of this folder.

    Only while that is imported does the folder come first in the path: no file of the user's is to be taken for a
    module that we need. After that it is the last, for what the worker imports while it runs.
    """
    from .workers import load

    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return load(name)
    except UsageError as error:
        module = name.partition(":")[0].partition(".")[0]
        in_the_way = taken_for_installed() or _hidden_by_installed(module)
        if not in_the_way:
            raise
        raise UsageError(f"{error}; {in_the_way}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
        sys.path.append(here)


def taken_for_installed() -> str:
    """Which file of this folder was imported although an installed module has its name; nothing if none was."""
    here = os.getcwd()
    elsewhere = [folder for folder in sys.path if folder not in ("", here)]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        is_ours = "." in name or name in ("__main__", __package__)
        if is_ours or not file.startswith(f"{here}{os.sep}"):
            continue
        installed = PathFinder.find_spec(name, elsewhere)
        if installed is not None and installed.origin != file:
            return f"{os.path.relpath(file)} was imported for the installed module {name!r}: give it another name"
    return ""


def _hidden_by_installed(name: str) -> str:
    """Whether a file of this folder was not imported, because a module of its name had been."""
    file = getattr(sys.modules.get(name), "__file__", None) or "built in"
    found = PathFinder.find_spec(name, [os.getcwd()]) if name in sys.modules else None
    if found is None or found.origin in (None, file):
        return ""
    return f"that is {file}, and not {os.path.relpath(found.origin)}: give that another name"
