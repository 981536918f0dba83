"""Data: the embedded `shapes` world, image folders, words, the loader, and a cache of the encoder's features.

`shapes` is a world with exact ground truth, so that the claims of Reconstruction Alignment (arXiv 2509.07295) can be checked exactly and with no download.
A scene is a few colored shapes on a 3 x 3 grid. What makes it a model of the paper's problem is what its captions leave out:

  * The *generator's* captions are sparse, as web captions are: they name objects and counts, a color in one mention of twenty, a relation in three captions
    of ten. And its images are biased: each shape has a usual color. That is the paper's broccoli, always green, whose color nobody mentions.
  * The *understanding* side sees full descriptions of unbiased scenes, as CLIP and instruction-tuned language models have seen far richer language.
  * RecA's images are unbiased scenes, with no caption at all.

Every data set here answers one question, `__getitems__([(epoch, index), ...])`, with one dictionary:

    image     (B, 3, H, W) float in [0, 1]
    caption   (B, T) long   <bos> words <eos> <pad> ...   what the generator reads (sparse)
    full      (B, T) long   a full description            what the understanding side reads
    wording   (B, T) long   the same in another wording   what the model is taught to say of an image; shapes: the canonical one
    canonical (B, T) long   the same in a fixed wording and order: what the visual words learn to say; ANY where they are free to say more
    question, answer (B, T)  words to words: a full description and its wording; shapes: or a description, an instruction, and what it makes
    features  (B, tokens, D_enc) float16   what the encoder says of `image`, where that was computed before (`cache_features`)

# B batch, T words, H W pixels. One cell of a scene is 0 when empty, else 1 + shape * len(COLORS) + color.
"""
import csv
import difflib
import errno
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import time
import warnings
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Words

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
ANY = -100  # in place of a word that is not asked for; torch's losses skip it

def split_words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]", text.lower())

class Vocabulary:
    """Words <-> ids. Text is words, not bytes: RecA's visual words are mixtures of word embeddings (see model.py)."""

    def __init__(self, words: list[str]):
        assert words[:4] == SPECIALS, f"the first words must be {SPECIALS}, got {words[:4]}"
        self.words, self.ids = list(words), {w: i for i, w in enumerate(words)}

    @classmethod
    def from_captions(cls, captions) -> "Vocabulary":
        """All words of the captions, the most frequent first."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        return cls(SPECIALS + sorted(counts, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int, strict: bool = False) -> list[int]:
        """`<bos> words <eos> <pad> ...`, `length` ids. What the model cannot read is <unk> or cut off, as a training caption may;
        strict, for a prompt: raises ValueError with the nearest known words, or with the number of words that fit."""
        words = split_words(text)
        for word in words if strict else ():
            if word not in self.ids:
                near = difflib.get_close_matches(word, self.words[4:], 3, 0.5) or self.words[4:10]
                raise ValueError(f"the prompt {text!r} holds the unknown word {word!r}; known words near it: {', '.join(near)}")
        if strict and len(words) > length - 1:
            raise ValueError(f"the prompt {text!r} has {len(words)} words, and this model reads at most {length - 1}: shorten it")
        ids = [BOS] + [self.ids.get(w, UNK) for w in words][: length - 1] + [EOS]
        return (ids + [PAD] * length)[:length]

    def decode(self, ids) -> str:
        """The words before <eos>, without <bos> and <pad>."""
        ids = itertools.takewhile(lambda i: i != EOS, ids)
        return " ".join(self.words[i] for i in ids if i not in (PAD, BOS))

# ----------------------------------------------------------------------------------------------------------------------
# The shapes world: scenes

GRID = 3
SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross"]
PLURALS = ["circles", "squares", "triangles", "stars", "diamonds", "crosses"]
COLORS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "white"]
RGB = [(225, 40, 40), (250, 140, 20), (245, 220, 50), (50, 170, 60), (60, 205, 215), (45, 85, 220), (145, 60, 190), (245, 245, 245)]
USUAL_COLOR = [0, 5, 3, 2, 6, 1]  # by shape: red circles, blue squares, green triangles, yellow stars, ...
BACKGROUNDS = [(46, 46, 46), (107, 107, 107)]
NUMBERS = ["one", "two", "three", "four"]
WORDS = ["a", "an", "the", "and", "make", "add", "remove", "move", "left", "right", "above", "below", "directly", "of", "top", "middle", "bottom", "center"] + NUMBERS + COLORS + SHAPES + PLURALS
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]  # by cell

FACING = [(3, 5), (1, 7)]  # cells of a pair: across the middle row, or the middle column; two others are spread

KINDS = {"single": 0.25, "group": 0.25, "pair": 0.25, "spread": 0.15, "several": 0.1}  # share of scenes of each kind
USUAL = 0.7           # share of objects with their shape's usual color, in biased scenes
SPARSE = (0.05, 0.3, 0.05)  # a sparse caption names a color in 1 mention of 20, a pair's relation in 3 of 10, places in 1 of 20
EDITED = 0.4          # share of instructions among what the language side learns: a description and "make the star red" -> another description
EDITS = ["recolor", "replace", "move", "add", "remove"]
TEXT_LEN = 18         # <bos> and 17 words: three objects with colors and places, or two and an instruction

@dataclass(frozen=True)
class Thing:
    """One object of a scene. `cell` counts the grid's cells row by row."""
    shape: int
    color: int
    cell: int

@dataclass(frozen=True)
class Scene:
    """kind: one of KINDS; what is to be said of the arrangement depends on it."""
    kind: str
    things: tuple[Thing, ...]
    background: int

def relation(a: int, b: int) -> str | None:
    """How cell a stands to cell b: 'left', 'right', 'above' or 'below'; None where neither axis prevails."""
    dy, dx = a // GRID - b // GRID, a % GRID - b % GRID
    if abs(dx) == abs(dy):
        return None
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else "above" if dy < 0 else "below"

def random_scene(rng: random.Random, biased: bool, kind: str | None = None) -> Scene:
    """A scene; its objects differ in shape, except in a group, which is alike. A pair stands face to face, all else anywhere."""
    kind = kind or rng.choices(list(KINDS), KINDS.values())[0]
    count = {"single": 1, "group": rng.randint(2, 4), "pair": 2, "spread": 2, "several": 3}[kind]
    shapes = rng.sample(range(len(SHAPES)), 1 if kind == "group" else count)
    colors = [USUAL_COLOR[s] if biased and rng.random() < USUAL else rng.randrange(len(COLORS)) for s in shapes]
    if kind == "group":
        shapes, colors = shapes * count, colors * count
    cells = rng.sample(rng.choice(FACING), 2) if kind == "pair" else spread(rng, count)
    return Scene(kind, tuple(map(Thing, shapes, colors, cells)), rng.randrange(len(BACKGROUNDS)))

def facing(cells) -> bool:
    return tuple(sorted(cells)) in FACING

def spread(rng: random.Random, count: int) -> list[int]:
    """So many cells at random, but not the two of a pair: how a scene is described can be seen."""
    while facing(chosen := rng.sample(range(GRID * GRID), count)):
        pass
    return chosen

def random_edit(rng: random.Random, kind: str) -> tuple[Scene, str, Scene]:
    """A scene of one or two objects, an instruction of a kind of EDITS, and the scene that it makes; nothing else changes."""
    while True:
        scene = random_scene(rng, False, "spread" if kind == "remove" else rng.choice(["single", "spread"]))
        *rest, old = scene.things
        shape = rng.choice([s for s in range(len(SHAPES)) if s not in (thing.shape for thing in scene.things)])
        color = rng.choice([c for c in range(len(COLORS)) if c != old.color])
        cell = rng.choice([c for c in range(GRID * GRID) if c not in (thing.cell for thing in scene.things)])
        new = {"recolor": Thing(old.shape, color, old.cell), "replace": Thing(shape, old.color, old.cell),
               "move": Thing(old.shape, old.color, cell), "add": Thing(shape, color, cell), "remove": None}[kind]
        things = [*rest, *([old] if kind == "add" else []), *([new] if new else [])]
        if not facing(thing.cell for thing in things):
            break
    name = f"the {SHAPES[old.shape]}"
    said = {"recolor": f"make {name} {COLORS[color]}", "replace": f"make {name} a {SHAPES[shape]}", "move": f"move {name} {PLACES[cell]}",
            "add": "add " + describe(Scene("single", (new,), 0)) if new else "", "remove": f"remove {name}"}[kind]
    return scene, said, Scene({1: "single", 2: "spread", 3: "several"}[len(things)], tuple(things), scene.background)

# ----------------------------------------------------------------------------------------------------------------------
# The shapes world: captions, and back

def describe(scene: Scene, rng: random.Random | None = None, color: float = 1, relations: float = 1, places: float = 1) -> str:
    """A caption in a random wording; the numbers are the chances that a color, a pair's relation and other objects' places are named.

    With no rng: the canonical description, in a fixed order and with all of these.
    """
    chance = lambda p: p > 0 and (rng is None or rng.random() < p)
    placed = scene.kind in ("single", "spread", "several") and chance(places)

    def phrase(thing: Thing, count: int = 1) -> str:
        name = (COLORS[thing.color] + " " if chance(color) else "") + (PLURALS if count > 1 else SHAPES)[thing.shape]
        if count > 1:
            return f"{NUMBERS[count - 1]} {name}"
        article = "one" if rng and rng.random() < 0.25 else "an" if name.startswith("orange") else "a"
        return f"{article} {name}" + (f" {PLACES[thing.cell]}" if placed else "")

    if scene.kind == "group":
        return phrase(scene.things[0], len(scene.things))
    things = sorted(scene.things, key=lambda thing: (thing.color, thing.shape)) if rng is None else rng.sample(scene.things, len(scene.things))
    link = "and"
    if scene.kind == "pair" and chance(relations):  # either may be the subject
        link = relation(things[0].cell, things[1].cell)
        link = f"{link} of" if link in ("left", "right") else f"directly {link}" if rng and rng.random() < 0.5 else link
    return f" {link} ".join(map(phrase, things))

@dataclass(frozen=True)
class Claim:
    """What a caption or prompt says: phrases (count, color or None, shape, cell or None), relations (i, name, j) between them."""
    phrases: tuple[tuple[int, int | None, int, int | None], ...]
    relations: tuple[tuple[int, str, int], ...]

PHRASE = re.compile(f"(an?|{'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES + PLURALS)})(?: ({'|'.join(PLACES)}))?")
LINK = re.compile(" (and|(?:left|right) of|(?:directly )?(?:above|below)) ")

def parse(text: str) -> Claim | None:
    """The claim that a caption makes, in any wording of `describe`; None where it is not a sentence of this world."""
    parts = LINK.split(" ".join(text.split()))  # phrase, link, phrase, ...
    phrases = []
    for match in map(PHRASE.fullmatch, parts[::2]):
        number, color, name, place = match.groups() if match else [None] * 4
        count = NUMBERS.index(number) + 1 if number in NUMBERS else 1
        names = SHAPES if count == 1 else PLURALS
        if name not in names:
            return None
        phrases.append((count, COLORS.index(color) if color else None, names.index(name), PLACES.index(place) if place else None))
    links = [link.removeprefix("directly ").removesuffix(" of") for link in parts[1::2]]
    return Claim(tuple(phrases), tuple((i, link, i + 1) for i, link in enumerate(links) if link != "and"))

def holds(claim: Claim, grid) -> bool:
    """Whether a scene holds exactly what the claim says: these objects, no other, in these colors and relations.

    grid: the GRID * GRID cells as ints (0 empty); a negative cell is an object that could not be read: no claim holds.
    """
    things = [Thing((c - 1) // len(COLORS), (c - 1) % len(COLORS), i) for i, c in enumerate(grid) if c]
    if min(grid) < 0 or len(things) != sum(phrase[0] for phrase in claim.phrases):
        return False
    found = []
    for count, color, shape, cell in claim.phrases:
        alike = [t for t in things if t.shape == shape and color in (None, t.color) and cell in (None, t.cell)]
        if len(alike) != count:
            return False
        found.append(alike[0].cell)
    return all(relation(found[i], found[j]) == name for i, name, j in claim.relations)

def is_full(claim: Claim) -> bool:
    """Whether a claim names every color, and where objects differ either a relation for each pair or every place."""
    phrases = claim.phrases
    placed = all(phrase[3] is not None for phrase in phrases)
    return all(phrase[1] is not None for phrase in phrases) and (placed or len(claim.relations) >= len(phrases) // 2)

# ----------------------------------------------------------------------------------------------------------------------
# The shapes world: pixels

def covers(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which points of [-1, 1]^2 (y downwards) each shape covers, in the order of SHAPES: x, y (H, W) -> (shapes, H, W)."""
    ray = ((torch.atan2(x, -y) / (2 * math.pi) * 5) % 1 - 0.5).abs() * 2  # a star has five: 1 at a tip, 0 at a notch
    tip, notch, angle = 0.95, 0.40, (1 - ray) * math.pi / 5               # two radii, and the angle off the tip; the edge is a straight line
    edge = tip * notch * math.sin(math.pi / 5) / (notch * torch.sin(math.pi / 5 - angle) + tip * torch.sin(angle))
    return torch.stack([
        x * x + y * y < 0.90 ** 2,
        (x.abs() < 0.76) & (y.abs() < 0.76),
        (y < 0.75) & (y > -0.85 + 1.72 * x.abs()),
        x * x + y * y < edge ** 2,
        x.abs() / 0.72 + y.abs() / 0.95 < 1,
        ((x.abs() < 0.27) | (y.abs() < 0.27)) & (x.abs() < 0.88) & (y.abs() < 0.88)])

def sprites(cell: int) -> torch.Tensor:
    """Every content of a cell: (len(BACKGROUNDS), 1 + shapes * colors, 3, cell, cell) in [0, 1], anti-aliased 8 x 8."""
    fine = (torch.arange(cell * 8) + 0.5) / (cell * 4) - 1
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    cover = torch.cat([torch.zeros_like(x)[None], covers(x, y).repeat_interleave(len(COLORS), 0)])  # (1 + shapes * colors, 8 cell, 8 cell)
    cover = rearrange(cover, "n (h a) (w b) -> n 1 h w (a b)", a=8, b=8).mean(-1)
    ink = torch.tensor([(0, 0, 0)] + RGB * len(SHAPES))[:, :, None, None] / 255
    paper = torch.tensor(BACKGROUNDS)[:, None, :, None, None] / 255
    return cover * ink + (1 - cover) * paper

def to_grid(scene: Scene) -> list[int]:
    """The scene as GRID * GRID cells."""
    grid = [0] * GRID * GRID
    for thing in scene.things:
        grid[thing.cell] = 1 + thing.shape * len(COLORS) + thing.color
    return grid

def render(grids: torch.Tensor, backgrounds: torch.Tensor, atlas: torch.Tensor) -> torch.Tensor:
    """Cells (B, GRID * GRID) and backgrounds (B,) -> images (B, 3, GRID * cell, GRID * cell) in [0, 1]."""
    cells = atlas[backgrounds[:, None], grids]                                   # (B, 9, 3, cell, cell)
    return rearrange(cells, "b (r c) k h w -> b k (r h) (c w)", r=GRID)

class Shapes(Dataset):
    """Scenes made on the fly: scene `index` of a split is the same in every epoch, its wording changes with the epoch.

    split: 'pretrain' (biased), 'understand', 'reca' or 'test' (unbiased); the four never share a random stream.
    """
    SPLITS = {"pretrain": 40_000, "understand": 40_000, "reca": 40_000, "test": 2_000}

    def __init__(self, split: str, image_size: int = 48, seed: int = 0):
        assert image_size % GRID == 0, f"{image_size=} must be a multiple of {GRID}: one cell is a third of it"
        self.split, self.seed, self.size = split, seed, self.SPLITS[split]
        self.atlas = sprites(image_size // GRID)
        self.vocabulary = Vocabulary(SPECIALS + WORDS)
        self.text_len = TEXT_LEN

    def __len__(self) -> int:
        return self.size

    def identity(self):
        """What the images depend on, piece by piece (bytes)."""
        yield repr((self.split, self.seed, self.size, self.atlas.shape)).encode()

    def scene(self, index: int) -> Scene:
        return random_scene(random.Random(f"{self.seed} {self.split} {index}"), biased=self.split == "pretrain")

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        scenes = [self.scene(index) for _, index in keys]
        rngs = [random.Random(f"{self.seed} {self.split} {key}") for key in keys]
        texts = {"caption": [describe(s, r, *SPARSE) for s, r in zip(scenes, rngs)], "canonical": [describe(s) for s in scenes],
                 "full": [describe(s, r) if r.random() < 0.5 else describe(s) for s, r in zip(scenes, rngs)]}
        texts["wording"] = texts["canonical"]
        for i, r in enumerate(rngs):
            question, answer = texts["full"][i], texts["canonical"][i]
            if r.random() < EDITED:
                before, instruction, after = random_edit(r, r.choice(EDITS))
                question, answer = f"{describe(before)} {instruction}", describe(after)
            texts.setdefault("question", []).append(question)
            texts.setdefault("answer", []).append(answer)
        texts = {name: torch.tensor([self.vocabulary.encode(text, self.text_len) for text in lines]) for name, lines in texts.items()}
        grid = torch.tensor([to_grid(s) for s in scenes])
        background = torch.tensor([s.background for s in scenes])
        return {"image": render(grid, background, self.atlas), "grid": grid, **texts}

# ----------------------------------------------------------------------------------------------------------------------
# Image folders

DATASETS = ("shapes", "imagenet", "folder", "cifar10")
LAYOUT = "ImageNet is laid out as train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # told apart by content, whatever the suffix says
METADATA = ("metadata.jsonl", "metadata.csv")                   # the hub's captioned folder: `file_name` and `text`
CLASS_LISTS = ("classes.tsv", "LOC_synset_mapping.txt", "words.txt")  # lines `wnid name, other name`, beside train/
WORDINGS = ["a photo of {}", "a picture of {}", "an image of {}", "a photograph of {}", "this is {}", "here you see {}"]
SETTLED = 2.0  # s; a folder changed later than this may change again within one tick of its clock
warnings.filterwarnings("ignore", module="PIL")  # what Pillow cannot read is named in bad_images.txt, once

class Strings:
    """A read-only list of strings in one block of memory, which workers share; a million str objects would be copied by each."""

    def __init__(self, strings):
        parts = [s.encode("utf-8", "surrogatepass") for s in strings]
        self.block, self.ends = b"".join(parts), array("q", itertools.accumulate(map(len, parts), initial=0))

    def __getitem__(self, i: int) -> str:
        return self.block[self.ends[i]: self.ends[i + 1]].decode("utf-8", "surrogatepass")

def cache_folder(cache_dir: str) -> str:
    return cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "reca")

def stamp(path: str) -> list[int]:
    """What moves when a file is written, and when a file of a folder is added, removed or renamed."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]

def list_files(root: str, cache_dir: str = "") -> list[str]:
    """Relative paths of all images and metadata files below root, sorted; dot files are left out, links followed.

    A second call reads them from an index in cache_dir (default: ~/.cache/reca), while no folder's stamp has moved.
    Raises ValueError where a folder cannot be listed.
    """
    root, cache_dir = os.path.abspath(root), cache_folder(cache_dir)
    index = os.path.join(cache_dir, f"index_{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json.gz")
    try:
        with gzip.open(index, "rt") as file:  # gzip brings a checksum
            known = json.load(file)
        if all(stamp(os.path.join(root, folder)) == was for folder, was in known["folders"].items()):
            return known["files"]
    except (OSError, EOFError, ValueError, zlib.error):
        pass  # no index yet, a damaged one, or a folder that has gone

    def refuse(error: OSError):
        raise ValueError(f"cannot list the folder {error.filename}: {error.strerror}")

    began, folders, files, seen = time.time(), {}, [], set()
    for path, below, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:
            below.clear()  # a link back: each folder once
            continue
        seen.add(real)
        folder = "" if path == root else os.path.relpath(path, root)
        folders[folder] = stamp(path)
        shown = [name for name in names + below if not name.startswith(".")]
        found = {name for name in shown if os.path.splitext(name)[1].lower() in SUFFIXES or name in METADATA}
        files += [os.path.join(folder, name) for name in found]
        below[:] = sorted(set(below).intersection(shown) - found)
    files.sort()
    if max(map(max, folders.values())) < (began - SETTLED) * 1e9:
        try:
            os.makedirs(cache_dir, exist_ok=True)
            with gzip.open(f"{index}.{os.getpid()}", "wt", 1) as file:
                file.write(json.dumps({"folders": folders, "files": files}))
            os.replace(f"{index}.{os.getpid()}", index)
        except OSError:
            pass  # no place for an index: the next start walks again
    return files

def fit(image: Image.Image, size: int) -> Image.Image:
    """Any Pillow image as size x size RGB: upright, alpha over white, the shorter side resized, the centre kept."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits: convert("L") would clip at 255
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    sharp = Image.Resampling.HAMMING if side > size else Image.Resampling.BICUBIC  # as good when shrinking, and faster
    return image.convert("RGB").resize((size, size), sharp, (left, top, left + side, top + side))

def decode(path: str, size: int) -> Image.Image:
    """An image file as `fit` makes it; of an animation the first frame. Raises whatever Pillow finds wrong with it."""
    if not os.path.isfile(path):
        raise OSError("not a file")  # a pipe would be waited for
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # 89 million; Pillow itself refuses twice as many
            raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
        image.draft(None, (size, size))  # a JPEG comes out of its DCT at 1/2, 1/4 or 1/8 where that is large enough
        return fit(image, size)

def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """RGB images of one size -> (B, 3, S, S) float in [0, 1]."""
    batch = torch.empty(len(images), 3, images[0].height, images[0].width)       # (B, 3, S, S)
    if get_worker_info():
        batch.share_memory_()  # written where the main process reads it: no copy on the way
    for i, image in enumerate(images):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        batch[i] = rearrange(pixels, "(h w c) -> c h w", h=image.height, c=3)
    return batch.div_(255)

def read_images(paths: list[str], size: int) -> torch.Tensor:
    """Picture files -> (B, 3, size, size) in [0, 1]. Raises ValueError that names the one that cannot be read."""
    pictures = []
    for path in paths:
        try:
            pictures.append(decode(path, size))
        except Exception as error:  # Pillow raises nearly anything
            raise ValueError(f"cannot read the image {path}: {error}") from None
    return to_tensor(pictures)

def image_grid(rows, row_captions=(), column_captions=(), scale: int | None = None, note: str = "") -> Image.Image:
    """Rows of images with their captions -> one PIL image. A row is a tensor (C, 3, H, W) in [0, 1], or a list of them, groups set apart:
    [base, sft, reca]; none is longer than the first. A row's caption stands above it, a column's above its group. Images are magnified without
    blur by the whole number `scale`, by default to about 96 pixels. A note stands below all."""
    rows = [row if isinstance(row, list) else [row] for row in rows]
    scale = scale or max(1, round(96 / rows[0][0].shape[-1]))
    gap, margin, line, font = 4, 16, 22 if row_captions else 0, ImageFont.load_default(size=15)
    large = lambda group: F.pad(F.interpolate(group.float().cpu().clamp(0, 1), scale_factor=scale), (0, gap, 0, gap), value=1)
    from torchvision.transforms.functional import to_pil_image  # here, since it takes a second to import
    rows = [[to_pil_image(rearrange(large(group), "n c h w -> c h (n w)")) for group in row] for row in rows]
    lefts = [margin + sum(group.width - gap + margin for group in rows[0][:g]) for g in range(len(rows[0]) + 1)]
    tops = [margin // 2 + 22 * bool(column_captions) + i * (rows[0][0].height + line) for i in range(len(rows) + 1)]
    texts = [*zip(row_captions, itertools.repeat(margin), tops), *zip(column_captions, lefts, itertools.repeat(margin // 2)), (note, margin, tops[-1])]
    right = max([lefts[-1]] + [int(left + font.getlength(text)) + margin for text, left, _ in texts])
    canvas = Image.new("RGB", (right, tops[-1] + (26 if note else margin // 2)), "white")
    for text, left, top in texts:
        ImageDraw.Draw(canvas).text((left, top), text, fill="black", font=font)
    for row, top in zip(rows, tops):
        for group, left in zip(row, lefts):
            canvas.paste(group, (left, top + line))
    return canvas

class Photos(Dataset):
    """Photographs with captions. Image i is root/files[i]; the lines of captions[i] are its wordings, the plain one first.

    An image that cannot be read is skipped: the next one that can stands in, whatever the number of workers, and the batch names it in `bad`, a list of
    (path, reason). Flips (in training) and wordings change with the epoch. Raises ValueError where no image can be read.
    """

    def __init__(self, root: str, files: list[str], captions: list[str], split: str, image_size: int, seed: int,
                 vocabulary: Vocabulary | None = None, text_len: int = 32):
        self.root, self.split, self.image_size, self.seed, self.text_len = root, split, image_size, seed, text_len
        numbers: dict[str, int] = {}  # images of a class share their captions
        self.kinds = array("q", [numbers.setdefault(lines, len(numbers)) for lines in captions])
        self.files, self.texts = Strings(files), Strings(numbers)
        self.vocabulary = vocabulary or Vocabulary.from_captions(numbers)
        self.flip = split != "test"
        self.bad: dict[int, str] = {}
        self.picture(0, [])  # that no image can be read is said here, before any long work

    def __len__(self) -> int:
        return len(self.kinds)

    def identity(self):
        """What the images depend on, piece by piece (bytes)."""
        yield repr((self.image_size, len(self))).encode()
        for name in self.files:
            path = os.path.join(self.root, name)
            yield repr((name, os.path.exists(path) and stamp(path))).encode()  # a broken link is a bad image

    def read(self, index: int) -> Image.Image:
        return decode(os.path.join(self.root, self.files[index]), self.image_size)

    def picture(self, index: int, skipped: list[int]) -> tuple[int, Image.Image]:
        """The first image from `index` on that can be read, and its index; the others are added to `skipped`."""
        for index in itertools.chain(range(index, len(self)), range(index)):
            try:
                if index not in self.bad:
                    return index, self.read(index)
            except Exception as error:  # Pillow's plugins raise nearly anything for a damaged file
                if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                    raise  # no memory, too many open files: no fault of the image
                self.bad[index] = " ".join(f"{type(error).__name__}: {error}".split())
            skipped.append(index)
        raise ValueError(f"none of the {len(self)} images below {self.root} can be read; the last one: {self.bad[index]}")

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        skipped, images, said = [], [], {"caption": [], "canonical": [], "full": [], "wording": []}
        for key in keys:
            index, image = self.picture(key[1], skipped)
            rng = random.Random(f"{self.seed} {self.split} {key}")
            flip = self.flip and rng.random() < 0.5
            images.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)
            lines = self.texts[self.kinds[index]].split("\n")
            for name, text in zip(said, lines[:1] * 2 + (rng.sample(lines, 2) if len(lines) > 1 else lines * 2)):
                said[name].append(self.vocabulary.encode(text, self.text_len))
        said = {name: torch.tensor(ids) for name, ids in said.items()}
        said["canonical"].masked_fill_(said["canonical"] == PAD, ANY)            # a class's name says little of a photograph
        bad = [(os.path.join(self.root, self.files[i]), self.bad[i]) for i in dict.fromkeys(skipped)]
        return {"image": to_tensor(images), **said, "question": said["full"], "answer": said["wording"], "bad": bad}

class Cifar(Photos):
    """CIFAR-10's images, one array (N, 32, 32, 3) of bytes; downloaded to data_dir where they are not there."""

    def __init__(self, data_dir: str, split: str, *how):
        from torchvision.datasets import CIFAR10
        try:
            cifar = CIFAR10(data_dir, split != "test", download=True)
        except Exception as error:
            raise ValueError(f"CIFAR-10 is not in {data_dir} and cannot be downloaded ({error}): put cifar-10-python.tar.gz there") from None
        self.arrays, captions = cifar.data, [class_captions(name) for name in cifar.classes]
        super().__init__("CIFAR-10", [str(i) for i in range(len(cifar.data))], [captions[i] for i in cifar.targets], split, *how)

    def identity(self):
        yield repr(self.image_size).encode()
        yield self.arrays.tobytes()

    def read(self, index: int) -> Image.Image:
        return fit(Image.fromarray(self.arrays[index]), self.image_size)

def class_captions(names: str) -> str:
    """All wordings with all names of a class, "goldfish, Carassius auratus", a line each; the first is "a photo of a goldfish"."""
    names = [name.strip().lower() for name in names.split(",") if name.strip()]
    articled = [("an " if re.match("(?!eu|uni|one|uk)[aeiou]", name) else "a ") + name for name in names]
    return "\n".join(wording.format(name) for name in articled for wording in WORDINGS)

def class_names(data_dir: str, classes: list[str]) -> dict[str, str]:
    """The comma-separated names of class folders: from a list in data_dir, from torchvision, or the folders' own. Raises ValueError where they are
    WordNet ids and nothing says what they mean."""
    for path in (os.path.join(data_dir, name) for name in CLASS_LISTS):
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                names = dict(line.strip().split(None, 1) for line in file if len(line.split()) > 1)
            if lacking := sorted(set(classes) - set(names)):
                raise ValueError(f"{path} has no name for the class folder {lacking[0]}: add a line `{lacking[0]} its name, another name`")
            return {name: names[name] for name in classes}
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return {name: re.sub("[_,]", " ", name) for name in classes}
    if len(classes) == 1000:  # the whole of ImageNet-1k: torchvision knows its names, in the order of the ids
        from torchvision.models._meta import _IMAGENET_CATEGORIES
        return dict(zip(classes, _IMAGENET_CATEGORIES))
    raise ValueError(f"nothing says what class folders such as {classes[0]} mean: "
                     f"put a file {CLASS_LISTS[0]} with lines `{classes[0]} its name, another name` into {data_dir}")

def read_metadata(path: str):
    """The (file_name, text) rows of a metadata.jsonl or metadata.csv. Raises ValueError with the row's number."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file) if path.endswith(".csv") else map(json.loads, filter(str.strip, file)), 1):
                yield os.path.normpath(row["file_name"]), " ".join(row["text"].split())
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path}, near row {number}: each row needs `file_name` and `text`, both strings ({type(error).__name__}: {error})") from None

def captioned(root: str, paths: list[str], name: str, data_dir: str) -> tuple[list[str], list[str]]:
    """The images among paths, and the captions of each, a wording a line: of metadata, else of its class, else "".

    imagenet: the class is the folder below root. folder: the image's own folder, where there are several and no metadata.
    Raises ValueError where there is no image, where metadata names none of them, or an ImageNet's image has no class.
    """
    captions: dict[str, list[str]] = {}
    for path in paths:
        if os.path.basename(path) in METADATA:
            for file_name, text in read_metadata(os.path.join(root, path)):
                captions.setdefault(os.path.join(os.path.dirname(path), file_name), []).append(text)
    files = [path for path in paths if os.path.basename(path) not in METADATA]
    if not files:
        raise ValueError(f"no images below {root} (looked for {' '.join(sorted(SUFFIXES))}); {_content(root)}")
    if captions and captions.keys().isdisjoint(files):
        raise ValueError(f"the metadata below {root} names no image that is there, neither {min(captions)!r}: `file_name` is relative to the metadata's folder")
    folders, names = [os.path.dirname(path) for path in files], {}
    if name == "imagenet":
        if "" in folders:
            raise ValueError(f"{root} has images in no class folders, such as {files[folders.index('')]}: {LAYOUT}")
        folders = [folder.split(os.sep)[0] for folder in folders]
        names = class_names(data_dir, sorted(set(folders)))
    elif len(set(folders)) > 1 and not captions:
        names = {folder: re.sub("[_,]", " ", os.path.basename(folder)) for folder in folders}
    of_class = {folder: class_captions(name) for folder, name in names.items()}
    return files, ["\n".join(captions.get(path, ())) or of_class.get(folder, "") for path, folder in zip(files, folders)]

def _content(folder: str) -> str:
    """What a folder holds, for a message."""
    names = sorted(os.listdir(folder))
    return f"it holds {', '.join(names[:5])}{' ...' * (len(names) > 5)}" if names else "it is an empty folder"

def make_dataset(name: str, split: str, data_dir: str = "", image_size: int = 48, seed: int = 0,
                 vocabulary: Vocabulary | None = None, text_len: int = 32, cache_dir: str = "") -> Dataset:
    """The data set `name`, one of DATASETS. split: 'pretrain', 'understand', 'reca' or 'test'.

    Photographs have no bias to remove: the first three splits are the training images, 'test' is val/. A folder without train/ and val/ keeps one image
    in twenty for 'test', always the same ones. vocabulary: that of a checkpoint, else all words of the training captions. cache_dir: see `list_files`.
    Raises ValueError with a sentence for the user where the images are not as they should be.
    """
    if name not in DATASETS:
        raise ValueError(f"--dataset {name}: no such data set, there are {', '.join(DATASETS)}")
    if name == "shapes":
        return Shapes(split, image_size, seed)
    if split == "test" and vocabulary is None:
        vocabulary = make_dataset(name, "pretrain", data_dir, image_size, seed, None, text_len, cache_dir).vocabulary
    how = split, image_size, seed, vocabulary, text_len
    if name == "cifar10":
        return Cifar(data_dir, *how)
    if not os.path.isdir(data_dir):
        what = "a file, not a folder" if os.path.exists(data_dir) else "no such folder"
        raise ValueError(f"--dataset {name} needs --data_dir, the folder of its images; {data_dir!r} is {what}")
    parted = name == "imagenet" or all(os.path.isdir(os.path.join(data_dir, part)) for part in ("train", "val"))
    root = os.path.join(data_dir, "val" if split == "test" else "train") if parted else data_dir
    if not os.path.isdir(root):
        raise ValueError(f"--data_dir {data_dir} has no {os.path.basename(root)}/ in it: {LAYOUT}; {_content(data_dir)}")
    files, captions = captioned(root, list_files(root, cache_dir), name, data_dir)
    if not parted and len(files) > 1:
        order = sorted(range(len(files)), key=lambda i: zlib.crc32(os.fsencode(files[i])))
        held = max(1, len(files) // 20)
        chosen = sorted(order[:held] if split == "test" else order[held:])
        files, captions = [files[i] for i in chosen], [captions[i] for i in chosen]
    return Photos(root, files, captions, *how)

# ----------------------------------------------------------------------------------------------------------------------
# The loader

def keys(size: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1):
    """Batches of (epoch, index) without end: one seeded permutation an epoch. `start` is the number of batches already used: a resumed run goes on with the
    very next one. Of several processes each gets its share of every batch: `rank` of `world`."""
    assert size >= 1, "the data set is empty"
    assert batch_size % world == 0, f"{batch_size=} cannot be shared by {world=} processes"
    epoch, share = -1, batch_size // world
    for first in itertools.count(start * batch_size, batch_size):
        batch = []
        for position in range(first, first + batch_size):
            if position // size != epoch:
                epoch = position // size
                order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
            batch.append((epoch, order[position % size]))
        yield batch[rank * share: (rank + 1) * share]

def make_loader(dataset: Dataset, batches_of_keys, workers: int) -> DataLoader:
    return DataLoader(dataset, batch_sampler=batches_of_keys, num_workers=workers, prefetch_factor=4 if workers else None, worker_init_fn=_let_the_main_process_save,
                      collate_fn=dict,  # `__getitems__` has made a whole batch
                      pin_memory=torch.cuda.is_available(),
                      generator=torch.Generator())  # its base seed must not move the global generator: a resumed run restores that

def _let_the_main_process_save(worker: int):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process saves first; workers end with it
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # a cluster sends this one to every process

def batches(dataset: Dataset, batch_size: int, seed: int, start: int = 0, workers: int = 0, bad_file: str = "", rank: int = 0, world: int = 1, images: int = 0):
    """Batches without end, from batch number `start` on, of the first `images` images (0: all). Those that were skipped are named in `bad_file`, once each."""
    named = set()
    for batch in make_loader(dataset, keys(min(images or len(dataset), len(dataset)), batch_size, seed, start, rank, world), workers):
        new = {path: reason for path, reason in batch.pop("bad", ()) if path not in named}
        if new and bad_file:
            named |= new.keys()
            with open(bad_file, "a+", encoding="utf-8", errors="surrogateescape") as file:
                file.seek(0)
                before = {line.split("\t")[0] for line in file}  # by an earlier run, or another stream of this one
                file.writelines(f"{path}\t{reason}\n" for path, reason in new.items() if path not in before)
        yield batch

# ----------------------------------------------------------------------------------------------------------------------
# Features of the frozen encoder, computed once

BLOCK = 128            # images that are encoded, and marked as done, at once
SAME_FEATURES = 0.2    # relative error up to which features are the same ones. CLIP: rounding to bfloat16 0.08, bicubic for bilinear 0.5

class Cached(Dataset):
    """A data set whose batches also hold `features`, from a file of (images, tokens, D_enc) float16 that `cache_features` wrote."""

    def __init__(self, dataset: Dataset, path: str, shape: tuple[int, int, int]):
        self.dataset, self.path, self.shape = dataset, path, shape

    def __len__(self) -> int:
        return len(self.dataset)

    def features(self, indices: list[int]) -> torch.Tensor:
        mapped = torch.from_file(self.path, True, math.prod(self.shape), dtype=torch.float16)  # anew each time: microseconds, and nothing to send to workers
        return mapped.view(self.shape)[indices]

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        return self.dataset.__getitems__(keys) | {"features": self.features([index for _, index in keys])}

def encoder_identity(encoder: torch.nn.Module, size: int, dtype: torch.dtype):
    """What features depend on besides the images, piece by piece (bytes): the encoder with every weight, the size that it sees, the precision."""
    yield repr((encoder.cfg, size, dtype)).encode()
    for name, x in encoder.state_dict().items():
        yield repr((name, x.dtype, x.shape)).encode()
        yield x.cpu().reshape(-1).view(torch.uint8).numpy()

def cache_features(dataset: Dataset, encode, identity, cache_dir: str = "", workers: int = 0, rank: int = 0, world: int = 1) -> Cached:
    """The data set with its features; those not in the cache yet are computed: encode(images (B, 3, H, W)) -> (B, tokens, D_enc).

    Images are not flipped any more: the file would be twice as large. Its name is a hash of all that features depend on, `identity` (pieces, bytes) being
    the encoder's part. A stopped computation goes on where it was: at the file's end is a byte for each block of images, set once the block is on the disk.
    Of several processes each computes its share. Raises ValueError with a sentence for the user.
    """
    dataset.flip = False
    few = list(range(min(8, BLOCK, len(dataset))))
    expected = encode(dataset.__getitems__([(0, i) for i in few])["image"]).cpu().half()
    shape = (len(dataset), *expected.shape[1:])                                  # (images, tokens, D_enc)
    key = hashlib.sha256(repr(shape).encode())
    for piece in itertools.chain(identity, dataset.identity()):
        key.update(hashlib.sha256(piece).digest())
    folder = cache_folder(cache_dir)
    os.makedirs(folder, exist_ok=True)
    cached = Cached(dataset, os.path.join(folder, f"features_{key.hexdigest()[:32]}"), shape)
    row, blocks = 2 * math.prod(shape[1:]), math.ceil(len(dataset) / BLOCK)      # bytes of an image, marks
    end = row * len(dataset)
    open(cached.path, "ab").close()  # made where it is not there
    with open(cached.path, "r+b") as file:
        file.truncate(end + blocks)
        done = os.pread(file.fileno(), blocks, end)
        need, free = row * BLOCK * done.count(0), shutil.disk_usage(folder).free
        if need > free:
            raise ValueError(f"--cache_features needs {need / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free: "
                             f"give --cache_dir another place, or leave --cache_features out")
        if done[0] and not (cached.features(few) - expected).float().norm() < SAME_FEATURES * expected.float().norm():
            raise ValueError(f"the features in {cached.path} are not those that this code computes: remove that file")
        todo = [block for block in range(rank, blocks, world) if not done[block]]
        images = ([(0, i) for i in range(block * BLOCK, min(block * BLOCK + BLOCK, len(dataset)))] for block in todo)
        bar = tqdm(make_loader(dataset, images, workers), "features", len(todo), unit="block", leave=False, disable=rank > 0 or not todo or None)
        for block, batch in zip(todo, bar):
            features = encode(batch["image"]).cpu().half()                       # (BLOCK, tokens, D_enc)
            if not features.isfinite().all():
                raise ValueError("--cache_features: features of this encoder are beyond float16's 65504: leave it out")
            file.seek(block * BLOCK * row)
            file.write(features.contiguous().numpy())
            file.flush()
            os.fsync(file.fileno())  # first the features, then their mark
            os.pwrite(file.fileno(), b"\1", end + block)
            os.fsync(file.fileno())
        while 0 in os.pread(file.fileno(), blocks, end):
            time.sleep(0.1)  # for the shares of the other processes
    return cached
