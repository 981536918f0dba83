"""Grade a submission: the tests of each blank, in a copy with our tests and our files around it.

    python assignments/grade.py 2 SUBMISSION     # a table, and results.json for Gradescope
    python assignments/grade.py 2 /autograder/submission --json /autograder/results/results.json

Of the submission only the files that hold blanks are taken; tests, configuration and all other code
are ours. Each blank's tests run in a process group of their own, with limits on time, memory, and
the size of any file or output. A test in which that process dies or hangs fails, and the rest goes
on in a new process, within the blank's time. So grading takes at most `--seconds` a blank.

The student's code runs in the process that tests it: this is made for mistakes, not for fraud. Run
it in a container, as Gradescope does.
"""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# beside this file, also when it is imported from elsewhere
sys.path.insert(0, str(Path(__file__).resolve().parent))
from make import TITLES, Blank, blanks_of, make  # noqa: E402

MAX_SOURCE = 1_000_000  # bytes of a submitted file
MAX_WRITTEN = 16_000_000  # bytes of any file that a test writes, its output included
MAX_PROCESSES = 1024  # of a test; root has no such limit
PR_SET_PDEATHSIG = 1  # Linux: a signal for the child when its parent ends
PR_SET_CHILD_SUBREAPER = 36  # Linux: orphans become children of this process, which can end them
AT_IMPORT = "while the file was imported, before its first test"


# ---------------------------------------------------------------- the submission


def take(submission: Path, copy: Path, blanks: list[Blank]) -> dict[str, str]:
    """Copies the student's files over ours: {file: why it cannot be used}."""
    problems = {}
    for name in sorted({b.file for b in blanks}):
        problem = problem_of(submission, name)
        if problem:
            problems[name] = problem
            (copy / name).write_text("raise ImportError('it was not handed in')\n")
        else:
            (copy / name).write_bytes((submission / name).read_bytes())
    return problems


def problem_of(submission: Path, name: str) -> str:
    """Why a file of the submission cannot be taken; empty if it can."""
    source = submission / name
    try:
        info = source.stat()
        inside = source.resolve().is_relative_to(submission.resolve())
        if not stat.S_ISREG(info.st_mode) or not inside:
            return "is no plain file of the submission"
        if info.st_size > MAX_SOURCE:
            return f"has {info.st_size} bytes, more than {MAX_SOURCE}"
        with open(source, "rb"):
            return ""
    except OSError as error:
        return f"cannot be read ({error.strerror})"


# ---------------------------------------------------------------- processes


def prctl(*args: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(*args, 0, 0, 0)


def descendants() -> dict[int, int]:
    """All processes below this one: {process id: its group}. Linux; elsewhere there are none."""
    parents, groups = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # a process may end meanwhile
        with contextlib.suppress(OSError, ValueError, IndexError):
            pid = int(entry.parent.name)
            _, _, after_name = entry.read_text(errors="replace").rpartition(")")
            _, parent, group, *_ = after_name.split()
            parents[pid] = int(parent)
            groups[pid] = int(group)
    found = set()
    generation = {os.getpid()}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation} - found
        found |= generation
    return {pid: groups[pid] for pid in found}


def kill_all(group: int, before: dict[int, int]) -> None:
    """Kills a process group and every descendant that was not there before, with its group."""
    # a whole group dies at once, so that none can outrun it; one that forks is found the next time
    for _ in range(50):
        left = {pid: own for pid, own in descendants().items() if pid not in before}
        for target in {group, *left.values()} - {os.getpgrp()}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(target, signal.SIGKILL)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, ChildProcessError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def limits(seconds: int, memory: int):
    """A function that runs in the child before Python starts there."""

    def set_limits():
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # the memory that it may write to; torch maps far more than it uses
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_WRITTEN, MAX_WRITTEN))
        resource.setrlimit(resource.RLIMIT_CPU, (4 * seconds, 4 * seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.getuid() != 0:
            resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))

    return set_limits


def run_once(copy: Path, tests: list[str], seconds: float, memory: int) -> tuple[list[dict], str]:
    """One pytest process over some tests: its log, and how the process ended ("" if by itself)."""
    log, output, home = copy / "grade.log", copy / "output.txt", copy / "tmp"
    log.write_text("")
    home.mkdir(exist_ok=True)
    env = {
        "PATH": os.environ.get("PATH", ""),
        "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", ""),
        "HOME": str(home),
        "TMPDIR": str(home),
        "GRADE_LOG": str(log),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(copy), "-c", str(copy / "pyproject.toml"), *tests]
    before = descendants()
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=limits(max(1, int(seconds)), memory),
        )
        try:
            ending = describe_exit(process.wait(max(0.1, seconds)))
        except subprocess.TimeoutExpired:
            ending = f"it was stopped after {seconds:.0f} s"
        finally:
            kill_all(process.pid, before)
            process.wait()
    entries = read_log(log)
    at_collection = ending.endswith("exit code 2") and not entries
    if at_collection or ending.endswith("exit code 4"):
        ending = collection_error(output, copy) or ending
    return entries, ending


def describe_exit(code: int) -> str:
    """How a pytest process ended; empty if all its tests ran, green or red."""
    if code in (0, 1):
        return ""
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def read_log(path: Path) -> list[dict]:
    """What handout_conftest.py wrote of each test."""
    entries = []
    with open(path, "rb") as file:
        text = file.read(MAX_WRITTEN).decode(errors="replace")
    for line in text.splitlines():
        # a line may be cut off
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.get("event"):
                entries.append(entry)
    return entries


def collection_error(output: Path, copy: Path) -> str:
    """The error lines of pytest's output when it could not import a file."""
    with open(output, "rb") as file:
        text = file.read(100_000).decode(errors="replace").replace(f"{copy}/", "")
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
    return "\n".join(lines)


# ---------------------------------------------------------------- grades


def grade_blank(b: Blank, copy: Path, seconds: float, memory: int) -> tuple[dict[str, str], float]:
    """{test: "" if it passed, else what went wrong}, and the seconds that it took."""
    began = time.monotonic()
    left = list(b.tests)
    outcomes = {}
    while left:
        rest = seconds - (time.monotonic() - began)
        if rest < 1:
            outcomes |= dict.fromkeys(left, "there was no time left for it")
            break
        entries, ending = run_once(copy, [f"tests/{test}" for test in left], rest, memory)
        outcomes = outcomes_of(entries, ending, outcomes)
        remaining = [test for test in left if test not in outcomes]
        if remaining == left:
            # not one was started: another process would end the same way
            reason = f"{AT_IMPORT}: {ending or 'the process ended'}"
            outcomes |= dict.fromkeys(left, reason)
            break
        left = remaining
    return {test: outcomes[test] for test in b.tests}, time.monotonic() - began


def outcomes_of(entries: list[dict], ending: str, known: dict[str, str]) -> dict[str, str]:
    """The outcomes known so far, and what a log adds: a test passes if no case of it fails."""
    started = {}  # cases that have not ended: {case: its test}
    passed, failed = {}, {}
    for entry in entries:
        event = entry["event"]
        test, case = str(entry.get("test", "")), str(entry.get("case", ""))
        if event == "start":
            started[case] = test
        elif event == "end":
            started.pop(case, None)
        elif event == "passed":
            passed[test] = ""
        else:
            failed.setdefault(test, str(entry.get("message", "")) or event)
    for test in started.values():
        failed[test] = f"{ending or 'the process ended early'} in the middle of it"
    return passed | known | failed


def grade(assignment: int, submission: Path, seconds: float, memory: int) -> dict:
    """results.json in Gradescope's format."""
    began = time.monotonic()
    blanks = blanks_of(assignment)
    tests = []
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as folder:
        for number, b in enumerate(blanks, 1):
            copy = Path(folder) / b.name
            make(assignment, copy, fill=True)
            problems = take(submission, copy, blanks)
            outcomes, took = grade_blank(b, copy, seconds, memory)
            entry = report(b, outcomes, problems.get(b.file, ""))
            entry["number"] = f"{assignment}.{number}"
            entry["extra_data"]["seconds"] = round(took, 1)
            tests.append(entry)
            shutil.rmtree(copy, ignore_errors=True)
    return {
        "score": round(sum(test["score"] for test in tests), 2),
        "execution_time": round(time.monotonic() - began),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
    }


def report(b: Blank, outcomes: dict[str, str], problem: str) -> dict:
    """One blank in Gradescope's format. problem: of its file, if that could not be taken."""
    passed = sum(not message for message in outcomes.values())
    lines = [b.equation]
    if problem:
        lines.append(f"{b.file} {problem}")
    for test, message in outcomes.items():
        lines.append(f"FAIL {test}\n     {shorten(message)}" if message else f"ok   {test}")
    return {
        "name": b.name,
        "score": round(b.points * passed / len(outcomes), 2),
        "max_score": b.points,
        "status": "passed" if passed == len(outcomes) else "failed",
        "output": "\n".join(lines),
        "visibility": "visible",
        "extra_data": {"passed": passed, "tests": len(outcomes)},
    }


def shorten(message: str) -> str:
    """The lines of a message that say what was expected."""
    lines = [line.strip()[:200] for line in message.strip().splitlines()[:5]]
    return "\n     ".join(line for line in lines if line)


def table(results: dict) -> str:
    rows = [("blank", "points", "tests", "seconds")]
    for test in results["tests"]:
        extra = test["extra_data"]
        points = f"{test['score']:g}/{test['max_score']}"
        rows.append((test["name"], points, f"{extra['passed']}/{extra['tests']}", extra["seconds"]))
    most = sum(test["max_score"] for test in results["tests"])
    rows.append(("sum", f"{results['score']:g}/{most}", "", results["execution_time"]))
    return "\n".join(f"{a:40} {b:>8} {c:>6} {d:>8}" for a, b, c, d in rows)


# ---------------------------------------------------------------- the command line


def stop(number: int, frame) -> None:
    """Ends by an exception, so that the process of a test and the copies go too."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # a second one would leave them behind
    print(f"stopped by {signal.Signals(number).name}; nothing was written", file=sys.stderr)
    sys.exit(128 + number)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("assignment", choices=[str(n) for n in TITLES if blanks_of(n)])
    add("submission", type=Path, help="the student's folder")
    add("--json", type=Path, default=Path("results.json"), help="where Gradescope's file goes")
    add("--seconds", type=float, default=60, help="for the tests of one blank (60)")
    add("--gigabytes", type=float, default=4, help="of memory for the tests of one blank (4)")
    args = parser.parse_args()
    if not args.submission.is_dir():
        parser.error(f"there is no folder {args.submission}")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # what a submission prints may have no encoding
    sys.stdout.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    memory = int(args.gigabytes * 2**30)
    results = grade(int(args.assignment), args.submission, args.seconds, memory)
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    for test in results["tests"]:
        if test["status"] == "failed":
            print(f"{test['name']}: {test['output']}\n")
    print(table(results))


if __name__ == "__main__":
    main()
