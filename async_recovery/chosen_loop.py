"""The event loop that the command line runs on: uvloop, which the extra ``fast`` brings, or asyncio's own."""

from __future__ import annotations

from typing import Any

import click

from .errors import UsageError

_META = f"{__name__}.use_uvloop"


def _choose(context: click.Context, option: click.Parameter, name: str) -> None:
    import importlib.util

    is_there = name != "asyncio" and importlib.util.find_spec("uvloop") is not None
    if name == "uvloop" and not is_there:
        raise UsageError("--loop uvloop: uvloop is not installed: pip install 'async-recovery[fast]'")
    context.meta[_META] = is_there


LOOP = click.option(
    "--loop",
    type=click.Choice(["auto", "asyncio", "uvloop"]),
    default="auto",
    show_default=True,
    envvar="ASYNC_RECOVERY_LOOP",
    show_envvar=True,
    expose_value=False,
    callback=_choose,
    help="The event loop: uvloop (extra fast) where it is installed, or asyncio's own.",
)


def backend_options() -> dict[str, Any]:
    """What `anyio.run` is told by the option of the command that runs."""
    return {"use_uvloop": click.get_current_context().meta.get(_META, False)}
