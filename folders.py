"""What an image folder holds: its files, its splits, and the caption of each image.

Captions are those of a table or of a text beside the image (captions.py), else of the image's
class, else "". The class is a WordNet id in the path; else, for imagenet, the first folder of the
split and, for folder, the image's own one, where there are several.
"""

import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product

from captions import (
    CLASS_LISTS,
    TEXTS,
    TRUTHS,
    WNID,
    class_captions,
    class_names,
    join,
    read_captions,
    read_truth,
)
from images import SUFFIXES

SETTLED = 2.0  # s; a folder changed later than this may change again within one tick of its clock
DEVKIT = os.path.join("ILSVRC2012_devkit_t12", "data")
MAX_DEPTH = 4  # folders above the splits, and above what holds the lists of an ImageNet
KINDS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
KINDS |= dict.fromkeys(["val", "valid", "validation", "dev", "eval"], "val")
# `train`, `test1`, `val2017`, `train.X1`, `training_set`
SPLIT_NAME = rf"({'|'.join(sorted(KINDS, reverse=True))})([\W_]?(\d+|x\d*|images?|imgs?|set|data))*"
NO_CLASS = ["", "images", "image", "imgs", "img", "jpegimages", "photos", "data"]
NOT_READ = {".parquet": "Parquet", ".tar": "tar", ".tgz": "tar", ".zip": "zip", ".arrow": "Arrow"}


def default_cache_dir(cache_dir: str) -> str:
    """`cache_dir`, or where that is empty `reca` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return cache_dir or os.path.join(user_cache, "reca")


def file_fingerprint(path: str) -> list[int]:
    """Changes when a file is written, and when a file of a folder is added, removed or renamed."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


# ---------------------------------------------------------------- the listing
def list_folders(root: str, cache_dir: str = "") -> dict[str, dict]:
    """{folder below root: {"images": [name, ...], "texts": [...], "others": {suffix: count}}}.

    Dot files are left out, links followed. A second call reads an index in cache_dir, as long as no
    folder's fingerprint has changed. ValueError where a folder cannot be listed.
    """
    root = os.path.abspath(root)
    root_hash = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    index = os.path.join(default_cache_dir(cache_dir), f"listing_{root_hash}.json.gz")
    # An absent or damaged index is made anew: gzip brings a checksum.
    with suppress(OSError, EOFError, ValueError, AttributeError, zlib.error):
        with gzip.open(index, "rt") as file:
            folders = json.load(file)
        old = {folder: entry["fingerprint"] for folder, entry in folders.items()}
        if old and all(file_fingerprint(os.path.join(root, path)) == old[path] for path in old):
            return folders
    began = time.time()
    folders = walk(root)
    if max(max(entry["fingerprint"]) for entry in folders.values()) < (began - SETTLED) * 1e9:
        # Replace the index in one step. Where that is not possible, the next start walks again.
        part = f"{index}.{os.getpid()}"
        with suppress(OSError):
            os.makedirs(os.path.dirname(index), exist_ok=True)
            with gzip.open(part, "wt", 1) as file:
                file.write(json.dumps(folders))
            os.replace(part, index)
    return folders


def walk(root: str) -> dict[str, dict]:
    """What `list_folders` returns, each with the folder's fingerprint, sorted."""
    folders = {}
    visited = set()
    errors = []
    for path, subfolders, names in os.walk(root, onerror=errors.append, followlinks=True):
        # Enter each folder once: a link may lead back.
        real_path = os.path.realpath(path)
        if real_path in visited:
            subfolders.clear()
            continue
        visited.add(real_path)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        # An empty folder that is called like an image is a bad image.
        names += [
            name for name in subfolders if is_image(name) and not os.listdir(join(path, name))
        ]
        images, texts, others = [], [], Counter()
        for name in sorted(name for name in names if not name.startswith(".")):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in SUFFIXES:
                images.append(name)
            elif suffix in TEXTS or name in CLASS_LISTS:
                texts.append(name)
            else:
                others[suffix] += 1
        folder = "" if path == root else os.path.relpath(path, root).replace(os.sep, "/")
        folders[folder] = {"fingerprint": file_fingerprint(path), "images": images}
        folders[folder] |= {"texts": texts, "others": others}
    for error in errors:
        raise ValueError(f"cannot list the folder {error.filename}: {error.strerror}")
    return dict(sorted(folders.items()))


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def describe_content(folder: str) -> str:
    """What a folder holds, for a message."""
    names = sorted(os.listdir(folder))
    if len(names) > 5:
        names[5:] = ["..."]
    return f"it holds {', '.join(names)}" if names else "it is an empty folder"


# ---------------------------------------------------------------- splits
def split_kind(name: str, before: str = "") -> str:
    """Of a folder called like a split: 'train', 'val' or 'test'; else ''. before: a pattern."""
    match = re.fullmatch(before + SPLIT_NAME, name.lower())
    return KINDS[match[1]] if match else ""


def find_splits(name: str, folders: list[str]) -> tuple[dict[str, str], int]:
    """{folder: 'train', 'val' or 'test'} of the folders with images, and the splits' depth.

    A folder belongs to the split that a part of its path names, the same part for all; `X_train`
    counts where all are called so. A 'train' without another split is one for imagenet, and where
    nothing stands beside it or folders are in it: else it is the class of trains. None: {}, -1.
    """
    parts = {folder: folder.split("/") for folder in folders}
    for before, depth in product(["", r".*[\W_]"], range(MAX_DEPTH)):
        kinds = {f: split_kind(p[depth], before) for f, p in parts.items() if len(p) > depth}
        splits = {folder: kind for folder, kind in kinds.items() if kind}
        found = set(splits.values())
        is_alone = len(splits) == len(folders)
        if before and not is_alone:
            continue
        if "train" in found and len(found) > 1:
            return splits, depth
        has_classes = any(len(parts[folder]) > depth + 1 for folder in splits)
        if found == {"train"} and (is_alone or has_classes or name == "imagenet"):
            return splits, depth
        if found and "train" not in found and is_alone:
            there = f"{', '.join(sorted({part[depth] for part in parts.values()}))} and no train/"
            raise ValueError(f"there is {there}: rename it, or give that folder as --data_dir")
    return {}, -1


def find_classes(name: str, folders: list[str], depth: int) -> dict[str, str]:
    """{folder: the class of its images}, "" for none. depth: of the splits, -1 without."""
    paths = {folder: folder.split("/") for folder in folders}
    if len({tuple(parts[: max(depth, 0)]) for parts in paths.values()}) == 1:
        paths = {folder: parts[depth + 1 :] for folder, parts in paths.items()}
    else:  # `cat/train`
        paths = {folder: parts[:depth] + parts[depth + 1 :] for folder, parts in paths.items()}
    for folder, parts in paths.items():
        paths[folder] = [part for part in parts if part.lower() not in NO_CLASS]
    # what all paths begin with is no class
    named = [parts for parts in paths.values() if parts]
    while min(map(len, named), default=0) > 1 and len({parts[0] for parts in named}) == 1:
        named = [parts for parts in named if parts.pop(0)]
    classes = {}
    for folder, parts in paths.items():
        wnids = [part for part in folder.split("/") if re.fullmatch(WNID, part)]
        own = parts[:1] if name == "imagenet" else parts[-1:]
        classes[folder] = (wnids or own or [""])[-1]
    is_one = len(set(classes.values())) == 1
    if is_one and name == "folder" and not re.fullmatch(WNID, *set(classes.values())):
        return dict.fromkeys(classes, "")  # tells nothing apart
    return classes


# ---------------------------------------------------------------- all of it
@dataclass
class Found:
    """The images of a folder: {"train": [path below root, ...], "test": [...]}, and of each its
    caption, a wording a line; what was assumed, and what the user should know."""

    root: str
    files: dict[str, list[str]]
    captions: dict[str, list[str]]
    classes: int
    facts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_lists(root: str, listing: dict, names: list[str]) -> list[str]:
    """The files of these names below root, and in the folders above it."""
    paths = []
    for name in names:
        paths += [join(root, folder, name) for folder, e in listing.items() if name in e["texts"]]
        above = root
        for _ in range(MAX_DEPTH):
            above = os.path.dirname(above)
            paths += [os.path.join(above, name), os.path.join(above, DEVKIT, name)]
    return [path for path in paths if os.path.isfile(path)]


def read_folder(name: str, data_dir: str, cache_dir: str = "", caption_column: str = "") -> Found:
    """The images of a folder by split, with their captions.

    Where no split is held out, every twentieth image is, always the same ones. Raises ValueError
    where there is no such folder, no image, a split none of whose images has a caption, and for a
    table of captions that cannot be used.
    """
    root = check_folder(name, data_dir)
    listing = list_folders(root, cache_dir)
    others = sum((Counter(entry["others"]) for entry in listing.values()), Counter())
    packed = [f"{n} {NOT_READ[s]} files" for s, n in others.items() if s in NOT_READ]
    unpack = f": {', '.join(packed)} are not read, unpack them into images and a metadata.csv"
    unpack = unpack if packed else ""
    filled = [folder for folder, entry in listing.items() if entry["images"]]
    if not filled:
        looked = f"looked for {' '.join(sorted(SUFFIXES))}"
        raise ValueError(f"no images below {root} ({looked}); {describe_content(root)}{unpack}")
    try:
        splits, depth = find_splits(name, filled)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from None
    own, used, unused = read_captions(root, listing, caption_column)
    if caption_column and not used:
        looked = f"; found are {', '.join(unused) or 'no tables'}"
        raise ValueError(f"--caption_column {caption_column}: no such column below {root}{looked}")

    # the class of each folder, or of images that stand in none, and its captions
    classes = find_classes(name, filled, depth)
    truth = {}
    if "" in classes.values():
        for path in find_lists(root, listing, TRUTHS):
            truth |= read_truth(path)
    used_classes = sorted({*classes.values(), *truth.values()} - {""})
    names, sources = class_names(used_classes, find_lists(root, listing, CLASS_LISTS))
    texts = {"": ""} | {name: class_captions(text) for name, text in names.items()}

    # the images and captions of each split
    held_out = "val" if "val" in splits.values() else "test"
    files, captions = {"train": [], "test": []}, {"train": [], "test": []}
    left_out = Counter()
    for folder in filled:
        images = listing[folder].pop("images")  # a million names: freed folder by folder
        kind = splits.get(folder, "" if splits else "train")
        if kind not in ("train", held_out):
            left_out[folder.split("/")[max(depth, 0)] or "."] += len(images)
            continue
        split = "train" if kind == "train" else "test"
        paths = [join(folder, image) for image in images]
        files[split] += paths
        if own or (truth and not classes[folder]):
            for path in paths:
                text = texts[classes[folder] or find_truth(truth, path)]
                captions[split].append("\n".join(own.get(path, ())) or text)
        else:
            captions[split] += [texts[classes[folder]]] * len(paths)

    # what was assumed
    facts = []
    for kind in ("train", held_out):
        parts = {folder.split("/")[depth] for folder, other in splits.items() if other == kind}
        facts += [f"{kind} images are those of {', '.join(sorted(parts))}"] if parts else []
    if not files["test"]:
        facts.append("no split to test on is there: one image in twenty is held out")
    if names:
        facts.append(f"names of {len(names)} classes from {', '.join(sources)}")
    facts += [f"captions from {text}" for text in used]
    found = Found(root, files, captions, len(names), facts)
    found.warnings += [f"{n} images of {part}/ are left out" for part, n in left_out.items()]
    found.warnings += [f"not used: {text}" for text in unused]
    if packed:
        found.warnings.append(unpack[2:])
    check_captions(found)
    if not files["test"]:
        hold_out(files, captions)
    return found


def find_truth(truth: dict, path: str) -> str:
    """The class of an image of ImageNet's flat val/, by its name or number; "" for others."""
    stem = os.path.splitext(path)[0].split("/")[-1]
    number = re.search(r"(?<=_val_)\d{8}$", stem)
    return truth.get(stem) or truth.get(int(number[0]) if number else "", "")


def check_captions(found: Found) -> None:
    """Warns of images without a caption; ValueError where a split has no caption at all."""
    for split, captions in found.captions.items():
        missing = captions.count("")
        if missing and missing == len(captions):
            where = f"no {split} image, such as {join(found.root, found.files[split][0])},"
            how = "write metadata.csv (file_name,text), a .txt beside each image, or class folders"
            seen = "".join(f"; {text}" for text in found.warnings)
            raise ValueError(f"{where} has a caption or a class: {how}{seen}")
        if missing:
            found.warnings.append(f"{missing} of {len(captions)} {split} images have no caption")


def hold_out(files: dict, captions: dict) -> None:
    """Moves one image in twenty from 'train' to 'test'; a single image is in both."""
    paths, texts = files["train"], captions["train"]
    order = sorted(range(len(paths)), key=lambda i: zlib.crc32(os.fsencode(paths[i])))
    test_size = max(1, len(paths) // 20)
    chosen = {"test": sorted(order[:test_size]), "train": sorted(order[test_size:]) or [0]}
    for split, numbers in chosen.items():
        files[split] = [paths[i] for i in numbers]
        captions[split] = [texts[i] for i in numbers]


def check_folder(name: str, data_dir: str) -> str:
    """The absolute path of data_dir. Raises ValueError where it is no folder."""
    root = os.path.abspath(os.path.expanduser(data_dir or "."))
    if os.path.isdir(root) and (data_dir or os.path.isdir("train")):
        return root
    what = "a file, not a folder: unpack it" if os.path.exists(root) else "no such folder"
    what = f"{data_dir!r} is {what}" if data_dir else "there is no ./train either"
    raise ValueError(f"--dataset {name} needs --data_dir, a folder: {what}")
