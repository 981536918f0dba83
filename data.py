"""Data: the embedded `shapes` world, image folders, words, and the loader.

    python data.py                     # writes shapes.png: scenes with their sparse and dense captions

`shapes` is a world with exact ground truth, so that the claims of Reconstruction Alignment (arXiv 2509.07295) can be
checked exactly and with no download. A scene is a few coloured shapes on a 3 x 3 grid. What makes it a model of the
paper's problem is what its captions leave out:

  * The *generator's* captions are sparse, as web captions are: they name objects and counts, a colour in one mention
    of twenty, a relation in three captions of ten. And its images are biased: each shape has a usual colour.
    That is the paper's broccoli, which is always green and whose colour nobody mentions.
  * The *understanding* side sees full descriptions of unbiased scenes, as CLIP and instruction-tuned language models
    have seen far richer language than a generator's captions.
  * RecA's images are unbiased scenes, with no caption at all.

Every data set here answers one question, `__getitems__([(epoch, index), ...])`, with one dictionary:

    image     (B, 3, H, W) float in [0, 1]
    caption   (B, T) long   <bos> words <eos> <pad> ...   what the generator reads (sparse)
    full      (B, T) long   a full description            what the understanding side reads
    wording   (B, T) long   the same in another wording

# B batch, T words, H W pixels. One cell of a scene is 0 when empty, else 1 + shape * len(COLORS) + color.
"""
import difflib
import math
import random
import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.utils.data import DataLoader, Dataset

# ----------------------------------------------------------------------------------------------------------------------
# Words

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


def split_words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]", text.lower())


class Vocabulary:
    """Words <-> ids. Text is words, not bytes: RecA's visual words are mixtures of word embeddings (see model.py)."""

    def __init__(self, words: list[str]):
        assert words[:4] == SPECIALS, f"the first words must be {SPECIALS}, got {words[:4]}"
        self.words, self.ids = list(words), {w: i for i, w in enumerate(words)}

    @classmethod
    def from_captions(cls, captions, min_count: int = 1) -> "Vocabulary":
        """The words that occur at least `min_count` times, the most frequent first; the rest become <unk>."""
        counts: dict[str, int] = {}
        for caption in captions:
            for word in split_words(caption):
                counts[word] = counts.get(word, 0) + 1
        kept = sorted((w for w, c in counts.items() if c >= min_count), key=lambda w: (-counts[w], w))
        return cls(SPECIALS + kept)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, length: int, strict: bool = False) -> list[int]:
        """`<bos> words <eos> <pad> ...`, `length` ids.

        strict: refuse what the model cannot read, as a prompt must; otherwise <unk> and cut, as a training caption may.
        Raises ValueError with the nearest known words, or with the number of words that fit.
        """
        words = split_words(text)
        if strict:
            for word in words:
                if word not in self.ids:
                    near = difflib.get_close_matches(word, self.words[4:], 3, 0.5) or self.words[4:10]
                    raise ValueError(f"the prompt {text!r} holds the unknown word {word!r}; known words near it: {', '.join(near)}")
            if len(words) > length - 1:
                raise ValueError(f"the prompt {text!r} has {len(words)} words, and this model reads at most {length - 1}: shorten it")
        ids = [BOS] + [self.ids.get(w, UNK) for w in words][: length - 1] + [EOS]
        return (ids + [PAD] * length)[:length]

    def decode(self, ids) -> str:
        """The words before <eos>, without <bos> and <pad>."""
        words = []
        for i in ids:
            if i == EOS:
                break
            if i not in (PAD, BOS):
                words.append(self.words[i])
        return " ".join(words)


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
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]  # by cell
RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

KINDS = {"single": 0.32, "group": 0.23, "pair": 0.35, "several": 0.10}  # share of scenes of each kind
USUAL = 0.7           # share of objects with their shape's usual colour, in biased scenes
SPARSE = (0.05, 0.3, 0.0)  # a sparse caption names a color in 1 mention of 20, the relation in 3 of 10, a place never
TEXT_LEN = 18         # <bos> and 17 words: "a red circle left of a blue star and a white cross above a cyan square"


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `cell` counts the grid's cells row by row."""
    shape: int
    color: int
    cell: int


@dataclass(frozen=True)
class Scene:
    """Things in the order in which a caption names them: pairs (0, 1) and (2, 3) stand in one row or one column."""
    kind: str
    things: tuple[Thing, ...]
    background: int


def relation(a: int, b: int) -> str | None:
    """How cell a stands to cell b: 'left', 'right', 'above' or 'below'; None where neither axis prevails."""
    dy, dx = a // GRID - b // GRID, a % GRID - b % GRID
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > abs(dx):
        return "above" if dy < 0 else "below"
    return None


def random_scene(rng: random.Random, biased: bool, kind: str | None = None) -> Scene:
    """A scene; objects of one scene differ in shape, except in a group, which is alike."""
    kind = kind or rng.choices(list(KINDS), KINDS.values())[0]
    count = {"single": 1, "group": rng.randint(2, 4), "pair": 2, "several": rng.randint(3, 4)}[kind]
    shapes = rng.sample(range(len(SHAPES)), 1 if kind == "group" else count)
    colors = [USUAL_COLOR[s] if biased and rng.random() < USUAL else rng.randrange(len(COLORS)) for s in shapes]
    if kind == "group":
        shapes, colors = shapes * count, colors * count
    while True:  # until the pairs are aligned: a relation is never ambiguous
        cells = rng.sample(range(GRID * GRID), count)
        pairs = [] if kind in ("single", "group") else list(zip(cells[::2], cells[1::2]))
        if all(a // GRID == b // GRID or a % GRID == b % GRID for a, b in pairs):
            break
    return Scene(kind, tuple(map(Thing, shapes, colors, cells)), rng.randrange(len(BACKGROUNDS)))


# ----------------------------------------------------------------------------------------------------------------------
# The shapes world: captions, and back


def describe(scene: Scene, rng: random.Random, name_color: float = 1.0, name_relation: float = 1.0, name_place: float = 0.5) -> str:
    """A caption in a random wording: chances that a color, a relation and, in place of relations, the places are named.

    1, 1 and any third number give a full description; SPARSE gives the generator's captions.
    """
    placed = rng.random() < name_place and scene.kind != "group" and len(scene.things) < 4

    def phrase(thing: Thing, count: int = 1) -> str:
        color = COLORS[thing.color] + " " if rng.random() < name_color else ""
        if count > 1:
            return f"{NUMBERS[count - 1]} {color}{PLURALS[thing.shape]}"
        article = "one" if rng.random() < 0.25 else "an" if color == "orange " else "a"
        return f"{article} {color}{SHAPES[thing.shape]}" + (f" {PLACES[thing.cell]}" if placed else "")

    if scene.kind == "group":
        return phrase(scene.things[0], len(scene.things))
    parts = []
    for pair in (scene.things[:2], scene.things[2:]):
        pair = rng.sample(pair, len(pair))  # either may be the subject
        if len(pair) == 2:
            named = not placed and rng.random() < name_relation
            link = RELATION_WORDS[relation(pair[0].cell, pair[1].cell)] if named else "and"
            parts.append(f"{phrase(pair[0])} {link} {phrase(pair[1])}")
        elif pair:
            parts.append(phrase(pair[0]))
    rng.shuffle(parts)
    return " and ".join(parts)


@dataclass(frozen=True)
class Claim:
    """What a caption or prompt says: phrases (count, color or None, shape, cell or None), relations (i, name, j) between them."""
    phrases: tuple[tuple[int, int | None, int, int | None], ...]
    relations: tuple[tuple[int, str, int], ...]


def parse(text: str) -> Claim | None:
    """The claim that a caption makes, in any wording of `describe`; None where it is not a sentence of this world."""
    words, phrases, relations, link = text.split(), [], [], None
    while words:
        number = words.pop(0)
        count = 1 if number in ("a", "an") else NUMBERS.index(number) + 1 if number in NUMBERS else None
        color = COLORS.index(words.pop(0)) if words and words[0] in COLORS else None
        names = SHAPES if count == 1 else PLURALS
        if count is None or not words or words[0] not in names:
            return None
        shape, place = names.index(words.pop(0)), " ".join(words[:2])
        cell = PLACES.index(place) if place in PLACES else None
        words = words if cell is None else words[2:]
        phrases.append((count, color, shape, cell))
        if link:
            relations.append((len(phrases) - 2, link, len(phrases) - 1))
        if not words:
            return Claim(tuple(phrases), tuple(relations))
        word, link = words.pop(0), None
        if word in OPPOSITE:
            link = word
            if word in ("left", "right") and (not words or words.pop(0) != "of"):
                return None
        elif word != "and":
            return None
    return None


def holds(claim: Claim, grid) -> bool:
    """Whether a scene holds exactly what the claim says: these objects, no other, in these colours and relations.

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


def _inside(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which points of [-1, 1]^2 (y downwards) a shape covers."""
    if shape == "circle":
        return x * x + y * y < 0.90 ** 2
    if shape == "square":
        return (x.abs() < 0.76) & (y.abs() < 0.76)
    if shape == "triangle":
        return (y < 0.75) & (y > -0.85 + 1.72 * x.abs())
    if shape == "diamond":
        return x.abs() / 0.72 + y.abs() / 0.95 < 1
    if shape == "cross":
        return ((x.abs() < 0.27) | (y.abs() < 0.27)) & (x.abs() < 0.88) & (y.abs() < 0.88)
    angle = (torch.atan2(x, -y) / (2 * math.pi) * 5) % 1  # star: five rays, the radius falling from tip to notch
    ray = (angle - 0.5).abs() * 2                         # 1 at a tip, 0 at a notch
    tip, notch = 0.95, 0.40
    a = (1 - ray) * math.pi / 5                           # the angle off the tip; the edge is a straight line
    edge = tip * notch * math.sin(math.pi / 5) / (notch * torch.sin(math.pi / 5 - a) + tip * torch.sin(a))
    return x * x + y * y < edge ** 2


def sprites(cell: int) -> torch.Tensor:
    """Every content of a cell: (len(BACKGROUNDS), 1 + shapes * colors, 3, cell, cell) in [0, 1], anti-aliased 8 x 8."""
    fine = (torch.arange(cell * 8) + 0.5) / (cell * 4) - 1
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    cover = torch.stack([torch.zeros_like(x)] + [_inside(s, x, y).float() for s in SHAPES for _ in COLORS])
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
        self.vocabulary = Vocabulary(SPECIALS + shapes_words())
        self.text_len = TEXT_LEN

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        return random_scene(random.Random(f"{self.seed} {self.split} {index}"), biased=self.split == "pretrain")

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        scenes = [self.scene(index) for _, index in keys]
        rngs = [random.Random(f"{self.seed} {self.split} {key}") for key in keys]
        chances = {"caption": SPARSE, "full": (), "wording": ()}
        texts = {name: torch.tensor([self.vocabulary.encode(describe(s, r, *chance), self.text_len) for s, r in zip(scenes, rngs)])
                 for name, chance in chances.items()}
        grid = torch.tensor([to_grid(s) for s in scenes])
        background = torch.tensor([s.background for s in scenes])
        return {"image": render(grid, background, self.atlas), "grid": grid, **texts}


def shapes_words() -> list[str]:
    return ["a", "an", "and", "left", "right", "above", "below", "of", "top", "middle", "bottom", "center"] + NUMBERS + COLORS + SHAPES + PLURALS


# ----------------------------------------------------------------------------------------------------------------------
# The loader


class Keys:
    """Batches of (epoch, index) without end: one seeded permutation an epoch, the same for any number of workers.

    `start` is the number of batches already used: a resumed run goes on with the very next one.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int = 0):
        assert size >= 1, "the data set is empty"
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start

    def __iter__(self):
        epoch, order = -1, None
        position = self.start * self.batch_size
        while True:
            batch = []
            for position in range(position, position + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)).tolist()
                batch.append((epoch, order[position % self.size]))
            position += 1
            yield batch


def batches(dataset: Dataset, batch_size: int, seed: int, start: int = 0, workers: int = 0):
    """An endless iterator over batches, from batch number `start` on."""
    loader = DataLoader(dataset, batch_sampler=Keys(len(dataset), batch_size, seed, start), num_workers=workers,
                        collate_fn=_as_is, pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)
    return iter(loader)


def _as_is(batch):
    image = batch["image"]
    assert image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1, f"images must be float32 in [0, 1], got {image.dtype}"
    return batch
