"""Prints the table of the layers after a run of them."""

from __future__ import annotations

import pytest

from . import report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if report.table:
        terminalreporter.section("the proof")
        for line in report.lines():
            terminalreporter.write_line(line)
