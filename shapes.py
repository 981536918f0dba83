"""`shapes`: a world of colored shapes on a 3 x 3 grid, with exact ground truth and no download.

Its captions give it the problem that Reconstruction Alignment (arXiv 2509.07295) solves:
  * The generator reads sparse captions, as on the web: objects and counts, a color in one mention
    of twenty, a relation in three captions of ten. And each shape has a usual color: the paper's
    broccoli is always green, and no caption says so.
  * The understanding side reads full descriptions of unbiased scenes; CLIP has read richer ones.
  * RecA's images are unbiased scenes, without captions.

# B batch, T words, H W pixels. A cell of a grid: 0 empty, else 1 + shape * len(COLORS) + color.
"""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import NamedTuple

import torch
from einops import rearrange
from torch.utils.data import Dataset

from words import SPECIALS, Vocabulary, split_words

GRID = 3
SHAPES = split_words("circle square triangle star diamond cross")
PLURALS = split_words("circles squares triangles stars diamonds crosses")
COLORS = split_words("red orange yellow green cyan blue purple white")
HEX = ["e12828", "fa8c14", "f5dc32", "32aa3c", "3ccdd7", "2d55dc", "913cbe", "f5f5f5"]  # by color
RGB = [tuple(bytes.fromhex(code)) for code in HEX]
USUAL_COLOR = [0, 5, 3, 2, 6, 1]  # by shape: red circles, blue squares, green triangles, ...
BACKGROUNDS = [(46, 46, 46), (107, 107, 107)]
NUMBERS = split_words("one two three four")
ROWS = split_words("top middle bottom")
COLUMNS = split_words("left center right")
PLACES = [f"{row} {column}" for row in ROWS for column in COLUMNS]  # by cell
WORDS = split_words("a an the and make add remove move left right above below directly of")
WORDS += ROWS + ["center"] + NUMBERS + COLORS + SHAPES + PLURALS

FACING_PAIRS = [[3, 5], [1, 7]]  # cells of a pair, which no other scene takes: it would read as one
SCENE_KINDS = dict(single=0.25, group=0.25, pair=0.25, spread=0.15, several=0.1)  # with shares
USUAL_COLOR_SHARE = 0.7  # of objects in biased scenes; the others draw from all colors
SPARSE_CHANCES = (0.05, 0.3, 0.05)  # that a sparse caption names a color, a relation, the places
EDIT_SHARE = 0.4  # of (question, answer): an instruction, "make the star red", to a description
EDITS = split_words("recolor replace move add remove")
TEXT_LEN = 18  # <bos> and 17 words: three objects with places, or two and an instruction


@dataclass(frozen=True)
class SceneObject:
    shape: int  # position in SHAPES
    color: int  # position in COLORS
    cell: int  # of the grid, row by row


@dataclass(frozen=True)
class Scene:
    kind: str  # of SCENE_KINDS: decides how the arrangement is described
    objects: tuple[SceneObject, ...]
    background: int  # position in BACKGROUNDS


def relation(a: int, b: int) -> str | None:
    """How cell a stands to cell b: 'left', 'right', 'above' or 'below'; None on a diagonal."""
    dy = a // GRID - b // GRID
    dx = a % GRID - b % GRID
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def random_scene(rng: random.Random, biased: bool, kind: str | None = None) -> Scene:
    """A scene of a kind. The objects of a group are alike, all others differ in shape."""
    kind = kind or rng.choices(list(SCENE_KINDS), SCENE_KINDS.values())[0]
    count = {"single": 1, "group": rng.randint(2, 4), "pair": 2, "spread": 2, "several": 3}[kind]
    shapes = rng.sample(range(len(SHAPES)), 1 if kind == "group" else count)
    colors = []
    for shape in shapes:
        is_usual = biased and rng.random() < USUAL_COLOR_SHARE
        colors.append(USUAL_COLOR[shape] if is_usual else rng.randrange(len(COLORS)))
    free_cells = rng.choice(FACING_PAIRS) if kind == "pair" else range(GRID * GRID)
    cells = rng.sample(free_cells, count)
    while kind != "pair" and sorted(cells) in FACING_PAIRS:
        cells = rng.sample(free_cells, count)
    objects = tuple(map(SceneObject, cycle(shapes), cycle(colors), cells))
    return Scene(kind, objects, rng.randrange(len(BACKGROUNDS)))


def random_edit(rng: random.Random, kind: str) -> tuple[Scene, str, Scene]:
    """A scene of one or two objects, an instruction of a kind of EDITS, and the edited scene."""
    while True:
        before_kind = "spread" if kind == "remove" else rng.choice(["single", "spread"])
        before = random_scene(rng, biased=False, kind=before_kind)
        *others, old = before.objects
        shapes = [item.shape for item in before.objects]
        cells = [item.cell for item in before.objects]
        shape = rng.choice([i for i in range(len(SHAPES)) if i not in shapes])
        color = rng.choice([i for i in range(len(COLORS)) if i != old.color])
        cell = rng.choice([i for i in range(GRID * GRID) if i not in cells])
        new = SceneObject(shape, color, cell)
        name = f"the {SHAPES[old.shape]}"
        edited, instruction = {  # what takes the place of `old`
            "recolor": ([replace(old, color=color)], f"make {name} {COLORS[color]}"),
            "replace": ([replace(old, shape=shape)], f"make {name} a {SHAPES[shape]}"),
            "move": ([replace(old, cell=cell)], f"move {name} {PLACES[cell]}"),
            "add": ([old, new], f"add {describe(Scene('single', (new,), 0))}"),
            "remove": ([], f"remove {name}"),
        }[kind]
        objects = (*others, *edited)
        if sorted(item.cell for item in objects) not in FACING_PAIRS:
            after_kind = {1: "single", 2: "spread", 3: "several"}[len(objects)]
            return before, instruction, Scene(after_kind, objects, before.background)


# --------------------------------------------------------------------------- Captions, and back
def describe(scene: Scene, rng=None, color=1.0, relations=1.0, places=1.0) -> str:
    """A caption in a random wording and order, drawn from rng (random.Random).

    color, relations, places: the chances that a color, a pair's relation and the places of other
    objects are named. Without rng: the canonical description, in a fixed order, with all of them.
    """

    def chance(p: float) -> bool:
        return p > 0 and (rng is None or rng.random() < p)

    def phrase(item: SceneObject, count: int = 1) -> str:
        name = SHAPES[item.shape] if count == 1 else PLURALS[item.shape]
        if chance(color):
            name = f"{COLORS[item.color]} {name}"
        if count > 1:
            return f"{NUMBERS[count - 1]} {name}"
        article = "an" if name.startswith("orange") else "a"
        if rng and rng.random() < 0.25:
            article = "one"
        return f"{article} {name} {PLACES[item.cell]}" if placed else f"{article} {name}"

    placed = scene.kind not in ("group", "pair") and chance(places)
    if scene.kind == "group":
        return phrase(scene.objects[0], len(scene.objects))
    objects = sorted(scene.objects, key=lambda item: (item.color, item.shape))
    if rng:  # any object may be the subject
        objects = rng.sample(scene.objects, len(scene.objects))
    link = "and"
    if scene.kind == "pair" and chance(relations):
        link = relation(objects[0].cell, objects[1].cell)
        if link in ("left", "right"):
            link = f"{link} of"
        elif rng and rng.random() < 0.5:
            link = f"directly {link}"
    return f" {link} ".join(map(phrase, objects))


class Phrase(NamedTuple):
    count: int
    color: int | None  # None where the caption names none, as of cell
    shape: int
    cell: int | None

    def matches(self, item: SceneObject) -> bool:
        right_color = self.color in (None, item.color)
        right_cell = self.cell in (None, item.cell)
        return self.shape == item.shape and right_color and right_cell


class ParsedCaption(NamedTuple):
    phrases: tuple[Phrase, ...]
    relations: tuple[tuple[int, str, int], ...]  # (i, name, j): how phrase i stands to phrase j


PHRASE = re.compile(
    rf"(an?|{'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES + PLURALS)})"
    rf"(?: ({'|'.join(PLACES)}))?"
)
LINK = re.compile(" (and|(?:left|right) of|(?:directly )?(?:above|below)) ")


def parse_caption(text: str) -> ParsedCaption | None:
    """A caption in any wording of `describe`; None where it is not a sentence of this world."""
    parts = LINK.split(" ".join(text.split()))  # phrase, link, phrase, ...
    phrases = []
    for match in map(PHRASE.fullmatch, parts[::2]):
        if match is None:
            return None
        number, color, name, place = match.groups()
        count = NUMBERS.index(number) + 1 if number in NUMBERS else 1
        names = SHAPES if count == 1 else PLURALS
        if name not in names:
            return None
        color = COLORS.index(color) if color else None
        cell = PLACES.index(place) if place else None
        phrases.append(Phrase(count, color, names.index(name), cell))
    relations = []
    for i, link in enumerate(parts[1::2]):
        name = link.removeprefix("directly ").removesuffix(" of")
        if name != "and":
            relations.append((i, name, i + 1))
    return ParsedCaption(tuple(phrases), tuple(relations))


def scene_matches(parsed: ParsedCaption | None, grid: Sequence[int]) -> bool:
    """Whether a grid holds exactly the caption's objects, in their colors, places and relations."""
    if parsed is None or min(grid) < 0:  # no sentence; an object that could not be read
        return False
    objects = to_objects(grid)
    if len(objects) != sum(phrase.count for phrase in parsed.phrases):
        return False
    cells = []  # of each phrase's first object
    for phrase in parsed.phrases:
        matching = [item.cell for item in objects if phrase.matches(item)]
        if len(matching) != phrase.count:
            return False
        cells.append(matching[0])
    return all(relation(cells[i], cells[j]) == name for i, name, j in parsed.relations)


def is_complete_caption(parsed: ParsedCaption) -> bool:
    """Whether every color is named, and where shapes differ each pair's relation or all places."""
    colored = all(phrase.color is not None for phrase in parsed.phrases)
    placed = all(phrase.cell is not None for phrase in parsed.phrases)
    return colored and (placed or len(parsed.relations) >= len(parsed.phrases) // 2)


# --------------------------------------------------------------------------------------- Pixels
def to_grid(scene: Scene) -> list[int]:
    """The scene as GRID * GRID cells."""
    grid = [0] * GRID * GRID
    for item in scene.objects:
        grid[item.cell] = 1 + item.shape * len(COLORS) + item.color
    return grid


def to_objects(grid: Sequence[int]) -> list[SceneObject]:
    """The objects of a grid without negative cells, in the order of cells."""
    return [SceneObject(*divmod(c - 1, len(COLORS)), cell) for cell, c in enumerate(grid) if c]


def shape_masks(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which points of [-1, 1]^2 (y downwards) each of SHAPES covers: x, y (H, W) -> (S, H, W)."""
    # The star in polar coordinates: `point` is 1 at a tip, 0 at a notch, `edge` the radius between.
    turn = torch.atan2(x, -y) / (2 * math.pi) * 5
    point = (turn % 1 - 0.5).abs() * 2
    tip, notch = 0.95, 0.40
    angle = (1 - point) * math.pi / 5  # off the tip
    height = notch * torch.sin(math.pi / 5 - angle) + tip * torch.sin(angle)
    edge = tip * notch * math.sin(math.pi / 5) / height
    squared_radius = x * x + y * y
    circle = squared_radius < 0.90**2
    square = (x.abs() < 0.76) & (y.abs() < 0.76)
    triangle = (y < 0.75) & (y > -0.85 + 1.72 * x.abs())
    star = squared_radius < edge**2
    diamond = x.abs() / 0.72 + y.abs() / 0.95 < 1
    bars = (x.abs() < 0.27) | (y.abs() < 0.27)
    cross = bars & (x.abs() < 0.88) & (y.abs() < 0.88)
    return torch.stack([circle, square, triangle, star, diamond, cross])


def sprites(cell: int) -> torch.Tensor:
    """All contents of a cell: (backgrounds, contents, 3, cell, cell) in [0, 1], anti-aliased."""
    fine = (torch.arange(cell * 8) + 0.5) / (cell * 4) - 1
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    # Nothing, then each shape in each color.
    masks = shape_masks(x, y).repeat_interleave(len(COLORS), 0)
    masks = torch.cat([torch.zeros_like(x)[None], masks])  # (contents, 8 cell, 8 cell)
    alpha = rearrange(masks, "n (h a) (w b) -> n 1 h w (a b)", a=8, b=8).mean(-1)
    ink = torch.tensor([(0, 0, 0)] + RGB * len(SHAPES))[:, :, None, None] / 255
    paper = torch.tensor(BACKGROUNDS)[:, None, :, None, None] / 255
    return alpha * ink + (1 - alpha) * paper


def render(grids: torch.Tensor, backgrounds: torch.Tensor, atlas: torch.Tensor) -> torch.Tensor:
    """Grids (B, 9), backgrounds (B,), atlas of `sprites` -> images (B, 3, H, W) in [0, 1]."""
    cells = atlas[backgrounds[:, None], grids]  # (B, 9, 3, cell, cell)
    return rearrange(cells, "b (r c) k h w -> b k (r h) (c w)", r=GRID)


class Shapes(Dataset):
    """Scenes made on the fly: scene `index` of a split is the same in every epoch, its wording not.

    Only 'pretrain' is biased. No two splits share a random stream. Batches are those of data.py.
    """

    SPLITS = {"pretrain": 40_000, "understand": 40_000, "reca": 40_000, "test": 2_000}

    def __init__(self, split: str, image_size: int = 48, seed: int = 0):
        assert image_size % GRID == 0, f"{image_size=} must be a multiple of {GRID}"
        self.split = split
        self.seed = seed
        self.size = self.SPLITS[split]
        self.atlas = sprites(image_size // GRID)
        self.vocabulary = Vocabulary(SPECIALS + WORDS)
        self.text_len = TEXT_LEN

    def __len__(self) -> int:
        return self.size

    def fingerprint(self) -> Iterator[bytes]:
        """What the images depend on, piece by piece."""
        yield repr((self.split, self.seed, self.size, self.atlas.shape)).encode()

    def scene(self, index: int) -> Scene:
        rng = random.Random(f"{self.seed} {self.split} {index}")
        return random_scene(rng, biased=self.split == "pretrain")

    def texts(self, key: tuple[int, int], scene: Scene) -> dict[str, str]:
        rng = random.Random(f"{self.seed} {self.split} {key}")
        canonical = describe(scene)
        texts = {"canonical_caption": canonical, "caption_target": canonical, "answer": canonical}
        texts["caption"] = describe(scene, rng, *SPARSE_CHANCES)
        texts["full_caption"] = describe(scene, rng) if rng.random() < 0.5 else canonical
        texts["question"] = texts["full_caption"]
        if rng.random() < EDIT_SHARE:
            before, instruction, after = random_edit(rng, rng.choice(EDITS))
            texts["question"] = f"{describe(before)} {instruction}"
            texts["answer"] = describe(after)
        return texts

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        scenes = [self.scene(index) for _, index in keys]
        grid = torch.tensor([to_grid(scene) for scene in scenes])
        backgrounds = torch.tensor([scene.background for scene in scenes])
        batch = {"image": render(grid, backgrounds, self.atlas), "grid": grid}
        texts = [self.texts(key, scene) for key, scene in zip(keys, scenes, strict=True)]
        for name in texts[0]:
            ids = [self.vocabulary.encode(text[name], self.text_len) for text in texts]
            batch[name] = torch.tensor(ids)  # (B, T)
        return batch
