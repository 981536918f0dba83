"""Whether a hand-out shows a solution: a blank's body anywhere in it, or a twin beside it.

Statements are compared without names, spacing, comments and annotations:

    body   all statements of a blank in a row, one name for one; of a body of one statement, its
           expression anywhere; in prose, comments and strings, its source
    twin   three statements in a row, each like one of the blank, whatever the names of variables

`x = E` and `return E` are alike: what counts is how E is made.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path

TWIN = 3  # like statements in a row
LIKE = 0.7  # share of words that two like statements have in common
TWIN_WORDS = 24  # that three statements must have: three short calls in a row are no twin
PROSE = (".md", ".txt", ".json", ".toml", ".svg")
WORD = re.compile(r"[A-Za-z_]\w*|\d[\d.]*|[^\w\s]")
KEYWORDS = {"return", "for", "in", "if", "else", "with", "not", "is", "and", "or", "raise"}


# ---------------------------------------------------------------- normal forms


def statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """Simple statements in order, and the heads of compound ones; no docstrings, no signatures."""
    for node in body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield from statements(node.body)
        elif isinstance(node, ast.With):
            yield ast.Tuple([item.context_expr for item in node.items], ast.Load())
            yield from statements(node.body)
        elif isinstance(node, ast.For):
            yield ast.Tuple([node.iter], ast.Load())
            yield from statements(node.body + node.orelse)
        elif isinstance(node, ast.If | ast.While):
            yield node.test
            yield from statements(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            handlers = [line for handler in node.handlers for line in handler.body]
            yield from statements(node.body + handlers + node.orelse + node.finalbody)
        elif not is_text and not isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
            is_plain = isinstance(node, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr)
            yield (node.value or node) if is_plain else node


class Names:
    """A number for each name, in the order of appearance."""

    def __init__(self):
        self.numbers = {}

    def of(self, name: str) -> str:
        return f"n{self.numbers.setdefault(name, len(self.numbers))}"


def normal(node: ast.AST, names: Names) -> str:
    """An expression or simple statement without its own names, strings and comments."""
    if isinstance(node, ast.Name):
        return names.of(node.id)
    if isinstance(node, ast.Attribute):
        return f"{normal(node.value, names)}.{names.of(node.attr)}"
    if isinstance(node, ast.arg):
        return names.of(node.arg)
    if isinstance(node, ast.keyword):
        return f"{node.arg or '**'}={normal(node.value, names)}"
    if isinstance(node, ast.Constant):
        return "'s'" if isinstance(node.value, str) else repr(node.value)
    children = ",".join(normal(child, names) for child in ast.iter_child_nodes(node))
    return f"{type(node).__name__}({children})"


def normals(nodes: list[ast.AST]) -> list[str]:
    names = Names()
    return [normal(node, names) for node in nodes]


def shape(node: ast.AST) -> list[str]:
    """The words of a statement with one name for all variables; functions keep theirs."""
    variables = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    variables -= {part.id for part in calls if isinstance(part, ast.Name)}
    return ["n" if word in variables else word for word in WORD.findall(ast.unparse(node))]


def are_like(some: list[list[str]], others: list[list[str]]) -> bool:
    """Whether each statement, as its words, is like the other of its place."""
    for a, b in zip(some, others, strict=True):
        matcher = SequenceMatcher(None, a, b, autojunk=False)
        if matcher.real_quick_ratio() < LIKE or matcher.quick_ratio() < LIKE:
            return False
        if matcher.ratio() < LIKE:
            return False
    return True


def windows(items: list, length: int) -> Iterator[list]:
    for i in range(len(items) - length + 1):
        yield items[i : i + length]


# ---------------------------------------------------------------- a file of the hand-out


def functions(tree: ast.Module) -> Iterator[tuple[str, list[ast.AST]]]:
    """Each outermost function or method with all that is inside, and the lines around them."""
    rest = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, list(statements(node.body))
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            for part in methods:
                yield f"{node.name}.{part.name}", list(statements(part.body))
            rest += [part for part in node.body if part not in methods]
        else:
            rest.append(node)
    yield "the file's own lines", list(statements(rest))


def prose(text: str) -> str:
    """What Python says that is no code: comments and strings."""
    parts = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            parts.append(token.string.lstrip("# "))
        elif token.type == tokenize.STRING:
            parts.append(token.string.strip("rbf\"'"))
    return "\n".join(parts)


def words(text: str) -> str:
    """Source as words, with one name for all, between spaces and without comments."""
    lines = [line.partition("  #")[0] for line in text.splitlines()]
    found = WORD.findall("\n".join(line for line in lines if not line.strip().startswith("#")))
    return f" {' '.join(w if w in KEYWORDS or not w[0].isalpha() else 'n' for w in found)} "


class Body:
    """The body of a blank in its normal forms."""

    def __init__(self, name: str, source: str, node: ast.FunctionDef):
        self.name = name
        self.nodes = list(statements(node.body))
        self.exact = normals(self.nodes)
        triples = windows([shape(statement) for statement in self.nodes], TWIN)
        self.triples = [triple for triple in triples if sum(map(len, triple)) >= TWIN_WORDS]
        self.words = words(source)

    def is_in(self, nodes: list[ast.AST]) -> bool:
        """Whether statements hold the whole body."""
        if len(self.nodes) == 1:
            parts = [part for node in nodes for part in ast.walk(node)]
            return any(normals([part]) == self.exact for part in parts)
        return any(normals(window) == self.exact for window in windows(nodes, len(self.nodes)))

    def has_twin(self, triples: list[list[list[str]]]) -> bool:
        return any(are_like(mine, theirs) for mine in self.triples for theirs in triples)


@cache  # most files are the same in all hand-outs
def leaks_of(suffix: str, text: str, body: Body) -> list[str]:
    """Where a file shows the body of a blank."""
    leaks = []
    if body.words in said(suffix, text):
        leaks.append(f" says the body of {body.name}")
    for function, nodes, triples in parse(text) if suffix == ".py" else ():
        if body.is_in(nodes):
            leaks.append(f", {function}: the body of {body.name}")
        elif body.has_twin(triples):
            leaks.append(f", {function}: a twin of {body.name}")
    return leaks


@cache
def said(suffix: str, text: str) -> str:
    return words(prose(text) if suffix == ".py" else text)


@cache
def parse(text: str) -> list[tuple]:
    """Each function of a file: its name, its statements, and three in a row as their words."""
    found = []
    for function, nodes in functions(ast.parse(text)):
        found.append((function, nodes, list(windows([shape(node) for node in nodes], TWIN))))
    return found


def find_leaks(folder: Path, bodies: list[Body]) -> list[str]:
    """A line for each place of a hand-out that shows the body of a blank."""
    leaks = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", *PROSE) and path.is_file():
            text = path.read_text("utf-8")
            for body in bodies:
                found = leaks_of(path.suffix, text, body)
                leaks += [f"{path.relative_to(folder)}{leak}" for leak in found]
    return leaks
