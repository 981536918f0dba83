"""The exact scorer: what does an image of the shapes world hold, and is that what the words asked for?

    python evaluate.py --ckpt out/reca.pt --n 240 --json results.json

Six categories after GenEval (arXiv 2310.11513), and four more:

    single     "a star"                               counting   "three stars"
    two        "a star and a circle"                  color      "a green star"                 an unusual color
    position   "a star left of a circle"              attribute  "a green star and a red cross" unusual colors, each on its own
    overall    the mean of these six
    dense      three or four objects, all colors and relations (as DPG-Bench, arXiv 2403.05135)
    edit       an object is added, or recolored: the instruction is followed, all else unchanged
    understanding   an image's caption is true and complete, in any wording
    reconstruction  an image drawn again from its visual words keeps its objects, colors and places

No detector is needed: a cell's content is the render that comes nearest in squared error, and an image scores where its
cells are exactly what was asked for, no more and no less. Photographs have no such truth; for them see `photographs`.

# B batch, G = GRID * GRID cells
"""
import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
from einops import rearrange

from data import COLORS, EDITS, GRID, USUAL_COLOR, Scene, Shapes, describe, holds, is_full, parse, random_edit, random_scene, render, sprites, to_grid
from sample import caption, edit, image_grid, load_checkpoint, reconstruct, sample_image, text_to_image

ERROR_LIMIT = 0.02  # mean squared error above which a cell holds nothing that we know; another shape or color is at 0.02 to 0.3
CATEGORIES = ["single", "two", "counting", "color", "position", "attribute"]

# How a category's prompts are made: the kind of scene, the chances that `describe` names colors, relations, places, and whether colors are unusual.
PROMPTS = {
    "single": ("single", (0, 0, 0), False), "two": ("pair", (0, 0, 0), False), "counting": ("group", (0, 0, 0), False),
    "color": ("single", (1, 0, 0), True), "position": ("pair", (0, 1, 0), False), "attribute": ("pair", (1, 0, 0), True),
    "dense": ("several", (1, 0, 1), False),
}


def read_cells(images, atlas):
    """Images (B, 3, H, W) in [0, 1] -> cells (B, G) as in data.py, -1 where no render is near. atlas: data.sprites."""
    cells = rearrange(images, "b k (r h) (c w) -> b (r c) (k h w)", r=GRID, c=GRID)
    known = atlas.flatten(2).to(images)                                          # (backgrounds, contents, P)
    squared = torch.cdist(cells.flatten(0, 1), known, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / known.shape[-1]
    error, content = (rearrange(x, "g (b n) -> g b n", n=GRID * GRID) for x in squared.min(-1))
    background = error.sum(-1).argmin(0)                                         # (B,): one for all cells of an image
    error, content = (x[background, torch.arange(len(images))] for x in (error, content))
    return torch.where(error < ERROR_LIMIT, content, -1)


def prompts(category: str, n: int, seed: int = 0) -> list[str]:
    """n prompts of a category, the same for the same seed."""
    kind, chances, unusual = PROMPTS[category]
    rng, out = random.Random(f"{category} {seed}"), []
    while len(out) < n:
        scene = random_scene(rng, biased=False, kind=kind)
        if not unusual or all(thing.color != USUAL_COLOR[thing.shape] for thing in scene.things):
            out.append(describe(scene, rng, *chances))
    return out


def interval(p: float, n: int) -> list[float]:
    """Wilson's 95% interval of a share p of n cases."""
    z = 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round((middle - half) / (1 + z * z / n), 4), round((middle + half) / (1 + z * z / n), 4)]


def edits(n: int, seed: int = 0) -> list[tuple[Scene, str, Scene]]:
    """n edits, of all kinds in turn: a scene, the instruction, and the scene that has to come."""
    return [random_edit(random.Random(f"edit {seed} {i}"), EDITS[i % len(EDITS)]) for i in range(n)]


def score(hits: list[bool]) -> tuple[float, int]:
    return sum(hits) / len(hits), len(hits)


@torch.no_grad()
def evaluate(loaded, n: int = 240, seed: int = 0) -> dict:
    """All categories of a checkpoint on the shapes world: {category: share right}, with "cases" and 95% "interval"s by category.

    The prompts, scenes and noise depend on seed alone: two checkpoints are compared on the same ones.
    """
    model, encoder, vocabulary = loaded.model, loaded.encoder, loaded.vocabulary
    test = Shapes("test", model.cfg.image_size)
    noise = lambda: torch.Generator().manual_seed(seed)
    found = {}
    for category in PROMPTS:
        asked = prompts(category, n, seed)
        cells = read_cells(text_to_image(model, vocabulary, asked, generator=noise()), test.atlas).tolist()
        found[category] = score([holds(parse(words), row) for words, row in zip(asked, cells)])
    if encoder is not None:
        batch = test.__getitems__([(0, seed * n + i) for i in range(n)])
        images, truth = batch["image"], batch["grid"].tolist()
        claims = [parse(words) for words in caption(model, encoder, vocabulary, images)]
        right = [bool(claim and is_full(claim) and holds(claim, row)) for claim, row in zip(claims, truth)]
        found["understanding"] = score(right)
        kinds = [test.scene(seed * n + i).kind for i in range(n)]
        found["understanding_pairs"] = score([hit for hit, kind in zip(right, kinds) if kind == "pair"])
        found["recognized"], found["drawn"] = unusual(loaded, test.atlas, n, seed)
        again = read_cells(reconstruct(model, encoder, images, generator=noise()), test.atlas).tolist()
        found["reconstruction"] = score([row == there for row, there in zip(again, truth)])
        scenes, instructions, wanted = zip(*edits(n, seed))
        before = render(torch.tensor([to_grid(s) for s in scenes]), torch.tensor([s.background for s in scenes]), test.atlas)
        after = read_cells(edit(model, encoder, vocabulary, before, instructions, generator=noise()), test.atlas).tolist()
        found["edit"] = score([row == to_grid(scene) for row, scene in zip(after, wanted)])
    values = {category: share for category, (share, _) in found.items()}
    return {"overall": sum(values[c] for c in CATEGORIES) / len(CATEGORIES)} | values | {
        "cases": {category: cases for category, (_, cases) in found.items()},
        "interval": {category: interval(*pair) for category, pair in found.items()}}


def unusual(loaded, atlas, n: int, seed: int):
    """The paper's figure 3: of n single objects in an unusual color, the share whose caption names it, and the share drawn so."""
    rng, scenes = random.Random(f"unusual {seed}"), []
    while len(scenes) < n:
        scene = random_scene(rng, biased=False, kind="single")
        if scene.things[0].color != USUAL_COLOR[scene.things[0].shape]:
            scenes.append(scene)
    images = render(torch.tensor([to_grid(s) for s in scenes]), torch.tensor([s.background for s in scenes]), atlas)
    named = [COLORS[scene.things[0].color] in words.split() for scene, words in zip(scenes, caption(loaded.model, loaded.encoder, loaded.vocabulary, images))]
    asked = [describe(scene, rng, 1, 0, 0) for scene in scenes]
    cells = read_cells(text_to_image(loaded.model, loaded.vocabulary, asked, generator=torch.Generator().manual_seed(seed)), atlas).tolist()
    return score(named), score([holds(parse(words), row) for words, row in zip(asked, cells)])


@torch.no_grad()
def photographs(loaded, dataset, n: int = 240, seed: int = 0) -> dict:
    """Held-out photographs, drawn again from their visual words, and drawn from their captions.

    psnr        in dB, of the reconstruction
    cosine      between the encoder's pooled features of photograph and reconstruction, mean; semantic likeness
    t2i_cosine  the same for an image drawn from the caption
    frechet     between the two sets of pooled features, reconstructions against photographs (FID's formula, this encoder's features)
    mmd         squared kernel distance of the same sets (CMMD's Gaussian kernel, arXiv 2401.09603), times 1000
    """
    model, encoder = loaded.model, loaded.encoder
    n = min(n, len(dataset))
    batch = dataset.__getitems__([(0, i * len(dataset) // n) for i in range(n)])
    images, words = batch["image"], batch["caption"].to(model.device)
    noise = lambda: torch.Generator().manual_seed(seed)
    again = reconstruct(model, encoder, images, generator=noise()).cpu()
    drawn = sample_image(model, model.text_prefix(words), noise()).cpu()
    real, fake, told = (torch.cat([pooled(encoder(model.for_encoder(part.to(model.device)))) for part in x.split(64)]).cpu() for x in (images, again, drawn))
    mse = (again - images).square().flatten(1).mean(1)
    cosine = torch.nn.functional.cosine_similarity
    return {"psnr": (-10 * mse.log10()).mean().item(), "cosine": cosine(real, fake).mean().item(), "t2i_cosine": cosine(real, told).mean().item(),
            "frechet": frechet(real, fake), "mmd": 1000 * mmd(real, fake), "cases": {"photographs": n}}


def pooled(features):
    """The encoder's one vector an image; where it has none, the mean of its patch tokens. (B, P)."""
    return (features.pooled if features.pooled is not None else features.patch_tokens.mean(1)).float()


def frechet(a, b) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, P) (arXiv 1706.08500, eq. 6); biased upwards for small n."""
    A, B = (x.double().T.cov() for x in (a, b))
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    return ((a - b).double().mean(0).square().sum() + A.trace() + B.trace() - 2 * root).item()


def mmd(a, b, sigma: float = 10.0) -> float:
    """Squared maximum mean discrepancy of unit features times sqrt(P), Gaussian kernel; without the diagonal, so unbiased."""
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) * x.shape[1] ** 0.5 for x in (a, b))
    kernel = lambda x, y: (-torch.cdist(x, y) ** 2 / (2 * sigma ** 2)).exp()
    within = lambda x: (kernel(x, x).sum() - len(x)) / (len(x) * (len(x) - 1))
    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


TITLES = {"pretrain": "base", "sft": "SFT", "reca": "RecA"}
COLUMNS = [*CATEGORIES, "overall", "dense", "edit", "reconstruction", "understanding", "psnr", "cosine", "t2i_cosine", "frechet", "mmd"]


def table(results: dict) -> str:
    """results.json as aligned text, a checkpoint a line."""
    columns = [c for c in COLUMNS if any(c in row for row in results.values())]
    head = f"{'':8}" + "".join(f"{c:>{max(len(c), 6) + 2}}" for c in columns)
    return "\n".join([head] + [f"{TITLES.get(name, name):8}" + "".join(f"{row[c]:{max(len(c), 6) + 2}.3f}" for c in columns) for name, row in results.items()])


def compare(checkpoints: list, names: list[str], path, seed: int = 0) -> None:
    """A picture for people: the same prompts and the same noise, one group of columns a checkpoint."""
    asked = [prompts(category, 2, seed + 7)[i] for category in ("color", "attribute", "position", "counting", "dense") for i in range(2)]
    rows = [[] for _ in asked]
    for loaded in checkpoints:
        images = text_to_image(loaded.model, loaded.vocabulary, [words for words in asked for _ in range(4)], generator=torch.Generator().manual_seed(seed))
        for row, four in zip(rows, images.split(4)):
            row.append(four)
    image_grid(rows, asked, [TITLES.get(name, name) for name in names], scale=2).save(path)


def compare_photographs(checkpoints: list, names: list[str], dataset, path, seed: int = 0, n: int = 16) -> None:
    """Held-out photographs beside what each checkpoint draws from their visual words, same noise; the caption is not read, only shown."""
    batch = dataset.__getitems__([(0, i * len(dataset) // n) for i in range(n)])
    groups = [batch["image"]] + [reconstruct(c.model, c.encoder, batch["image"], generator=torch.Generator().manual_seed(seed)).cpu() for c in checkpoints]
    captions = [checkpoints[0].vocabulary.decode(ids) for ids in batch["caption"].tolist()]
    image_grid([[group[i: i + 1] for group in groups] for i in range(n)], captions, ["photograph", *(TITLES.get(name, name) for name in names)], scale=2).save(path)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="+", required=True, help="one or more checkpoints of train.py")
    parser.add_argument("--n", type=int, default=240, help="cases of each category")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, scenes and noise")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if args.n < 1:
            raise ValueError(f"--n is {args.n}, it must be at least 1")
        results = {Path(path).stem: evaluate(load_checkpoint(path, args.device), args.n, args.seed) for path in args.ckpt}
        print(table(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
