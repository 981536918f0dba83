"""assignments/: a hand-out is red where it is blank, green once it is filled in, and shows no
solution; every wrong body is caught. Grading: test_grade.py."""

import ast
import json
import os
import subprocess
import sys
import textwrap
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from assignments.leaks import find_leaks
from assignments.make import (
    BLANKS,
    REWRITTEN,
    RUNS,
    TITLES,
    TWINS,
    blanked,
    blanks_of,
    bodies_of,
    body_of,
    code_of,
    cut,
    find,
    left_blank,
    make,
    with_body,
)
from wrong_bodies import WRONG, mistakes

ROOT = Path(__file__).resolve().parents[1]
MAKE = ROOT / "assignments" / "make.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
WITH_BLANKS = [1, 2, 3, 4]


def run_python(*args, cwd=ROOT, env=ENV):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def run_handout(assignment, out, filled):
    """A hand-out under pytest: {file.py::function: its outcomes}, and what pytest printed."""
    make(assignment, out, fill=filled)
    report = out.parent / f"{out.name}.xml"
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", "--junitxml", report]
    done = run_python("-m", "pytest", *options, cwd=out)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname").split(".")[-1]
        test = f"{file}.py::{case.get('name').split('[')[0]}"
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes.setdefault(test, set()).update(kinds or {"passed"})
    return outcomes, done.stdout + done.stderr


def try_wrong_bodies(assignment):
    script = ROOT / "tests" / "wrong_bodies.py"
    return run_python(script, assignment, env=ENV | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """All that takes seconds, two at a time: {(what, assignment): a future}."""
    folder = tmp_path_factory.mktemp("assignments")
    futures = {}
    with ThreadPoolExecutor(2) as pool:
        for n in WITH_BLANKS:
            futures["wrong", n] = pool.submit(try_wrong_bodies, n)
            futures["blank", n] = pool.submit(run_handout, n, folder / f"{n}", False)
            futures["filled", n] = pool.submit(run_handout, n, folder / f"{n}-filled", True)
        yield futures


# ---------------------------------------------------------------- blanks


def test_there_are_enough_blanks_and_mistakes():
    names = {b.name for b in BLANKS}
    assert len(BLANKS) == 20
    assert len(names) == len(BLANKS)
    assert set(WRONG) == names
    counts = [len(mistakes(name)) for name in names]
    assert min(counts) >= 4
    assert sum(counts) >= 150


@pytest.mark.parametrize("b", BLANKS, ids=lambda b: b.name)
def test_a_cut_keeps_signature_and_docstring_and_goes_back(b):
    source = (ROOT / b.file).read_text()
    blank = cut(source, b.function, b.equation)
    before, after = find(source, b.function), find(blank, b.function)
    assert ast.unparse(before.args) == ast.unparse(after.args)
    assert ast.get_docstring(before) == ast.get_docstring(after)
    assert ast.unparse(after.body[-1]) == f"raise NotImplementedError({b.equation!r})"
    assert len(after.body) <= 2, "nothing but the docstring stays"
    assert max(map(len, blank.splitlines())) <= 100
    restored = with_body(blank, b.function, body_of(source, b.function))
    assert restored == source, "the real body put back is the real file, to the byte"


def test_every_file_of_the_program_is_handed_out():
    names = {path.name for path in ROOT.glob("*.py")}
    assert names == {name for name in code_of(4) if name.endswith(".py")}
    assert set(code_of(4)) - set(code_of(3)) == set(RUNS)


@pytest.mark.parametrize("assignment", TITLES)
def test_a_handout_holds_what_it_imports_and_nothing_of_the_teachers(assignment, tmp_path):
    out = tmp_path / "out"
    make(assignment, out)
    names = {path.name for path in out.rglob("*")}
    teachers = {"wrong_bodies.py", "test_assignments.py", "make.py", "grade.py", "leaks.py"}
    teachers |= {"teacher.md", "answers.py", "probes.py", "bodies.py", "canary.py"}
    assert not teachers & names
    assert not [name for name in names if name.startswith((".git", "__pycache__"))]
    tests = {path.name for path in (out / "tests").glob("test_*.py")}
    assert tests == ({f"test_assignments_{assignment}.py"} if assignment < 5 else set())
    for path in out.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
                assert f"{node.module}.py" in names, f"{path.name} imports {node.module}"


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


# ---------------------------------------------------------------- solutions in a hand-out


def test_no_handout_shows_a_solution():
    done = run_python(MAKE, "check")
    assert done.returncode == 0, done.stdout
    assert "no hand-out shows" in done.stdout


class Renamed(ast.NodeTransformer):
    """Other names for variables and attributes."""

    def visit_Name(self, node):
        return ast.Name(f"my_{node.id}", node.ctx)

    def visit_Attribute(self, node):
        return ast.Attribute(self.visit(node.value), f"{node.attr}_too", node.ctx)


def renamed_body(b):
    node = find((ROOT / b.file).read_text(), b.function)
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return ast.unparse(ast.Module([Renamed().visit(part) for part in body], []))


def hide(kind, b, out):
    """Puts a body, under other names, into a place of a hand-out."""
    lines = renamed_body(b)
    inside = textwrap.indent(lines, "    ")
    path = out / "tests" / "small.py"
    if kind == "test":
        path = out / "tests" / "test_more.py"
        path.write_text(f"def test_more(a, b):\n    c = a + b\n{inside}\n")
    elif kind == "helper":
        path.write_text(f"{path.read_text()}\n\ndef oracle(a, b):\n{inside}\n")
    elif kind == "nested":
        deeper = textwrap.indent(inside, "        ")
        path.write_text(
            f"{path.read_text()}\n\nclass A:\n    def b(self):\n        def c():\n{deeper}\n"
        )
    elif kind == "comment":
        real = body_of((ROOT / b.file).read_text(), b.function)
        said = textwrap.indent(textwrap.dedent(real), "# ")
        path.write_text(f"{path.read_text()}\n{said}\n")
    elif kind == "text":
        real = textwrap.dedent(body_of((ROOT / b.file).read_text(), b.function))
        readme = out / "README.md"
        readme.write_text(f"{readme.read_text()}\n```python\n{real}```\n")


@pytest.mark.parametrize("assignment", WITH_BLANKS)
@pytest.mark.parametrize("kind", ["test", "helper", "nested", "comment", "text"])
def test_a_body_in_a_handout_is_found(assignment, kind, tmp_path):
    bodies = bodies_of(assignment)
    handed_out = tmp_path / "out"
    make(assignment, handed_out)
    # of later assignments too
    for i, b in enumerate([*blanks_of(assignment), left_blank(assignment)[-1]]):
        out = tmp_path / str(i)  # the files that `hide` changes alone: others take time
        (out / "tests").mkdir(parents=True)
        for name in ("README.md", "tests/small.py"):
            (out / name).write_text((handed_out / name).read_text())
        assert find_leaks(out, bodies) == []
        hide(kind, b, out)
        found = find_leaks(out, bodies)
        assert any(b.name in line for line in found), f"{b.name} in a {kind}: {found}"


A_TWIN_OF_ATTENTION = """
class Reader(nn.Module):
    def forward(self, words, extra):
        both = self.mixed(words)
        a, b, c = rearrange(both, "n t (three h d) -> three n h t d", three=3, h=self.count)
        out = F.scaled_dot_product_attention(a, b, c)
        out = self.last(rearrange(out, "n h t d -> n t (h d)"))
        return out + extra
"""


def test_twins_are_found(tmp_path):
    out = tmp_path / "out"
    make(1, out)
    (out / "reader.py").write_text(A_TWIN_OF_ATTENTION)
    found = find_leaks(out, bodies_of(1))
    assert found == ["reader.py, Reader.forward: a twin of encoder.Attention.forward"]
    # the real twin, which hand-outs show in another way
    (out / "reader.py").unlink()
    (out / "encoder.py").write_text(cut((ROOT / "encoder.py").read_text(), "Attention.forward", ""))
    found = find_leaks(out, bodies_of(1))
    assert any("AttentionPool.forward: a twin" in line for line in found)


def test_what_is_left_out_or_rewritten_exists_and_changes():
    for twin, (blank, _) in TWINS.items():
        module, function = twin.split(".", 1)
        assert find((ROOT / f"{module}.py").read_text(), function)
        assert blank in {b.name for b in BLANKS}
    for r in REWRITTEN:
        name = r.name.split(".")[0] + ".py"
        last = max(b.assignment for b in BLANKS if b.name in r.like)
        source = blanked(name, last)
        function = r.name.split(".", 1)[1]
        assert body_of(source, function) != body_of((ROOT / name).read_text(), function)
        assert max(map(len, source.splitlines())) <= 100


def module_of(name, assignment):
    """A file as it is handed out, as a module."""
    module = types.ModuleType(f"handed_out_{name}")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(blanked(f"{name}.py", assignment), f"{name}.py", "exec"), module.__dict__)
    return module


@torch.no_grad()
def test_what_is_rewritten_computes_the_same():
    import encoder
    import paradigms
    import shapes
    from laws import random_weights
    from small import small

    handed_out = module_of("encoder", 2)
    for pool in ("mean", "attention"):
        cfg = encoder.scratch_config(12, 4, width=20, depth=2, heads=5, pool=pool)
        ours, theirs = encoder.ViT(cfg).double(), handed_out.ViT(cfg).double()
        random_weights(ours)
        theirs.load_state_dict(ours.state_dict())
        images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
        torch.testing.assert_close(theirs(images).pooled, ours(images).pooled)
    torch.testing.assert_close(module_of("shapes", 3).sprites(8), shapes.sprites(8))
    cfg = small("mar").cfg
    ours, theirs = paradigms.FlowMLP(cfg), module_of("paradigms", 4).FlowMLP(cfg)
    random_weights(ours)
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(2, 9, 48), torch.rand(2, 9), torch.randn(2, 9, 24)
    torch.testing.assert_close(theirs(*inputs), ours(*inputs))


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_a_text_says_what_is_graded(assignment):
    text = (ROOT / "assignments" / TITLES[assignment]).read_text()
    for b in blanks_of(assignment):
        _, _, rest = text.partition(f"### `{b.name}` ({b.points} points)")
        assert rest, f"{b.name} has a section with its points"
        section = rest.partition("\n### ")[0].partition("\n## ")[0]
        assert "By hand" in section, f"{b.name} has an example by hand"
        assert section.count("<details>") >= 2, f"{b.name} has a ladder of hints"
    for heading in ("## What to hand in", "## Time", "## The run at the end", "## Questions"):
        assert heading in text, heading
    points = sum(b.points for b in blanks_of(assignment))
    assert f"{points} points for the blanks" in text
    assert "15 points for the questions" in text
    lines = [line for line in text.splitlines() if "](" not in line]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_a_text_names_the_files_to_hand_in(assignment):
    text = (ROOT / "assignments" / TITLES[assignment]).read_text()
    section = text.partition("## What to hand in")[2].partition("\n## ")[0]
    for b in blanks_of(assignment):
        assert f"`{b.file}`" in section, f"{b.name} is in {b.file}"


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_each_question_has_a_model_answer(assignment):
    text = (ROOT / "assignments" / TITLES[assignment]).read_text()
    questions = text.partition("## Questions")[2].partition("\n## ")[0]
    teacher = (ROOT / "assignments" / "teacher.md").read_text()
    answers = teacher.partition(f"## Assignment {assignment}\n")[2].partition("\n## ")[0]
    for number in (1, 2, 3):
        assert f"\n{number}. *" in questions, f"question {number}"
        assert f"**{number}. " in answers, f"an answer to question {number}"


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_a_handout_has_its_run_and_the_picture_of_it(assignment, tmp_path):
    out = tmp_path / "out"
    make(assignment, out)
    assert (out / "draw.py").exists()
    assert (out / "expected.png").exists()


# ---------------------------------------------------------------- the tests of a hand-out


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_blanks_are_red(assignment, work):
    outcomes, printed = work["blank", assignment].result()
    own = {test for b in blanks_of(assignment) for test in b.tests}
    assert set(outcomes) == own, printed[-3000:]
    for test in own:
        assert outcomes[test] == {"failure"}, f"{test}: a case passes with a blank body"


@pytest.mark.parametrize("assignment", WITH_BLANKS)
def test_filled_in_a_handout_is_green(assignment, work):
    """The blanks of later assignments stay blank."""
    outcomes, printed = work["filled", assignment].result()
    assert outcomes
    for test, found in outcomes.items():
        assert found == {"passed"}, f"{test}: {printed[-3000:]}"


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


def test_the_tests_of_one_blank_run_alone(tmp_path):
    out = tmp_path / "out"
    make(4, out, fill=True)
    (out / "tests" / "test_other.py").write_text("raise SystemExit('imported')\n")
    options = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--blank"]
    done = run_python(*options, "recon_loss.recon_loss", cwd=out)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    done = run_python(*options, "nothing", cwd=out)
    assert done.returncode == 4
    assert "no blank nothing; there are: model.Connector.forward, " in done.stderr
    assert "Traceback" not in done.stderr
