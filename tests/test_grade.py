"""assignments/grade.py: a mistake costs what it is worth, a trick everything, and there is always a
results.json."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from assignments.grade import UNFINISHED, grade
from assignments.make import BLANKS, blanks_of, find, make, with_body
from wrong_bodies import wrong_sources

# modules of the grader, which it imports from its own folder
import bodies  # isort: skip
import sandbox  # isort: skip
from submission import Submission, read_submission  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
GRADE = ROOT / "assignments" / "grade.py"
GIGABYTES = 4 * 2**30
NAMES = {b.name: b for b in BLANKS}
needs_walls = pytest.mark.skipif(not sandbox.landlock_version(), reason="needs Landlock (Linux)")


def submit(folder: Path, assignment: int, new: dict[str, str]) -> None:
    """A right submission, but for the bodies of some blanks."""
    make(assignment, folder, fill=True)
    for name, body in new.items():
        path = folder / NAMES[name].file
        path.write_text(replaced(path.read_text(), name, body))


def replaced(source: str, name: str, body: str) -> str:
    function = NAMES[name].function
    indent = " " * (find(source, function).col_offset + 4)
    body = textwrap.indent(textwrap.dedent(body).strip() + "\n", indent)
    return with_body(source, function, body)


def run_grade(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, GRADE, *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def take(b, source: str) -> bodies.Body:
    """What is taken of a file for a blank, with the real file as the reference."""
    return bodies.take(b, Submission({b.file: source}), (ROOT / b.file).read_text())


def by_name(results: dict) -> dict:
    return {test["name"]: test for test in results["tests"]}


# ---------------------------------------------------------------- honest submissions


@pytest.fixture
def one_parse_at_a_time(monkeypatch):
    """Fails where two threads parse at once, for which Python 3.11 raises SystemError at times."""
    busy = threading.Lock()
    parse = ast.parse

    def checked(*args, **options):
        assert busy.acquire(blocking=False), "two threads parse at once"
        try:
            time.sleep(0.01)
            return parse(*args, **options)
        finally:
            busy.release()

    monkeypatch.setattr(ast, "parse", checked)


def test_a_right_submission_has_all_points(tmp_path, one_parse_at_a_time):
    submit(tmp_path / "mine", 4, {})
    results = grade(4, tmp_path / "mine", 60, GIGABYTES)
    assert results["score"] == 50, json.dumps(results["tests"], indent=1)
    assert results["output"] == ""
    assert results["extra_data"]["flags"] == []
    if sandbox.landlock_version():
        assert all("Landlock" in test["extra_data"]["walls"] for test in results["tests"])


WITH_HELPERS = """
q, k, v = split(self.qkv(x), self.heads, THREE)
x = weights(q, k) @ v
return self.proj(x.transpose(1, 2).flatten(2))
"""
HELPERS = '''
import math

THREE = 3


def split(x, heads, parts):
    """Zürich"""
    B, T, _ = x.shape
    return x.view(B, T, parts, heads, -1).permute(2, 0, 3, 1, 4)


def weights(q, k):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
'''
NO_REGISTERS = """
if rows == cols == self.grid:
    return self.pos_embed
return resize(self.pos_embed, rows, cols)
"""


@pytest.fixture(scope="module")
def as_they_come(tmp_path_factory):
    """A zip with a subfolder, CRLF, Latin-1, helpers, a blank left out, a mistake, a module."""
    folder = tmp_path_factory.mktemp("as_they_come")
    wrong = dict(wrong_sources(NAMES["encoder.ViT.forward"]))["no class token in the result"]
    mine = folder / "mine" / "hw 1"
    new = {"pretrained.rename_keys": "raise NotImplementedError('strict loading')"}
    submit(mine, 1, new)
    source = replaced(wrong, "encoder.Attention.forward", WITH_HELPERS)
    source = replaced(source, "encoder.ViT.position_embeddings", NO_REGISTERS)
    source = f"from resizing import resize\n{source}{HELPERS}".replace("\n", "\r\n")
    (mine / "encoder.py").write_bytes(source.encode("latin-1", "replace"))
    (mine / "resizing.py").write_text("def resize(x, rows, cols):\n    return x\n")
    for name in ("__main__.py", "my.model.py", "json.py"):
        (mine / name).write_text("raise SystemExit('imported')\n")
    archive = shutil.make_archive(str(folder / "mine"), "zip", folder / "mine")
    path = folder / "not" / "there" / "results.json"
    done = run_grade(1, archive, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_a_mistake_costs_its_own_blank_alone(as_they_come):
    results, printed = as_they_come
    tests = by_name(results)
    assert tests["encoder.Attention.forward"]["score"] == 10
    assert tests["pretrained.rename_keys"]["score"] == 0
    assert 0 <= tests["encoder.ViT.forward"]["score"] < 20
    assert results["score"] == sum(test["score"] for test in tests.values())
    assert "sum" in printed and "/50" in printed


def test_reasons_say_what_was_found_where(as_they_come):
    results, _ = as_they_come
    tests = by_name(results)
    blank = tests["pretrained.rename_keys"]["output"]
    assert "hw 1/pretrained.py, line" in blank and "it is still blank" in blank
    helped = tests["encoder.Attention.forward"]["output"]
    assert "encoder.py was found in hw 1/encoder.py" in helped
    assert "split (line" in helped and "was taken along" in helped
    module = tests["encoder.ViT.position_embeddings"]["output"]
    assert "it comes from hw 1/resizing.py; write it into the file of the blank" in module
    assert "in your hw 1/encoder.py, line" in module
    assert "return resize(self.pos_embed, rows, cols)" in module
    mistake = tests["encoder.ViT.forward"]["output"]
    assert "FAIL test_assignments_1.py::test_each_output_of_the_encoder" in mistake
    assert "cls_token" in mistake
    outside = results["output"]
    assert "hw 1/encoder.py is not UTF-8; it was read as Latin-1" in outside
    assert "FLAG hw 1/json.py" in outside
    for name in ("resizing.py", "__main__.py", "my.model.py"):
        assert f"note hw 1/{name} is not as handed out; it is not used" in outside


@pytest.mark.parametrize("b", BLANKS, ids=lambda b: b.name)
def test_right_bodies_and_plain_mistakes_are_run(b):
    """The audit takes no honest body for a trick."""
    sources = [("right", (ROOT / b.file).read_text()), *wrong_sources(b)]
    for what, source in sources:
        body = take(b, source)
        assert body.problem == "", f"{what}: {body.problem} {body.flags}"
        assert body.flags == []


def test_a_mistake_elsewhere_in_the_file_costs_nothing():
    b = NAMES["paradigms.cfg_predict"]
    source = (ROOT / b.file).read_text()
    broken = source.replace("def interpolate(", "def interpolate((", 1)
    assert broken != source
    assert take(b, broken).problem == ""
    problem = take(NAMES["paradigms.interpolate"], broken).problem
    assert problem.startswith("paradigms.py: line ") and "no Python" in problem


def test_files_that_cannot_be_taken(tmp_path):
    (tmp_path / "model.py").symlink_to(ROOT / "model.py")
    (tmp_path / "notes.txt").write_text("done")
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "encoder.py").write_text("x = 1\n")
    handed = read_submission(tmp_path)
    reasons = [bodies.find_file(handed, f"{name}.py")[1] for name in ("model", "encoder", "other")]
    assert reasons[0] == "model.py is a link that leads out of the submission"
    assert reasons[1] == "encoder.py is there 2 times, hand in one: a/encoder.py, b/encoder.py"
    assert reasons[2].startswith("other.py was not found; there is model.py, notes.txt, a/encoder")


# ---------------------------------------------------------------- tricks

FORGED = """
import json, os
lines = [{"answers": {}}]
lines += [{"test": "test_canary.py::test", "outcome": "failed"}] * 3
for name in TESTS:
    lines.append({"test": name, "outcome": "passed"})
text = "".join(json.dumps(line) + chr(10) for line in lines).encode()
"""
# {blank: a body that would like its points without the work}
TRICKS = {
    "model.Attention.forward": """
        import _pytest.python
        _pytest.python.Function.runtest = lambda self: None
    """,
    "model.prefix_mask": """
        names = {}
        exec(open("ROOT/model.py").read(), names)
        return names["prefix_mask"](prefix_len, image_len, repeats, causal, device)
    """,
    "model.UnifiedModel.predict_image": """
        import os
        os._exit(0)
    """,
    "model.UnifiedModel.text_logits": """
        import sys
        import torch
        for module in list(sys.modules.values()):
            if hasattr(module, "assert_close"):
                module.assert_close = lambda *args, **more: None
            if hasattr(module, "assert_learns"):
                module.assert_learns = lambda *args, **more: None
    """,
    "model.UnifiedModel.predict_image_cached": """
        open("OUTSIDE/written", "w").write("by a student")
        open("ROOT/assignments/written.py", "w").write("by a student")
    """,
    "recon_loss.text_loss": """
        import os, signal
        os.kill(os.getppid(), signal.SIGKILL)
    """,
    "paradigms.interpolate": """
        import sys
        import types
        probes = types.ModuleType("probes")
        probes.answers = lambda name, seed: {}
        sys.modules["probes"] = probes
        while True:
            pass
    """,
    "paradigms.velocity_squared_error": """
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(2)
            open("OUTSIDE/later", "w").write("by a student")
    """,
    "paradigms.Flow.loss": """
        import sys
        frame = sys._getframe(1)
        while frame and "expected" not in frame.f_locals:
            frame = frame.f_back
        return frame.f_locals["expected"]
    """,
    "recon_loss.drop_prefix": """
        class Equal(type(prefix)):
            def __eq__(self, other):
                return True
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                return True
        return prefix.as_subclass(Equal)
    """,
    "paradigms.cfg_predict": """
        FORGED
        import gc
        for x in gc.get_objects():
            if type(x).__name__ == "Recorder":
                for line in lines:
                    x.write(**line)
        os._exit(0)
    """,
    "paradigms.euler_sample": """
        FORGED
        for file in range(3, 64):
            try:
                os.write(file, text)
            except OSError:
                pass
        os._exit(0)
    """,
}


# What is said of a trick that was run.
OVERLOOKED = {
    "model.Attention.forward": "tests that must fail did not",
    "model.prefix_mask": "Permission denied",
    "model.UnifiedModel.predict_image": "FLAG its process gave no answers: it ended early",
    "model.UnifiedModel.text_logits": "FLAG 1 of 3 tests that must fail did not",
    "model.UnifiedModel.predict_image_cached": "Permission denied",
    "paradigms.interpolate": "FLAG its process gave no answers: it was stopped after 8 s",
    "paradigms.cfg_predict": "FLAG its tests pass, and yet new random inputs show other values",
    "paradigms.euler_sample": "FLAG its tests pass, and yet new random inputs show other values",
}


def tricks(assignment: int, outside: Path) -> dict[str, str]:
    found = {}
    for b in blanks_of(assignment):
        body = textwrap.dedent(TRICKS[b.name]).replace("FORGED", FORGED)
        body = body.replace("TESTS", repr(b.tests))
        found[b.name] = body.replace("ROOT", str(ROOT)).replace("OUTSIDE", str(outside))
    return found


@pytest.fixture
def outside():
    """A folder that anyone may write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.parametrize("name", TRICKS)
def test_every_trick_is_flagged_and_not_run(name, outside):
    b = NAMES[name]
    body = tricks(b.assignment, outside)[name]
    found = take(b, replaced((ROOT / b.file).read_text(), name, body))
    assert found.problem == "it was not run: it does what no blank needs"
    assert found.flags
    assert all(flag.startswith("line ") for flag in found.flags)


def test_tricks_earn_nothing_and_are_listed(tmp_path, outside):
    mine = tmp_path / "mine"
    submit(mine, 2, tricks(2, outside))
    with open(mine / "model.py", "a") as file:
        file.write("\nimport _pytest.python\n_pytest.python.Function.runtest = print\n")
    (mine / "tests" / "conftest.py").write_text("raise SystemExit(0)\n")
    results = grade(2, mine, 60, GIGABYTES)
    assert results["score"] == 0
    flags = "\n".join(results["extra_data"]["flags"])
    for b in blanks_of(2):
        assert f"{b.name}: line" in flags
    assert "FLAG model.py, outside the blanks, not used: line" in flags
    assert "FLAG tests/conftest.py is not as handed out; it is not used" in flags


@needs_walls
@pytest.mark.parametrize("assignment", [2, 3])
def test_tricks_that_the_audit_overlooks_earn_nothing(assignment, tmp_path, outside, monkeypatch):
    monkeypatch.setattr(bodies, "suspicious", lambda *args: [])
    monkeypatch.setattr(tempfile, "tempdir", str(outside))  # the grader's files are there too
    submit(tmp_path / "mine", assignment, tricks(assignment, outside))
    written = ROOT / "assignments" / "written.py"
    try:
        results = grade(assignment, tmp_path / "mine", 8, GIGABYTES)
        assert list(outside.iterdir()) == []
        assert not written.exists()
        assert processes_in(outside) == []
    finally:
        written.unlink(missing_ok=True)
    outputs = {test["name"]: test["output"] for test in results["tests"]}
    assert results["score"] == 0, outputs
    for name, said in OVERLOOKED.items():
        if NAMES[name].assignment == assignment:
            assert said in outputs[name], name


# ---------------------------------------------------------------- whatever dies


def processes_in(folder: Path) -> list[str]:
    """Working folders of the processes that a grader with this folder for its files has started."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(link))
    return [cwd for cwd in found if cwd.startswith(f"{folder}/grade-")]


@needs_walls
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grader_that_is_killed_leaves_zeros_and_no_process(number, tmp_path, outside):
    submit(tmp_path / "mine", 1, {"encoder.Attention.forward": "while True:\n    pass"})
    path = tmp_path / "results.json"
    command = [sys.executable, GRADE, "1", tmp_path / "mine", "--json", path]
    grader = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(outside)})
    wait_for(lambda: any("encoder.Attention" in cwd for cwd in processes_in(outside)))
    grader.send_signal(number)
    grader.wait()
    results = json.loads(path.read_text())
    assert results["score"] == 0
    assert len(results["tests"]) == 4
    assert all(UNFINISHED in test["output"] for test in results["tests"])
    wait_for(lambda: not processes_in(outside))
    if number == signal.SIGTERM:
        assert list(outside.iterdir()) == []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_grader_that_fails_leaves_zeros_and_the_reason(tmp_path):
    path = tmp_path / "results.json"
    code = "import sys, grade\ngrade.read_submission = None\ngrade.main()"
    args = ["1", str(tmp_path), "--json", str(path)]
    env = os.environ | {"PYTHONPATH": str(GRADE.parent)}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True)
    assert done.returncode == 1
    assert b"the grader failed (TypeError" in done.stderr
    results = json.loads(path.read_text())
    assert results["score"] == 0
    assert all("the grader failed (TypeError" in test["output"] for test in results["tests"])


REFUSED = [
    (["2", "none"], "there is no folder and no zip none"),
    (["5", "."], "invalid choice"),
    (["2", ".", "--seconds", "0"], "0 is not a number above 0"),
    (["2", ".", "--gigabytes", "nan"], "nan is not a number above 0"),
    (["2", ".", "--json", "/dev/null/results.json"], "cannot be written"),
]


@pytest.mark.parametrize("args, said", REFUSED)
def test_what_cannot_be_graded_is_refused(args, said):
    done = run_grade(*args)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
