"""The files that a student handed in: a folder or a zip, as texts by their paths."""

import io
import os
import stat
import tokenize
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MAX_SOURCE = 1_000_000  # bytes of a submitted file
MAX_FILES = 5000  # files of a submission that are looked at
LISTED = 12  # file names that a reason mentions
SKIPPED = {"__pycache__", "__MACOSX", "site-packages", "node_modules"}


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
