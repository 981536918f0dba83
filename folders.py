"""What an image folder holds: a split's images and their captions, from metadata or classes."""

import csv
import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress

from images import SUFFIXES

METADATA = ("metadata.jsonl", "metadata.csv")  # the hub's captioned folder: `file_name`, `text`
CLASS_LISTS = ("classes.tsv", "LOC_synset_mapping.txt", "words.txt")  # `wnid name, other name`
LAYOUT = "ImageNet is laid out as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
# How the captions of a class begin.
STARTS = ["a photo of", "a picture of", "an image of", "a photograph of", "this is", "here you see"]
SETTLED = 2.0  # s; a folder changed later than this may change again within one tick of its clock


def default_cache_dir(cache_dir: str) -> str:
    """`cache_dir`, or where that is empty `reca` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return cache_dir or os.path.join(user_cache, "reca")


def file_fingerprint(path: str) -> list[int]:
    """Changes when a file is written, and when a file of a folder is added, removed or renamed."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def list_files(root: str, cache_dir: str = "") -> list[str]:
    """Relative paths of all images and metadata files below root, sorted.

    Dot files are left out, links followed. A second call reads them from an index in cache_dir, as
    long as no folder's fingerprint has changed. ValueError where a folder cannot be listed.
    """
    root = os.path.abspath(root)
    root_hash = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    index = os.path.join(default_cache_dir(cache_dir), f"index_{root_hash}.json.gz")
    # An absent or damaged index is made anew: gzip brings a checksum.
    with suppress(OSError, EOFError, ValueError, zlib.error):
        with gzip.open(index, "rt") as file:
            known = json.load(file)
        known_folders = known["folders"].items()
        if all(file_fingerprint(os.path.join(root, path)) == old for path, old in known_folders):
            return known["files"]
    began = time.time()
    folders, files = walk(root)
    if max(map(max, folders.values())) < (began - SETTLED) * 1e9:
        # Replace the index in one step. Where that is not possible, the next start walks again.
        part = f"{index}.{os.getpid()}"
        with suppress(OSError):
            os.makedirs(os.path.dirname(index), exist_ok=True)
            with gzip.open(part, "wt", 1) as file:
                file.write(json.dumps({"folders": folders, "files": files}))
            os.replace(part, index)
    return files


def walk(root: str) -> tuple[dict[str, list[int]], list[str]]:
    """The fingerprint of each folder below root, and the files that `list_files` returns."""
    folders = {}
    files = []
    visited = set()
    errors = []
    for path, subfolders, names in os.walk(root, onerror=errors.append, followlinks=True):
        # Enter each folder once: a link may lead back.
        real_path = os.path.realpath(path)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        folder = "" if path == root else os.path.relpath(path, root)
        folders[folder] = file_fingerprint(path)
        shown = [name for name in names + subfolders if not name.startswith(".")]
        found = {n for n in shown if n in METADATA or os.path.splitext(n)[1].lower() in SUFFIXES}
        files += [os.path.join(folder, name) for name in found]
        # A folder that is called like an image is listed, as a bad image, and not entered.
        subfolders[:] = sorted(set(subfolders).intersection(shown) - found)
    for error in errors:
        raise ValueError(f"cannot list the folder {error.filename}: {error.strerror}")
    return folders, sorted(files)


def describe_content(folder: str) -> str:
    """What a folder holds, for a message."""
    names = sorted(os.listdir(folder))
    if len(names) > 5:
        names[5:] = ["..."]
    return f"it holds {', '.join(names)}" if names else "it is an empty folder"


def class_captions(names: str) -> str:
    """All wordings with all names of a class, "goldfish, Carassius auratus", a line each."""
    captions = []
    for name in map(str.strip, names.lower().split(",")):
        article = "an" if re.match("(?!eu|uni|one|uk)[aeiou]", name) else "a"
        captions += [f"{start} {article} {name}" for start in STARTS if name]
    return "\n".join(captions)


def folder_to_name(folder: str) -> str:
    """`sea_otter` -> `sea otter`; a comma would part two names."""
    return re.sub("[_,]", " ", os.path.basename(folder))


def class_names(data_dir: str, classes: list[str]) -> dict[str, str]:
    """The comma-separated names of class folders: from a list of CLASS_LISTS in data_dir, from the
    folders' own names, or from torchvision. Raises ValueError where none names one of them."""
    for path in (os.path.join(data_dir, name) for name in CLASS_LISTS):
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                names = dict(line.strip().split(None, 1) for line in file if len(line.split()) > 1)
            for name in sorted(set(classes) - names.keys()):
                line = f"add a line `{name} its name, another name`"
                raise ValueError(f"{path} has no name for the class folder {name}: {line}")
            return {name: names[name] for name in classes}
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return {name: folder_to_name(name) for name in classes}
    if len(classes) == 1000:  # ImageNet-1k: torchvision has its names, in the order of the ids
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        return dict(zip(classes, _IMAGENET_CATEGORIES, strict=True))
    hint = f"put a file {CLASS_LISTS[0]} with lines `{classes[0]} its name, another name`"
    raise ValueError(f"class folders such as {classes[0]} have no names: {hint} into {data_dir}")


def read_metadata(path: str) -> Iterator[tuple[str, str]]:
    """The (file_name, text) rows of a metadata file. Raises ValueError with the row's number."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            is_csv = path.endswith(".csv")
            rows = csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file))
            for row in rows:
                number += 1
                yield os.path.normpath(row["file_name"]), " ".join(row["text"].split())
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        rule = "each row needs `file_name` and `text`, both strings"
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}, near row {number}: {rule} ({reason})") from None


def pair_with_captions(root: str, paths: list[str], name: str, data_dir: str):
    """The images among `paths`, and the captions of each, a wording a line (two lists).

    Captions are those of metadata, else of the image's class, else "". The class is, for imagenet,
    the folder below root; for folder, the image's own folder, where there are several and no
    metadata. Raises ValueError where there is no image, where metadata names none of them, and
    where an image of an ImageNet has no class.
    """
    files = []
    captions = {}
    for path in paths:
        folder, file_name = os.path.split(path)
        if file_name not in METADATA:
            files.append(path)
            continue
        for described, text in read_metadata(os.path.join(root, path)):
            captions.setdefault(os.path.join(folder, described), []).append(text)
    if not files:
        looked = f"looked for {' '.join(sorted(SUFFIXES))}"
        raise ValueError(f"no images below {root} ({looked}); {describe_content(root)}")
    if captions and captions.keys().isdisjoint(files):
        found = f"names no image that is there (it names {min(captions)!r})"
        hint = "`file_name` is relative to the metadata's folder"
        raise ValueError(f"the metadata below {root} {found}: {hint}")
    names = {}
    if name == "imagenet":
        flat = [file for file in files if os.sep not in file]
        if flat:
            raise ValueError(f"{root} has images in no class folders, such as {flat[0]}: {LAYOUT}")
        folders = [file.split(os.sep, 1)[0] for file in files]
        names = class_names(data_dir, sorted(set(folders)))
    else:
        folders = [os.path.dirname(file) for file in files]
        if len(set(folders)) > 1 and not captions:
            names = {folder: folder_to_name(folder) for folder in folders}
    by_class = {folder: class_captions(name) for folder, name in names.items()}
    texts = []
    for file, folder in zip(files, folders, strict=True):
        own = "\n".join(captions.get(file, ()))
        texts.append(own or by_class.get(folder, ""))
    return files, texts


def read_folder(name: str, split: str, data_dir: str, cache_dir: str):
    """The images of a split of data_dir: their root, their paths below it, their captions.

    A folder without train/ and val/ keeps one image in twenty for the split 'test', always the same
    ones. Raises ValueError where the folder is not laid out as `name`, imagenet or folder, needs.
    """
    root = find_root(name, split, data_dir)
    files, captions = pair_with_captions(root, list_files(root, cache_dir), name, data_dir)
    if root == data_dir and len(files) > 1:
        order = sorted(range(len(files)), key=lambda i: zlib.crc32(os.fsencode(files[i])))
        test_size = max(1, len(files) // 20)
        chosen = sorted(order[:test_size] if split == "test" else order[test_size:])
        files = [files[i] for i in chosen]
        captions = [captions[i] for i in chosen]
    return root, files, captions


def find_root(name: str, split: str, data_dir: str) -> str:
    """The folder of a split: train/ or val/ in data_dir, else data_dir itself."""
    if not os.path.isdir(data_dir):
        what = "a file, not a folder" if os.path.exists(data_dir) else "no such folder"
        raise ValueError(f"--dataset {name} needs --data_dir, a folder: {data_dir!r} is {what}")
    train, val = (os.path.join(data_dir, part) for part in ("train", "val"))
    if name == "folder" and not (os.path.isdir(train) and os.path.isdir(val)):
        return data_dir
    root = val if split == "test" else train
    if not os.path.isdir(root):
        lacks = f"--data_dir {data_dir} has no {os.path.basename(root)}/ in it"
        raise ValueError(f"{lacks}: {LAYOUT}; {describe_content(data_dir)}")
    return root
