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
import probes  # noqa: E402
import sandbox  # noqa: E402

sys.path.remove(HERE)  # what lies there is not the student's to import

STUDENTS = "your "  # begins the file name of the student's code, see grade.py


def main() -> None:
    job = json.loads(sys.argv[1])
    # orphans become children of this process, which can end them; and no other reads its memory
    sandbox.prctl(sandbox.PR_SET_CHILD_SUBREAPER, 1)
    sandbox.prctl(sandbox.PR_SET_DUMPABLE, 0)
    with tempfile.TemporaryFile() as report, tempfile.TemporaryFile() as output:
        ending = watch(job, report, output)
        result = {"ending": ending, "report": read_report(report), "output": read_end(output)}
    print(json.dumps(result))


def watch(job: dict, report, output) -> str:
    """Starts the confined process, and leaves nothing of it behind. Returns how it ended."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            code = test(job, report.fileno(), output.fileno())
        finally:
            os._exit(code)

    def stop(number, frame):
        sandbox.kill_descendants(child)
        os._exit(1)

    signal.signal(signal.SIGTERM, stop)
    sandbox.prctl(sandbox.PR_SET_PDEATHSIG, signal.SIGTERM)
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


def read_end(file) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2000))
    return file.read(2000).decode(errors="replace")


# ---------------------------------------------------------------- the confined process


def test(job: dict, report: int, output: int) -> int:
    """Confines itself, then imports pytest and the student's code. Returns its exit code."""
    folder = Path(job["folder"])
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    walls = sandbox.confine(folder, job["user"], job["seconds"], job["memory"])
    sys.path[:0] = [str(folder), str(folder / "tests")]

    import pytest

    recorder = Recorder(report)
    recorder.write(walls=walls)
    tests = [*job["tests"], "test_canary.py"]
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore", "-c", "pyproject.toml"]
    pytest.main([*options, *[f"tests/{test}" for test in tests]], plugins=[recorder])
    recorder.write(answers=probes.answers(job["name"], job["seed"]))
    return 0


class Recorder:
    """A pytest plugin that writes a line for each case of a test."""

    def __init__(self, file: int):
        self.file = file

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
            message = explain(call.excinfo, item)
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        self.write(test=name, case=item.name, outcome=outcome, message=message)


def explain(excinfo, item) -> str:
    """What to fix: the error, values seen and expected, the line of the test and the student's."""
    lines = [line.strip() for line in excinfo.exconly().splitlines()[:5]]
    frames = []
    tb = excinfo.tb
    while tb is not None:
        frames.append((tb.tb_frame, tb.tb_lineno))
        tb = tb.tb_next
    with contextlib.suppress(Exception):
        lines += [seen_and_expected(frame) for frame, _ in frames if is_comparison(frame)][:1]
    own = [(frame, line) for frame, line in frames if frame.f_code.co_filename == str(item.path)]
    for frame, line in own[-1:]:
        code = linecache.getline(frame.f_code.co_filename, line).strip()
        lines.append(f"in {item.path.name}, line {line}: {code}")
    theirs = [pair for pair in frames if pair[0].f_code.co_filename.startswith(STUDENTS)]
    for frame, line in theirs[-1:]:
        lines.append(f"in {frame.f_code.co_filename}, line {line}")
    return "\n".join(line[:200] for line in lines if line)[:1200]


def is_comparison(frame) -> bool:
    names = frame.f_locals
    return frame.f_code.co_name == "assert_close" and {"actual", "expected"} <= names.keys()


def seen_and_expected(frame) -> str:
    """The elements of two tensors that differ most."""
    import torch

    seen, expected = frame.f_locals["actual"], frame.f_locals["expected"]
    if not isinstance(seen, torch.Tensor):
        return f"seen: {type(seen).__name__} {seen!r:.80}, expected {type(expected).__name__}"
    if not isinstance(expected, torch.Tensor) or seen.shape != expected.shape:
        shape = tuple(getattr(expected, "shape", ()))
        return f"seen: shape {tuple(seen.shape)}, expected {shape}"
    difference = (seen.detach().double() - expected.detach().double()).abs()
    where = torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape)
    where = tuple(int(i) for i in where)
    return f"at {list(where)} seen {seen[where]:.5g}, expected {expected[where]:.5g}"


if __name__ == "__main__":
    main()
