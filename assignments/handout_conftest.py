"""Tests of an assignment, a blank at a time.

python -m pytest                 # all tests
python -m pytest --blank NAME    # those of one blank
python -m pytest --blank list    # the blanks' names
"""

import json
from pathlib import Path

import pytest

BLANKS = json.loads((Path(__file__).parent / "tests" / "blanks.json").read_text())


def pytest_addoption(parser):
    parser.addoption("--blank", help="run the tests of one blank, by its name or the end of it")


def pytest_configure(config):
    """config.tests: the tests, `file.py::function`, of the blank that --blank names, or None."""
    config.tests = None
    wanted = config.getoption("--blank")
    if not wanted:
        return
    chosen = [blank for blank in BLANKS if blank["name"].endswith(wanted)]
    if not chosen:
        names = ", ".join(blank["name"] for blank in BLANKS)
        raise pytest.UsageError(f"no blank {wanted}; there are: {names}")
    config.tests = {test for blank in chosen for test in blank["tests"]}


def pytest_ignore_collect(collection_path, config):
    """Leaves out the files without a chosen test: one that is not imported costs no time."""
    if config.tests is None or collection_path.suffix != ".py":
        return None
    files = {test.split("::")[0] for test in config.tests}
    return True if collection_path.name not in files else None


def pytest_collection_modifyitems(config, items):
    if config.tests is not None:
        items[:] = [item for item in items if function_of(item) in config.tests]


def function_of(item):
    return f"{item.path.name}::{getattr(item, 'originalname', item.name)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure that a blank caused says which one."""
    report = yield
    if call.excinfo and call.excinfo.errisinstance(NotImplementedError):
        for blank in BLANKS:
            if blank["equation"] in str(call.excinfo.value):
                report.longrepr = f"{blank['name']} is still blank: {blank['equation']}"
    return report
