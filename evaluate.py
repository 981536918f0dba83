"""Exact scores of checkpoints: what does a generated image hold, and is that what was asked for?

    python evaluate.py --ckpt out/pretrain.pt out/reca.pt --n 240 --json results.json

Six categories after GenEval (arXiv 2310.11513), here with a prompt, and more. All are shares in
[0, 1], but for psnr, which is in dB:

    single, two, counting   "a star", "a star and a circle", "three stars"
    color, attribute        in unusual colors: "a green star", "a green star and a red cross"
    position, overall       "a star left of a circle"; the mean of these six
    dense                   three objects, all colors and places (as DPG-Bench, arXiv 2403.05135)
    edit, edit_KIND         the instruction is followed, all else unchanged (as ImgEdit, arXiv
                            2505.20275); edit_direct: without saying the edited scene first
    understanding           a caption is true and complete, in any wording; _pairs: of pairs;
                            _shape, _color, _count, _arrangement: one attribute by itself
    reconstruction, psnr    an image keeps all objects when generated from its visual words
    object_recall           objects of which it keeps shape and color; _in_place: and cell
    tokenizer, _psnr        (ar, mask) an image keeps all objects through its codes alone
    codes_used              codes that occur

A cell holds the render that comes nearest in squared error, so no detector is needed; an image is
correct where its cells are exactly what was asked for. Photographs are reconstructed, and drawn
from their captions (t2i_); cosine of a photograph and its image, frechet (FID's formula) and mmd
(CMMD, arXiv 2401.09603, times 1000) of the two sets are of the encoder's pooled features.

# B batch, G cells of an image, A backgrounds, C contents of a cell, P pooled features
"""

import json
import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

import shapes
from cli import Parser, user_errors
from data import open_splits
from figures import image_grid
from model import resize_for_encoder
from sample import Checkpoint, caption_images, edit, reconstruct, sample_image, text_to_image
from shapes import EDITS, GRID, USUAL_COLOR, ParsedCaption, Scene, Shapes, parse_caption, to_grid

ERROR_LIMIT = 0.02  # mean squared error of a known cell; another shape or color is at 0.02 to 0.3
PHOTOS_AT_A_TIME = 128  # as many as sample.py samples at a time
SEED_STRIDE = 10_000  # image i of an evaluation with seed s has noise of seed SEED_STRIDE * s + i

# kind of scene, chances of `describe` to name colors, relations and places, only unusual colors
PROMPTS = {
    "single": ("single", (0, 0, 0), False),
    "two": ("pair", (0, 0, 0), False),
    "counting": ("group", (0, 0, 0), False),
    "color": ("single", (1, 0, 0), True),
    "position": ("pair", (0, 1, 0), False),
    "attribute": ("pair", (1, 0, 0), True),
    "dense": ("several", (1, 0, 1), False),
}
CATEGORIES = list(PROMPTS)[:6]


# ---------------------------------------------------------------- prompts, scenes, and reading them
def make_prompts(category: str, n: int, seed: int = 0) -> list[str]:
    """n prompts of a category, the same for the same seed."""
    kind, chances, unusual = PROMPTS[category]
    rng = random.Random(f"{category} {seed}")
    prompts = []
    while len(prompts) < n:
        scene = shapes.random_scene(rng, biased=False, kind=kind)
        if not unusual or all(item.color != USUAL_COLOR[item.shape] for item in scene.objects):
            prompts.append(shapes.describe(scene, rng, *chances))
    return prompts


def make_edits(n: int, seed: int = 0) -> list[tuple[Scene, str, Scene]]:
    """n edits, of all kinds in turn: a scene, the instruction, and the edited scene."""
    rngs = [random.Random(f"edit {seed} {i}") for i in range(n)]
    return [shapes.random_edit(rng, EDITS[i % len(EDITS)]) for i, rng in enumerate(rngs)]


def draw_scenes(scenes: list[Scene], image_size: int) -> torch.Tensor:
    """The true images of scenes, (B, 3, H, W) in [0, 1]."""
    backgrounds = torch.tensor([scene.background for scene in scenes])
    grids = torch.tensor(list(map(to_grid, scenes)))
    return shapes.render(grids, backgrounds, shapes.sprites(image_size // GRID))


def read_cells(images) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] -> cells (B, G) as in shapes.py, -1 where no render is near."""
    cells = rearrange(images, "b k (r h) (c w) -> (b r c) (k h w)", r=GRID, c=GRID)
    known = shapes.sprites(images.shape[-1] // GRID).flatten(2).to(images)  # (A, C, pixels)
    distance = torch.cdist(cells, known, compute_mode="donot_use_mm_for_euclid_dist")
    distance = rearrange(distance, "a (b g) c -> a b g c", b=len(images))
    error, content = (distance**2 / known.shape[-1]).min(-1)  # both (A, B, G)
    # all cells of an image are read on one background, the one that fits best
    best = error.sum(-1).argmin(0), torch.arange(len(images))
    return torch.where(error[best] < ERROR_LIMIT, content[best], -1)


def noise_seeds(seed: int, n: int) -> range:
    """Of n images: the same ones for all checkpoints."""
    return range(SEED_STRIDE * seed, SEED_STRIDE * seed + n)


def generate_and_check(loaded, prompts: list[str], seed: int) -> tuple[torch.Tensor, list[bool]]:
    """An image of each prompt (B, 3, H, W), and whether it holds exactly what was asked for."""
    seeds = noise_seeds(seed, len(prompts))
    images = text_to_image(loaded.model, loaded.vocabulary, prompts, seeds=seeds)
    grids = read_cells(images).tolist()
    return images, list(map(shapes.scene_matches, map(parse_caption, prompts), grids))


def caption_scenes(loaded, scenes: list[Scene]) -> list[str]:
    """What a checkpoint says of the true images of scenes."""
    images = draw_scenes(scenes, loaded.model.cfg.image_size)
    return caption_images(loaded.model, loaded.encoder, loaded.vocabulary, images)


# ---------------------------------------------------------------- means with their 95% intervals
def wilson_interval(share: float, n: int) -> list[float]:
    """Wilson's 95% interval of a share of n cases."""
    z = 1.96
    scale = 1 + z * z / n
    center = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [round((center - half) / scale, 4), round((center + half) / scale, 4)]


def mean_with_ci(values) -> tuple[float, int, list[float]]:
    """Mean, cases and interval of one value a case: Wilson's of booleans, of numbers the normal."""
    values = torch.as_tensor(values)
    n = len(values)
    if values.dtype == torch.bool:
        share = values.sum().item() / n
        return share, n, wilson_interval(share, n)
    mean = values.mean().item()
    half = 1.96 * values.std().item() / n**0.5 if n > 1 else math.inf
    return mean, n, [round(mean - half, 4), round(mean + half, 4)]


def summarize(cases: dict) -> dict:
    """{name: one value a case} -> {name: mean, ..., "cases": {}, "interval": {}}, both by name."""
    means, counts, intervals = {}, {}, {}
    for name, values in cases.items():
        means[name], counts[name], intervals[name] = mean_with_ci(values)
    return means | {"cases": counts, "interval": intervals}


def write_json(path, results) -> None:
    """Writes strict JSON: nan and the infinities, which it cannot hold, become null."""
    strict = json.loads(json.dumps(results), parse_constant=lambda name: None)
    Path(path).write_text(json.dumps(strict, indent=1, allow_nan=False))


# ---------------------------------------------------------------- the shapes world
@torch.no_grad()
def evaluate(loaded, n: int = 240, seed: int = 0) -> dict:
    """All scores of a checkpoint: {name: value}, with "cases" and 95% "interval"s by name."""
    if loaded.config["dataset"] != "shapes":
        return evaluate_photographs(loaded, n, seed)
    test = Shapes("test", loaded.model.cfg.image_size)
    scenes = [test.scene(seed * n + i) for i in range(n)]
    cases = {}
    for category in PROMPTS:
        _, cases[category] = generate_and_check(loaded, make_prompts(category, n, seed), seed)
    cases |= understanding_cases(loaded, scenes)
    cases |= reconstruction_cases(loaded, scenes, seed)
    cases |= edit_cases(loaded, n, seed)
    if loaded.model.tokenizer:
        cases |= tokenizer_cases(loaded.model, test)
    results = summarize(cases)
    total = sum(results[category] for category in CATEGORIES)
    return {"overall": total / len(CATEGORIES)} | results


def understanding_cases(loaded, scenes: list[Scene]) -> dict:
    """Captions of scenes: true and complete, and by attribute."""
    cases = defaultdict(list)
    for scene, caption in zip(scenes, caption_scenes(loaded, scenes), strict=True):
        parsed = parse_caption(caption)
        is_true = shapes.scene_matches(parsed, to_grid(scene))
        is_right = is_true and shapes.is_complete_caption(parsed)
        cases["understanding"].append(is_right)
        if scene.kind == "pair":
            cases["understanding_pairs"].append(is_right)
        for attribute, is_right in correct_attributes(parsed, scene).items():
            cases[f"understanding_{attribute}"].append(is_right)
    return cases


def correct_attributes(parsed: ParsedCaption | None, scene: Scene) -> dict[str, bool]:
    """Whether a caption is right on each attribute by itself. A group has no arrangement."""
    said, relations = parsed or ((), ())
    colors = {(item.shape, item.color) for item in scene.objects}
    correct = {"shape": {p.shape for p in said} == {item.shape for item in scene.objects}}
    correct["color"] = {(p.shape, p.color) for p in said} == colors
    correct["count"] = sum(p.count for p in said) == len(scene.objects)
    if scene.kind != "group":
        colorless = ParsedCaption(tuple(p._replace(color=None) for p in said), relations)
        is_true = shapes.scene_matches(colorless, to_grid(scene))
        says_places = all(p.cell is not None for p in said)
        correct["arrangement"] = is_true and (says_places or bool(relations))
    return correct


def reconstruction_cases(loaded, scenes: list[Scene], seed: int) -> dict:
    """Scenes generated again from their visual words; recall is counted object by object."""
    images = draw_scenes(scenes, loaded.model.cfg.image_size)
    seeds = noise_seeds(seed, len(images))
    generated = reconstruct(loaded.model, loaded.encoder, images, seeds=seeds).cpu()
    cases = defaultdict(list, psnr=psnr(generated, images))
    for grid, target in zip(read_cells(generated).tolist(), map(to_grid, scenes), strict=True):
        cases["reconstruction"].append(grid == target)
        in_place = [a == b for a, b in zip(grid, target, strict=True) if b > 0]
        cases["object_recall_in_place"] += in_place
        found = (Counter(grid) & Counter(cell for cell in target if cell > 0)).total()
        cases["object_recall"] += [i < found for i in range(len(in_place))]
    return cases


def psnr(images, targets) -> torch.Tensor:
    """Peak signal-to-noise ratio of images (B, 3, H, W) in [0, 1], in dB, at most 60: (B,)."""
    error = (images - targets).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-6).log10()


def edit_cases(loaded, n: int, seed: int) -> dict:
    """Edits: the edited scene said first and then generated, or generated at once."""
    before, instructions, after = zip(*make_edits(n, seed), strict=True)
    images = draw_scenes(before, loaded.model.cfg.image_size)
    models = loaded.model, loaded.encoder, loaded.vocabulary
    cases = {}
    for name, think in {"edit": True, "edit_direct": False}.items():
        edited = edit(*models, images, instructions, think, seeds=noise_seeds(seed, n))
        pairs = zip(read_cells(edited).tolist(), after, strict=True)
        cases[name] = [grid == to_grid(scene) for grid, scene in pairs]
    for i, kind in enumerate(EDITS[:n]):
        cases[f"edit_{kind}"] = cases["edit"][i :: len(EDITS)]
    return cases


def tokenizer_cases(model, test: Shapes) -> dict:
    """All test images, encoded to codes and decoded."""
    batch = test.__getitems__([(0, i) for i in range(len(test))])
    codes = model.tokenizer.encode(batch["image"].to(model.device))
    decoded = model.tokenizer.decode(codes).cpu()
    kept = (read_cells(decoded) == batch["grid"]).all(1)
    used = torch.isin(torch.arange(model.cfg.codes), codes.cpu())
    return {"tokenizer": kept, "codes_used": used, "tokenizer_psnr": psnr(decoded, batch["image"])}


# ---------------------------------------------------------------- photographs
def held_out_photographs(loaded, n: int) -> tuple:
    """The test split, and the keys of n photographs from all over it, or of as many as it has."""
    keys = ["data_dir", "image_size", "seed", "text_len", "cache_dir", "caption_column"]
    options = {key: loaded.config[key] for key in keys if key in loaded.config}
    splits = open_splits(loaded.config["dataset"], vocabulary=loaded.vocabulary, **options)
    dataset = splits["test"]
    n = min(n, len(dataset))
    return dataset, [(0, i * len(dataset) // n) for i in range(n)]


def evaluate_photographs(loaded, n: int, seed: int) -> dict:
    """The scores of held-out photographs, reconstructed, and generated from their captions."""
    model = loaded.model
    dataset, keys = held_out_photographs(loaded, n)
    seeds = noise_seeds(seed, len(keys))
    columns = []
    starts = range(0, len(keys), PHOTOS_AT_A_TIME)
    for start in tqdm(starts, f"{loaded.stage}: reconstructs and draws", unit="batch"):
        part = slice(start, start + PHOTOS_AT_A_TIME)
        batch = dataset.__getitems__(keys[part])
        images = batch["image"]
        again = reconstruct(model, loaded.encoder, images, seeds=seeds[part])
        prefix = model.text_prefix(batch["caption"].to(model.device))
        drawn = sample_image(model, prefix, seeds=seeds[part])
        columns.append([psnr(again.cpu(), images)])
        for found in (images, again, drawn):
            found = resize_for_encoder(found.to(model.device), model.cfg.encoder_size)
            features = loaded.encoder(found)
            pooled = features.patch_tokens.mean(1) if features.pooled is None else features.pooled
            columns[-1].append(pooled.float().cpu())
    quality, real, again, drawn = map(torch.cat, zip(*columns, strict=True))
    cases = {"psnr": quality}
    distances = {}
    for name, fake in {"": again, "t2i_": drawn}.items():
        cases[f"{name}cosine"] = F.cosine_similarity(real, fake)
        distances[f"{name}frechet"] = frechet_distance(real, fake)
        distances[f"{name}mmd"] = 1000 * squared_mmd(real, fake)
    return distances | summarize(cases)


def frechet_distance(a, b) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, P) (1706.08500, eq. 6)."""
    # biased upwards for small n
    if min(len(a), len(b)) < 2 or not (a.sum() + b.sum()).isfinite():  # LAPACK would abort
        return math.nan
    A, B = a.double().T.cov(), b.double().T.cov()
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    means = (a - b).double().mean(0).square().sum()
    return (means + A.trace() + B.trace() - 2 * root).item()


def squared_mmd(a, b) -> float:
    """Unbiased squared maximum mean discrepancy of features (n, P), scaled to length sqrt(P)."""
    n, P = a.shape
    a, b = (F.normalize(features.double(), dim=1) * P**0.5 for features in (a, b))
    distances = torch.cdist(a, a), torch.cdist(b, b), torch.cdist(a, b)
    # the kernel is a Gaussian of width 10; its diagonal is left out
    aa, bb, ab = ((-(d**2) / 200).exp().sum() for d in distances)
    within = (aa - n) / (n * (n - 1)) + (bb - n) / (n * (n - 1))
    return (within - 2 * ab / (n * n)).item()


# ---------------------------------------------------------------- a table, and pictures
TITLES = {"pretrain": "base", "sft": "SFT", "reca": "RecA"}
DISTANCES = ["cosine", "frechet", "mmd", "t2i_cosine", "t2i_frechet", "t2i_mmd"]
COLUMNS = [*CATEGORIES, "overall", "dense", "edit", "edit_direct", "reconstruction"]
COLUMNS += ["object_recall", "object_recall_in_place", "understanding", "psnr", *DISTANCES]
COLUMNS += ["tokenizer", "tokenizer_psnr", "codes_used"]
KINDS = {"single": "one object", "group": "two to four alike", "pair": "a pair, face to face"}
KINDS |= {"spread": "two objects anywhere", "several": "three objects anywhere"}


def table(results: dict) -> str:
    """results.json as aligned text, a checkpoint a line."""
    common = set.intersection(*map(set, results.values()))
    heads = {column: f"  {column:>6}" for column in COLUMNS if column in common}
    lines = [" " * 8 + "".join(heads.values())]
    for name, row in results.items():
        cells = [f"{row[column]:{len(head)}.3f}" for column, head in heads.items()]
        lines.append(f"{TITLES.get(name, name):8}" + "".join(cells))
    return "\n".join(lines)


def save_columns(columns, captions, titles, path, note, transpose=False, **options) -> None:
    """A picture of columns (images, which of them are right), a row of them for each caption."""
    titles = [TITLES.get(title, title) for title in titles]
    total = len(columns[0][0])
    count = math.ceil(total / len(captions))
    rows, marks = [], []
    for i in range(0, total, count):
        rows.append([images[i : i + count] for images, _ in columns])
        marks.append([correct[i : i + count] for _, correct in columns])
    if transpose:
        rows, marks = (list(zip(*cells, strict=True)) for cells in (rows, marks))
        captions, titles = titles, captions
    image_grid(rows, captions, titles, 2, note, correct=marks, **options).save(path)


def compare(checkpoints: list, names: list[str], path, seed: int = 0, prompts=()) -> None:
    """A picture of what checkpoints generate from the same prompts and noise, a prompt a row."""
    if checkpoints[0].config["dataset"] != "shapes":
        return compare_reconstructions(checkpoints, names, path, seed)
    is_wide = len(checkpoints) > 4  # then the checkpoints are the rows
    categories = ["color", "attribute", "position", "counting", "dense"]
    for category in [] if prompts else categories[: 3 if is_wide else 5]:
        prompts = [*prompts, *make_prompts(category, 1 if is_wide else 2, seed + 7)]
    repeated = [prompt for prompt in prompts for _ in range(4)]
    columns = [generate_and_check(loaded, repeated, seed) for loaded in checkpoints]
    note = f"Tick: exactly what the prompt asks for. Seed {seed}: the same noise for all."
    save_columns(columns, prompts, names, path, note, transpose=is_wide)


def compare_reconstructions(checkpoints: list, names: list[str], path, seed: int = 0) -> None:
    """The paper's figure 5: images, and what checkpoints generate from their visual words alone."""
    first = checkpoints[0]
    is_shapes = first.config["dataset"] == "shapes"
    note = f"Generated from visual words alone. Seed {seed}: the same noise for all."
    if is_shapes:
        note += " Tick: all objects, colors and places are kept."
        rng = random.Random(f"reconstructions {seed}")
        scenes = [shapes.random_scene(rng, False, kind) for kind in KINDS for _ in range(4)]
        images = draw_scenes(scenes, first.model.cfg.image_size)
        captions = list(KINDS.values())
    else:
        dataset, keys = held_out_photographs(first, 16)
        batch = dataset.__getitems__(keys)
        images = batch["image"]
        texts = map(first.vocabulary.decode, batch["caption"].tolist())
        texts = [text.replace("<unk>", "...") for text in texts]
        pairs = ["; ".join(texts[i : i + 2]) for i in range(0, len(texts), 2)]
        captions = [f"class, not shown to the model: {pair}" for pair in pairs]
    columns = [(images, [])]
    for loaded in checkpoints:
        seeds = noise_seeds(seed, len(images))
        again = reconstruct(loaded.model, loaded.encoder, images, seeds=seeds).cpu()
        kept = (read_cells(again) == read_cells(images)).all(1).tolist() if is_shapes else []
        columns.append((again, kept))
    save_columns(columns, captions, ["input", *names], path, note)


def main(argv=None) -> None:
    parser = Parser(description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="one or more checkpoints of train.py")
    add("--n", type=int, default=96, help="cases of each category (96)")
    add("--seed", type=int, default=0, help="of prompts, scenes and noise (0)")
    add("--json", help="where to write the results")
    add("--data_dir", default="", help="where the photographs are, if moved since training")
    add("--encoder", default="", help="where the encoder's public weights are, if moved")
    add("--device", default=device, help=f"({device})")
    args = parser.parse_args(argv)
    if args.n < 1:
        parser.error(f"--n is {args.n}, it must be at least 1")
    with user_errors():
        results = {}
        for path in args.ckpt:
            loaded = Checkpoint(path, args.device, encoder=args.encoder)
            loaded.config["data_dir"] = args.data_dir or loaded.config["data_dir"]
            results[Path(path).stem] = evaluate(loaded, args.n, args.seed)
        print(table(results))
        if args.json:
            write_json(args.json, results)


if __name__ == "__main__":
    main()
