"""Exceptions on their way from one process to another: type, arguments and fields stay what they were.

`pickle` alone calls the type with the arguments of ``Exception``, which many types of users' own do not take.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import Any

from .errors import SlowDown, message_of

TRACEBACK_FRAMES = 20


def pack(error: BaseException) -> bytes:
    """The error as bytes, with its traceback as text. It never fails: what can not be carried is left out."""
    error = SlowDown.within(error) or error
    kind, message = type(error), message_of(error)
    told = "".join(traceback.format_exception(error, limit=-TRACEBACK_FRAMES))
    ways: list[Callable[[], Any]] = [
        lambda: error.__reduce_ex__(5),  # asked of it alone: libraries (tblib) change how `pickle` takes exceptions
        lambda: (_anew, (kind, error.args), error.__dict__),
        lambda: (_anew, (kind, (message,)), {}),
    ]
    for way in ways:
        try:
            packed = pickle.dumps(way(), 5)
            found = _unpack(packed)
            if type(found) is kind and message_of(found) == message:
                return pickle.dumps((packed, kind.__name__, message, told), 5)
        except Exception:  # whatever a type of the user's own does there
            continue
    return pickle.dumps((b"", kind.__name__, message, told), 5)


def unpack(packed: bytes, where: str) -> BaseException:
    """The error again; one of another type with the same name where its own can not be had here.

    :param where: it was raised, for the note of its traceback.
    """
    whole, name, message, told = pickle.loads(packed)
    try:
        error = _unpack(whole)
    except Exception:  # its type is not here
        stand_in: Any = type(name, (Exception,), {})
        error = stand_in(message)
    error.add_note(f"raised on {where}:\n{told}")
    return error


def _unpack(packed: bytes) -> BaseException:
    make, args, *state = pickle.loads(packed)
    error: BaseException = make(*args)
    if state and state[0]:
        error.__setstate__(state[0])
    return error


def _anew(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    return error
