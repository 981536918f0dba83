"""Runs the tests of one blank in a confined process, and reports what it said. For grade.py alone.

    python -I -B run_blank.py '{"folder": ..., "name": ..., "tests": [...], "seed": 3, ...}'

This process starts the confined one (`test`), ends it with all that it started, and prints one line
of JSON: how it ended, and its report. What the report says of tests is the student's process'
word, since their code ran in it. Its `answers` (probes.py) are compared by the grader.
"""

import contextlib
import json
import linecache
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
sys.path.insert(0, HERE)
import sandbox  # noqa: E402

sys.path.remove(HERE)  # what lies there is not the student's to import

STUDENTS = 1_000_000  # is added to line numbers of the student's code, to tell it in a traceback


def main() -> None:
    job = json.loads(sys.argv[1])
    # orphans become children of this process, which can end them; and no other reads its memory
    sandbox.prctl(sandbox.PR_SET_CHILD_SUBREAPER, 1)
    sandbox.prctl(sandbox.PR_SET_DUMPABLE, 0)
    with tempfile.TemporaryFile() as report:
        ending = watch(job, report.fileno())
        print(json.dumps({"ending": ending, "report": read_report(report)}))


def watch(job: dict, report: int) -> str:
    """Starts the confined process, and leaves nothing of it behind. Returns how it ended."""
    watcher = os.getpid()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            code = test(job, report, watcher)
        finally:
            os._exit(code)

    def stop(number, frame):
        sandbox.kill_descendants(child)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    sandbox.die_with(job["grader"], signal.SIGTERM)
    ending = wait(child, job["seconds"])
    sandbox.kill_descendants(child)
    return ending


def wait(child: int, seconds: float) -> str:
    """Waits for a process: how it ended, empty if by itself and in order."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                return f"the process was ended by {signal.Signals(-code).name}"
            return f"the process ended itself, with exit code {code}" if code else ""
        time.sleep(0.02)
    return f"it was stopped after {seconds:g} s"


def read_report(file) -> list[dict]:
    """What the process wrote, a JSON object a line; what is no such line is left out."""
    entries = []
    file.seek(0)
    for line in file.read(sandbox.MAX_WRITTEN).decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


# ---------------------------------------------------------------- the confined process


def test(job: dict, report: int, watcher: int) -> int:
    """Confines itself, then imports pytest and the student's code. Returns its exit code."""
    folder = Path(job["folder"])
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(folder)
    walls = sandbox.confine(folder, job["user"], job["seconds"], job["memory"])
    sandbox.die_with(watcher, signal.SIGKILL)  # after `confine`, where another user id forgets it
    sys.path[:0] = [str(folder), str(folder / "tests")]

    import pytest

    recorder = Recorder(report, job)
    recorder.write(walls=walls)
    tests = [*job["tests"], "test_canary.py"]
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", "-c", "pyproject.toml"]
    pytest.main([*options, *[f"tests/{test}" for test in tests]], plugins=[recorder])
    try:
        import probes

        answers = probes.answers(job["name"], job["seed"])
    except Exception as error:
        answers = {"error": f"{type(error).__name__}: {error}"[:300]}
    recorder.write(answers=answers)
    return 0


class Recorder:
    """A pytest plugin that writes a line for each case of a test."""

    def __init__(self, file: int, job: dict):
        self.file = file
        self.job = job

    def write(self, **entry) -> None:
        os.write(self.file, json.dumps(entry).encode() + b"\n")

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.write(collection=str(report.longrepr)[-600:])

    def pytest_runtest_makereport(self, item, call) -> None:
        # pytest's own makereport comes after this one, and decides nothing that counts here
        if call.when != "call" and not call.excinfo:
            return
        message, outcome = "", "passed"
        if call.excinfo:
            is_skip = call.excinfo.typename == "Skipped"
            outcome = "skipped" if is_skip else "failed"
            message = self.explain(call.excinfo, item)
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        self.write(test=name, case=item.name, outcome=outcome, message=message)

    def explain(self, excinfo, item) -> str:
        """What to fix: the error, the line of the test, and the student's line."""
        lines = [line.strip() for line in excinfo.exconly().splitlines()[:5]]
        in_test, in_body = "", ""
        tb = excinfo.tb
        while tb is not None:
            code = tb.tb_frame.f_code
            if code.co_filename == str(item.path):
                source = linecache.getline(code.co_filename, tb.tb_lineno).strip()
                in_test = f"in {item.path.name}, line {tb.tb_lineno}: {source}"
            elif tb.tb_lineno > STUDENTS:
                line = tb.tb_lineno - STUDENTS
                source = linecache.getline(self.job["source"], line).strip()
                in_body = f"in your {self.job['path']}, line {line}: {source}"
            tb = tb.tb_next
        lines += [in_test, in_body]
        return "\n".join(line[:200] for line in lines if line)[:1200]


if __name__ == "__main__":
    main()
