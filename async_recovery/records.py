"""An outcome as its line in the output.

A record is one JSON object without its line end, the same bytes in every run of a deterministic worker:

* a mapping, dataclass or msgspec Struct: its fields, with ``"index"`` before them;
* any other value: ``{"index": i, "result": value}``;
* a recorded failure: ``{"index": i, "error": {"type": …, "message": …}, "item": …}``.

Refused, because the line would not be faithful or not repeatable: sets (their order differs from process to
process), NaN and infinity (JSON has no form for them), keys that are one and the same in JSON (1 and "1"), a
``msgspec.Raw`` that is not JSON on one line, a field ``index`` of the result's own, the very form of a recorded
failure.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import msgspec

from .checkpoint import printable
from .errors import ResultRefused, describe, message_of


def _other_types(value: Any) -> Any:
    """What msgspec asks for a type it does not know: mappings other than dict are written as dicts."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"an object of type {type(value).__qualname__} has no JSON form")


_encode = msgspec.json.Encoder(enc_hook=_other_types).encode
_decode = msgspec.json.Decoder().decode
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# Values of these very types (not of subclasses) are written faithfully whatever they are.
_PLAIN = frozenset({str, int, bool, type(None)})
_PLAIN_OR_FINITE = _PLAIN | {float}
_has_only_str = frozenset({str}).issuperset


def encode_record(index: int, result: Any) -> bytes:
    """The record of a result.

    :param index: 0-based position of the item.
    :param result: what the worker returned; it is not changed.
    :raises ResultRefused: if the result has no faithful JSON form, with the reason.
    """
    if type(result) is dict and "index" not in result:
        for key, value in result.items():
            kind = type(value)
            if type(key) is not str or (kind not in _PLAIN and not (kind is float and isfinite(value))):
                break
        else:
            with_index = {"index": index, **result}
            try:  # here, and not a call away: this is the way of most records
                return _encode(with_index)
            except Exception:
                return _encode_any(with_index)
    if isinstance(result, msgspec.Raw):
        result = _decode_raw(result)
    data = _encode_any(result)
    if type(result) not in _PLAIN:
        _check(result, data)
    if data[0] != 0x7B:  # not an object
        return b'{"index":%d,"result":%b}' % (index, data)
    if len(data) == 2:
        return b'{"index":%d}' % index
    return b'{"index":%d,%b' % (index, data[1:])


def _encode_any(result: Any) -> bytes:
    try:
        return _encode(result)
    except Exception as error:  # msgspec raises several types, and a user's own property any other
        raise ResultRefused(f"the result can not be written as JSON ({describe(error)})") from error


def encode_failure(index: int, item: Any, error: BaseException) -> bytes:
    """The record of a failure that takes its item's place in the output.

    :param index: 0-based position of the item.
    :param item: the whole item, as it was given to the worker.
    :param error: what the worker raised; its type's name and its message are kept.
    :raises ResultRefused: if the item has no faithful JSON form, with the reason.
    """
    try:
        whole = _encode(item)
        text = _encode({"type": type(error).__name__, "message": printable(message_of(error))})
    except Exception as reason:
        raise ResultRefused(f"the failed item can not be written as JSON ({describe(reason)})") from reason
    _refuse_unfaithful(item, whole)
    return b'{"index":%d,"error":%b,"item":%b}' % (index, text, whole)


FAILURE_MARK = b'"error":{"type":'
"""Stands behind the index of every recorded failure; other records may hold it too."""


class FailedWith(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The error of a recorded failure: the name of its type, and its message."""

    type: str
    message: str


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recorded failure, its item as JSON gives it back."""

    index: int
    error: FailedWith
    item: Any


_decode_failure = msgspec.json.Decoder(Failure).decode


def read_failure(record: bytes) -> Failure | None:
    """What a record says if it is that of a failure; None if it is that of a result.

    :raises ValueError: if it can not be read at all.
    """
    if not record.startswith(b"," + FAILURE_MARK, record.find(b",")):
        return None
    try:
        return _decode_failure(record)
    except msgspec.ValidationError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(describe(error)) from error


def _refuse_index() -> None:
    raise ResultRefused('the result has a field "index" of its own: rename it, the record\'s index is written there')


def _check(result: Any, data: bytes) -> None:
    """Refuses what msgspec would write, but not faithfully."""
    _refuse_unfaithful(result, data)
    if data[0] == 0x7B and (data.find(b'"index":') >= 0 or data.find(b'"error":') >= 0):
        fields = _fields_of(data)
        if "index" in fields:
            _refuse_index()
        if fields.keys() == {"error", "item"} and _is_failure(fields["error"]):
            raise ResultRefused(
                'the result has the very form of a recorded failure ("error" with "type" and "message", "item"): '
                "raise an exception, or rename a field"
            )


def _is_failure(error: msgspec.Raw) -> bool:
    try:
        return _fields_of(error).keys() == {"type", "message"}
    except msgspec.DecodeError:
        return False


def _refuse_unfaithful(value: Any, data: bytes) -> None:
    """Walks `value`, which is `data` in JSON: where that has no null, no float in it is NaN or infinite."""
    try:
        _walk(value, (_PLAIN if data.find(b"null") >= 0 else _PLAIN_OR_FINITE).issuperset)
    except RecursionError:
        raise ResultRefused("the value is nested too deeply to be checked") from None


def _walk(value: Any, has_only_plain: Callable[[Iterable[type]], bool]) -> None:
    """Long lists of plain values are passed at C speed."""
    if isinstance(value, float):
        if not isfinite(value):
            raise ResultRefused(f"the value holds {value}, which JSON can not hold: use None or a string")
        return
    inside = _inside(value)
    if not has_only_plain(map(type, inside)):
        for part in inside:
            if type(part) not in _PLAIN:
                _walk(part, has_only_plain)


def _inside(value: Any) -> Sequence[Any]:
    """The values directly inside `value`, as far as JSON would show them."""
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, (dict, Mapping)):  # a dict is told at once, by itself
        if _has_only_str(map(type, value)):
            return list(value.values())
        if len(_fields_of(_encode(value))) != len(value):
            raise ResultRefused("two keys of a mapping are one and the same in JSON: one of their values would be lost")
        return [*value, *value.values()]
    if isinstance(value, msgspec.Struct):
        return [getattr(value, name) for name in value.__struct_fields__]
    if isinstance(value, set | frozenset):
        raise ResultRefused(f"the value holds a {type(value).__name__}, whose order changes: use sorted(...)")
    if isinstance(value, msgspec.Raw):
        _decode_raw(value)
        if b"\n" in bytes(value) or b"\r" in bytes(value):
            raise ResultRefused("the value holds a raw line end (msgspec.Raw): a record is one line")
        return []
    if isinstance(value, enum.Enum):
        return [value.value]
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if hasattr(type(value), "__attrs_attrs__"):  # msgspec writes whatever it holds, not its fields alone
        names = [*getattr(value, "__dict__", ()), *(field.name for field in type(value).__attrs_attrs__)]
        return [getattr(value, name, None) for name in names]
    return []


def _decode_raw(raw: msgspec.Raw) -> Any:
    try:
        return _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultRefused(f"a msgspec.Raw holds what is not JSON ({describe(error)})") from error
