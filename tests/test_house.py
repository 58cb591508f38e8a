"""The house: its rules of architecture and style, read from the files themselves.

Each rule is a function from source text to complaints, so that each has a control beside it: a text that breaks it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

import async_recovery

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "async_recovery"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
LONGEST_FUNCTION_LINES = 70

PURE_MODULES = {
    "watermark",
    "collector",
    "records",
    "checkpoint",
    "progress",
    "prefix_crc",
    "readout",
    "torture_report",
}
PURE_ONCE_THEY_EXIST = {"policies"}
PURE_MAY_IMPORT = PURE_MODULES | PURE_ONCE_THEY_EXIST | {"errors"}
IMPURE_MODULES = {
    *("aiofiles", "anyio", "asyncio", "concurrent", "ctypes", "datetime", "fcntl", "glob", "http", "importlib", "io"),
    *("logging", "mmap", "multiprocessing", "os", "pathlib", "queue", "random", "sched", "secrets", "select"),
    *("selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading"),
    *("time", "urllib", "uuid"),
}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}

TOP_LEVEL = {"async_recovery", "tests", "data", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "docs"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """The path of a file, from the top of the repository."""
    return str(path.relative_to(ROOT))


def functions(source: str) -> Iterator[Function]:
    """Every function and method, nested ones included."""
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def long_functions(source: str) -> list[str]:
    """Complaints about functions that are too long to be seen at once."""
    lengths = ((function.name, (function.end_lineno or 0) - function.lineno + 1) for function in functions(source))
    return [f"{name} has {length} lines" for name, length in lengths if length > LONGEST_FUNCTION_LINES]


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that a statement imports: those of the package by their own name with a dot before it."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level:
        names = [f".{node.module}"] if node.module else [f".{alias.name}" for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module == "async_recovery":
        names = [f".{alias.name}" for alias in node.names]
    else:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    for name in names:
        if name == "async_recovery" or name.startswith("async_recovery."):
            yield name.removeprefix("async_recovery") or "."
        else:
            yield name


def impurities(source: str) -> list[str]:
    """Complaints about all that a pure file must not have: await, clock, file, randomness, or a file that has them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            found.append(f"{type(node).__name__} in line {node.lineno}")
        if isinstance(node, ast.comprehension) and node.is_async:
            found.append("an async comprehension")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            found.append(f"{node.func.id}() in line {node.lineno}")
        for name in imported(node):
            inside = name.startswith(".")
            part = name.lstrip(".").split(".")[0]
            if part not in PURE_MAY_IMPORT if inside else part in IMPURE_MODULES:
                found.append(f"import of {name}")
    return found


def undocumented(source: str) -> list[str]:
    """Complaints about a module, and its public classes and functions, that do not say what they are."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and node.name[0] != "_" and not ast.get_docstring(node):
            found.append(node.name)
    return found


def silent_tests(source: str) -> list[str]:
    """Complaints about tests without a docstring."""
    return [
        function.name
        for function in functions(source)
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]


def face_complaints(face: ModuleType, source: str) -> list[str]:
    """Complaints about an `__all__` that is not sorted, names what is not there, or leaves out what is imported."""
    names: list[str] = face.__all__
    found = [] if names == sorted(set(names)) else ["__all__ is not sorted, or has a name twice"]
    found += [f"{name} does not exist" for name in names if not hasattr(face, name)]
    tree = ast.parse(source)
    lazy = [node for branch in tree.body if isinstance(branch, ast.If) for node in branch.body]  # if TYPE_CHECKING
    for node in [*tree.body, *lazy]:
        aliases = node.names if isinstance(node, ast.ImportFrom) and node.level else []
        public = [alias.asname or alias.name for alias in aliases]
        if isinstance(node, Function | ast.ClassDef):
            public = [node.name]
        found += [f"{name} is not in __all__" for name in public if name[0] != "_" and name not in names]
    return found


def strangers(entries: Iterable[str], ignored: Iterable[str]) -> list[str]:
    """Entries that the top level must not have: not fixed, not hidden, not ignored by git."""
    patterns = [pattern.strip("/") for pattern in ignored]
    return [
        entry
        for entry in entries
        if entry not in TOP_LEVEL and entry[0] != "." and not any(fnmatch(entry, pattern) for pattern in patterns)
    ]


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `statement`."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_is_longer_than_seventy_lines(path: Path) -> None:
    """Every function of the package can be seen at once."""
    assert long_functions(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_everything_public_says_what_it_is(path: Path) -> None:
    """Every module of the package, and every public class and function in it, has a docstring."""
    assert undocumented(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_every_test_states_its_property(path: Path) -> None:
    """Every test has a docstring that says what must hold."""
    assert silent_tests(path.read_text("utf-8")) == []


@pytest.mark.parametrize("name", sorted(PURE_MODULES | PURE_ONCE_THEY_EXIST))
def test_the_rules_are_pure(name: str) -> None:
    """Values in, values out: no await, clock, file or randomness, nor anything of the package that has them."""
    path = PACKAGE / f"{name}.py"
    if name in PURE_MODULES or path.exists():
        assert impurities(path.read_text("utf-8")) == []


def test_only_the_seam_syncs() -> None:
    """Every sync is one that tests can fail, record and count."""
    syncing = re.compile(r"\bos\.(fsync|fdatasync|sync)\b")
    assert [path.name for path in MODULES if syncing.search(path.read_text())] == ["files.py"]


def test_all_tells_the_truth() -> None:
    """`__all__` is sorted, everything in it exists, and everything public that is imported for it is in it."""
    assert face_complaints(async_recovery, (PACKAGE / "__init__.py").read_text("utf-8")) == []


def test_the_top_level_holds_only_what_belongs_there() -> None:
    """The fixed entries, those beside them that are allowed, hidden ones, and what git ignores."""
    ignored = (ROOT / ".gitignore").read_text("utf-8").split()
    assert strangers((path.name for path in ROOT.iterdir()), ignored) == []


def test_the_import_costs_neither_click_nor_rich() -> None:
    """What only the command line needs is imported by the command line alone."""
    assert not {"click", "rich"} & modules_after("from async_recovery import *")


def test_help_costs_no_more_than_click() -> None:
    """The help of a command needs none of the heavy parts: it is there before they would have been loaded."""
    shown = "try: async_recovery.cli.cli.main(['run', '--help'])\nexcept SystemExit: print()"
    loaded = modules_after(f"import async_recovery.cli\n{shown}")
    assert "async_recovery.help" in loaded
    assert not {"asyncio", "anyio", "msgspec", "rich", "aiofiles", "aiohttp", "ssl"} & loaded


def test_the_control_of_the_import() -> None:
    """The check above sees what is loaded: with the command line, click is."""
    assert "click" in modules_after("import async_recovery.cli")


PURE = """
from __future__ import annotations
import math, msgspec
from collections.abc import Mapping
from . import errors, watermark
from .errors import describe
from async_recovery.records import encode_record

class Opened:
    def open(self) -> None:
        self.open()
"""


def test_the_checkers_have_nothing_against_good_code() -> None:
    """Code that keeps the rules gives no complaints, a function of exactly seventy lines among it."""
    assert impurities(PURE) == []
    assert long_functions("def f():\n" + "    pass\n" * 69) == []
    assert (
        undocumented('"""A module."""\ndef f():\n    "A function."\ndef _g(): pass\nclass C:\n    "A class."\n') == []
    )
    assert strangers([".git", "README.md", "dist", "x.egg-info"], ["dist/", "*.egg-info/"]) == []


@pytest.mark.parametrize(
    "snippet",
    [
        "async def f(): pass",
        "async def f():\n    await g()",
        "def f():\n    async def g(): pass",
        "def f():\n    return [x async for x in y]",
        "import asyncio",
        "import os.path as p",
        "import math, time",
        "from os import path",
        "from datetime import datetime",
        "from concurrent.futures import Future",
        "def f():\n    import random",
        "if TYPE_CHECKING:\n    from anyio import Path",
        "from . import engine",
        "from . import errors, files",
        "from .files import Files",
        "from .files.inner import Files",
        "from async_recovery import files",
        "from async_recovery.files import Files",
        "import async_recovery",
        "import async_recovery.engine",
        "x = open('f')",
        "def f():\n    print(1)",
        "y = [input() for _ in x]",
        "__import__('os')",
    ],
)
def test_the_control_of_purity(snippet: str) -> None:
    """Each way to be impure is seen: alone, and after code that is pure."""
    assert impurities(snippet)
    assert impurities(PURE + snippet)


@pytest.mark.parametrize(
    ("check", "snippet"),
    [
        (long_functions, "def f():\n" + "    pass\n" * 70),
        (long_functions, "async def f():\n" + "    pass\n" * 70),
        (long_functions, "class C:\n    def f(self):\n        def g():\n" + "            pass\n" * 70),
        (undocumented, "x = 1"),
        (undocumented, '"""A module."""\ndef f(): pass'),
        (undocumented, '"""A module."""\nasync def f(): pass'),
        (undocumented, '"""A module."""\nclass C:\n    x = 1'),
        (silent_tests, "def test_x(): pass"),
        (silent_tests, "class T:\n    async def test_x(self): pass"),
    ],
)
def test_the_control_of_lengths_and_docstrings(check: Callable[[str], list[str]], snippet: str) -> None:
    """A function of 71 lines, and whatever has no docstring, is seen wherever it stands."""
    assert check(snippet)


def test_the_control_of_the_top_level() -> None:
    """A file or a folder that does not belong there is seen."""
    assert strangers(["README.md", "notes.txt", "src"], ["dist/"]) == ["notes.txt", "src"]


@pytest.mark.parametrize(
    ("names", "source", "complaint"),
    [
        (["b", "a"], "", "__all__ is not sorted, or has a name twice"),
        (["a", "a"], "", "__all__ is not sorted, or has a name twice"),
        (["a", "missing"], "", "missing does not exist"),
        (["a"], "from .x import a, b", "b is not in __all__"),
        (["a"], "from .x import a, _private, c as d", "d is not in __all__"),
        (["a"], "if TYPE_CHECKING:\n    from .x import a, b", "b is not in __all__"),
        (["a"], "def helper(): pass", "helper is not in __all__"),
    ],
)
def test_the_control_of_the_face(names: list[str], source: str, complaint: str) -> None:
    """Disorder, a name that does not exist and a public name left out are each seen."""
    face = ModuleType("face")
    vars(face).update(a=1, b=2, __all__=names)
    assert face_complaints(face, source) == [complaint]
