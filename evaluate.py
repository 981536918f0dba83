"""The exact scorer: what does an image of the shapes world hold, and is that what the words asked for? And the experiments built on it.

    python evaluate.py --ckpt out/reca.pt --n 240 --json results.json
    python evaluate.py --experiment controls --seeds 0 1 2        # trains what is not there yet; assets/controls.md and .png

Six categories after GenEval (arXiv 2310.11513), and more:

    single     "a star"                               counting   "three stars"
    two        "a star and a circle"                  color      "a green star"                 an unusual color
    position   "a star left of a circle"              attribute  "a green star and a red cross" unusual colors, each on its own
    overall    the mean of these six
    dense      three objects, all colors and places (as DPG-Bench, arXiv 2403.05135)
    edit       recolor, replace, move, add, remove (as ImgEdit, arXiv 2505.20275): the instruction is followed, all else unchanged. edit_recolor and so on:
               one kind; edit_direct: drawn without saying the edited scene first
    understanding   an image's caption is true and complete, in any wording; of pairs of objects (understanding_pairs), and for each attribute by itself:
               understanding_shape, _color, _count, _arrangement (the places or the relation)
    reconstruction  an image drawn again from its visual words keeps all objects, colors and places. kept: the share of objects whose shape and
               color are found again; kept_places: in the same cell as well; psnr: of the pixels, in dB
    tokenizer  of ar and mask: the 2,000 test images keep all through their codes alone; tokenizer_psnr, in dB; codes_used: the share of codes that occur in them

The scenes that are asked for are of the kinds single, group, pair (two objects face to face), spread (two anywhere) and several (three): see data.py.
No detector is needed: a cell's content is the render that comes nearest in squared error, and an image scores where its
cells are exactly what was asked for, no more and no less. Photographs have no such truth: see `photographs` for what is measured of them.

# B batch, G = GRID * GRID cells
"""
import argparse
import json
import math
import random
import re
import shlex
import statistics
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from einops import rearrange

from data import (COLORS, EDITS, GRID, KINDS, NUMBERS, PLURALS, SHAPES, USUAL_COLOR, Claim, Scene, Shapes, Thing, describe, holds, image_grid, is_full,
                  make_dataset, parse, random_edit, random_scene, render, sprites, to_grid)
from recon_loss import image_loss, recon_prefix
from sample import caption, edit, load_checkpoint, reconstruct, sample_image, text_to_image

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

def score(hits) -> tuple[float, int, list[float]]:
    """Right or wrong by case, never none -> share right, cases, 95% interval."""
    share = sum(hits) / len(hits)
    return share, len(hits), interval(share, len(hits))

def mean(values) -> tuple[float, int, list[float]]:
    """The same for numbers that are no shares."""
    values = torch.as_tensor(values)
    middle, half = values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.inf
    return middle, len(values), [round(middle - half, 4), round(middle + half, 4)]

def psnr(drawn, images) -> tuple[float, int, list[float]]:
    """Of images (B, 3, H, W) in [0, 1], in dB, at most 60; the mean."""
    return mean(-10 * (drawn - images).square().flatten(1).mean(1).clamp(min=1e-6).log10())

def objects(grid) -> Counter:
    """(shape, color), as a cell says it -> how many there are."""
    return Counter(cell for cell in grid if cell > 0)

def attributes(claim: Claim | None, scene: Scene) -> dict[str, bool]:
    """Whether a caption is right on each attribute by itself. A group has no arrangement."""
    phrases, relations = (claim.phrases, claim.relations) if claim else ((), ())
    right = {"shape": {phrase[2] for phrase in phrases} == {thing.shape for thing in scene.things},
             "color": {phrase[2:0:-1] for phrase in phrases} == {(thing.shape, thing.color) for thing in scene.things},
             "count": sum(phrase[0] for phrase in phrases) == len(scene.things)}
    if scene.kind != "group":
        placed = bool(relations) or bool(phrases) and all(phrase[3] is not None for phrase in phrases)
        right["arrangement"] = placed and holds(Claim(tuple((count, None, shape, cell) for count, _, shape, cell in phrases), relations), to_grid(scene))
    return right

def atlas_of(loaded) -> torch.Tensor:
    return sprites(loaded.model.cfg.image_size // GRID)

def draw_scenes(scenes: list[Scene], atlas) -> torch.Tensor:
    """Their true pictures (B, 3, H, W)."""
    return render(torch.tensor([to_grid(s) for s in scenes]), torch.tensor([s.background for s in scenes]), atlas)

def results_of(found: dict[str, tuple]) -> dict:
    """{category: (value, cases, interval)} -> the form of results.json."""
    return {c: value for c, (value, _, _) in found.items()} | {"cases": {c: cases for c, (_, cases, _) in found.items()}, "interval": {c: i for c, (_, _, i) in found.items()}}

@torch.no_grad()
def evaluate(loaded, n: int = 240, seed: int = 0) -> dict:
    """All categories of a checkpoint of the shapes world: {category: share right}, with "cases" and 95% "interval"s by category; of one of
    photographs see `photographs`.

    The prompts, scenes and noise depend on seed alone: two checkpoints are compared on the same ones.
    """
    if loaded.config["dataset"] != "shapes":
        return photographs(loaded, n, seed)
    model, encoder, vocabulary = loaded.model, loaded.encoder, loaded.vocabulary
    test = Shapes("test", model.cfg.image_size)
    noise = lambda: torch.Generator().manual_seed(seed)
    found, hits = {}, {}  # hits: right or wrong, by category
    for category in PROMPTS:
        asked = prompts(category, n, seed)
        cells = read_cells(text_to_image(model, vocabulary, asked, generator=noise()), test.atlas).tolist()
        hits[category] = [holds(parse(words), row) for words, row in zip(asked, cells)]

    batch = test.__getitems__([(0, seed * n + i) for i in range(n)])
    images, truth, scenes = batch["image"], batch["grid"].tolist(), [test.scene(seed * n + i) for i in range(n)]
    claims = [parse(words) for words in caption(model, encoder, vocabulary, images)]
    hits["understanding"] = [bool(claim and is_full(claim) and holds(claim, row)) for claim, row in zip(claims, truth)]
    hits["understanding_pairs"] = [hit for hit, scene in zip(hits["understanding"], scenes) if scene.kind == "pair"]
    for claim, scene in zip(claims, scenes):
        for name, hit in attributes(claim, scene).items():
            hits.setdefault(f"understanding_{name}", []).append(hit)

    drawn = reconstruct(model, encoder, images, generator=noise()).cpu()
    again = read_cells(drawn, test.atlas).tolist()
    hits["reconstruction"] = [row == there for row, there in zip(again, truth)]
    kept = [((objects(row) & objects(there)).total(), objects(there).total()) for row, there in zip(again, truth)]
    hits["kept"] = [i < found_again for found_again, all_of_them in kept for i in range(all_of_them)]
    hits["kept_places"] = [a == b for row, there in zip(again, truth) for a, b in zip(row, there) if b]
    found["psnr"] = psnr(drawn, images)
    if model.tokenizer:
        batch = test.__getitems__([(0, i) for i in range(len(test))])
        codes = model.tokenizer.encode(batch["image"].to(model.device))
        drawn, used = model.tokenizer.decode(codes).cpu(), set(codes.flatten().tolist())
        hits["tokenizer"] = [row == there for row, there in zip(read_cells(drawn, test.atlas).tolist(), batch["grid"].tolist())]
        hits["codes_used"] = [code in used for code in range(model.cfg.codes)]
        found["tokenizer_psnr"] = psnr(drawn, batch["image"])

    scenes, instructions, wanted = zip(*edits(n, seed))
    for name, think in {"edit": True, "edit_direct": False}.items():
        after = edit(model, encoder, vocabulary, draw_scenes(scenes, test.atlas), instructions, think, generator=noise())
        hits[name] = [row == to_grid(scene) for row, scene in zip(read_cells(after, test.atlas).tolist(), wanted)]
    hits |= {f"edit_{kind}": hits["edit"][i:: len(EDITS)] for i, kind in enumerate(EDITS)}
    found = {name: score(row) for name, row in hits.items() if row} | found
    return {"overall": sum(found[c][0] for c in CATEGORIES) / len(CATEGORIES)} | results_of(found)

def held_out(loaded, n: int) -> dict:
    """A batch of n photographs from all over the test split that the checkpoint's training left out, or of as many as there are."""
    cfg = loaded.config
    dataset = make_dataset(cfg["dataset"], "test", cfg["data_dir"], cfg["image_size"], cfg["seed"], loaded.vocabulary, cfg["text_len"], cfg["cache_dir"])
    n = min(n, len(dataset))
    return dataset.__getitems__([(0, i * len(dataset) // n) for i in range(n)])

@torch.no_grad()
def photographs(loaded, n: int = 240, seed: int = 0) -> dict:
    """Held-out photographs, drawn again from their visual words, and drawn from their captions (t2i_).

    psnr              in dB, of the reconstruction
    cosine            between the encoder's pooled features of photograph and drawing, mean: semantic likeness
    frechet           between the two sets of pooled features, drawings against photographs (FID's formula, this encoder's features)
    mmd               squared kernel distance of the same sets (CMMD's Gaussian kernel, arXiv 2401.09603), times 1000
    """
    model, batch = loaded.model, held_out(loaded, n)
    images, words = batch["image"], batch["caption"].to(model.device)
    noise = lambda: torch.Generator().manual_seed(seed)
    look = lambda images: torch.cat([pooled(loaded.encoder(model.for_encoder(part.to(model.device)))) for part in images.split(64)]).cpu()
    real, again = look(images), reconstruct(model, loaded.encoder, images, generator=noise()).cpu()
    found, distances = {"psnr": psnr(again, images)}, {}
    for prefix, drawn in (("", again), ("t2i_", sample_image(model, model.text_prefix(words), noise()))):
        fake = look(drawn)
        found[f"{prefix}cosine"] = mean(torch.nn.functional.cosine_similarity(real, fake))
        distances |= {f"{prefix}frechet": frechet(real, fake), f"{prefix}mmd": 1000 * mmd(real, fake)}
    return distances | results_of(found)

def pooled(features):
    """The encoder's one vector an image; where it has none, the mean of its patch tokens. (B, P)."""
    return (features.pooled if features.pooled is not None else features.patch_tokens.mean(1)).float()

def frechet(a, b) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, P) (arXiv 1706.08500, eq. 6); biased upwards for small n.
    nan of a single image, or of features that are no numbers."""
    if min(len(a), len(b)) < 2 or not (a.sum() + b.sum()).isfinite():  # LAPACK would abort the process
        return math.nan
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
DISTANCES = ["cosine", "frechet", "mmd", "t2i_cosine", "t2i_frechet", "t2i_mmd"]  # of photographs
COLUMNS = [*CATEGORIES, "overall", "dense", "edit", "edit_direct", "reconstruction", "kept", "kept_places", "understanding", "psnr", *DISTANCES,
           "tokenizer", "tokenizer_psnr", "codes_used"]

def table(results: dict) -> str:
    """results.json as aligned text, a checkpoint a line."""
    columns = [c for c in COLUMNS if all(c in row for row in results.values())]
    head = f"{'':8}" + "".join(f"{c:>{max(len(c), 6) + 2}}" for c in columns)
    return "\n".join([head] + [f"{TITLES.get(name, name):8}" + "".join(f"{row[c]:{max(len(c), 6) + 2}.3f}" for c in columns) for name, row in results.items()])

# ----------------------------------------------------------------------------------------------------------------------
# Pictures for people: checkpoints side by side, the same prompts and the same noise. note: a line below, how it was made

def compare(checkpoints: list, names: list[str], path, seed: int = 0, note: str = "", asked=None) -> None:
    """Prompts, drawn by each checkpoint; photographs are drawn from their visual words."""
    if checkpoints[0].config["dataset"] != "shapes":
        return compare_reconstructions(checkpoints, names, path, seed, note)
    asked = asked or [prompts(category, 2, seed + 7)[i] for category in ("color", "attribute", "position", "counting", "dense") for i in range(2)]
    many, rows = max(1, min(4, 16 // len(checkpoints))), [[] for _ in asked]
    for loaded in checkpoints:
        images = text_to_image(loaded.model, loaded.vocabulary, [words for words in asked for _ in range(many)], generator=torch.Generator().manual_seed(seed))
        for row, group in zip(rows, images.split(many)):
            row.append(group)
    image_grid(rows, asked, [TITLES.get(name, name) for name in names], 2, note).save(path)

def compare_many(checkpoints: list, names: list[str], path, seed: int = 0, note: str = "") -> None:
    """The same for more checkpoints than stand side by side: a row each, three images of four short prompts."""
    asked = [prompts(category, 1, seed + 7)[0] for category in ("color", "attribute", "position", "counting")]
    many = [words for words in asked for _ in range(3)]
    rows = [list(text_to_image(c.model, c.vocabulary, many, generator=torch.Generator().manual_seed(seed)).split(3)) for c in checkpoints]
    image_grid(rows, names, asked, 2, note).save(path)

def compare_counts(*args) -> None:
    compare(*args, asked=[f"{number} {name}" for name in PLURALS[:2] for number in NUMBERS[1:]])

def compare_broccoli(checkpoints: list, names: list[str], path, seed: int = 0, note: str = "") -> None:
    """Each shape in each color, in a row, as each checkpoint draws it."""
    groups = [color_test(c, 1, seed)[3].split(len(COLORS)) for c in checkpoints]
    captions = [f"{shapes} in {', '.join(COLORS)}; usually {COLORS[color]}" for shapes, color in zip(PLURALS, USUAL_COLOR)]
    image_grid([list(row) for row in zip(*groups)], captions, names, 2, note).save(path)

def compare_reconstructions(checkpoints: list, names: list[str], path, seed: int = 0, note: str = "") -> None:
    """The paper's figure 5: four scenes of each kind, or held-out photographs, and what each checkpoint draws from their visual words. Captions are only shown."""
    if checkpoints[0].config["dataset"] == "shapes":
        rng, many, captions = random.Random(f"reconstructions {seed}"), 4, list(KINDS)
        images = draw_scenes([random_scene(rng, False, kind) for kind in KINDS for _ in range(many)], atlas_of(checkpoints[0]))
    else:
        batch, many = held_out(checkpoints[0], 16), 2
        said, images = [checkpoints[0].vocabulary.decode(ids) for ids in batch["caption"].tolist()], batch["image"]
        captions = ["; ".join(said[i: i + many]) for i in range(0, len(said), many)]
    drawn = [reconstruct(c.model, c.encoder, images, generator=torch.Generator().manual_seed(seed)).cpu() for c in checkpoints]
    rows = [list(row) for row in zip(*(group.split(many) for group in [images, *drawn]))]
    image_grid(rows, captions, ["input", *(TITLES.get(name, name) for name in names)], 2, note).save(path)

# ----------------------------------------------------------------------------------------------------------------------
# Experiments: which runs of train.py, which of their checkpoints, which scores

def color_test(loaded, k: int, seed: int):
    """The paper's figure 3, k objects of each shape and color, shape by shape: the objects, whether a caption names the color, whether it is drawn when
    asked for, and the images drawn."""
    rng, atlas = random.Random(f"combinations {seed}"), atlas_of(loaded)
    things = [Thing(shape, color, rng.randrange(GRID * GRID)) for shape in range(len(SHAPES)) for color in range(len(COLORS)) for _ in range(k)]
    said = caption(loaded.model, loaded.encoder, loaded.vocabulary, draw_scenes(scenes := [Scene("single", (thing,), rng.randrange(2)) for thing in things], atlas))
    asked = [describe(scene, rng, 1, 0, 0) for scene in scenes]
    images = text_to_image(loaded.model, loaded.vocabulary, asked, generator=torch.Generator().manual_seed(seed))
    named = [COLORS[thing.color] in words.split() for thing, words in zip(things, said)]
    return things, named, [holds(parse(words), row) for words, row in zip(asked, read_cells(images, atlas).tolist())], images

def broccoli(loaded, n: int, seed: int) -> dict:
    """n / 12 objects of each shape and color: the share recognized and drawn, of those in an unusual color, and of each ("drawn green star")."""
    things, *both, _ = color_test(loaded, k := max(1, n // 12), seed)
    found = {}
    for name, hits in zip(("recognized", "drawn"), both):
        found[name] = score([hit for hit, thing in zip(hits, things) if thing.color != USUAL_COLOR[thing.shape]])
        found |= {f"{name} {COLORS[thing.color]} {SHAPES[thing.shape]}": score(hits[i * k: i * k + k]) for i, thing in enumerate(things[::k])}
    return results_of(found)

def broccoli_table(rows: dict) -> str:
    """Percent, by shape and color: recognized by the first row's checkpoint / drawn by it / drawn by the last row's."""
    (base, first), *_, (title, last) = rows.items()
    cell = lambda what: " / ".join(f"{100 * sum(run[f'{how} {what}'] for run in runs) / len(runs):.0f}" for how, runs in (("recognized", first), ("drawn", first), ("drawn", last)))
    lines = [[name, *(f"({cell(f'{color} {name}')})" if i == usual else cell(f"{color} {name}") for i, color in enumerate(COLORS))] for name, usual in zip(SHAPES, USUAL_COLOR)]
    return f"\nPercent recognized by {base} / drawn by {base} / drawn by {title}; the usual color in brackets:\n\n" + pipes(["", *COLORS], lines)

def counts(loaded, n: int, seed: int) -> dict:
    """Groups of two, three and four: drawn when asked for, and counted right in captions."""
    found, rng, atlas = {}, random.Random(f"counts {seed}"), atlas_of(loaded)
    for number in (2, 3, 4):
        asked = [f"{NUMBERS[number - 1]} {PLURALS[i % len(PLURALS)]}" for i in range(n)]
        cells = read_cells(text_to_image(loaded.model, loaded.vocabulary, asked, generator=torch.Generator().manual_seed(seed)), atlas).tolist()
        found[f"drawn_{number}"] = score([holds(parse(words), row) for words, row in zip(asked, cells)])
        groups = (scene for scene in iter(lambda: random_scene(rng, False, "group"), None) if len(scene.things) == number)
        scenes = list(islice(groups, n))
        said = caption(loaded.model, loaded.encoder, loaded.vocabulary, draw_scenes(scenes, atlas))
        found[f"counted_{number}"] = score([attributes(parse(words), scene)["count"] for words, scene in zip(said, scenes)])
    return results_of(found)

@torch.no_grad()
def shuffled(loaded, n: int, seed: int) -> dict:
    """The recon loss of n held-out scenes behind their own visual words, and behind those of the scene before: the same noise, another condition."""
    test, found = Shapes("test", loaded.model.cfg.image_size), {}
    images = test.__getitems__([(0, i) for i in range(n)])["image"].to(loaded.model.device)
    prefix = recon_prefix(loaded.model, loaded.encoder, images)                  # (B, T, D)
    for name, condition in {"own_words": prefix, "shuffled_words": prefix.roll(1, 0)}.items():
        torch.manual_seed(seed)
        found[name] = image_loss(loaded.model, condition, images).item()
    return found

ABLATIONS = {option[2:].replace(" ", "_"): option for option in (  # by folder
    "--images 500", "--drop 0", "--drop 0.3", "--reca_lr 5e-4", "--reca_lr 4e-3", "--i2t 0", "--t2t 0", "--replay 0", "--trains attention",
    "--visual_words 4", "--visual_words 8", "--sharpness 0.3", "--sharpness 10", "--reverse_words", "--templates 1", "--templates 4", "--ema 0.99")}

PHOTOGRAPHS = """--dataset imagenet --data_dir {data_dir} --encoder {encoder} --encoder_size 96 --cache_features --width 192 --depth 6 --heads 6
    --batch_size 16 --understand_batch 16 --encoder_steps 200 --pretrain_steps 3000 --pretrain_lr 2e-3 --align_steps 300 --reca_steps 1000 --reca_lr 1e-3 --replay 0.5 --replay_batch 8"""

# Runs of train.py by folder: their options. {main} is the folder of the run `main` of the same seed, which is made first.
RUNS = {
    "main": "",
    "features": "--stage reca --init_from {main}/pretrain.pt --condition features", "pixels": "--stage reca --init_from {main}/pretrain.pt --condition pixels",
    "sft_own": "--stage sft --init_from {main}/pretrain.pt --captions own", "sft_dense": "--stage sft --init_from {main}/pretrain.pt --captions dense",
    "reca_sft": "--stage sft --init_from {main}/reca.pt", "sft_reca": "--stage reca --init_from {main}/sft.pt", "reca_reca": "--stage reca --init_from {main}/reca.pt",
    "ar": "--paradigm ar", "mask": "--paradigm mask", "mar": "--paradigm mar",
    "noise_3": "--noise_scale 3", "random": "--encoder random --align_steps 950", "clip": "--encoder {encoder} --encoder_size 48 --align_steps 950",
    "photographs": PHOTOGRAPHS, "photographs_connector": PHOTOGRAPHS + " --stage reca --init_from {photographs}/pretrain.pt --train_connector",
} | {name: f"--stage reca --init_from {{main}}/pretrain.pt {option}" for name, option in ABLATIONS.items()}

class Experiment(NamedTuple):
    rows: dict[str, str]              # title: run/checkpoint. Differences are to the row before that is called "base", or to the first
    columns: list[str]
    measure: Callable = evaluate      # (loaded, n, seed) -> scores
    picture: Callable = compare

BEFORE_AND_AFTER = {"base": "main/pretrain", "RecA": "main/reca"}

def all_of(*runs: str) -> dict[str, str]:
    """The rows of whole runs: base, SFT and RecA of each."""
    return {title + (f", {run}" if run != "main" else ""): f"{run}/{checkpoint}" for run in runs for checkpoint, title in TITLES.items()}

SCORES = [*CATEGORIES, "overall", "dense", "edit", "kept", "kept_places", "understanding"]

EXPERIMENTS = {
    "main": Experiment(all_of("main"), [*SCORES, "reconstruction"]),
    "broccoli": Experiment(BEFORE_AND_AFTER, ["recognized", "drawn"], broccoli, compare_broccoli),
    "reconstruction": Experiment(all_of("main"), ["kept", "kept_places", "reconstruction", "psnr"], picture=compare_reconstructions),
    "shuffle": Experiment(BEFORE_AND_AFTER, ["own_words", "shuffled_words"], shuffled, compare_reconstructions),
    "copy": Experiment({"base": "main/pretrain", "words": "main/reca", "features": "features/reca", "pixels": "pixels/reca"},
                       ["recon_loss", "overall", "color", "attribute", "dense", "kept", "kept_places", "psnr"]),
    "controls": Experiment(all_of("main") | {"SFT, own captions": "sft_own/sft", "SFT, dense": "sft_dense/sft", "RecA, SFT": "reca_sft/sft", "SFT, RecA": "sft_reca/reca",
                                             "RecA twice": "reca_reca/reca"}, SCORES),
    "ablations": Experiment({"RecA": "main/reca"} | {option: f"{name}/reca" for name, option in ABLATIONS.items()}, SCORES, picture=compare_many),
    "paradigms": Experiment(all_of("main", "ar", "mask", "mar"), [*SCORES, "reconstruction"]),
    "noise": Experiment(all_of("main", "noise_3"), [*SCORES, "reconstruction"]),
    "counting": Experiment(all_of("main"), [f"{what}_{number}" for what in ("drawn", "counted") for number in (2, 3, 4)], counts, compare_counts),
    "encoder": Experiment(BEFORE_AND_AFTER | {"base, random": "random/pretrain", "RecA, random": "random/reca", "base, CLIP": "clip/pretrain", "RecA, CLIP": "clip/reca"}, SCORES),
    "photographs": Experiment({title: f"photographs/{checkpoint}" for checkpoint, title in TITLES.items()}, ["psnr", *DISTANCES]),
    "connector": Experiment({"RecA": "photographs/reca", "RecA, connector too": "photographs_connector/reca"}, ["psnr", *DISTANCES]),
}
T95 = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's t, 97.5%, by the number of seeds less 2

def make_run(name: str, seed: int, args) -> Path:
    """The folder of a run; trains it where there are no results yet, going on where it was stopped. Ends with train.py's exit code where that is not 0."""
    folders = {run: Path(args.out_dir) / f"s{seed}" / run for run in RUNS}
    if not ((folder := folders[name]) / "results.json").exists():
        for parent in re.findall(r"{(\w+)}/", RUNS[name]):
            make_run(parent, seed, args)
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--out_dir", str(folder)]
        if (folder / "run.json").exists():
            command += ["--resume"]
        else:
            options = [word.format(**folders, encoder=args.encoder or "clip-b16", data_dir=args.data_dir) for word in RUNS[name].split()]
            command += ["--seed", str(seed), "--eval_n", str(args.n), *shlex.split(args.train), *options]
        print(shlex.join(command), flush=True)
        process = subprocess.Popen(command)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has got the signal too, and saves its state first
            code = process.wait()
        if code:
            raise SystemExit(code)
    return folder

def scores_of(row: str, seed: int, measure: Callable, args) -> dict:
    """The scores of a run/checkpoint: those in results.json where they are of as many cases, else measured, and kept beside them."""
    name, checkpoint = row.split("/")
    folder = make_run(name, seed, args)
    path, kept = folder / f"{checkpoint}.pt", folder / f"{measure.__name__}_{checkpoint}_{args.n}.json"
    scores = json.loads((folder / "results.json").read_text()).get(checkpoint, {})
    if measure is not evaluate or scores.get("cases", {}).get("psnr") != args.n:
        if not kept.exists() or kept.stat().st_mtime < path.stat().st_mtime:
            kept.write_text(json.dumps(measure(load_checkpoint(path, args.device), args.n, seed)))
        scores = json.loads(kept.read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] if (folder / "log.jsonl").exists() else []
    return scores | {"recon_loss": line["recon"] for line in log if line["stage"] == checkpoint and "recon" in line}  # the last one

def markdown(rows: dict[str, list[dict]], columns: list[str]) -> str:
    """{title: scores by seed} -> a table: means over seeds and, in brackets, the difference to the base with its 95% t-interval over seeds, paired by
    seed; "open" where that touches zero. Under RecA, where SFT is there too, the difference to that."""
    lines, base = [], []
    for title, runs in rows.items():
        base, control = [] if title.startswith("base") else base, rows.get(title.replace("RecA", "SFT"), runs)
        means = [f"{sum(values) / len(values):.3f}" if None not in (values := [run.get(column) for run in runs]) else "" for column in columns]
        lines.append([title, *(mean + f" ({gain})" * bool(mean and gain) for mean, gain in zip(means, (difference(runs, base, column) for column in columns)))])
        if control is not runs:
            lines.append([f"{title} - {title.replace('RecA', 'SFT')}", *(difference(runs, control, column) for column in columns)])
        base = base or runs
    return pipes(["", *columns], lines)

def difference(runs: list[dict], others: list[dict], column: str) -> str:
    """The mean difference with its interval; nothing where a score is missing."""
    gains = [run[column] - other[column] for run, other in zip(runs, others) if column in run and column in other]
    if not gains:
        return ""
    mean, half = sum(gains) / len(gains), T95[len(gains) - 2] * statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return f"{mean:+.3f}" + ("" if half is None else f" ± {half:.3f}" + ", open" * (half >= abs(mean)))

def pipes(head: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])

def experiment(name: str, args) -> None:
    """Trains and scores what is not there yet, then assets/NAME.md and assets/NAME.png."""
    rows, columns, measure, picture = EXPERIMENTS[name]
    rows = {title: row for title, row in rows.items() if args.encoder or not row.startswith("clip/")}
    runs = list(dict.fromkeys(row.split("/")[0] for row in rows.values()))
    if unknown := set(args.runs.split()) - set(runs):
        raise ValueError(f"--runs {args.runs}: the experiment {name} has no run {min(unknown)}, it has {' '.join(runs)}")
    rows = {title: row for title, row in rows.items() if row.split("/")[0] in (args.runs.split() or runs)}
    by_seed = [{title: scores_of(row, seed, measure, args) for title, row in rows.items()} for seed in args.seeds]
    found = {title: [scores[title] for scores in by_seed] for title in rows}
    given = {"runs": args.runs, "train": args.train, "encoder": args.encoder, "data_dir": args.data_dir}
    command = f"python evaluate.py --experiment {name} --seeds {' '.join(map(str, args.seeds))} --n {args.n}" + "".join(f" --{k}={shlex.quote(v)}" for k, v in given.items() if v)
    text = f"`{command}`: seeds {', '.join(map(str, args.seeds))}, {args.n} cases each\n\n" + markdown(found, columns) + (broccoli_table(found) if name == "broccoli" else "")
    Path("assets").mkdir(exist_ok=True)
    (Path("assets") / f"{name}.md").write_text(text)
    print(text)
    seed = args.seeds[0]
    checkpoints = [load_checkpoint(make_run(row.split("/")[0], seed, args) / f"{row.split('/')[1]}.pt", args.device) for row in rows.values()]
    picture(checkpoints, list(rows), Path("assets") / f"{name}.png", seed, f"{command} (seed {seed})")

def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", nargs="+", help="one or more checkpoints of train.py")
    what.add_argument("--experiment", choices=EXPERIMENTS, help="train, score, and write assets/NAME.md and .png; what is done already is not done again")
    parser.add_argument("--n", type=int, default=96, help="cases of each category")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, scenes and noise")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of an experiment's runs, and of their prompts, scenes and noise")
    parser.add_argument("--runs", default="", help='only these runs of an experiment, and what they start from: --runs="main ar"')
    parser.add_argument("--out_dir", default="experiments", help="where an experiment's runs are, as s0/main, s0/pixels, ...")
    parser.add_argument("--train", default="", help='more options of train.py for all runs of an experiment: --train="--pretrain_steps 20 --reca_steps 5"')
    parser.add_argument("--encoder", default="", help="CLIP's weights: of the experiment `encoder`, for two more rows; of photographs (clip-b16)")
    parser.add_argument("--data_dir", default="", help="where the photographs are, train/ and val/; of --ckpt: if no longer where they were in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        if args.n < 1:
            raise ValueError(f"--n is {args.n}, it must be at least 1")
        if len(set(args.seeds)) < len(args.seeds) or len(args.seeds) > len(T95) + 1 or min(args.seeds) < 0:
            raise ValueError(f"--seeds {' '.join(map(str, args.seeds))}: give one to {len(T95) + 1} different seeds, at least 0")
        if args.experiment:
            return experiment(args.experiment, args)
        results = {}
        for path in args.ckpt:
            loaded = load_checkpoint(path, args.device)
            loaded.config["data_dir"] = args.data_dir or loaded.config["data_dir"]
            results[Path(path).stem] = evaluate(loaded, args.n, args.seed)
        print(table(results))
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)

if __name__ == "__main__":
    main()
