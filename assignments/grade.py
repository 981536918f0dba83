"""Grade a submission by the bodies of its blanks: each alone in the reference, in its own process.

    python assignments/grade.py 2 SUBMISSION     # a table, and results.json for Gradescope
    python assignments/grade.py 2 /autograder/submission --json /autograder/results/results.json

SUBMISSION is a folder or a zip. Of a blank the body is taken, with functions, imports and constants
of the same file that it needs and the reference lacks; all else of the submission is listed, and
not used. So a mistake costs the points of its own blank.

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
import builtins
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
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import CodeType

HERE = Path(__file__).resolve().parent
# beside this file, also when it is imported from elsewhere
sys.path.insert(0, str(HERE))
from audit import imported_names, is_allowed, suspicious  # noqa: E402
from make import BLANKS, CODE, TITLES, Blank, blanks_of, make  # noqa: E402
from probes import agreement  # noqa: E402
from run_blank import STUDENTS  # noqa: E402
from sandbox import PR_SET_DUMPABLE, prctl  # noqa: E402
from submission import (  # noqa: E402
    Submission,
    changes,
    definition,
    find_file,
    is_blank,
    parse_blank,
    read_submission,
    statements,
)

FIRST_USER = 61_000  # user ids of the blanks' processes; one each, so that none can end another
AT_ONCE = 2  # blanks that are tested at a time
GRACE = 20  # seconds for a process to report after its time is up
ENOUGH = 0.5  # share of answers that must agree for any points: some are right by chance
CANARIES = 3  # tests of canary.py
UNFINISHED = "grading did not come to its end; see the grader's log"

running = set()  # processes of run_blank.py, to be stopped with this one
stopping = threading.Event()


# ---------------------------------------------------------------- a blank out of a submission


@dataclass
class Body:
    """What is taken of a submission for one blank, and why it may earn nothing."""

    blank: Blank
    path: str = ""  # where its file was found
    source: str = ""  # that file
    node: ast.FunctionDef | None = None
    extras: list[ast.stmt] = field(default_factory=list)  # what it needs besides
    problem: str = ""  # why it was not run
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def take(b: Blank, handed: Submission, reference: str) -> Body:
    """The body of a blank with what it needs, or why there is none."""
    body = Body(b)
    body.path, body.problem = find_file(handed, b.file)
    if body.problem:
        return body
    body.source = handed.sources[body.path]
    if body.path != b.file:
        body.notes.append(f"{b.file} was found in {body.path}")
    body.node, body.problem = parse_blank(body.source, b.function)
    if body.problem:
        body.problem = f"{body.path}: {body.problem}"
        return body
    if is_blank(body.node):
        body.problem = f"{body.path}, line {body.node.lineno}: it is still blank"
        return body
    tree = ast.parse(reference)
    names = names_of(tree)
    imports = imported_names(tree)
    body.extras = extras_of(body, handed, set(names))
    body.notes += added_methods(body, reference)
    for extra in body.extras:
        imports |= imported_names(ast.Module([extra], []))
    ours = {name for name in names if name not in imports} | names_of(
        ast.Module(body.extras, [])
    ).keys()
    code = [*statements(body.node), *body.extras]
    parameters = definition(tree, b.function).args
    body.flags = suspicious([parameters, *code], imports, ours)
    if body.flags:
        body.problem = "it was not run: it does what no blank needs"
    return body


def names_of(tree: ast.Module) -> dict[str, ast.stmt]:
    """{name: the statement} of all that a file defines at its top."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= dict.fromkeys(imported_names(ast.Module([node], [])), node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For):
            stores = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            found |= {n.id: node for n in stores if isinstance(n.ctx, ast.Store)}
    return found


def extras_of(body: Body, handed: Submission, known: set[str]) -> list[ast.stmt]:
    """Functions, imports and constants of the student's file that a body needs."""
    try:
        theirs = names_of(ast.parse(body.source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    taken = {}
    left = [*statements(body.node)]
    while left:
        for part in ast.walk(left.pop()):
            name = part.id if isinstance(part, ast.Name) else ""
            node = theirs.get(name)
            if node is None or name in known or name in taken or hasattr(builtins, name):
                continue
            reason = why_not(node, handed)
            if reason:
                body.notes.append(f"{name} (line {node.lineno}) was not taken: {reason}")
                known.add(name)
                continue
            taken[name] = node
            left.append(node)
            body.notes.append(f"{name} (line {node.lineno}) was taken along")
    return sorted(set(taken.values()), key=lambda node: node.lineno)


def added_methods(body: Body, reference: str) -> list[str]:
    """Notes on methods that the student gave the blank's class, and that its body calls."""
    owner = body.blank.function.rpartition(".")[0]
    called = {part.attr for part in ast.walk(body.node) if isinstance(part, ast.Attribute)}
    notes = []
    for name in sorted(called) if owner else []:
        added, _ = parse_blank(body.source, f"{owner}.{name}")
        if added and not definition(ast.parse(reference), f"{owner}.{name}"):
            where = f"{owner}.{name} (line {added.lineno})"
            notes.append(f"{where} was not taken: write it as a function outside the class")
    return notes


def why_not(node: ast.stmt, handed: Submission) -> str:
    """Why a definition cannot be taken along; empty if it can."""
    if isinstance(node, ast.FunctionDef):
        return ""
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        own = [path for path in handed.sources if PurePosixPath(path).stem in modules]
        if all(is_allowed(module) for module in modules):
            return ""
        if own:
            return f"it comes from {own[0]}; write it into the file of the blank"
        return f"{', '.join(modules)} is no module that a blank may import"
    if isinstance(node, ast.Assign) and is_literal(node.value):
        return ""
    return "beside a body, functions, imports and constants alone are"


def is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


# ---------------------------------------------------------------- a blank's folder


def write_compiled(code: CodeType, path: Path) -> None:
    """A .pyc that is imported without its source."""
    header = importlib.util.MAGIC_NUMBER + bytes(12)
    path.write_bytes(header + marshal.dumps(code))


def build_reference(assignment: int, folder: Path) -> dict[str, str]:
    """The reference as bytecode, beside the tests: {file: its source}."""
    make(assignment, folder, fill=True)
    sources = {}
    for name in CODE:
        if not name.endswith(".py"):
            continue
        sources[name] = (folder / name).read_text("utf-8")
        write_compiled(compile(sources[name], name, "exec"), folder / f"{name}c")
        (folder / name).unlink()
    (folder / "conftest.py").unlink()  # of the hand-out, whose blanks are not the grader's
    shutil.copyfile(HERE / "canary.py", folder / "tests" / "test_canary.py")
    return sources


def build(body: Body, reference: Path, source: str, folder: Path) -> str:
    """The reference with one body of the student's. Returns why it cannot be compiled, or ""."""
    tree = ast.parse(source)
    node = definition(tree, body.blank.function)
    docstring = node.body[: len(node.body) - len(statements(node))]
    node.body = docstring + statements(body.node)
    tree.body += body.extras
    try:
        code = compile(tree, body.blank.file, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{body.path}, line {getattr(error, 'lineno', '?')}: {error}"
    names = [body.blank.function, *[n.name for n in body.extras if hasattr(n, "name")]]
    for name in names:
        code = rename_file(code, name.split("."), f"{STUDENTS}{body.path}")
    shutil.copytree(reference, folder)
    write_compiled(code, folder / f"{body.blank.file}c")
    (folder / "tmp").mkdir()
    return ""


def rename_file(code: CodeType, names: list[str], filename: str) -> CodeType:
    """The code with another file name in one function, by which a traceback shows whose it is."""
    if not names:
        inner = [
            rename_file(c, [], filename) if isinstance(c, CodeType) else c for c in code.co_consts
        ]
        return code.replace(co_consts=tuple(inner), co_filename=filename)
    constants = list(code.co_consts)
    for i, constant in enumerate(constants):
        if isinstance(constant, CodeType) and constant.co_name == names[0]:
            constants[i] = rename_file(constant, names[1:], filename)
    return code.replace(co_consts=tuple(constants))


# ---------------------------------------------------------------- processes


def environment(scratch: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "CUDA_VISIBLE_DEVICES": ""}
    return kept | own | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def run_tests(body: Body, folder: Path, job: dict) -> dict:
    """What run_blank.py prints of a blank; {"ending": ...} alone if it printed nothing."""
    job = job | {"folder": str(folder), "name": body.blank.name, "tests": body.blank.tests}
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


def start_reference(blanks: list[Blank], folder: Path, seed: int) -> subprocess.Popen:
    """A process that computes the reference's answers."""
    path = os.pathsep.join([str(folder), str(folder / "tests")])
    command = [sys.executable, "-B", str(HERE / "probes.py"), str(seed), *[b.name for b in blanks]]
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE)


# ---------------------------------------------------------------- grades


def judge(body: Body, result: dict, reference: dict) -> dict:
    """The entry of a blank that was run: the smaller share of tests and answers is its points."""
    b, lines = body.blank, []
    cases, answers = {}, None
    canaries = 0
    walls = ""
    collection = []
    for entry in result["report"]:
        walls = str(entry.get("walls", walls))
        if "answers" in entry:
            answers = entry["answers"]
        elif "collection" in entry:
            collection.append(str(entry["collection"]))
        elif str(entry.get("test", "")).startswith("test_canary.py::"):
            canaries += entry.get("outcome") == "failed"
        elif "test" in entry:
            cases.setdefault(str(entry["test"]), []).append(entry)

    passed = 0
    for test in b.tests:
        found = cases.get(test, [])
        wrong = [entry for entry in found if entry.get("outcome") == "failed"]
        right = [entry for entry in found if entry.get("outcome") == "passed"]
        if right and not wrong:
            passed += 1
            lines.append(f"ok   {test}")
        elif wrong:
            share = f" ({len(wrong)} of {len(found)} cases)" if len(found) > 1 else ""
            message = shorten(with_sources(str(wrong[0].get("message", "")), body))
            lines.append(f"FAIL {test}{share}\n     {message}")
        else:
            lines.append(f"FAIL {test}\n     {why_not_run(result, collection)}")

    agreed, expected = 0, len(reference)
    if isinstance(answers, dict):
        found = [agreement(answers.get(what), reference[what], what) for what in reference]
        agreed = sum(not problem for problem in found)
        problem = str(answers.get("error", "")) or next(filter(None, found), "")
        verdict = f"FAIL new random inputs: {agreed} of {expected} answers agree\n     {problem}"
        lines.append(verdict if problem else "ok   new random inputs")
    else:
        lines.append(f"FAIL new random inputs\n     {result['ending'] or 'no answer came'}")

    share = min(passed / len(b.tests), agreed / expected)
    if agreed < ENOUGH * expected:
        share = 0
    if not isinstance(answers, dict):
        body.flags.append(f"its process gave no answers: {result['ending'] or 'it ended early'}")
    elif canaries != CANARIES:
        body.flags.append(f"{CANARIES - canaries} of {CANARIES} tests that must fail did not")
        share = 0
    elif passed == len(b.tests) and agreed < expected:
        body.flags.append("its tests pass, and yet new random inputs show other values")
    entry = entry_of(body, share, lines)
    entry["extra_data"] |= {"passed": passed, "answers": f"{agreed}/{expected}", "walls": walls}
    return entry


def why_not_run(result: dict, collection: list[str]) -> str:
    if collection:
        return shorten("\n".join(collection[0].splitlines()[-4:]))
    return f"it did not come to its end: {result['ending'] or 'it was not run'}"


def with_sources(message: str, body: Body) -> str:
    """The text of the student's lines, where a message names them by number."""
    source = body.source.splitlines()
    lines = []
    for line in message.splitlines():
        start, found, number = line.partition(f"in {STUDENTS}{body.path}, line ")
        if found and not start and number.isdigit() and 0 < int(number) <= len(source):
            line += f": {source[int(number) - 1].strip()}"
        lines.append(line)
    return "\n".join(lines)


def shorten(message: str) -> str:
    lines = [line.strip()[:200] for line in message.strip().splitlines()[:9]]
    return "\n     ".join(line for line in lines if line)


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
    for number, test in enumerate(tests, 1):
        test["number"] = f"{assignment}.{number}"
    flagged = [line for line in outside if line.startswith("FLAG")]
    flagged += [f"{test['name']}: {flag}" for test in tests for flag in test["extra_data"]["flags"]]
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
                outside = changed_outside(blanks, handed, folder / "handout", sources)
                reference = json.loads(oracle.communicate()[0])
                for name, found in reference.items():
                    assert "error" not in found, f"the probe of {name}: {found['error']}"
                tests = [finish(*future.result(), reference) for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                oracle.kill()
                raise
    return results_of(assignment, tests, outside, time.monotonic() - began)


def run_blank(b: Blank, handed: Submission, source: str, folder: Path, job: dict):
    """A blank's body, what its process said (None if it was not run), and its seconds."""
    began = time.monotonic()
    body, result = Body(b), None
    try:
        body = take(b, handed, source)
        own = folder / b.name
        if not body.problem:
            body.problem = build(body, folder / "reference", source, own)
        if not body.problem:
            own.chmod(0o755 if os.getuid() else 0o750)
            if os.getuid() == 0:
                os.chown(own, -1, job["user"])
            result = run_tests(body, own, job)
        shutil.rmtree(own, ignore_errors=True)
    except Exception as error:
        body.problem = f"the grader failed on it ({type(error).__name__}: {error})"
    return body, result, time.monotonic() - began


def finish(body: Body, result: dict | None, seconds: float, reference: dict) -> dict:
    if result is None:
        entry = entry_of(body, 0, [])
    else:
        try:
            entry = judge(body, result, reference[body.blank.name])
        except Exception as error:
            body.flags.append(f"its process reported what cannot be read ({type(error).__name__})")
            entry = entry_of(body, 0, [])
    entry["extra_data"]["seconds"] = round(seconds, 1)
    return entry


# ---------------------------------------------------------------- what else was handed in


def changed_outside(
    blanks: list[Blank], handed: Submission, handout: Path, reference: dict[str, str]
) -> list[str]:
    """Lines on all that is not as it was handed out, and is not used; FLAG before a suspect one."""
    lines = [f"note {note}" for note in handed.notes]
    lines += [f"note {path} {problem}" for path, problem in handed.problems.items()]
    used = {find_file(handed, b.file)[0]: b.file for b in blanks}
    given = {}
    for path in handout.rglob("*.py"):
        given.setdefault(path.name, []).append(path.read_text("utf-8"))
    for path, source in handed.sources.items():
        name = PurePosixPath(path).name
        if path in used:
            lines += changed_in_file(path, source, [given[name][0], reference[name]])
        elif source not in [*given.get(name, []), reference.get(name)]:
            stem = PurePosixPath(path).stem
            is_hook = stem in ("conftest", "sitecustomize", "usercustomize")
            has_namesake = stem in sys.stdlib_module_names or importlib.util.find_spec(stem)
            is_suspect = is_hook or (has_namesake and name not in given)
            mark = "FLAG" if is_suspect else "note"
            lines.append(f"{mark} {path} is not as handed out; it is not used")
    return lines


def changed_in_file(path: str, source: str, given: list[str]) -> list[str]:
    lines = []
    names = [b.function for b in BLANKS if b.file == PurePosixPath(path).name]
    try:
        tree = ast.parse(source)
        imports, ours = imported_names(tree), set(names_of(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        imports, ours = {}, set()
    for change in changes(source, given, names):
        lines.append(f"note {path}, outside the blanks, {change.what}")
        if change.node is not None and not isinstance(change.node, ast.ClassDef):
            found = suspicious([change.node], imports, ours - set(imports))
            lines += [f"FLAG {path}, outside the blanks, not used: {flag}" for flag in found]
    return lines


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
