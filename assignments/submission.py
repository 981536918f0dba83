"""What a student handed in: its files, the bodies of its blanks, and all else that was changed.

Nothing here runs the student's code: a file is text, and `ast` finds what is in it.
"""

import ast
import io
import os
import re
import stat
import textwrap
import tokenize
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MAX_SOURCE = 1_000_000  # bytes of a submitted file
MAX_FILES = 5000  # files of a submission that are looked at
LISTED = 12  # file names that a reason mentions
SKIPPED = {"__pycache__", "__MACOSX", "site-packages", "node_modules"}
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what ast.parse raises


@dataclass
class Submission:
    """Paths are relative to the submission, with slashes."""

    sources: dict[str, str] = field(default_factory=dict)  # of each Python file: its text
    problems: dict[str, str] = field(default_factory=dict)  # why a file cannot be read
    others: list[str] = field(default_factory=list)  # files that are not Python's
    notes: list[str] = field(default_factory=list)  # what a reader should know

    def add(self, path: str, raw: bytes) -> None:
        text, encoding = decode(raw)
        self.sources[path] = text
        if encoding:
            self.notes.append(f"{path} is not UTF-8; it was read as {encoding}")


# ---------------------------------------------------------------- files


def read_submission(path: Path) -> Submission:
    """A folder, a zip, or a folder that holds nothing of Python but one zip."""
    submission = Submission()
    if path.is_file():
        read_archive(path, submission)
        return submission
    read_folder(path, submission)
    archives = [name for name in submission.others if name.lower().endswith(".zip")]
    if len(archives) == 1 and not submission.sources:
        submission.notes.append(f"read from {archives[0]}")
        read_archive(path / archives[0], submission)
    return submission


def read_folder(folder: Path, submission: Submission) -> None:
    count = 0
    for root, folders, names in os.walk(folder):
        for name in list(folders):
            if (Path(root) / name).is_symlink():
                names.append(name)
        folders[:] = sorted(name for name in folders if not is_skipped(name))
        for name in sorted(names):
            count += 1
            if count > MAX_FILES:
                submission.notes.append(f"only the first {MAX_FILES} files were looked at")
                return
            source = Path(root) / name
            path = source.relative_to(folder).as_posix()
            if source.is_dir() or source.suffix.lower() == ".py":
                read_file(source, path, folder, submission)
            else:
                submission.others.append(path)


def is_skipped(name: str) -> bool:
    return name.startswith(".") or name in SKIPPED


def read_file(source: Path, path: str, folder: Path, submission: Submission) -> None:
    """Adds a file, or why it cannot be taken. A link may lead to a file of the submission."""
    try:
        info = source.stat()
        if not source.resolve().is_relative_to(folder.resolve()):
            submission.problems[path] = "is a link that leads out of the submission"
        elif not stat.S_ISREG(info.st_mode):
            submission.problems[path] = "is no plain file"
        elif info.st_size > MAX_SOURCE:
            submission.problems[path] = f"has {info.st_size} bytes, more than {MAX_SOURCE}"
        else:
            submission.add(path, source.read_bytes())
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        submission.problems[path] = f"cannot be read ({reason})"


def read_archive(path: Path, submission: Submission) -> None:
    """Adds the Python files of a zip. Nothing of it is written to the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist()[:MAX_FILES]:
                name = PurePosixPath(entry.filename.replace("\\", "/"))
                if entry.is_dir() or any(is_skipped(part) for part in name.parts):
                    continue
                is_link = stat.S_ISLNK(entry.external_attr >> 16)
                if name.suffix.lower() != ".py":
                    submission.others.append(str(name))
                elif is_link:
                    submission.problems[str(name)] = "is a link; hand in the file itself"
                elif entry.file_size > MAX_SOURCE:
                    reason = f"has {entry.file_size} bytes, more than {MAX_SOURCE}"
                    submission.problems[str(name)] = reason
                else:
                    with archive.open(entry) as file:
                        submission.add(str(name), file.read(MAX_SOURCE))
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        submission.notes.append(f"{path.name} cannot be read as a zip ({error})")


def decode(raw: bytes) -> tuple[str, str]:
    """The text with plain line ends, and its encoding if that is not what Python expects."""
    encoding = ""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
        text = raw.decode("utf-16", "replace")
    else:
        try:
            declared, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
            text = raw.decode(declared)
        except (SyntaxError, ValueError, LookupError):
            encoding = "Latin-1"
            text = raw.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def find_file(submission: Submission, name: str) -> tuple[str, str]:
    """The path of a file wherever it lies, and "": or "", and why there is none.

    The one that lies least deep counts.
    """
    known = [*submission.sources, *submission.problems]
    candidates = [path for path in known if PurePosixPath(path).name == name]
    if not candidates:
        there = sorted([*known, *submission.others], key=lambda path: (path.count("/"), path))
        more = f" and {len(there) - LISTED} more" if len(there) > LISTED else ""
        listed = ", ".join(there[:LISTED]) or "no file at all"
        return "", f"{name} was not found; there is {listed}{more}"
    depth = min(path.count("/") for path in candidates)
    nearest = sorted(path for path in candidates if path.count("/") == depth)
    if len(nearest) > 1:
        return "", f"{name} is there {len(nearest)} times, hand in one: {', '.join(nearest)}"
    if nearest[0] in submission.problems:
        return "", f"{nearest[0]} {submission.problems[nearest[0]]}"
    return nearest[0], ""


# ---------------------------------------------------------------- what a file holds


def definition(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The function of a dotted name, `function` or `Class.function`; of several the last."""
    node = tree
    for part in name.split("."):
        found = [
            n for n in node.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part
        ]
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
    return node.body[1:] if has_docstring else node.body


def is_blank(node: ast.FunctionDef) -> bool:
    """Whether nothing was written: an error, pass or ... alone."""
    for statement in statements(node):
        is_ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_error = isinstance(statement, ast.Raise) and "NotImplemented" in ast.unparse(statement)
        if not (is_ellipsis or is_error or isinstance(statement, ast.Pass)):
            return False
    return True


# ---------------------------------------------------------------- what else was changed


@dataclass(frozen=True)
class Change:
    """A definition or statement that is not as it was handed out; node: the student's, if any."""

    what: str
    node: ast.stmt | None


def changes(text: str, given: list[str], blanks: list[str]) -> list[Change]:
    """What differs outside the bodies of the blanks. Comments and layout do not count.

    given: the file as handed out, and the reference; to be like either is no change.
    """
    try:
        before = [units(source, blanks) for source in given]
        after = units(text, blanks)
    except UNREADABLE as error:
        return [Change(f"not compared: {describe_syntax(error)}", None)]
    found = []
    for name, (code, node) in after.items():
        known = [source[name][0] for source in before if name in source]
        if code not in known:
            verb = "changed" if known else "added"
            found.append(Change(f"{verb}: {name} (line {node.lineno})", node))
    in_all = set.intersection(*[set(source) for source in before])
    found += [Change(f"missing: {name}", None) for name in before[0] if name in in_all - set(after)]
    return found


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
