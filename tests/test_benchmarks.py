"""The frame of the benchmarks, and that no row of theirs can win by doing less."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.benchmarks import __main__ as frame
from tests.benchmarks import apart, durable, durable_rows, engine, latency, pools, simple
from tests.benchmarks.figures import Figure, Scale
from tests.benchmarks.report import PEERS
from tests.benchmarks.rounds import interleave, missing, missing_apart, ratio

Put = Callable[..., None]

REACHED = Figure("stub", "fast", 2.0, 1.5, at_least=True)
MISSED = Figure("stub", "big", 70.0, 40.0, at_least=False, unit="MiB", note="one round")
ABSENT = Figure("stub", "peer", math.nan, 6.0, at_least=True, note="pip install it")


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Put:
    """Puts tables into the frame, instead of its own, that give these figures, or raise this error."""
    monkeypatch.chdir(tmp_path)

    def put(**tables: list[Figure] | Exception) -> None:
        for name, found in tables.items():

            def measure(scale: Scale, folder: Path, found: list[Figure] | Exception = found) -> list[Figure]:
                assert list(folder.iterdir()) == []
                (folder / "left").write_text("behind")
                if isinstance(found, Exception):
                    raise found
                return found

            module = ModuleType(name)
            vars(module).update(TITLE=f"About {name}", measure=measure)
            monkeypatch.setitem(sys.modules, f"tests.benchmarks.{name}", module)
        monkeypatch.setattr(frame, "TABLES", list(tables))

    return put


def rows_of(printed: str) -> dict[str, list[str]]:
    """The cells of each row of the tables, by the first one."""
    lines = [line.strip("|").split("|") for line in printed.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_table_shows_each_figure_beside_its_bound(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    """Value, bound, whether it is reached, and the note; what was not measured says why, and reaches nothing."""
    put(stub=[REACHED, MISSED, ABSENT, Figure("stub", "shown", 1234.5, None, at_least=True)])
    assert frame.main([]) == 1
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert "stub: About stub" in printed
    assert rows["fast"] == ["2 ×", "≥ 1.5", "yes", ""]
    assert rows["big"] == ["70 MiB", "≤ 40", "NO", "one round"]
    assert rows["peer"] == ["not measured", "≥ 6", "NO", "pip install it"]
    assert rows["shown"] == ["1,234 ×", "", "", ""]
    assert "1 of 3 bounds reached" in printed
    assert "not measured: stub: peer: pip install it" in printed


def test_the_exit_code_says_whether_all_bounds_are_reached(put: Put) -> None:
    """0 if they are, 1 if one is missed; tiny sizes judge nothing; a table can be chosen by its name."""
    put(good=[REACHED], bad=[MISSED])
    assert [frame.main(words) for words in (["good"], ["bad"], [], ["--quick"])] == [0, 1, 1, 0]


def test_a_table_is_a_module() -> None:
    """Each table that can be named has a title and measures, and no peer is imported before it does."""
    names = [f"tests.benchmarks.{name}" for name in frame.TABLES]
    for table in map(import_module, names):
        assert table.TITLE
        assert callable(table.measure)
    program = f"import sys, {', '.join(names)}\nprint(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=apart.ROOT, capture_output=True, text=True, check=True)
    assert not {*PEERS, "matplotlib"} & set(ran.stdout.split())


@pytest.mark.slow
def test_every_table_runs_at_tiny_sizes(tmp_path: Path) -> None:
    """The command itself, with all peers that are installed."""
    env = {**os.environ, "PYTHONPATH": str(apart.ROOT)}
    words = [sys.executable, "-m", "tests.benchmarks", "--quick", "--json", "figures.json"]
    ran = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert {figure["table"] for figure in figures} == set(frame.TABLES)


def test_the_figures_of_two_runs_can_be_compared(put: Put, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The JSON of one run, given to another one, shows by how much a figure is more, what is new and what is gone."""
    kept = tmp_path / "results" / "kept.json"
    put(stub=[REACHED, ABSENT, REACHED._replace(row="old")])
    frame.main(["--json", str(kept), "--rounds", "3"])
    written = json.loads(kept.read_text())
    assert (written["rounds"], written["factor"]) == (3, 1.0)
    assert written["versions"]["msgspec"]
    assert [(row["row"], row["value"], row["reached"]) for row in written["figures"]] == [
        ("fast", 2.0, True),
        ("peer", None, False),
        ("old", 2.0, True),
    ]
    put(stub=[REACHED._replace(value=3.0), ABSENT._replace(value=9.0), MISSED])
    capsys.readouterr()
    frame.main(["--compare", str(kept), "--quick"])
    printed = capsys.readouterr().out
    changes = {name: cells[3] for name, cells in rows_of(printed).items()}
    assert changes["fast"] == "+50.0% (was 2)"
    assert changes["peer"] == "was not measured"
    assert changes["big"] == "new"
    assert "the sizes are not the same: 0.01 here, 1 there" in printed
    assert "gone since: stub: old" in printed


def test_a_table_that_fails_does_not_cost_the_others(
    put: Put, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The next table is measured and kept all the same; the run says what failed, and its exit code too."""
    put(broken=ValueError("no disk"), stub=[REACHED])
    assert frame.main(["--quick", "--json", "kept.json"]) == 1
    said = capsys.readouterr()
    assert "ValueError: no disk" in said.err
    assert "failed: broken" in said.out
    assert [row["row"] for row in json.loads(Path("kept.json").read_text())["figures"]] == ["fast"]
    assert list((tmp_path / ".benchmarks").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "there is no table nonsense: there are stub"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--plots", "here"], "--plots needs matplotlib: pip install 'async-recovery[bench]'"),
        (["--compare", "nowhere.json"], "--compare nowhere.json"),
        (["--json", "."], "--json . is a folder"),
    ],
)
def test_a_mistake_is_said_before_anything_is_measured(
    put: Put, words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not exist, can not be drawn or compared, or is no number of rounds, is named; exit code 2."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    put(stub=AssertionError("it was measured"))
    with pytest.raises(SystemExit) as ended:
        frame.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("matplotlib") is None, reason="plots need the extra bench")
def test_each_table_is_drawn(put: Put, tmp_path: Path) -> None:
    """One plot a table that has something to show, and the same figures give the same bytes."""
    put(stub=[REACHED, MISSED, ABSENT], other=[ABSENT._replace(table="other")])
    for name in ("plots", "again"):
        assert frame.main(["--quick", "--plots", name]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["stub.svg"]
    assert (tmp_path / "plots/stub.svg").read_bytes() == (tmp_path / "again/stub.svg").read_bytes()


def test_a_ratio_is_taken_within_a_round() -> None:
    """Rows take turns, every other round backwards; the ratio is the median of those of each round."""
    called = list[tuple[str, int]]()

    def row(name: str, costs: list[float], number: int) -> float:
        called.append((name, number))
        return costs[number]

    costs = {"one": [2.0, 30.0, 4.0], "two": [1.0, 10.0, 4.0]}
    found = interleave(3, {name: partial(row, name, values) for name, values in costs.items()})
    assert found == costs
    assert called == [("one", 0), ("two", 0), ("two", 1), ("one", 1), ("one", 2), ("two", 2)]
    assert ratio(found["one"], found["two"]) == (2.0, "rounds 1–3")


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that can not be imported, or a program that is not there, is named with the reason."""
    monkeypatch.setenv("PATH", "/nowhere")
    for look in (missing, missing_apart):
        assert look("json") is None
        reason = "pip install 'async-recovery[bench]' (ModuleNotFoundError: No module named 'no_such_peer')"
        assert look("no_such_peer") == reason
    assert durable.why_absent(durable.PARALLEL) == "apt-get install parallel"
    assert durable.why_absent(durable.OURS) is None


def test_a_peer_that_is_missing_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The durable table has a row for every peer: those that can not take part say why, the others their ratio."""

    def spent_by(module: str, row: str, items: int, number: int, folder: Path) -> apart.Spent:
        return apart.Spent(items * (1.0 if row == durable.OURS else 8.0), 0, items)

    monkeypatch.setattr(durable, "spent_by", spent_by)
    monkeypatch.setattr(durable, "why_absent", {durable.BYTEWAX: "no wheel"}.get)
    figures = {figure.row: figure for figure in durable.measure(Scale(1, 0.01), tmp_path)}
    assert {f"over {name}" for name in durable_rows.ROWS if name != durable.OURS} <= figures.keys()
    absent = figures.pop(f"over {durable.BYTEWAX}")
    assert (absent.note, absent.reached, math.isnan(absent.value)) == ("no wheel", False, True)
    assert {figure.value for figure in figures.values()} == {1.0, 8.0}
    assert figures["over a pool by hand, fsync each 100 ms"].reached


def test_the_table_of_the_engine_runs(tmp_path: Path) -> None:
    """Every bound of the issue has its figure, also in a run of a few items."""
    figures = engine.measure(Scale(1, 0.0005), tmp_path)
    assert [figure.bound for figure in figures] == [
        *(0.75, 1.5, 0.85, None),
        *(0.70, 1.5, 0.85, None),
        *(0.62, 1.5, 0.85, None),
    ]
    assert all(math.isfinite(figure.value) for figure in figures)


def test_rows_apart_run_and_are_counted(tmp_path: Path) -> None:
    """A row in a process of its own checks its results; its bytes and its peak of memory are counted."""
    for row in (durable.OURS, durable.HAND):
        spent = apart.spent_by("tests.benchmarks.durable_rows", row, 300, 1, tmp_path)
        assert spent.seconds > 0
        assert spent.written_bytes > 300 * 20
    spent = apart.spent_by("tests.benchmarks.simple", "gather", 5_000, 1, tmp_path)
    assert spent.peak_bytes > 5_000 * 100
    with pytest.raises(RuntimeError, match="KeyError: 'no such row'"):
        apart.spent_by("tests.benchmarks.simple", "no such row", 1, 1, tmp_path)


def test_the_pools_beside_ours_run(tmp_path: Path) -> None:
    """Each of those that need no library does the whole job."""
    for pool in (pools.bare, pools.by_hand, pools.ours, simple.gather):
        assert pools.timed(pool, 50, 4, 1, tmp_path) > 0
    for patient in (latency.ours, latency.bare, latency.chunks):
        assert latency.over_ideal(patient, 20, 10, tmp_path, 1) > 0


def test_the_ideal_pool_gives_each_item_to_whoever_is_free_first() -> None:
    """Its makespan, for cases that can be counted on the fingers."""
    assert latency.ideal_s([1, 2, 3], 1) == 6
    assert latency.ideal_s([3, 1, 1, 1], 2) == 3
    assert latency.ideal_s([1, 1, 1, 3], 2) == 4
    assert sum(latency.latencies_of(20_000, 1)) / 20_000 == pytest.approx(latency.MEAN_S, rel=0.05)
    assert latency.latencies_of(5, 1) != latency.latencies_of(5, 2)


def skips(pool: Any) -> Any:
    """The pool, with one item less than it was given."""

    async def run(items: int, concurrency: int, round_number: int, folder: Path) -> Path | None:
        output: Awaitable[Path | None] = pool(items - 1, concurrency, round_number, folder)
        return await output

    return run


@pytest.mark.parametrize("pool", [pools.by_hand, pools.ours])
def test_a_pool_that_skips_an_item_is_caught(pool: Any, tmp_path: Path) -> None:
    """The negative control of every pool that writes: its output is compared with what it should be."""
    with pytest.raises(AssertionError, match="1 of 50 records are missing"):
        pools.timed(skips(pool), 50, 4, 1, tmp_path)


def test_a_result_of_another_round_is_caught(tmp_path: Path) -> None:
    """Records that an earlier round left behind, doubled or wrong ones are not taken for those of this round."""
    output = tmp_path / "out.jsonl"
    lines = [json.dumps({"index": index, **pools.result_of(index, 1)}) for index in range(3)]
    output.write_text("\n".join(lines))
    pools.check_records(output, 3, 1)
    with pytest.raises(AssertionError):
        pools.check_records(output, 3, 2)
    output.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(AssertionError):
        pools.check_records(output, 3, 1)


@pytest.mark.parametrize("order", [[0, 1], [0, 2, 1], [0, 1, 2, 2], []])
async def test_a_stream_that_loses_or_disorders_is_caught(order: list[int]) -> None:
    """Results of a library have to come all, once, and in order."""

    async def results(order: list[int]) -> AsyncIterator[pools.Result]:
        for item in order:
            yield pools.result_of(item, 1)

    await simple.check_stream(results([0, 1, 2]), 3, 1)
    with pytest.raises(AssertionError):
        await simple.check_stream(results(order), 3, 1)


def test_a_durable_row_can_not_lose_or_double() -> None:
    """What a durable peer has kept is compared with the items of the round, in any order."""
    whole = [durable_rows.result_of(line) for line in durable_rows.lines_of(10, 1)]
    durable_rows.check(whole[::-1], 10, 1)
    for wrong in (
        whole[1:],
        [*whole, whole[0]],
        [durable_rows.result_of(line) for line in durable_rows.lines_of(10, 2)],
    ):
        with pytest.raises(AssertionError):
            durable_rows.check(wrong, 10, 1)
