"""The texts of an image folder: tables of captions, files beside images, the names of classes.

Read are CSV (by comma, semicolon, tab or bar), JSON lines, JSON and COCO's captions, by their
columns; `a.txt` or `a.caption` beside `a.jpg`; and the lists of class names that ImageNet and its
subsets come with. Paths are relative to the image folder, with / on any system.
"""

import codecs
import csv
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from images import SUFFIXES

SIDECARS = (".txt", ".caption")
TEXTS = {*SIDECARS, ".csv", ".tsv", ".json", ".jsonl", ".token"}
MAX_TABLES = 20  # of one suffix in a folder; more are annotations, one an image
MAX_BYTES = 300e6  # of a table; COCO's captions are 92 MB, its boxes 470
FILE_COLUMNS = "file_name filename file image image_name image_path file_path filepath path img"
FILE_COLUMNS = [*FILE_COLUMNS.split(), "image_id", "imageid", "id", "name"]
CAPTION_COLUMNS = ["text", "caption", "captions", "prompt", "description", "comment", "sentence"]
CLASS_LISTS = ["classes.tsv", "LOC_synset_mapping.txt", "synset_words.txt", "words.txt"]
CLASS_LISTS += ["Labels.json", "imagenet_class_index.json", "meta.bin"]
# The classes of held-out images that are in no class folders, by file name or by number.
TRUTHS = ["LOC_val_solution.csv", "val_annotations.txt", "ILSVRC2012_validation_ground_truth.txt"]
IMAGENET_WNIDS = Path(__file__).parent / "assets" / "imagenet_wnids.txt"  # by ILSVRC2012_ID
WNID = r"n\d{8}"
# How the captions of a class begin.
STARTS = ["a photo of", "a picture of", "an image of", "a photograph of", "this is", "here you see"]


def read_text(path: str) -> str:
    """A text file: UTF-16 where it says so, else UTF-8, else Windows' western encoding."""
    data = Path(path).read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


# ---------------------------------------------------------------- tables of captions
def parse_rows(path: str) -> list[dict]:
    """The rows of a table as {column: value}."""
    text = read_text(path)
    if path.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if path.endswith(".json"):
        return parse_json(json.loads(text))
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    header = lines[0] if lines else ""
    delimiter = max(",;\t|", key=header.count)
    columns = None
    if os.path.splitext(header.split(delimiter)[0].split("#")[0])[1].lower() in SUFFIXES:
        columns = ["file_name", "text"]  # no header: `a.jpg#0<tab>a red bus`, as Flickr8k has it
    reader = csv.DictReader(lines, columns, delimiter=delimiter)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    rows = []
    for row in reader:
        rest = row.pop(None, None)
        if rest:  # the last column is a text with delimiters and without quotation marks
            row[reader.fieldnames[-1]] += "".join(delimiter + part for part in rest)
        if columns:
            row["file_name"] = re.sub(r"#\d+$", "", row["file_name"])
        rows.append(row)
    return rows


def parse_json(content) -> list[dict]:
    """Rows of a list of them, of COCO's captions, or of {file name: caption}."""
    if isinstance(content, list):
        return content
    if content.keys() >= {"images", "annotations"}:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [row | {"file_name": names[row["image_id"]]} for row in content["annotations"]]
    is_text = all(isinstance(text, str | list) for text in content.values())
    return [{"file_name": name, "text": text} for name, text in content.items() if is_text]


def find_column(columns: Iterable[str], known: list[str]) -> str | None:
    """The column whose name is the first of the known ones, in any case."""
    by_name = {column.strip().lower(): column for column in reversed(list(columns))}
    return next((by_name[name] for name in known if name in by_name), None)


def read_table(path: str, caption_column: str = "") -> tuple[list[tuple[str, str]], list[str]]:
    """The (file name, caption) pairs of a table, and its columns; no pairs: it is another table.

    Raises ValueError with the row's number where a row lacks one of the two.
    """
    try:
        rows = parse_rows(path)
        columns = [str(name) for name in rows[0]] if rows else []
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    file_column = find_column(columns, FILE_COLUMNS)
    text_column = find_column(
        columns, [caption_column.lower()] if caption_column else CAPTION_COLUMNS
    )
    if not file_column or not text_column:
        return [], columns
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            name, texts = row[file_column], row[text_column]
            texts = texts if isinstance(texts, list) else [texts or ""]
            pairs += [(f"{name}".replace("\\", "/"), " ".join(t.split())) for t in texts]
            if not name:
                raise ValueError(f"no {file_column}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            rule = f"each row needs `{file_column}`, and `{text_column}` as text"
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}, near row {number}: {rule} ({reason})") from None
    return pairs, columns


def find_image(name: str, folder: str, root_name: str, by_stem: dict) -> str | None:
    """The one image that a table in `folder` calls `name`: by its path, or by the end of it.

    by_stem: {name without folder and suffix: [path, ...]}. The name may lack folders or the suffix,
    begin with the image folder's own name, or be absolute, as on the machine that wrote it.
    """
    is_absolute = name.startswith("/") or name[1:3] == ":/"
    own = os.path.normpath(os.path.join(folder, name)).replace(os.sep, "/")
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    paths = by_stem.get(os.path.splitext(parts[-1])[0] if parts else "", [])
    paths = paths + by_stem.get(parts[-1] if parts else "", [])
    both = [(path, os.path.splitext(path)[0]) for path in paths]
    for path, stem in both:
        if own in (path, stem):
            return path
    starts = len(parts) if is_absolute else 1 + (parts[:1] == [root_name])
    for start in range(min(starts, len(parts))):
        end = "/" + "/".join(parts[start:])
        found = [
            path for path, stem in both if f"/{path}".endswith(end) or f"/{stem}".endswith(end)
        ]
        if found:
            return found[0] if len(set(found)) == 1 else None
    return None


def read_captions(root: str, listing: dict, caption_column: str = "") -> tuple[dict, list, list]:
    """{path: [caption, ...]} of the images below root, what was used, and what was not.

    Raises ValueError for a table of captions that names no image, or that has a damaged row.
    """
    captions, used, unused = defaultdict(list), [], []
    sidecars = Counter()
    tables = defaultdict(list)  # of a folder and a suffix
    for folder, entry in listing.items():
        # A folder of images alone is not looked at: there may be a million of them.
        texts = [name for name in entry["texts"] if name not in CLASS_LISTS + TRUTHS]
        images = {os.path.splitext(name)[0]: name for name in entry["images"] if texts}
        for name in texts:
            stem, suffix = os.path.splitext(name)
            is_beside = stem in images and suffix != ".csv"
            if is_beside and suffix.lower() in SIDECARS:
                lines = read_sidecar(join(root, folder, name))
                captions[join(folder, images[stem])] += lines
                sidecars[suffix.lower() if lines else f"{suffix.lower()} without words"] += 1
            elif not is_beside:
                tables[folder, suffix].append(join(folder, name))
    by_stem = defaultdict(list)
    for folder, entry in listing.items() if tables else ():
        for name in entry["images"]:
            by_stem[os.path.splitext(name)[0]].append(join(folder, name))
    for (folder, suffix), paths in tables.items():
        if len(paths) > MAX_TABLES:
            unused.append(f"{len(paths)} {suffix} files in {folder or '.'}")
            continue
        for path in paths:
            fact, is_used = use_table(root, path, caption_column, by_stem, captions)
            (used if is_used else unused).append(fact)
    for suffix, count in sidecars.items():
        (unused if "without" in suffix else used).append(f"{count} {suffix} beside images")
    return {path: texts for path, texts in captions.items() if any(texts)}, used, unused


def read_sidecar(path: str) -> list[str]:
    """The captions in a text beside an image, one a line; lines of numbers are boxes or labels."""
    lines = [" ".join(line.split()) for line in read_text(path).splitlines()]
    return [line for line in lines if re.search(r"[^\W\d_]{2}|[^\x00-\x7f]", line)]


def join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def use_table(root, path, caption_column, by_stem, captions) -> tuple[str, bool]:
    """Adds a table's captions to `captions`. Returns a phrase about it, and whether it had any."""
    if os.path.getsize(join(root, path)) > MAX_BYTES:
        return f"{path} (larger than {MAX_BYTES / 1e6:.0f} MB)", False
    folder, name = os.path.split(path)
    is_captions = re.match("metadata|caption", name.lower())
    try:
        pairs, columns = read_table(join(root, path), caption_column)
    except ValueError as error:
        if is_captions or "near row" in str(error):
            raise
        return f"{path} (cannot be read)", False
    facts = f"{path} (columns {', '.join(columns[:8])})" if len(columns) < 50 else path
    if not pairs:
        if is_captions and columns:
            hint = "name the column of the captions with --caption_column"
            raise ValueError(f"{join(root, facts)} has no column that is known here: {hint}")
        return (path if path.endswith(".txt") else facts), False
    root_name = os.path.basename(root)
    missing = 0
    for file_name, text in pairs:
        image = find_image(file_name, folder, root_name, by_stem)
        if image is None:
            missing += 1
        elif text:
            captions[image].append(text)
    if missing == len(pairs):
        if is_captions:
            found = f"names no image that is there (it names {pairs[0][0]!r})"
            raise ValueError(f"{join(root, path)} {found}: file names are relative to its folder")
        return f"{path} (names no image that is there)", False
    absent = f", {missing} rows of images that are not there" if missing else ""
    return f"{path} ({len(pairs)} captions{absent})", True


# ---------------------------------------------------------------- classes
def class_captions(names: str) -> str:
    """All wordings with all names of a class, "goldfish, Carassius auratus", a line each."""
    captions = []
    for name in map(str.strip, names.lower().split(",")):
        article = "an" if re.match("(?!eu|uni|one|uk)[aeiou]", name) else "a"
        captions += [f"{start} {article} {name}" for start in STARTS if name]
    return "\n".join(captions)


def folder_to_name(folder: str) -> str:
    """`sea_otter` -> `sea otter`; a number before it goes, and a comma would part two names."""
    name = re.sub(rf"^({WNID}|\d+)[-_. ]+(?=\D)", "", folder.split("/")[-1])
    return " ".join(re.sub("[_,]", " ", name).split())


def read_class_list(path: str) -> dict[str, str]:
    """{class: its names, comma-separated} of one of CLASS_LISTS."""
    if path.endswith(".bin"):
        names = torch.load(path, weights_only=True)[0]  # torchvision's, {wnid: (name, ...)}
        return {wnid: ", ".join(both) for wnid, both in names.items()}
    if path.endswith(".json"):
        content = json.loads(read_text(path))
        rows = [
            value if isinstance(value, list) else [key, value] for key, value in content.items()
        ]
    else:
        rows = [line.strip().split(None, 1) for line in read_text(path).splitlines()]
    return {row[0]: row[1].replace("_", " ") for row in rows if len(row) > 1}


def class_names(classes: list[str], lists: list[str]) -> tuple[dict[str, str], list[str]]:
    """The comma-separated names of classes, and where they come from.

    They come from the files `lists`, else from torchvision for a class of ImageNet-1k, else from
    the folder. Raises ValueError for a WordNet id that nothing names.
    """
    known, sources = {}, {}
    for path in lists:
        try:
            for name, text in read_class_list(path).items():
                known.setdefault(name, text)
                sources.setdefault(name, os.path.basename(path))
        except Exception as error:  # a damaged meta.bin can raise nearly anything
            raise ValueError(f"{path} is no list of class names ({error})") from None
    if any(re.fullmatch(WNID, name) and name not in known for name in classes):
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        wnids = sorted(IMAGENET_WNIDS.read_text().split())
        for wnid, name in zip(wnids, _IMAGENET_CATEGORIES, strict=True):
            known.setdefault(wnid, name)
            sources.setdefault(wnid, "ImageNet-1k's list")
    unknown = [name for name in classes if re.fullmatch(WNID, name) and name not in known]
    if unknown:
        line = f"put a file {CLASS_LISTS[0]} with lines `{unknown[0]} its name, another name`"
        raise ValueError(f"{len(unknown)} classes such as {unknown[0]} have no names: {line} there")
    names = {name: known.get(name) or folder_to_name(name) for name in classes}
    return names, sorted({sources.get(name, "folders") for name in classes})


def read_truth(path: str) -> dict:
    """{image without suffix, or its number: WordNet id} of one of TRUTHS."""
    wnids = IMAGENET_WNIDS.read_text().split()
    truth = {}
    for number, line in enumerate(read_text(path).split(), 1) if "ground" in path else ():
        if not line.isdigit() or not 1 <= int(line) <= len(wnids):
            raise ValueError(f"{path}, line {number}: {line!r} is no number from 1 to {len(wnids)}")
        truth[number] = wnids[int(line) - 1]
    for line in read_text(path).splitlines() if not truth else ():
        name, _, rest = re.sub(r"[\t,]", " ", line).partition(" ")
        if re.match(WNID, rest):
            truth[os.path.splitext(name)[0]] = rest.split()[0]
    return truth
