"""A plugin of pytest that writes down what became of a test as soon as that is known, so that a run
that is stopped loses nothing.

    pytest -p bench.gpu.outcomes --outcomes=FILE.jsonl ...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LONGEST_ERROR = 3000  # characters; the end of it says what happened


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="a line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path and not hasattr(config, "workerinput"):  # workers report to the process that has it
        config.pluginmanager.register(Writer(path))


class Writer:
    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(report, 0.0)

    def _add(self, report: Any, seconds: float) -> None:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 3)}
        if report.failed:
            line["error"] = report.longreprtext[-LONGEST_ERROR:]
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
