"""A pytest plugin that writes each test's outcome when it ends: `-p bench.gpu.pytest_outcomes
--outcomes=FILE`. A line of JSON when a test begins and one for each outcome, so that a run that is
killed, or that a test takes down, leaves what was known of it.
"""

import json

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", required=True, help="the file that outcomes are added to")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Writer(str(config.getoption("outcomes"))))


class Writer:
    """Adds a line for every start and every outcome."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _add(self, **line: str) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._add(test=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self._add(test=report.nodeid, outcome=report.outcome, text=report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._add(test=report.nodeid, outcome=report.outcome, text=report.longreprtext)
