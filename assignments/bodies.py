"""What is taken of a submission: the bodies of its blanks, with what they need; the rest is listed.

Nothing here runs the student's code: a file is text, and `ast` finds what is in it.
"""

import ast
import builtins
import re
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from audit import imported_names, is_allowed, suspicious
from make import BLANKS, Blank
from submission import Submission, find_file

UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse raises
# Files that Python or pytest would load by their names, as the standard library's.
SUSPECT_FILES = {"conftest", "sitecustomize", "usercustomize", "pytest", "torch", "numpy", "einops"}


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
    """The body of a blank with what it needs, or why there is none. reference: its file."""
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
    known = names_of(tree)
    add_extras(body, handed, set(known))
    body.notes += added_methods(body, tree)
    extras = ast.Module(body.extras, [])
    imports = imported_names(tree) | imported_names(extras)
    ours = (known.keys() | names_of(extras).keys()) - imports.keys()
    code = [definition(tree, b.function).args, *statements(body.node), *body.extras]
    body.flags = suspicious(code, imports, ours)
    if body.flags:
        body.problem = "it was not run: it does what no blank needs"
    return body


def add_extras(body: Body, handed: Submission, known: set[str]) -> None:
    """Adds functions, imports and constants of the student's file that a body needs.

    known: names that the reference defines, which stay its own.
    """
    try:
        theirs = names_of(ast.parse(body.source))
    except UNREADABLE:
        return
    left = statements(body.node)
    while left:
        for part in ast.walk(left.pop()):
            name = part.id if isinstance(part, ast.Name) else ""
            if name not in theirs or name in known or hasattr(builtins, name):
                continue
            known.add(name)
            node = theirs[name]
            reason = why_not(node, handed)
            if reason:
                body.notes.append(f"{name} (line {node.lineno}) was not taken: {reason}")
                continue
            body.notes.append(f"{name} (line {node.lineno}) was taken along")
            if node not in body.extras:
                body.extras.append(node)
                left.append(node)
    body.extras.sort(key=lambda node: node.lineno)


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
    except (*UNREADABLE, TypeError):
        return False
    return True


def added_methods(body: Body, reference: ast.Module) -> list[str]:
    """Notes on methods that the student gave the blank's class, and that its body calls."""
    owner = body.blank.function.rpartition(".")[0]
    called = {part.attr for part in ast.walk(body.node) if isinstance(part, ast.Attribute)}
    notes = []
    for name in sorted(called) if owner else []:
        added, _ = parse_blank(body.source, f"{owner}.{name}")
        if added and not definition(reference, f"{owner}.{name}"):
            where = f"{owner}.{name} (line {added.lineno})"
            notes.append(f"{where} was not taken: write it as a function outside the class")
    return notes


# ---------------------------------------------------------------- a function of a file


def definition(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The function of a dotted name, `function` or `Class.function`; of several the last."""
    node = tree
    for part in name.split("."):
        definitions = [n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        found = [n for n in definitions if n.name == part]
        if not found:
            return None
        node = found[-1]
    return node if isinstance(node, ast.FunctionDef) else None


def parse_blank(text: str, name: str) -> tuple[ast.FunctionDef | None, str]:
    """A function of a file, and "": or None, and why not.

    Where the file is no Python, the function alone is parsed: a mistake elsewhere costs it nothing.
    """
    try:
        node = definition(ast.parse(text), name)
        missing = f"there is no function {name} at its place"
    except UNREADABLE as error:
        problem = describe_syntax(error)
        try:
            node = parse_block(text, name)
        except UNREADABLE as error:
            return None, describe_syntax(error)
        missing = f"{problem}, and no function {name} was found at its place"
    return (node, "") if node else (None, missing)


def describe_syntax(error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno} is no Python: {error.msg}"
    return f"it cannot be parsed ({type(error).__name__}: {error})"


def parse_block(text: str, name: str) -> ast.FunctionDef | None:
    """The lines of a function, by their indentation, parsed alone with their line numbers."""
    lines = text.split("\n")
    first, last, indent = 0, len(lines), -1
    for part in name.split("."):
        pattern = re.compile(rf"( *)(?:class|def) {re.escape(part)}\b")
        starts = []
        for i in range(first, last):
            found = pattern.match(lines[i])
            if found and len(found[1]) > indent:
                starts.append((i, len(found[1])))
        if not starts:
            return None
        # the outermost; of several the last
        indent = min(width for _, width in starts)
        first = [i for i, width in starts if width == indent][-1]
        last = end_of_block(lines, first, last, indent)
        first += 1
    first -= 1
    block = textwrap.dedent("\n".join(lines[first:last]))
    tree = ast.parse("\n" * first + block)
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def end_of_block(lines: list[str], first: int, last: int, indent: int) -> int:
    """The first line behind a block. Its signature may close at the block's own indentation."""
    for i in range(first + 1, last):
        line = lines[i]
        width = len(line) - len(line.lstrip())
        is_content = line.strip() and not line.lstrip().startswith(("#", ")", "]", "}"))
        if is_content and width <= indent:
            return i
    return last


def statements(node: ast.FunctionDef) -> list[ast.stmt]:
    """A function's body without its docstring."""
    has_docstring = ast.get_docstring(node, clean=False) is not None
    return node.body[1:] if has_docstring else list(node.body)


def is_blank(node: ast.FunctionDef) -> bool:
    """Whether nothing was written: an error, pass or ... alone."""
    for statement in statements(node):
        is_ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_error = isinstance(statement, ast.Raise) and "NotImplemented" in ast.unparse(statement)
        if not (is_ellipsis or is_error or isinstance(statement, ast.Pass)):
            return False
    return True


# ---------------------------------------------------------------- what else was handed in


def changed_outside(blanks: list[Blank], handed: Submission, handout: Path) -> list[str]:
    """Lines on all that is not as it was handed out, and is not used; FLAG before a suspect one."""
    lines = [f"note {note}" for note in handed.notes]
    lines += [f"note {path} {problem}" for path, problem in handed.problems.items()]
    used = [find_file(handed, b.file)[0] for b in blanks]
    given = {}
    for path in handout.rglob("*.py"):
        given.setdefault(path.name, []).append(path.read_text("utf-8"))
    for path, source in handed.sources.items():
        name, stem = PurePosixPath(path).name, PurePosixPath(path).stem
        if path in used:
            lines += changed_in_file(path, source, given[name][0])
        elif source not in given.get(name, []):
            is_suspect = stem in SUSPECT_FILES or stem in sys.stdlib_module_names
            mark = "FLAG" if is_suspect else "note"
            lines.append(f"{mark} {path} is not as handed out; it is not used")
    return lines


def changed_in_file(path: str, source: str, given: str) -> list[str]:
    """What differs outside the bodies of the blanks. Comments and layout do not count."""
    blanks = [b.function for b in BLANKS if b.file == PurePosixPath(path).name]
    before = units(given, blanks)
    try:
        tree = ast.parse(source)
        after = units(source, blanks)
    except UNREADABLE as error:
        return [f"note {path}, outside the blanks, not compared: {describe_syntax(error)}"]
    imports = imported_names(tree)
    ours = names_of(tree).keys() - imports.keys()
    lines = []
    for name, (code, node) in after.items():
        if name in before and code == before[name][0]:
            continue
        verb = "changed" if name in before else "added"
        lines.append(f"note {path}, outside the blanks, {verb}: {name} (line {node.lineno})")
        if not isinstance(node, ast.ClassDef):
            flags = suspicious([node], imports, ours)
            lines += [f"FLAG {path}, outside the blanks, not used: {flag}" for flag in flags]
    missing = [name for name in before if name not in after]
    lines += [f"note {path}, outside the blanks, missing: {name}" for name in missing]
    return lines


def units(text: str, blanks: list[str]) -> dict[str, tuple[str, ast.stmt]]:
    """{name: (its code, its node)} of each function, method and other statement of a file."""
    found = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                header = [ast.unparse(part) for part in node.bases + node.decorator_list]
                found[f"class {prefix}{node.name}"] = (str(header), node)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                name = prefix + node.name
                found[name] = (header_of(node) if name in blanks else ast.unparse(node), node)
            elif not is_docstring(node):
                code = ast.unparse(node)
                found[f"{prefix}`{code[:60]}`"] = (code, node)

    visit(ast.parse(text).body, "")
    return found


def header_of(node: ast.FunctionDef) -> str:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return f"{decorators} {ast.unparse(node.args)}"


def is_docstring(node: ast.stmt) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)
