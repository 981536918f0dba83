"""Grade a submission: the tests of each blank, in a copy with our tests and our files around the student's.

    python assignments/grade.py 2 SUBMISSION                              # a table, and results.json in Gradescope's format
    python assignments/grade.py 2 /autograder/submission --json /autograder/results/results.json

Of the submission only the files that hold blanks are taken; tests, configuration and all other code are ours. Each blank's tests run
in a process group of their own, with limits on time, memory, and the size of any file or output. A test in which that process dies or
hangs fails, and the rest goes on in a new process, within the blank's time. So grading takes at most `--seconds` a blank.

The student's code runs in the process that tests it: this is made for mistakes, not for fraud. Run it in a container, as Gradescope does.
"""
import argparse
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make import TITLES, Blank, blanks_of, make

MAX_SOURCE = 1_000_000      # bytes of a submitted file
MAX_WRITTEN = 16_000_000    # bytes of any file that a test writes, its output included
PR_SET_PDEATHSIG = 1        # Linux: a signal for the child when we end
PR_SET_CHILD_SUBREAPER = 36  # Linux: whoever loses its parent becomes ours, so that we can end it
STARTING = "while the file was imported, before its first test"


def take(submission: Path, copy: Path, blanks: list[Blank]) -> dict[str, str]:
    """Lays the student's files over ours; says of each that could not be used why."""
    wrong = {}
    for name in sorted({b.file for b in blanks}):
        source = submission / name
        try:
            info = source.stat()
            if not stat.S_ISREG(info.st_mode) or not source.resolve().is_relative_to(submission.resolve()):
                wrong[name] = "is no plain file of the submission"
            elif info.st_size > MAX_SOURCE:
                wrong[name] = f"has {info.st_size} bytes, more than {MAX_SOURCE}"
            else:
                (copy / name).write_bytes(source.read_bytes())
                continue
        except OSError as error:
            wrong[name] = f"cannot be read ({error.strerror})"
        (copy / name).write_text("raise ImportError('it was not handed in')\n")
    return wrong


def prctl(*args: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(*args, 0, 0, 0)


def descendants() -> dict[int, int]:
    """Processes whose parent, or its parent, ... is this one, and the group of each (Linux; elsewhere none)."""
    parents, groups = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, after_name = int(entry.parent.name), entry.read_text(errors="replace").rpartition(")")[2].split()
            parents[pid], groups[pid] = int(after_name[1]), int(after_name[2])
        except (OSError, ValueError, IndexError):
            pass  # it has ended meanwhile
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: groups[pid] for pid in found - {os.getpid()}}


def end(group: int, before: dict[int, int]) -> None:
    """Ends the process group, and the groups that its children made."""
    for _ in range(50):  # one that forks while we look is found the next time; a whole group ends at once, so that nobody can outrun it
        left = {pid: its for pid, its in descendants().items() if pid not in before}
        for target in {group, *left.values()} - {os.getpgrp()}:
            try:
                os.killpg(target, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            except (ProcessLookupError, ChildProcessError, PermissionError):
                pass
        time.sleep(0.02)


def limits(seconds: int, memory: int):
    """Runs in the child before Python starts there."""
    def set_them():
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # what it may write to; torch maps far more than it uses
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_WRITTEN, MAX_WRITTEN))
        resource.setrlimit(resource.RLIMIT_CPU, (4 * seconds, 4 * seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.getuid():  # root is above this limit
            resource.setrlimit(resource.RLIMIT_NPROC, (1024, 1024))
    return set_them


def run_once(copy: Path, tests: list[str], seconds: float, memory: int) -> tuple[list[dict], str]:
    """One pytest process over some tests: what the conftest wrote of each, and how the process ended ("" if by itself)."""
    log, output, before = copy / "grade.log", copy / "output.txt", descendants()
    log.unlink(missing_ok=True)
    log.touch()
    home = copy / "tmp"
    home.mkdir(exist_ok=True)
    env = {"PATH": os.environ.get("PATH", ""), "HOME": str(home), "TMPDIR": str(home), "GRADE_LOG": str(log), "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(copy), "-c", str(copy / "pytest.ini"), *tests]
    how = ""
    with open(output, "wb") as file:
        process = subprocess.Popen(command, cwd=copy, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                                   preexec_fn=limits(max(1, int(seconds)), memory))
        try:
            code = process.wait(max(0.1, seconds))
            how = "" if code in (0, 1) else f"the process was ended by {signal.Signals(-code).name}" if code < 0 else f"the process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = f"it was stopped after {seconds:.0f} s"
        finally:
            end(process.pid, before)
            process.wait()
    entries = []
    with open(log, "rb") as file:
        for line in file.read(MAX_WRITTEN).decode(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event"):
                    entries.append(entry)
            except ValueError:
                pass  # a line that was cut off
    if not entries and how.endswith("exit code 2") or how.endswith("exit code 4"):
        with open(output, "rb") as file:
            said = file.read(100_000).decode(errors="replace").replace(f"{copy}/tests/../", "")
        how = "\n".join(line[1:].strip() for line in said.splitlines() if line.startswith("E  ")) or how
    return entries, how


def grade_blank(b: Blank, copy: Path, seconds: float, memory: int) -> tuple[dict[str, str], float]:
    """Each test of a blank -> "" if it passed, else what went wrong."""
    began, left, found = time.monotonic(), list(b.tests), {}
    while left:
        rest = seconds - (time.monotonic() - began)
        if rest < 1:
            found |= {test: "there was no time left for it" for test in left}
            break
        entries, how = run_once(copy, [f"tests/{test}" for test in left], rest, memory)
        cases: dict[str, str] = {}      # of started cases: the last that was heard of each
        failed: dict[str, str] = {}
        for entry in entries:
            test, case = str(entry.get("test", "")), str(entry.get("case", ""))
            if entry["event"] == "start":
                cases[case] = test
            elif entry["event"] == "end":
                cases.pop(case, None)
            elif entry["event"] == "passed":
                found.setdefault(test, "")
            else:
                failed.setdefault(test, str(entry.get("message", "")) or entry["event"])
        open_tests = set(cases.values())
        if open_tests:                   # the process died in it
            failed |= {test: f"{how or 'the process ended early'} in the middle of it" for test in open_tests}
        found |= failed
        found = {test: found[test] for test in b.tests if test in found}
        going = [test for test in left if test not in found]
        if going == left:                # nothing was even started: another process would end the same way
            found |= {test: f"{STARTING}: {how or 'the process ended'}" for test in left}
            break
        left = going
    return {test: found[test] for test in b.tests}, time.monotonic() - began


def grade(assignment: int, submission: Path, seconds: float, memory: int) -> dict:
    """results.json in Gradescope's format."""
    blanks, tests, began = blanks_of(assignment), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as folder:
        for b in blanks:
            copy = Path(folder) / b.name
            make(assignment, copy, fill=True)
            (copy / "pytest.ini").write_text("[pytest]\n")
            wrong = take(submission, copy, blanks)
            found, took = grade_blank(b, copy, seconds, memory)
            passed = sum(not message for message in found.values())
            lines = [f"{name} {why}" for name, why in wrong.items() if name == b.file]
            lines += [f"{'ok  ' if not message else 'FAIL'} {test}" + (f"\n     {shorten(message)}" if message else "") for test, message in found.items()]
            tests.append({"name": b.name, "number": f"{assignment}.{len(tests) + 1}", "score": round(b.points * passed / len(found), 2), "max_score": b.points,
                          "status": "passed" if passed == len(found) else "failed", "output": "\n".join([b.equation, *lines]), "visibility": "visible",
                          "extra_data": {"seconds": round(took, 1), "passed": passed, "tests": len(found)}})
            shutil.rmtree(copy, ignore_errors=True)
    return {"score": round(sum(t["score"] for t in tests), 2), "execution_time": round(time.monotonic() - began), "visibility": "visible",
            "stdout_visibility": "hidden", "tests": tests}


def shorten(message: str) -> str:
    """The lines of a message that say what was expected."""
    return "\n     ".join(line.strip()[:200] for line in message.strip().splitlines()[:5] if line.strip())


def table(results: dict) -> str:
    rows = [("blank", "points", "tests", "seconds")]
    for t in results["tests"]:
        rows.append((t["name"], f"{t['score']:g}/{t['max_score']}", f"{t['extra_data']['passed']}/{t['extra_data']['tests']}", f"{t['extra_data']['seconds']}"))
    rows.append(("sum", f"{results['score']:g}/{sum(t['max_score'] for t in results['tests'])}", "", f"{results['execution_time']}"))
    return "\n".join(f"{a:40} {b:>8} {c:>6} {d:>8}" for a, b, c, d in rows)


def stop(number: int, frame) -> None:
    """Ends by an exception, so that the process of a test and the copies go too."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # a second one would leave them behind
    print(f"stopped by {signal.Signals(number).name}; nothing was written", file=sys.stderr)
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assignment", choices=[str(n) for n in TITLES if blanks_of(n)])
    parser.add_argument("submission", type=Path, help="the student's folder")
    parser.add_argument("--json", type=Path, default=Path("results.json"), help="where Gradescope's file goes")
    parser.add_argument("--seconds", type=float, default=60, help="for the tests of one blank")
    parser.add_argument("--gigabytes", type=float, default=4, help="of memory for the tests of one blank")
    args = parser.parse_args()
    if not args.submission.is_dir():
        parser.error(f"there is no folder {args.submission}")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    sys.stdout.reconfigure(errors="backslashreplace")  # what a submission says may be in no encoding
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    results = grade(int(args.assignment), args.submission, args.seconds, int(args.gigabytes * 2**30))
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    for t in results["tests"]:
        if t["status"] == "failed":
            print(f"{t['name']}: {t['output']}\n")
    print(table(results))


if __name__ == "__main__":
    main()
