"""A pytest plugin: slow tests that would begin after a time budget are skipped, and reported as NOT RUN.

python -m pytest -p tests.time_budget -m slow --slow-budget 1200
"""

import time

import pytest

BEGAN = pytest.StashKey[float]()
NOT_RUN = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-budget", type=float, metavar="SECONDS", help="begin no slow test after this many seconds"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()
    config.stash[NOT_RUN] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--slow-budget")
    if budget is None or item.get_closest_marker("slow") is None:
        return
    if time.monotonic() - item.config.stash[BEGAN] > budget:
        item.config.stash[NOT_RUN].append(item.nodeid)
        pytest.skip(f"NOT RUN: the {budget:g} s for slow tests were spent")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    not_run = config.stash[NOT_RUN]
    if not_run:
        terminalreporter.section(f"WARNING: {len(not_run)} slow tests NOT RUN", red=True, bold=True)
        terminalreporter.line(
            f"the {config.getoption('--slow-budget'):g} s for slow tests were spent before:"
        )
        for name in not_run:
            terminalreporter.line(f"  NOT RUN {name}")
