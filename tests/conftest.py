"""For every test: which real services the run used, and no skip of one that CI must have."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from typing import Any

import hypothesis
import pytest

from tests.services import used

_skipped: Counter[str] = Counter()

# No test is timed: a machine with other work is slow, not wrong.
hypothesis.settings.register_profile("runstream", deadline=None)
hypothesis.settings.load_profile("runstream")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count skips by the service whose marker the test carries, and note that chDB was really used."""
    if report.when == "call" and report.passed and "chdb" in report.keywords:
        used.record("chdb", f"chdb {version('chdb')} local store process")
    if report.skipped and not hasattr(report, "wasxfail"):
        for service in (*used.REQUIRED_ON_CI, "clickhouse"):
            if service in report.keywords:
                _skipped[service] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run that skipped what CI must not skip fails, even where every test that ran has passed."""
    told = getattr(session.config, "workeroutput", None)
    if told is not None:  # one of several processes (xdist): the one that reports must know
        told["used"] = used.known()
    if exitstatus == pytest.ExitCode.OK and _forbidden():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A process of several has ended: take over what it used."""
    for service, descriptions in getattr(node, "workeroutput", {}).get("used", {}).items():
        for each in descriptions:
            used.record(service, each)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which services were real, and which tests went without one."""
    terminalreporter.section("services")
    terminalreporter.write_line(used.line())
    for service, count in sorted(_skipped.items()):
        terminalreporter.write_line(f"{count} tests skipped for want of {service}")
    for service in _forbidden():
        terminalreporter.write_line(f"ERROR: with CI=true no {service} test may be skipped", red=True)


def _forbidden() -> list[str]:
    return [service for service in sorted(_skipped) if used.must_not_skip(service)]
