"""Tests of an assignment, a blank at a time.

    python -m pytest                 # all tests
    python -m pytest --blank NAME    # those of one blank
    python -m pytest --blank list    # the blanks' names

A test that is no blank's own, but needs what is still blank, is skipped and says what it waits for.
"""

import json
import os
from pathlib import Path

import pytest

BLANKS = json.loads((Path(__file__).parent / "tests" / "blanks.json").read_text())
OWN_TESTS = {test for blank in BLANKS for test in blank["tests"]}
# The grader's log: a line before each test, one for its outcome, one after it.
LOG = os.environ.pop("GRADE_LOG", None)


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
    report = yield
    message = call.excinfo.exconly() if call.excinfo else ""
    if call.excinfo and report.failed:
        explain_blank(item, call.excinfo, report)
    if report.when == "call" or report.outcome != "passed":
        log(event=report.outcome, test=function_of(item), case=item.nodeid, message=message[:600])
    return report


def explain_blank(item, excinfo, report):
    """A failure that a blank caused says so; a test that is no blank's own is skipped."""
    # torch.compile and a command in a process of its own wrap the error, but repeat its text
    text = excinfo.exconly(tryshort=True)
    is_own = function_of(item) in OWN_TESTS
    for blank in BLANKS:
        if blank["equation"] not in text:
            continue
        if not is_own:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: waits for {blank['name']}")
        elif excinfo.errisinstance(NotImplementedError):
            report.longrepr = f"{blank['name']} is still blank: {blank['equation']}"


def pytest_runtest_logstart(nodeid, location):
    file, *_, function = nodeid.split("::")
    test = f"{Path(file).name}::{function.split('[')[0]}"
    log(event="start", test=test, case=nodeid)


def pytest_runtest_logfinish(nodeid, location):
    log(event="end", case=nodeid)


def log(**entry):
    if LOG:
        with open(LOG, "a") as file:
            file.write(json.dumps(entry) + "\n")
