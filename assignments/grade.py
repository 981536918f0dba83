"""Grade a submission by the bodies of its blanks: each alone in the reference, in its own process.

    python assignments/grade.py 2 SUBMISSION     # a table, and results.json for Gradescope
    python assignments/grade.py 2 /autograder/submission --json /autograder/results/results.json

SUBMISSION is a folder or a zip. Of a blank the body is taken, with functions, imports and constants
of the same file that it needs and the reference lacks; all else of the submission is listed, and
not used. So a mistake costs the points of its own blank. The reference is the hand-out with its
own blanks filled in.

A body has to get through four walls, each made for what passes the one before:

    audit.py      reads it: what reaches for files, processes or Python's insides is not run
    sandbox.py    another user, without access to files but Python's and its own, and limits
    canary.py     tests that must fail, after its own tests, in the same process
    probes.py     what it computes for new random inputs, compared here with the reference

Points are the smaller share of tests passed and of answers that agree. results.json is there from
the first second on, with zeros, and replaced at the end: whatever dies, there is a reason.
"""

import argparse
import ast
import importlib.util
import json
import marshal
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# beside this file, also when it is imported from elsewhere
sys.path.insert(0, str(HERE))
from bodies import UNREADABLE, Body, changed_outside, definition, statements, take  # noqa: E402
from make import TITLES, Blank, blanks_of, make  # noqa: E402
from run_blank import STUDENTS  # noqa: E402
from sandbox import PR_SET_DUMPABLE, prctl  # noqa: E402
from submission import Submission, read_submission  # noqa: E402

FIRST_USER = 61_000  # user ids of the blanks' processes; one each, so that none can end another
AT_ONCE = 2  # blanks that are tested at a time
GRACE = 20  # seconds for a process to report after its time is up
CANARIES = 3  # tests of canary.py
ENOUGH = 0.5  # share of answers that must agree for any points: some are right by chance
ATOL, RTOL = 2e-4, 2e-3  # of equal answers: float32, in another order
UNFINISHED = "grading did not come to its end; see the grader's log"

running = set()  # processes of run_blank.py, to be stopped with this one
stopping = threading.Event()
parsing = threading.Lock()  # Python 3.11 raises SystemError where two threads parse at a time


# ---------------------------------------------------------------- a blank's folder


def build_reference(assignment: int, folder: Path) -> dict[str, str]:
    """The reference as bytecode, beside the tests: {file: its source}."""
    make(assignment, folder, fill=True)
    for name in ("conftest.py", "draw.py"):  # of the hand-out; not the grader's
        (folder / name).unlink()
    sources = {}
    for path in folder.glob("*.py"):
        sources[path.name] = path.read_text("utf-8")
        write_compiled(ast.parse(sources[path.name]), path)
        path.unlink()
    shutil.copyfile(HERE / "canary.py", folder / "tests" / "test_canary.py")
    shutil.copyfile(HERE / "probes.py", folder / "tests" / "probes.py")
    return sources


def write_compiled(tree: ast.Module, path: Path) -> None:
    """A .pyc that is imported without its source."""
    header = importlib.util.MAGIC_NUMBER + bytes(12)
    code = compile(tree, path.name, "exec")
    path.with_suffix(".pyc").write_bytes(header + marshal.dumps(code))


def build(body: Body, reference: Path, source: str, folder: Path) -> None:
    """The reference with one body of the student's; body.problem, if that cannot be compiled."""
    tree = ast.parse(source)
    node = definition(tree, body.blank.function)
    docstring = node.body[: len(node.body) - len(statements(node))]
    node.body = docstring + statements(body.node)
    tree.body += body.extras
    for statement in [*statements(body.node), *body.extras]:
        ast.increment_lineno(statement, STUDENTS)
    shutil.copytree(reference, folder)
    (folder / "tmp").mkdir()
    (folder / "submitted.txt").write_text(body.source, "utf-8")
    try:
        write_compiled(tree, folder / body.blank.file)
    except UNREADABLE as error:
        line = (getattr(error, "lineno", None) or STUDENTS) - STUDENTS
        body.problem = f"{body.path}, line {line}: {error}"


# ---------------------------------------------------------------- processes


def run_blank(b: Blank, handed: Submission, source: str, folder: Path, job: dict):
    """A blank's body, what its process said (None if it was not run), and its seconds."""
    began = time.monotonic()
    body, result = Body(b), None
    try:
        own = folder / b.name
        with parsing:
            body = take(b, handed, source)
            if not body.problem:
                build(body, folder / "reference", source, own)
        if not body.problem:
            own.chmod(0o755 if os.getuid() else 0o750)
            if os.getuid() == 0:
                os.chown(own, -1, job["user"])
            result = run_tests(body, own, job)
        shutil.rmtree(own, ignore_errors=True)
    except Exception as error:
        body.problem = f"the grader failed on it ({type(error).__name__}: {error})"
    return body, result, time.monotonic() - began


def run_tests(body: Body, folder: Path, job: dict) -> dict:
    """What run_blank.py prints of a blank; how it ended alone if it printed nothing."""
    job = job | {"folder": str(folder), "name": body.blank.name, "tests": body.blank.tests}
    job |= {"grader": os.getpid(), "path": body.path, "source": str(folder / "submitted.txt")}
    command = [sys.executable, "-I", "-B", str(HERE / "run_blank.py"), json.dumps(job)]
    pipe = subprocess.PIPE
    env = environment(folder / "tmp")
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    running.add(process)
    try:
        if stopping.is_set():
            process.terminate()
        said, error = process.communicate(timeout=job["seconds"] + GRACE)
        return json.loads(said)
    except (subprocess.TimeoutExpired, ValueError) as problem:
        process.kill()
        process.wait()
        said = "" if isinstance(problem, subprocess.TimeoutExpired) else error.decode()[-300:]
        return {"ending": f"the process that watches over it ended {said}".strip(), "report": []}
    finally:
        running.discard(process)


def environment(scratch: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "CUDA_VISIBLE_DEVICES": ""}
    return kept | own | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def start_reference(blanks: list[Blank], folder: Path, seed: int) -> subprocess.Popen:
    """A process that computes the reference's answers."""
    command = [sys.executable, "-B", "tests/probes.py", str(seed), *[b.name for b in blanks]]
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE)


# ---------------------------------------------------------------- grades


def grade(assignment: int, path: Path, seconds: float, memory: int) -> dict:
    """Grades a folder or a zip."""
    began = time.monotonic()
    blanks = blanks_of(assignment)
    handed = read_submission(path)
    seed = secrets.randbits(31)
    with tempfile.TemporaryDirectory(prefix="grade-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        folder.chmod(0o711)
        make(assignment, folder / "handout")
        (folder / "handout").chmod(0o700)
        sources = build_reference(assignment, folder / "reference")
        (folder / "reference").chmod(0o700)
        oracle = start_reference(blanks, folder / "reference", seed)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = []
            for i, b in enumerate(blanks):
                job = {"seed": seed, "user": FIRST_USER + i, "seconds": seconds, "memory": memory}
                args = (b, handed, sources[b.file], folder, job)
                futures.append(pool.submit(run_blank, *args))
            try:
                with parsing:
                    outside = changed_outside(blanks, handed, folder / "handout")
                reference = json.loads(oracle.communicate()[0])
                for name, found in reference.items():
                    assert "error" not in found, f"the probe of {name}: {found['error']}"
                tests = [finish(*future.result(), reference) for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                oracle.kill()
                raise
    return results_of(assignment, tests, outside, time.monotonic() - began)


def finish(body: Body, result: dict | None, seconds: float, reference: dict) -> dict:
    entry = entry_of(body, 0, [])
    if result is not None:
        try:
            entry = judge(body, result, reference[body.blank.name])
        except Exception as error:
            body.flags.append(f"its process reported what cannot be read ({type(error).__name__})")
            entry = entry_of(body, 0, [])
    entry["extra_data"]["seconds"] = round(seconds, 1)
    return entry


def judge(body: Body, result: dict, reference: dict) -> dict:
    """The entry of a blank that was run: the smaller share of tests and answers is its points."""
    b = body.blank
    cases = {}
    canaries = 0
    said = {"walls": "", "answers": None, "collection": ""}  # the last word on each
    for entry in result["report"]:
        said |= entry
        test = str(entry.get("test", ""))
        if test.startswith("test_canary.py::"):
            canaries += entry.get("outcome") == "failed"
        elif test:
            cases.setdefault(test, []).append(entry)

    # its tests
    passed = 0
    lines = []
    ending = result["ending"] or "it ended early"
    why_not_run = last_lines(str(said["collection"])) or f"it did not come to its end: {ending}"
    for test in b.tests:
        found = cases.get(test, [])
        wrong = [entry for entry in found if entry.get("outcome") == "failed"]
        if wrong:
            share = f" ({len(wrong)} of {len(found)} cases)" if len(found) > 1 else ""
            message = indented(str(wrong[0].get("message", "")))
            lines.append(f"FAIL {test}{share}\n{message}")
        elif any(entry.get("outcome") == "passed" for entry in found):
            passed += 1
            lines.append(f"ok   {test}")
        else:
            lines.append(f"FAIL {test}\n{indented(why_not_run)}")

    # its answers
    answers = said["answers"]
    agreed = 0
    if isinstance(answers, dict):
        problems = [difference(answers.get(what), reference[what], what) for what in reference]
        agreed = problems.count("")
        if agreed == len(reference):
            lines.append("ok   new random inputs")
        else:
            problem = str(answers.get("error", "")) or next(filter(None, problems))
            share = f"{agreed} of {len(reference)} answers agree"
            lines.append(f"FAIL new random inputs: {share}\n{indented(problem)}")
    else:
        body.flags.append(f"its process gave no answers: {ending}")

    share = min(passed / len(b.tests), agreed / len(reference))
    if isinstance(answers, dict) and canaries != CANARIES:
        body.flags.append(f"{CANARIES - canaries} of {CANARIES} tests that must fail did not")
        share = 0
    elif agreed < ENOUGH * len(reference):
        share = 0
    if passed == len(b.tests) and agreed < len(reference):
        body.flags.append("its tests pass, and yet new random inputs show other values")
    entry = entry_of(body, share, lines)
    entry["extra_data"] |= {"passed": passed, "answers": f"{agreed}/{len(reference)}"}
    entry["extra_data"]["walls"] = str(said["walls"])
    return entry


def difference(answer, reference, where: str) -> str:
    """Where two answers differ, plain JSON both; empty if they are equal but for rounding."""
    if isinstance(answer, list) and isinstance(reference, list):
        answer, reference = dict(enumerate(answer)), dict(enumerate(reference))
    if isinstance(answer, dict) and isinstance(reference, dict):
        if answer.keys() != reference.keys():
            return f"{where}: {sorted(answer)}, expected {sorted(reference)}"[:200]
        inner = (difference(answer[key], reference[key], f"{where} {key}") for key in reference)
        return next(filter(None, inner), "")
    if is_number(answer) and is_number(reference):
        is_close = abs(answer - reference) <= ATOL + RTOL * abs(reference)
        return "" if is_close else f"{where}: {answer:g}, expected {reference:g}"
    is_equal = type(answer) is type(reference) and answer == reference
    return "" if is_equal else f"{where}: {str(answer)[:100]}, expected {str(reference)[:100]}"


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def last_lines(message: str) -> str:
    return "\n".join(message.splitlines()[-4:])


def indented(message: str) -> str:
    lines = [line.strip()[:200] for line in message.strip().splitlines()[:9]]
    return "\n".join(f"     {line}" for line in lines if line)


def entry_of(body: Body, share: float, lines: list[str]) -> dict:
    """One blank in Gradescope's format."""
    b = body.blank
    text = [b.equation]
    text += [f"FLAG {flag}" for flag in body.flags]
    text += [body.problem] if body.problem else []
    text += [f"note {note}" for note in body.notes] + lines
    return {
        "name": b.name,
        "score": round(b.points * share, 2),
        "max_score": b.points,
        "status": "passed" if share == 1 else "failed",
        "output": "\n".join(text),
        "visibility": "visible",
        "extra_data": {"passed": 0, "tests": len(b.tests), "seconds": 0.0, "flags": body.flags},
    }


def results_of(assignment: int, tests: list[dict], outside: list[str], seconds: float) -> dict:
    """results.json in Gradescope's format. outside: lines on what lies outside the blanks."""
    flagged = [line for line in outside if line.startswith("FLAG")]
    for number, test in enumerate(tests, 1):
        test["number"] = f"{assignment}.{number}"
        flagged += [f"{test['name']}: {flag}" for flag in test["extra_data"]["flags"]]
    return {
        "score": round(sum(test["score"] for test in tests), 2),
        "execution_time": round(seconds),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "output": "\n".join(outside),
        "tests": tests,
        "extra_data": {"flags": flagged},
    }


def zeros(assignment: int, reason: str) -> dict:
    tests = [entry_of(Body(b, problem=reason), 0, []) for b in blanks_of(assignment)]
    return results_of(assignment, tests, [], 0)


# ---------------------------------------------------------------- the command line


def table(results: dict) -> str:
    rows = [("blank", "points", "tests", "seconds")]
    for test in results["tests"]:
        extra = test["extra_data"]
        points = f"{test['score']:g}/{test['max_score']}"
        rows.append((test["name"], points, f"{extra['passed']}/{extra['tests']}", extra["seconds"]))
    most = sum(test["max_score"] for test in results["tests"])
    rows.append(("sum", f"{results['score']:g}/{most}", "", results["execution_time"]))
    return "\n".join(f"{a:40} {b:>8} {c:>6} {d:>8}" for a, b, c, d in rows)


def stop(number: int, frame) -> None:
    """Ends by an exception, so that the processes of tests and their folders go too."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # a second one would leave them behind
    stopping.set()
    for process in list(running):
        process.terminate()
    print(f"stopped by {signal.Signals(number).name}; every blank has 0 points", file=sys.stderr)
    sys.exit(128 + number)


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def write(results: dict, path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("assignment", choices=[str(n) for n in TITLES if blanks_of(n)])
    add("submission", type=Path, help="the student's folder, or a zip of it")
    add("--json", type=Path, default=Path("results.json"), help="where Gradescope's file goes")
    add("--seconds", type=positive, default=60, help="for the tests of one blank (60)")
    add("--gigabytes", type=positive, default=4, help="of memory for the tests of one blank (4)")
    args = parser.parse_args()
    if not args.submission.exists():
        parser.error(f"there is no folder and no zip {args.submission}")
    assignment = int(args.assignment)
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write(zeros(assignment, UNFINISHED), args.json)
    except OSError as error:
        parser.error(f"--json {args.json} cannot be written: {error.strerror}")
    # what a submission prints may have no encoding
    sys.stdout.reconfigure(errors="backslashreplace")
    prctl(PR_SET_DUMPABLE, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    memory = int(args.gigabytes * 2**30)
    try:
        results = grade(assignment, args.submission, args.seconds, memory)
    except Exception as error:
        reason = f"the grader failed ({type(error).__name__}: {error}); every blank has 0 points"
        write(zeros(assignment, reason), args.json)
        sys.exit(reason)
    write(results, args.json)
    if results["output"]:
        print(results["output"] + "\n")
    for test in results["tests"]:
        if test["status"] == "failed":
            print(f"{test['name']}: {test['output']}\n")
    print(table(results))


if __name__ == "__main__":
    main()
