"""Tests of an assignment: `pytest` runs all, `pytest --blank NAME` those of one blank (`pytest --blank list` names them).

A test that is nobody's own, but needs what is still blank, is skipped and says what it waits for.
"""
import json
import os
from pathlib import Path

import pytest

BLANKS = json.loads((Path(__file__).parent / "blanks.json").read_text())
OWN = {test for blank in BLANKS for test in blank["tests"]}
LOG = os.environ.pop("GRADE_LOG", None)  # the grader's: one line before each test, one after


def pytest_addoption(parser):
    parser.addoption("--blank", help="run the tests of one blank, by its name or the end of it")


def function_of(item):
    return f"{item.path.name}::{getattr(item, 'originalname', item.name)}"


def pytest_configure(config):
    """config.tests: the tests, `file.py::function`, of the blank that --blank names, or None."""
    wanted = config.getoption("--blank")
    chosen = [b for b in BLANKS if wanted and b["name"].endswith(wanted)]
    if wanted and not chosen:
        raise pytest.UsageError(f"no blank {wanted}; there are: {', '.join(b['name'] for b in BLANKS)}")
    config.tests = {test for b in chosen for test in b["tests"]} or None


def pytest_ignore_collect(collection_path, config):
    if config.tests and collection_path.suffix == ".py" and collection_path.name not in {test.split("::")[0] for test in config.tests}:
        return True  # a file that is not imported costs no time


def pytest_collection_modifyitems(config, items):
    if config.tests:
        items[:] = [item for item in items if function_of(item) in config.tests]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo and report.failed:
        said = call.excinfo.exconly(tryshort=True)  # torch.compile and a command of its own wrap the error, but repeat it
        for blank in BLANKS:
            if blank["equation"] in said and (call.excinfo.errisinstance(NotImplementedError) or function_of(item) not in OWN):
                if function_of(item) not in OWN:
                    report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: waits for {blank['name']}")
                else:
                    report.longrepr = f"{blank['name']} is still blank: {blank['equation']}"
    if LOG and report.when == "call" or LOG and report.outcome != "passed":
        log(report.outcome, item, call.excinfo.exconly() if call.excinfo else "")
    return report


def pytest_runtest_logstart(nodeid, location):
    if LOG:
        write({"event": "start", "test": f"{Path(nodeid.split('::')[0]).name}::{nodeid.split('::')[-1].split('[')[0]}", "case": nodeid})


def pytest_runtest_logfinish(nodeid, location):
    if LOG:
        write({"event": "end", "case": nodeid})


def log(outcome, item, message):
    write({"event": outcome, "test": function_of(item), "case": item.nodeid, "message": message[:600]})


def write(entry):
    with open(LOG, "a") as file:
        file.write(json.dumps(entry) + "\n")
