"""Layer 14: signals in every phase of a run, and cancellations of the call at every round of the loop."""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Sequence

import pytest

from . import cancelled_mutants, report, signal_mix
from .cancellations import Tally, pairs, shares, sweep
from .parallel import in_processes
from .signal_mutants import MUTANTS
from .signal_phases import PHASES
from .signal_scenarios import SIGNALS, play, scenario_of, scenarios

LAYER = 14
LONG_FORM_PROCESSES = 2_000
CI_CANCELLATIONS = 2_000


def test_signals_in_every_phase_lose_nothing() -> None:
    """One or two signals in any phase end it with everything that finished committed, three at once; all resumable."""
    everything = scenarios()
    met = {(scenario.phase, scenario.signals) for scenario in everything}
    assert met >= {(phase, (name,) * count) for phase in PHASES for name in SIGNALS for count in (1, 2, 3)}
    parts = 4 * (os.cpu_count() or 1)
    played = in_processes(play, [everything[number::parts] for number in range(parts)])
    violations = [line for lines in played for line in lines]
    report.add(LAYER, "phases", len(PHASES))
    report.add(LAYER, "signal scenarios", len(everything), violations=len(violations))
    assert violations == []


def swept(what: Sequence[tuple[str, str, str]]) -> Tally:
    """Sweeps, counted together."""
    moments, cancelled, violations = zip(*in_processes(sweep, what), strict=True)
    found = Tally(sum(moments), sum(cancelled), [line for lines in violations for line in lines])
    report.add(LAYER, "cancellations", found.moments, violations=len(found.violations))
    return found


def test_a_cancellation_of_the_call_at_any_moment_loses_nothing() -> None:
    """However it is cancelled, at any round of the loop or write of the thread: what finished is committed, the lock
    given up, nothing written afterwards, and what comes out is what asyncio and anyio expect.
    """
    found = swept(shares())
    assert found.violations == []
    assert found.cancelled >= CI_CANCELLATIONS


@pytest.mark.slow
def test_two_cancellations_at_any_two_moments_lose_nothing() -> None:
    """The second cancellation comes any number of rounds after the first."""
    assert swept(pairs()).violations == []


@pytest.mark.parametrize("name", cancelled_mutants.MUTANTS)
def test_a_wrong_answer_to_a_cancellation_is_noticed(name: str) -> None:
    """A call that is cancelled wrongly has a violation in a sweep, and it says what is wrong."""
    mutant = cancelled_mutants.MUTANTS[name]
    (tally,) = in_processes(functools.partial(sweep, mutant=name), [mutant.shows])
    caught = any(mutant.says in line for line in tally.violations)
    report.control(LAYER, caught=caught)
    assert caught, tally.violations


@pytest.mark.slow
def test_random_signals_at_random_moments_lose_nothing() -> None:
    """Stopped again and again, at moments that nobody chose, each job ends with the right bytes, nothing paid twice."""
    first, jobs, parts = int(os.environ.get("SIGNAL_SEED") or time.time_ns() % 1_000_000), 600, 12
    print(f"to repeat these moments: SIGNAL_SEED={first}")
    lives: Counter[tuple[int, int]] = Counter()
    violations = []
    for ended, broken in in_processes(signal_mix.play, [range(first + n, first + jobs, parts) for n in range(parts)]):
        lives += ended
        violations += broken
    print({f"exit code {code} after {taken} signals": count for (code, taken), count in sorted(lives.items())})
    report.add(LAYER, "processes with random signals", lives.total(), violations=len(violations))
    assert violations == []
    assert lives.total() >= LONG_FORM_PROCESSES
    assert all(lives[code, taken] for code in (130, 143) for taken in (1, 2, 3)), "a number of signals was never met"


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_answer_to_a_signal_is_noticed(name: str) -> None:
    """A run that obeys signals wrongly has a violation in a scenario, and it says what is wrong."""
    mutant = MUTANTS[name]
    (violations,) = in_processes(functools.partial(play, mutant=name), [[scenario_of(mutant.shows)]])
    caught = any(mutant.says in line for line in violations)
    report.control(LAYER, caught=caught)
    assert caught, violations
