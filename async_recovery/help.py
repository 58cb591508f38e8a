"""The help, in groups of what one wants to do, and what shells need to complete a command."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

COMMANDS = {
    "Do the work": ("run", "retry-failed"),
    "Look at a job": ("status", "verify", "export"),
    "Keep jobs in a service": ("serve",),
    "Try a job out": ("torture",),
    "At the terminal": ("completion",),
}
OPTIONS = {
    "What to do": (
        *("--input", "--format", "--output", "--worker", "--exec", "--shell", "--max-output", "--save-dir"),
        *("--keep-header", "--dry-run"),
    ),
    "How fast": ("--concurrency", "--rate", "--burst", "--window", "--executor", "--loop"),
    "When items fail": (
        *("--on-error", "--max-failures", "--retries", "--retry-initial", "--retry-maximum", "--timeout"),
        *("--deadline", "--breaker", "--quarantine-after"),
    ),
    "Interrupt and resume": (
        *("--checkpoint", "--checkpoint-interval", "--batch-size", "--drain-timeout", "--fresh", "--keep-checkpoint"),
        *("--job-version", "--on-damage"),
    ),
    "The service": (
        *("--data", "--listen", "--allow-host", "--token-file", "--max-jobs", "--max-queued", "--max-concurrency"),
        *("--max-upload", "--dashboard"),
    ),
    "How to crash-test": ("--items", "--boundaries", "--random", "--seed", "--effects"),
    "What is shown": ("--progress", "--color", "--quiet", "--verbose", "--log-json", "--json", "--watch"),
    "More": ("--version", "--help"),
}
OTHER = "Other options"
"""The heading of options that are in no group; there should be none."""


class Formats(click.Choice):  # type: ignore[type-arg]  # older releases of click know no argument
    """Formats of an input. For the one that many try, and that can not be, there is a hint."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Choose it."""
        if value == "json":
            self.fail(
                "an array is one document: write its items one a line (`jq -c '.[]'`), and give jsonl", param, ctx
            )
        return super().convert(value, param, ctx)


class GroupedCommand(click.Command):
    """A command whose options are shown in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups, as `click` writes them in one."""
        _write_options(self, ctx, formatter)


class GroupedCommands(click.Group):
    """Commands that are shown in groups, as are their options."""

    command_class = GroupedCommand

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands and the options in groups, as `click` writes them in one."""
        records = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                records.append((name, (name, command.get_short_help_str(200))))
        _write(formatter, COMMANDS, records, "Other commands")
        _write_options(self, ctx, formatter)


def mistake(error: click.ClickException) -> str:
    """What `click` says of a mistake, in one line. It guesses by likeness, and --fresh would throw work away."""
    if isinstance(error, click.NoSuchOption):
        if error.option_name == "--resume":
            return "there is no option --resume: leave it out, the same line resumes by itself"
        if error.possibilities and "--fresh" in error.possibilities:
            error.possibilities.remove("--fresh")
    return " ".join(error.format_message().split())


def completion_script(commands: click.Command, name: str, shell: str) -> str:
    """What a shell has to run once to complete the words of a command.

    :param name: the command as the shell knows it.
    :param shell: ``"bash"``, ``"zsh"`` or ``"fish"``.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    return kind(commands, {}, name, f"_{name.replace('-', '_').upper()}_COMPLETE").source()


def _write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    records = []
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
        if record is not None:
            records.append((max(parameter.opts, key=len), record))
    _write(formatter, OPTIONS, records, OTHER)


def _write(
    formatter: click.HelpFormatter,
    groups: dict[str, tuple[str, ...]],
    records: Iterable[tuple[str, tuple[str, str]]],
    other: str,
) -> None:
    left = dict(records)
    widths = [len(record[0]) for record in left.values()]
    for heading, names in [*groups.items(), (other, tuple(left))]:
        found = [left.pop(name) for name in names if name in left]
        if found:
            with formatter.section(heading):
                # The column of the explanations is the same in all groups.
                formatter.write_dl(_aligned(found, min(30, max(widths))))


def _aligned(records: list[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    return [(name.ljust(width), text) for name, text in records]
