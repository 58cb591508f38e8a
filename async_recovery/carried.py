"""Exceptions on their way from one process to another: type, arguments and fields stay what they were.

`pickle` alone calls the type with the arguments of ``Exception``, which many types of users' own do not take.
"""

from __future__ import annotations

import pickle
import traceback
from typing import Any

from .errors import SlowDown, message_of

TRACEBACK_FRAMES = 20


def pack(error: BaseException) -> bytes:
    """The error as bytes, with its traceback as text. It never fails: what can not be carried is left out."""
    slow_down = SlowDown.within(error)
    if slow_down is not None:
        error = slow_down
    kind, message = type(error), message_of(error)
    told = "".join(traceback.format_exception(error, limit=-TRACEBACK_FRAMES))
    for args, fields in ((error.args, error.__dict__), ((message,), {})):
        try:
            packed = pickle.dumps((kind, args, fields, kind.__name__, message, told), 5)
            if message_of(_unpack(*pickle.loads(packed)[:3])) == message:
                return packed
        except Exception:  # whatever a type of the user's own does there
            continue
    return pickle.dumps((None, (message,), {}, kind.__name__, message, told), 5)


def unpack(packed: bytes, where: str) -> BaseException:
    """The error again; one of another type with the same name where its own can not be had here.

    :param where: it was raised, for the note of its traceback.
    """
    try:
        kind, args, fields, name, message, told = pickle.loads(packed)
        error = _unpack(kind, args, fields) if kind is not None else _stand_in(name, message)
    except Exception as failure:  # its type is not here: the rest can not be read either
        return RuntimeError(f"an error came from {where} that can not be read here: {failure!r}")
    error.add_note(f"raised on {where}:\n{told}")
    return error


def _unpack(kind: type[BaseException], args: tuple[Any, ...], fields: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


def _stand_in(name: str, message: str) -> BaseException:
    error: BaseException = type(name, (Exception,), {})(message)
    return error
