"""An outcome as its line in the output.

A record is one JSON object without its line end, the same bytes in every run of a deterministic worker:

* a mapping, dataclass or msgspec Struct: its fields, with ``"index"`` before them;
* any other value: ``{"index": i, "result": value}``;
* a recorded failure: ``{"index": i, "error": {"type": …, "message": …}, "item": …}``.

Refused, because the line would not be faithful or not repeatable: sets (their order differs from process to
process), NaN and infinity (JSON has no form for them), a field ``index`` of the result's own, the very form of a
recorded failure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import msgspec

from .errors import ResultRefused, describe


def _other_types(value: Any) -> Any:
    """What msgspec asks for a type it does not know: mappings other than dict are written as dicts."""
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"an object of type {type(value).__qualname__} has no JSON form")


_encode = msgspec.json.Encoder(enc_hook=_other_types).encode
_fields_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# Values of these very types (not of subclasses) are written faithfully whatever they are.
_PLAIN = frozenset({str, int, bool, type(None)})
_has_only_plain = _PLAIN.issuperset


def encode_record(index: int, result: Any) -> bytes:
    """The record of a result.

    :param index: 0-based position of the item.
    :param result: what the worker returned; it is not changed.
    :raises ResultRefused: if the result has no faithful JSON form, with the reason.
    """
    if type(result) is dict and "index" not in result:
        for value in result.values():
            if type(value) not in _PLAIN:
                break
        else:
            return _encode_any({"index": index, **result})
    data = _encode_any(result)
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
    :raises ResultRefused: if the item can not be written as JSON.
    """
    try:
        whole = _encode(item)
        text = _encode({"type": type(error).__name__, "message": str(error)})
    except Exception as reason:
        raise ResultRefused(f"the failed item can not be written as JSON ({describe(reason)})") from reason
    return b'{"index":%d,"error":%b,"item":%b}' % (index, text, whole)


def _refuse_index() -> None:
    raise ResultRefused('the result has a field "index" of its own: rename it, the record\'s index is written there')


def _check(result: Any, data: bytes) -> None:
    """Refuses what msgspec would write, but not faithfully: looked for only where the bytes show it is possible."""
    if data.find(b"[") >= 0 or data.find(b"null") >= 0 or data.find(b"{", 1) >= 0:
        _refuse_unfaithful(result)
    if data.find(b"\n") >= 0:
        raise ResultRefused("the result holds a raw line end (msgspec.Raw): a record is one line")
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


def _refuse_unfaithful(value: Any) -> None:
    """Walks the result; long lists of plain values are passed at C speed."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ResultRefused(f"the result holds {value}, which JSON can not hold: use None or a string")
    elif isinstance(value, set | frozenset):
        raise ResultRefused(f"the result holds a {type(value).__name__}, whose order changes: use sorted(...)")
    else:
        inside = _inside(value)
        if not _has_only_plain(map(type, inside)):
            for part in inside:
                if type(part) not in _PLAIN:
                    _refuse_unfaithful(part)


def _inside(value: Any) -> list[Any]:
    """The values directly inside `value`, as far as JSON would show them."""
    if isinstance(value, Mapping):
        return list(chain(value.keys(), value.values()))
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, msgspec.Struct):
        return [getattr(value, name) for name in value.__struct_fields__]
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if hasattr(type(value), "__attrs_attrs__"):
        return [getattr(value, field.name, None) for field in type(value).__attrs_attrs__]
    return []
