"""Records: every kind of result as its line, what is refused and why, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import enum
import json
import re
import sys
from collections import Counter, OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from async_recovery.errors import ResultRefused, shorten
from async_recovery.records import encode_failure, encode_record

NAN = float("nan")
INFINITY = float("inf")
Pair = namedtuple("Pair", "x y")


class Colour(enum.Enum):
    RED = "red"
    INDEX = "index"
    NOT_A_NUMBER = NAN
    SET = frozenset({"a"})


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Any


@dataclasses.dataclass
class WithIndex:
    index: int


class Shape(msgspec.Struct):
    x: Any
    y: Any = 2


class Array(msgspec.Struct, array_like=True):
    x: Any
    y: Any = 2


class Tagged(msgspec.Struct, tag_field="index", tag="tagged"):
    x: Any


class Renamed(msgspec.Struct, rename={"number": "index"}):
    number: int


class Attribute:
    def __init__(self, name: str) -> None:
        self.name = name


class Attrs:
    """As the library attrs makes them: the fields are named by the class, the values lie in the instance."""

    __attrs_attrs__: ClassVar[tuple[Attribute, ...]] = (Attribute("x"), Attribute("y"))

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class Loud(dict[str, Any]):
    """A subclass of dict, as web libraries return them."""


def name_of(value: Any) -> str:
    """A short name of a test's case, the same in every run."""
    return re.sub(" at 0x[0-9a-f]+", "", shorten(value))


@pytest.mark.parametrize(
    ("result", "record"),
    [
        ({}, b'{"index":7}'),
        ({"a": 1}, b'{"index":7,"a":1}'),
        ({"b": 1, "a": [2, {"c": None}]}, b'{"index":7,"b":1,"a":[2,{"c":null}]}'),
        ({"a": 0.5, "b": True, "c": None, "d": ""}, b'{"index":7,"a":0.5,"b":true,"c":null,"d":""}'),
        ({"inner": {"index": 1}}, b'{"index":7,"inner":{"index":1}}'),
        ({"a": '"index":'}, b'{"index":7,"a":"\\"index\\":"}'),
        ({"\u00e9": "\u20ac\u2028"}, '{"index":7,"\u00e9":"\u20ac\u2028"}'.encode()),
        ({"a": "line\nend\r"}, b'{"index":7,"a":"line\\nend\\r"}'),
        ({1: "a", 2.5: "b"}, b'{"index":7,"1":"a","2.5":"b"}'),
        ({Colour.RED: 1}, b'{"index":7,"red":1}'),
        (Loud(a=1), b'{"index":7,"a":1}'),
        (OrderedDict(b=1, a=2), b'{"index":7,"b":1,"a":2}'),
        (Counter("aab"), b'{"index":7,"a":2,"b":1}'),
        (MappingProxyType({"a": 1}), b'{"index":7,"a":1}'),
        (MappingProxyType({}), b'{"index":7}'),
        (UserDict(a=UserDict(b=1)), b'{"index":7,"a":{"b":1}}'),
        (Point(1), b'{"index":7,"x":1,"y":2}'),
        (Point(Slotted([Shape("deep")])), b'{"index":7,"x":{"x":[{"x":"deep","y":2}]},"y":2}'),
        (Slotted(1), b'{"index":7,"x":1}'),
        (Shape(1), b'{"index":7,"x":1,"y":2}'),
        (Attrs(x=1, y=[2]), b'{"index":7,"x":1,"y":[2]}'),
        ({"error": "not found", "item": 3}, b'{"index":7,"error":"not found","item":3}'),
        ({"error": "not found", "item": [3]}, b'{"index":7,"error":"not found","item":[3]}'),
        ({"error": None, "item": Point(3)}, b'{"index":7,"error":null,"item":{"x":3,"y":2}}'),
        ({"error": {"type": "E"}, "item": 3}, b'{"index":7,"error":{"type":"E"},"item":3}'),
        ({"error": {"type": "E", "message": "m"}}, b'{"index":7,"error":{"type":"E","message":"m"}}'),
        (None, b'{"index":7,"result":null}'),
        (True, b'{"index":7,"result":true}'),
        (5, b'{"index":7,"result":5}'),
        (-0.0, b'{"index":7,"result":-0.0}'),
        ("", b'{"index":7,"result":""}'),
        ("[text]", b'{"index":7,"result":"[text]"}'),
        ("{", b'{"index":7,"result":"{"}'),
        ([], b'{"index":7,"result":[]}'),
        ([{"index": 1}], b'{"index":7,"result":[{"index":1}]}'),
        ((1, "a"), b'{"index":7,"result":[1,"a"]}'),
        (Pair(1, 2), b'{"index":7,"result":[1,2]}'),
        (Array(1), b'{"index":7,"result":[1,2]}'),
        (Colour.RED, b'{"index":7,"result":"red"}'),
        (Level.HIGH, b'{"index":7,"result":3}'),
        (b"abc", b'{"index":7,"result":"YWJj"}'),
        (datetime.date(2024, 2, 29), b'{"index":7,"result":"2024-02-29"}'),
        (msgspec.Raw(b' {"a": [1] }'), b'{"index":7,"a":[1]}'),
        (msgspec.Raw(b"{ }"), b'{"index":7}'),
        (msgspec.Raw(b"[1,\n2]"), b'{"index":7,"result":[1,2]}'),
        ({"a": msgspec.Raw(b"[1, 2]")}, b'{"index":7,"a":[1, 2]}'),
    ],
    ids=name_of,
)
def test_a_result_has_exactly_this_record(result: Any, record: bytes) -> None:
    """Whatever has fields keeps them, in their order, with the index before them; anything else is the result."""
    assert encode_record(7, result) == record


@pytest.mark.parametrize(
    ("result", "because"),
    [
        ({"index": 7}, 'field "index" of its own'),
        ({"a": [1], "index": None}, 'field "index" of its own'),
        (MappingProxyType({"index": 1}), 'field "index" of its own'),
        ({Colour.INDEX: 1}, 'field "index" of its own'),
        (WithIndex(1), 'field "index" of its own'),
        (Tagged(1), 'field "index" of its own'),
        (Renamed(1), 'field "index" of its own'),
        (Attrs(index=1), 'field "index" of its own'),
        (msgspec.Raw(b'{"\\u0069ndex":1}'), 'field "index" of its own'),
        ({"error": {"type": "E", "message": "m"}, "item": 1}, "form of a recorded failure"),
        ({"item": 1, "error": {"message": 1, "type": []}}, "form of a recorded failure"),
        (UserDict(item=1, error=UserDict(message="", type="")), "form of a recorded failure"),
        ({1: "a", "1": "b"}, "one and the same"),
        ({"deep": [{"red": 1, Colour.RED: 2}]}, "one and the same"),
        ("\ud800", "can not be written as JSON"),
        ({"a": "\ud800"}, "can not be written as JSON"),
        ({"a": object()}, "type object has no JSON form"),
        ({"a": [1j]}, "type complex has no JSON form"),
        ({(1, 2): 3}, "can not be written as JSON"),
        ({None: 3}, "can not be written as JSON"),
        ((n for n in [1]), "type generator has no JSON form"),
        (Point, "type type has no JSON form"),
        (10**5000, "can not be written as JSON"),
        (msgspec.Raw(b""), "not JSON"),
        (msgspec.Raw(b"NaN"), "not JSON"),
        (msgspec.Raw(b'{"a":1} 2'), "not JSON"),
        ({"a": msgspec.Raw(b"xx")}, "not JSON"),
        ({"a": msgspec.Raw(b'"\xff"')}, "not JSON"),
        (Shape(msgspec.Raw(b"")), "not JSON"),
        ({"a": msgspec.Raw(b'{"b":\n1}')}, "raw line end"),
        ([[msgspec.Raw(b"[1,\r2]")]], "raw line end"),
    ],
    ids=name_of,
)
def test_a_result_without_a_faithful_line_is_refused(result: Any, because: str) -> None:
    """What would not come back as it was, or not be one line, is an error that says why."""
    with pytest.raises(ResultRefused, match=because):
        encode_record(7, result)


AROUND: dict[str, Callable[[Any], Any]] = {
    "itself": lambda value: value,
    "dict": lambda value: {"a": value},
    "list in a dict": lambda value: {"a": 1, "b": [value]},
    "list": lambda value: [value],
    "tuple": lambda value: (0.5, None, value),
    "dict subclass": lambda value: Loud(a=value),
    "mapping": lambda value: MappingProxyType({"a": value}),
    "keys that are no text": lambda value: {1: value},
    "dataclass": Point,
    "dataclass, second field": lambda value: Point(1, value),
    "dataclass with slots": Slotted,
    "struct": Shape,
    "array struct": lambda value: Array(1, value),
    "attrs": lambda value: Attrs(x=value),
    "attrs, besides its fields": lambda value: Attrs(x=1, not_a_field=value),
}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize(
    ("bad", "because"),
    [
        ({"a"}, "a set, whose order changes"),
        (set(), "a set, whose order changes"),
        (frozenset({1}), "a frozenset, whose order changes"),
        (Colour.SET, "a frozenset, whose order changes"),
        (NAN, "nan, which JSON can not hold"),
        (INFINITY, "inf, which JSON can not hold"),
        (-INFINITY, "-inf, which JSON can not hold"),
        (Colour.NOT_A_NUMBER, "nan, which JSON can not hold"),
    ],
    ids=name_of,
)
def test_sets_and_numbers_that_are_none_are_refused_at_any_depth(
    bad: Any, because: str, around: Callable[[Any], Any], depth: int
) -> None:
    """A set, NaN and infinity are found however deep they lie, in everything that can hold them."""
    result = bad
    for _ in range(depth):
        result = around(result)
    with pytest.raises(ResultRefused, match=because):
        encode_record(7, result)
    with pytest.raises(ResultRefused, match=because):
        encode_failure(7, result, ValueError())


def test_the_result_is_never_changed() -> None:
    """The worker's own object is as it was, whether its record was made or refused."""
    good = {"a": [1, {"b": Point(1)}], "c": UserDict(d=1)}
    bad = {**good, "index": 1}
    before = copy.deepcopy((good, bad))
    encode_record(7, good)
    with pytest.raises(ResultRefused):
        encode_record(7, bad)
    assert (good, bad) == before


def test_what_the_user_wrote_may_raise_anything() -> None:
    """An error inside the result's own methods is a refusal with that error as its cause, never a crash of the run."""

    class Broken(UserDict[str, Any]):
        def __iter__(self) -> Any:
            raise LookupError("the connection is closed")

    with pytest.raises(ResultRefused, match="the connection is closed") as refusal:
        encode_record(7, {"a": Broken(b=1)})
    assert isinstance(refusal.value.__cause__, LookupError)


def test_nesting_without_end_is_refused() -> None:
    """A value nested deeper than the interpreter's stack is refused, whichever step meets it first."""
    outcomes = set()
    for depth in range(100, sys.getrecursionlimit() + 10):
        value: Any = 1
        for _ in range(depth):
            value = UserDict(a=value) if depth % 2 else [value]
        try:
            outcomes.add(encode_record(7, value)[:9])
        except ResultRefused:
            outcomes.add(b"refused")
    assert outcomes == {b'{"index":', b"refused"}


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1, 2**64, -(2**64), 10**400])
def test_integers_of_any_size_keep_every_digit(number: int) -> None:
    """An integer comes back exactly, as a result, as a field and deep inside."""
    assert json.loads(encode_record(7, number))["result"] == number
    assert json.loads(encode_record(7, {"a": number}))["a"] == number
    assert json.loads(encode_record(number, {"a": [number]})) == {"index": number, "a": [number]}


finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | st.integers() | finite | text
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=12)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(index=st.integers(0, 2**70), value=values)
@example(index=0, value={"a": None, "b": 0.5})
def test_any_json_value_comes_back_as_it_was(index: int, value: Any) -> None:
    """A result that JSON can hold is read back unchanged, types and order of fields included, with its index added."""
    record = encode_record(index, value) if not (isinstance(value, dict) and "index" in value) else None
    if record is None:
        return
    expected = {"index": index, **value} if isinstance(value, dict) else {"index": index, "result": value}
    assert b"\n" not in record
    assert repr(json.loads(record)) == repr(expected)  # repr tells 1 from 1.0 and from True, and shows the order


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(index=st.integers(0, 2**70), item=values, message=st.text())
@example(index=0, item={"index": 1, "error": 2}, message="\ud800 is kept, escaped")
def test_any_failure_comes_back_with_its_whole_item(index: int, item: Any, message: str) -> None:
    """A failure's record holds exactly index, type and message of the error, and the whole item, whatever it is."""
    record = encode_failure(index, item, ConnectionError(message))
    escaped = message.encode("utf-8", "backslashreplace").decode()
    error = {"type": "ConnectionError", "message": escaped}
    assert b"\n" not in record
    assert repr(json.loads(record)) == repr({"index": index, "error": error, "item": item})


def test_a_failure_has_exactly_this_record() -> None:
    """The form of a failure, byte for byte: it has no time, attempt or address in it."""
    assert encode_failure(3, "http://x", TimeoutError("no answer")) == (
        b'{"index":3,"error":{"type":"TimeoutError","message":"no answer"},"item":"http://x"}'
    )
    assert encode_failure(0, Point(1), KeyError("k")) == (
        b'{"index":0,"error":{"type":"KeyError","message":"\'k\'"},"item":{"x":1,"y":2}}'
    )


@pytest.mark.parametrize(
    ("item", "because"),
    [
        (object(), "can not be written as JSON"),
        ("\ud800", "can not be written as JSON"),
        ({1: "a", "1": "b"}, "one and the same"),
        (msgspec.Raw(b"[1,\n2]"), "raw line end"),
        (msgspec.Raw(b"xx"), "not JSON"),
    ],
    ids=name_of,
)
def test_a_failed_item_without_a_faithful_form_is_refused(item: Any, because: str) -> None:
    """A failure is recorded only if its item can be written whole and on one line."""
    with pytest.raises(ResultRefused, match=because):
        encode_failure(3, item, ValueError("x"))


def test_a_result_can_never_be_taken_for_a_failure() -> None:
    """What a worker returns is refused exactly where its record would have the very form of a recorded failure."""
    record = encode_failure(7, {"a": 1}, ValueError("x"))
    fields = json.loads(record)
    del fields["index"]
    with pytest.raises(ResultRefused, match="form of a recorded failure"):
        encode_record(7, fields)
    assert json.loads(encode_record(7, {**fields, "more": 1})) == {"index": 7, **fields, "more": 1}
