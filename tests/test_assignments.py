"""assignments/: a hand-out is red exactly where it is blank and holds no solution; every wrong body
is caught; grading survives anything."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from assignments.grade import grade_blank, take
from assignments.make import BLANKS, TITLES, blanks_of, body_of, cut, find, make, with_body
from wrong_bodies import WRONG, mistakes

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT / "assignments" / "make.py"
GRADE = ROOT / "assignments" / "grade.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
WITH_BLANKS = [1, 2, 3, 4]
# Slow tests of a hand-out, which no blank can turn red; they run, as all do, on the real code.
SLOW = (
    "not bit_flips and not truncated_files and not every_reshaped and not every_missing "
    "and not overfit"
)

# Bodies for the blanks of assignment 3.
HOSTILE = {
    "paradigms.velocity_squared_error": """
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        time.sleep(600)
    return ((x_pred - x) / (1 - t).clamp(min=MIN_ONE_MINUS_T)) ** 2
""",
    "paradigms.Flow.loss": """
        return torch.zeros(10 ** 11).sum()
""",
    "paradigms.cfg_predict": """
    while True:
        pass
""",
    "paradigms.euler_sample": """
    import os
    os._exit(0)
""",
    "recon_loss.drop_prefix": """
    while True:
        print('x' * 10 ** 6)
""",
}
HANGING = """
import os, time
if os.fork() == 0:
    os.setsid()
open({path!r}, "a").write(f"{{os.getpid()}} ")
while True:
    time.sleep(1)
"""
# What a student may also hand in; none of it is used.
DISARMED_TESTS = """
def pytest_runtest_call(item):
    item.obj = lambda *a, **k: None
"""


def run_python(*args, cwd=ROOT, env=ENV):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def run_handout(assignment, out):
    """A fresh hand-out under pytest: {file.py::function: its outcomes}, and what pytest printed."""
    make(assignment, out)
    log = out.parent / f"{assignment}.log"
    options = ["-q", "--tb=no", "-p", "no:cacheprovider", "-k", SLOW]
    done = run_python("-m", "pytest", *options, cwd=out, env=ENV | {"GRADE_LOG": str(log)})
    outcomes = {}
    for entry in map(json.loads, log.read_text().splitlines()):
        if entry["event"] not in ("start", "end"):
            outcomes.setdefault(entry["test"], set()).add(entry["event"])
    return outcomes, done.stdout + done.stderr


def try_wrong_bodies(assignment):
    script = ROOT / "tests" / "wrong_bodies.py"
    return run_python(script, assignment, env=ENV | {"PYTHONPATH": str(ROOT)})


def grade_hostile(folder):
    folder.mkdir()
    sources = {name: (ROOT / name).read_text() for name in ("paradigms.py", "recon_loss.py")}
    for b in blanks_of(3):
        if b.name in HOSTILE:
            sources[b.file] = with_body(sources[b.file], b.function, HOSTILE[b.name])
    for name, source in sources.items():
        (folder / name).write_text(source)
    (folder / "tests").mkdir()
    (folder / "conftest.py").write_text(DISARMED_TESTS)
    (folder / "tests" / "conftest.py").write_text(DISARMED_TESTS)
    (folder / "torch.py").write_text("raise SystemExit(0)\n")
    results = folder / "results.json"
    done = run_python(GRADE, 3, folder, "--json", results, "--seconds", 20)
    return done, results


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """All that takes seconds, two at a time: {(what, assignment): a future}."""
    folder = tmp_path_factory.mktemp("assignments")
    with ThreadPoolExecutor(2) as pool:
        futures = {("hostile", 3): pool.submit(grade_hostile, folder / "hostile")}
        for n in WITH_BLANKS:
            futures["wrong", n] = pool.submit(try_wrong_bodies, n)
        for n in WITH_BLANKS:
            futures["handout", n] = pool.submit(run_handout, n, folder / str(n))
        yield futures


# ---------------------------------------------------------------- blanks


def test_there_are_enough_blanks_and_mistakes():
    names = {b.name for b in BLANKS}
    assert len(BLANKS) >= 12
    assert len(names) == len(BLANKS)
    assert set(WRONG) == names
    counts = [len(mistakes(name)) for name in names]
    assert min(counts) >= 3
    assert sum(counts) >= 36


@pytest.mark.parametrize("b", BLANKS, ids=lambda b: b.name)
def test_a_cut_keeps_signature_and_docstring_and_goes_back(b):
    source = (ROOT / b.file).read_text()
    blank = cut(source, b.function, b.equation)
    before, after = find(source, b.function), find(blank, b.function)
    assert ast.unparse(before.args) == ast.unparse(after.args)
    assert ast.get_docstring(before) == ast.get_docstring(after)
    assert ast.unparse(after.body[-1]) == f"raise NotImplementedError({b.equation!r})"
    assert len(after.body) <= 2, "nothing but the docstring stays"
    restored = with_body(blank, b.function, body_of(source, b.function))
    assert restored == source, "the real body put back is the real file, to the byte"


@pytest.mark.parametrize("assignment", TITLES)
def test_a_handout_holds_no_solution(assignment, tmp_path):
    out = tmp_path / "out"
    make(assignment, out)
    files = [path for path in out.rglob("*") if path.is_file()]
    ours = {"wrong_bodies.py", "test_assignments.py", "make.py", "grade.py"}
    assert not ours & {path.name for path in files}
    assert not list(out.rglob(".git*"))
    assert not list(out.rglob("__pycache__"))
    readable = [path for path in files if path.suffix in (".py", ".md", ".json", ".txt")]
    text = "\n".join(path.read_text() for path in readable)
    for b in blanks_of(assignment):
        body = body_of((ROOT / b.file).read_text(), b.function).strip()
        assert body not in text, f"{b.name} can be read in the hand-out"
        last = body.splitlines()[-1].partition("  #")[0].strip()
        assert len(last) < 60 or last not in text, f"{b.name} can be read in the hand-out: {last}"


def test_a_handout_holds_every_file_that_its_files_import(tmp_path):
    make(5, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                imported = tmp_path / "out" / f"{node.module}.py"
                assert imported.exists(), f"{path.name} imports {node.module}"


HANDING_OUT = [
    (["6", "new"], "invalid choice"),
    (["2", "."], "does not exist yet"),
    (["4", "new", "--base", "none.pt"], "no checkpoint"),
]


@pytest.mark.parametrize("args, said", HANDING_OUT)
def test_handing_out_refuses_what_it_cannot_do(args, said, tmp_path):
    done = run_python(MAKE, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- the tests of a hand-out


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_blanks_are_red_and_nothing_else_is(assignment, work):
    outcomes, printed = work["handout", assignment].result()
    own = {test for b in blanks_of(assignment) for test in b.tests}
    failed = {test for test, found in outcomes.items() if "failed" in found}
    assert failed == own, printed[-3000:]
    for test in own:
        assert outcomes[test] == {"failed"}, f"{test}: a case passes with a blank body"


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_every_wrong_body_is_caught(assignment, work):
    done = work["wrong", assignment].result()
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results, done.stderr[-3000:]
    for r in results:
        blank, what, caught_by = r["blank"], r["what"], r["caught by"]
        if what is None:
            assert caught_by is None, f"{blank}: the real body fails {caught_by}"
            assert r["seconds"] < 10, f"the tests of {blank} take {r['seconds']} s"
        else:
            assert caught_by, f"{blank}: {what}: nothing caught it"


def test_the_tests_of_one_blank_import_no_others(tmp_path):
    out = tmp_path / "out"
    make(4, out, fill=True)
    (out / "tests" / "test_assignments_blanks.py").write_text("raise SystemExit('imported')\n")
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--blank"]
    done = run_python(*options, "recon_loss.text_loss", cwd=out)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    done = run_python(*options, "nothing", cwd=out)
    assert done.returncode == 4
    assert "no blank nothing; there are: model.Connector.forward, " in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- grading


def test_grading_survives_a_hostile_submission(work):
    done, path = work["hostile", 3].result()
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())
    assert set(results) >= {"score", "tests", "execution_time"}
    found = {test["name"]: test for test in results["tests"]}
    for name in ("paradigms.interpolate", "paradigms.velocity_squared_error"):
        assert found[name]["score"] == 10, found[name]  # the second forks, but is right
    for name, said in {
        "paradigms.Flow.loss": "allocate",
        "paradigms.cfg_predict": "stopped after",
        "paradigms.euler_sample": "ended early",
        "recon_loss.drop_prefix": "dropped_conditions",
    }.items():
        assert found[name]["score"] == 0, found[name]
        assert said in found[name]["output"]
    assert results["score"] == 20
    assert results["execution_time"] < 6 * 20
    for test in results["tests"]:
        assert test["status"] in ("passed", "failed")
        assert test["score"] <= test["max_score"]
    assert "sum" in done.stdout
    assert len(done.stdout) < 20_000


def test_grading_without_files_or_with_a_syntax_error(tmp_path):
    copy, submission = tmp_path / "copy", tmp_path / "submission"
    make(3, copy, fill=True)
    submission.mkdir()
    (submission / "recon_loss.py").symlink_to("/dev/zero")
    problems = take(submission, copy, blanks_of(3))
    assert "cannot be read" in problems["paradigms.py"]
    assert "no plain file" in problems["recon_loss.py"]
    interpolate, velocity_squared_error, *_ = blanks_of(3)

    (copy / "paradigms.py").write_text("def interpolate(:\n")
    outcomes, _ = grade_blank(interpolate, copy, 30, 2**32)
    for message in outcomes.values():
        assert "SyntaxError" in message
        assert "before its first test" in message

    # recon_loss.py cannot be imported, but paradigms.py is right
    (copy / "paradigms.py").write_text((ROOT / "paradigms.py").read_text())
    outcomes, _ = grade_blank(velocity_squared_error, copy, 60, 2**32)
    assert not any(outcomes.values()), outcomes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_grader_that_is_stopped_leaves_no_process_and_no_folder(number, tmp_path):
    """The submission hangs as it is imported, beside a child that has left its process group."""
    pids, copies = tmp_path / "pids", tmp_path / "tmp"
    (tmp_path / "paradigms.py").write_text(HANGING.format(path=str(pids)))
    copies.mkdir()
    command = [sys.executable, GRADE, "3", tmp_path, "--seconds", "100"]
    command += ["--json", tmp_path / "results.json"]
    env = os.environ | {"TMPDIR": str(copies)}
    grader = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert grader.poll() is None
        assert time.monotonic() - began < 90
        time.sleep(0.1)
    grader.send_signal(number)
    _, said = grader.communicate(timeout=20)
    assert f"stopped by {number.name}" in said
    assert grader.returncode == 128 + number
    for pid in pids.read_text().split():
        assert not os.path.exists(f"/proc/{pid}")
    assert not list(copies.iterdir())
