"""Exact scores of checkpoints: what does a generated image hold, and is that what was asked for?

    python evaluate.py --ckpt out/pretrain.pt out/reca.pt --n 240 --json results.json

Six categories after GenEval (arXiv 2310.11513), here with a prompt, and more. All are shares in
[0, 1], but for psnr, which is in dB:

    single, two      "a star", "a star and a circle"
    counting         "three stars"
    color            "a green star": an unusual color
    position         "a star left of a circle"
    attribute        "a green star and a red cross": two unusual colors
    overall          the mean of these six
    dense            three objects, all colors and places (as DPG-Bench, arXiv 2403.05135)
    edit             the instruction is followed, all else unchanged (as ImgEdit, arXiv 2505.20275);
                     edit_direct: without saying the edited scene first; edit_KIND: one kind
    understanding    a caption is true and complete, in any wording; understanding_pairs: of pairs;
                     _shape, _color, _count, _arrangement: one attribute by itself
    reconstruction   an image keeps all objects when generated again from its visual words; psnr
    object_recall    objects of which it keeps shape and color; object_recall_in_place: and cell
    tokenizer        (ar, mask) images that keep all objects through their codes alone;
                     tokenizer_psnr; codes_used: codes that occur

No detector is needed: a cell's content is the render that comes nearest in squared error, and an
image is correct where its cells are exactly what was asked for. Photographs have no such truth, see
`evaluate_photographs`. What only one experiment measures is in experiments.py.

# B batch, G = GRID * GRID cells, P width of the encoder's pooled features
"""

import argparse
import json
import math
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

import shapes
from data import make_dataset
from figures import image_grid
from model import resize_for_encoder
from sample import caption_images, edit, load_checkpoint, reconstruct, sample_image, text_to_image
from shapes import EDITS, GRID, USUAL_COLOR, ParsedCaption, Scene, Shapes, parse_caption, to_grid

ERROR_LIMIT = 0.02  # mean squared error of a known cell; another shape or color is at 0.02 to 0.3
CATEGORIES = ["single", "two", "counting", "color", "position", "attribute"]

# A category's kind of scene, the chances of `describe` that its prompts name colors, relations and
# places, and whether all its colors are unusual.
PROMPTS = {
    "single": ("single", (0, 0, 0), False),
    "two": ("pair", (0, 0, 0), False),
    "counting": ("group", (0, 0, 0), False),
    "color": ("single", (1, 0, 0), True),
    "position": ("pair", (0, 1, 0), False),
    "attribute": ("pair", (1, 0, 0), True),
    "dense": ("several", (1, 0, 1), False),
}


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


def make_atlas(loaded) -> torch.Tensor:
    """All cells that the images of a checkpoint may hold, see shapes.sprites."""
    return shapes.sprites(loaded.model.cfg.image_size // GRID)


def draw_scenes(scenes: list[Scene], atlas) -> torch.Tensor:
    """The true images of scenes, (B, 3, H, W) in [0, 1]."""
    backgrounds = torch.tensor([scene.background for scene in scenes])
    return shapes.render(torch.tensor(list(map(to_grid, scenes))), backgrounds, atlas)


def read_cells(images, atlas) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] -> cells (B, G) as in shapes.py, -1 where no render is near."""
    cells = rearrange(images, "b k (r h) (c w) -> (b r c) (k h w)", r=GRID, c=GRID)
    known = atlas.flatten(2).to(images)  # (backgrounds, contents, pixels)
    distance = torch.cdist(cells, known, compute_mode="donot_use_mm_for_euclid_dist")
    error, content = (distance**2 / known.shape[-1]).min(-1)  # both (backgrounds, B G)
    error = rearrange(error, "g (b n) -> g b n", n=GRID * GRID)
    content = rearrange(content, "g (b n) -> g b n", n=GRID * GRID)
    # all cells of an image are read on one background, the one that fits best
    best = error.sum(-1).argmin(0), torch.arange(len(images))
    return torch.where(error[best] < ERROR_LIMIT, content[best], -1)


def generate_and_check(loaded, prompts: list[str], seed: int) -> tuple[torch.Tensor, list[bool]]:
    """An image of each prompt (B, 3, H, W), and whether it holds exactly what was asked for."""
    noise = torch.Generator().manual_seed(seed)
    images = text_to_image(loaded.model, loaded.vocabulary, prompts, generator=noise)
    grids = read_cells(images, make_atlas(loaded)).tolist()
    return images, list(map(shapes.scene_matches, map(parse_caption, prompts), grids))


def caption_scenes(loaded, scenes: list[Scene]) -> list[str]:
    """What a checkpoint says of the true images of scenes."""
    images = draw_scenes(scenes, make_atlas(loaded))
    return caption_images(loaded.model, loaded.encoder, loaded.vocabulary, images)


# ---------------------------------------------------------------- means with their 95% intervals
def wilson_interval(share: float, n: int) -> list[float]:
    """Wilson's 95% interval of a share of n cases."""
    z = 1.96
    scale = 1 + z * z / n
    center = share + z * z / (2 * n)
    variance = share * (1 - share) / n + z * z / (4 * n * n)
    half = z * math.sqrt(variance)
    return [round((center - half) / scale, 4), round((center + half) / scale, 4)]


def accuracy_with_ci(correct: list[bool]) -> tuple[float, int, list[float]]:
    """Right or wrong for each case, at least one -> share right, cases, interval."""
    share = sum(correct) / len(correct)
    return share, len(correct), wilson_interval(share, len(correct))


def mean_with_ci(values) -> tuple[float, int, list[float]]:
    """Numbers that are no shares -> mean, cases, normal interval."""
    values = torch.as_tensor(values)
    mean = values.mean().item()
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.inf
    return mean, len(values), [round(mean - half, 4), round(mean + half, 4)]


def psnr_with_ci(images, targets) -> tuple[float, int, list[float]]:
    """Peak signal-to-noise ratio of images (B, 3, H, W) in [0, 1], in dB, at most 60."""
    error = (images - targets).square().flatten(1).mean(1)
    return mean_with_ci(-10 * error.clamp(min=1e-6).log10())


def to_results(metrics: dict[str, tuple]) -> dict:
    """{name: (value, cases, interval)} -> {name: value, ..., "cases": {}, "interval": {}}."""
    results = {name: value for name, (value, _, _) in metrics.items()}
    results["cases"] = {name: cases for name, (_, cases, _) in metrics.items()}
    results["interval"] = {name: interval for name, (_, _, interval) in metrics.items()}
    return results


# ---------------------------------------------------------------- the shapes world
@torch.no_grad()
def evaluate(loaded, n: int = 240, seed: int = 0) -> dict:
    """All scores of a checkpoint: {name: value}, with "cases" and 95% "interval"s by name.

    loaded: see sample.load_checkpoint. Prompts, scenes and noise depend on n and seed alone: two
    checkpoints are compared on the same ones.
    """
    if loaded.config["dataset"] != "shapes":
        return evaluate_photographs(loaded, n, seed)
    test = Shapes("test", loaded.model.cfg.image_size)
    scenes = [test.scene(seed * n + i) for i in range(n)]
    metrics = text_to_image_metrics(loaded, n, seed)
    metrics |= understanding_metrics(loaded, scenes)
    metrics |= reconstruction_metrics(loaded, scenes, seed)
    metrics |= edit_metrics(loaded, n, seed)
    if loaded.model.tokenizer:
        metrics |= tokenizer_metrics(loaded.model, test)
    overall = sum(metrics[category][0] for category in CATEGORIES) / len(CATEGORIES)
    return {"overall": overall} | to_results(metrics)


def text_to_image_metrics(loaded, n: int, seed: int) -> dict:
    """The six categories and dense: the share of prompts that are met exactly."""
    metrics = {}
    for category in PROMPTS:
        _, correct = generate_and_check(loaded, make_prompts(category, n, seed), seed)
        metrics[category] = accuracy_with_ci(correct)
    return metrics


def understanding_metrics(loaded, scenes: list[Scene]) -> dict:
    """Captions of scenes: true and complete, and by attribute."""
    correct = defaultdict(list)
    for scene, caption in zip(scenes, caption_scenes(loaded, scenes), strict=True):
        parsed = parse_caption(caption)
        is_true = shapes.scene_matches(parsed, to_grid(scene))
        is_right = is_true and shapes.is_complete_caption(parsed)
        correct["understanding"].append(is_right)
        if scene.kind == "pair":
            correct["understanding_pairs"].append(is_right)
        for attribute, value in correct_attributes(parsed, scene).items():
            correct[f"understanding_{attribute}"].append(value)
    return {name: accuracy_with_ci(values) for name, values in correct.items()}


def correct_attributes(parsed: ParsedCaption | None, scene: Scene) -> dict[str, bool]:
    """Whether a caption is right on each attribute by itself. A group has no arrangement."""
    said, relations = (parsed.phrases, parsed.relations) if parsed else ((), ())
    objects = scene.objects
    correct = {"shape": {p.shape for p in said} == {item.shape for item in objects}}
    colors = {(item.shape, item.color) for item in objects}
    correct["color"] = {(p.shape, p.color) for p in said} == colors
    correct["count"] = sum(p.count for p in said) == len(objects)
    if scene.kind != "group":
        colorless = ParsedCaption(tuple(p._replace(color=None) for p in said), relations)
        is_true = shapes.scene_matches(colorless, to_grid(scene))
        says_places = bool(said) and all(p.cell is not None for p in said)
        correct["arrangement"] = is_true and (says_places or bool(relations))
    return correct


def reconstruction_metrics(loaded, scenes: list[Scene], seed: int) -> dict:
    """Scenes generated again from their visual words; recall is counted object by object."""
    atlas = make_atlas(loaded)
    images = draw_scenes(scenes, atlas)
    noise = torch.Generator().manual_seed(seed)
    generated = reconstruct(loaded.model, loaded.encoder, images, generator=noise).cpu()
    grids = read_cells(generated, atlas).tolist()
    correct = defaultdict(list)
    for grid, target in zip(grids, map(to_grid, scenes), strict=True):
        correct["reconstruction"].append(grid == target)
        wanted = Counter(cell for cell in target if cell > 0)
        found = (wanted & Counter(grid)).total()
        correct["object_recall"] += [i < found for i in range(wanted.total())]
        in_place = [a == b for a, b in zip(grid, target, strict=True) if b > 0]
        correct["object_recall_in_place"] += in_place
    metrics = {name: accuracy_with_ci(values) for name, values in correct.items()}
    return metrics | {"psnr": psnr_with_ci(generated, images)}


def edit_metrics(loaded, n: int, seed: int) -> dict:
    """Edits: the edited scene said first and then generated, or generated at once."""
    atlas = make_atlas(loaded)
    before, instructions, after = zip(*make_edits(n, seed), strict=True)
    images = draw_scenes(before, atlas)
    models = loaded.model, loaded.encoder, loaded.vocabulary
    correct = {}
    for name, think in {"edit": True, "edit_direct": False}.items():
        noise = torch.Generator().manual_seed(seed)
        edited = edit(*models, images, instructions, think, generator=noise)
        grids = read_cells(edited, atlas).tolist()
        correct[name] = [grid == to_grid(scene) for grid, scene in zip(grids, after, strict=True)]
    for i, kind in enumerate(EDITS[:n]):
        correct[f"edit_{kind}"] = correct["edit"][i :: len(EDITS)]
    return {name: accuracy_with_ci(values) for name, values in correct.items()}


def tokenizer_metrics(model, test: Shapes) -> dict:
    """All test images, encoded to codes and decoded."""
    batch = test.__getitems__([(0, i) for i in range(len(test))])
    codes = model.tokenizer.encode(batch["image"].to(model.device))
    decoded = model.tokenizer.decode(codes).cpu()
    kept = (read_cells(decoded, test.atlas) == batch["grid"]).all(1)
    used = set(codes.flatten().tolist())
    return {
        "tokenizer": accuracy_with_ci(kept.tolist()),
        "codes_used": accuracy_with_ci([code in used for code in range(model.cfg.codes)]),
        "tokenizer_psnr": psnr_with_ci(decoded, batch["image"]),
    }


# ---------------------------------------------------------------- photographs
def held_out_photographs(loaded, n: int) -> dict:
    """A batch of n photographs from all over the test split, or of as many as there are."""
    cfg = loaded.config
    options = {key: cfg[key] for key in ("data_dir", "image_size", "seed", "text_len", "cache_dir")}
    dataset = make_dataset(cfg["dataset"], "test", vocabulary=loaded.vocabulary, **options)
    n = min(n, len(dataset))
    return dataset.__getitems__([(0, i * len(dataset) // n) for i in range(n)])


def evaluate_photographs(loaded, n: int, seed: int) -> dict:
    """Held-out photographs, reconstructed, and generated from their captions (t2i_).

    psnr      of the reconstruction, in dB
    cosine    of the encoder's pooled features of photograph and image, mean: semantic likeness
    frechet   between the two sets of these features (FID's formula, with this encoder)
    mmd       squared kernel distance of the same sets (CMMD, arXiv 2401.09603), times 1000
    """
    model = loaded.model
    batch = held_out_photographs(loaded, n)
    images = batch["image"]
    noise = torch.Generator().manual_seed(seed)
    generated = {"": reconstruct(model, loaded.encoder, images, generator=noise)}
    prefix = model.text_prefix(batch["caption"].to(model.device))
    generated["t2i_"] = sample_image(model, prefix, torch.Generator().manual_seed(seed))

    real = pooled_features(loaded, images)
    metrics = {"psnr": psnr_with_ci(generated[""].cpu(), images)}
    distances = {}
    for name, sampled in generated.items():
        fake = pooled_features(loaded, sampled)
        metrics[f"{name}cosine"] = mean_with_ci(F.cosine_similarity(real, fake))
        distances[f"{name}frechet"] = frechet_distance(real, fake)
        distances[f"{name}mmd"] = 1000 * squared_mmd(real, fake)
    return distances | to_results(metrics)


def pooled_features(loaded, images) -> torch.Tensor:
    """What the encoder pools from images, or the mean of its patch tokens: (B, P) on the CPU."""
    rows = []
    for chunk in images.to(loaded.model.device).split(64):
        features = loaded.encoder(resize_for_encoder(chunk, loaded.model.cfg.encoder_size))
        pooled = features.patch_tokens.mean(1) if features.pooled is None else features.pooled
        rows.append(pooled.float().cpu())
    return torch.cat(rows)


def frechet_distance(a, b) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features (n, P) (arXiv 1706.08500, eq. 6).

    Biased upwards for small n. nan for fewer than two rows, or for features that are not finite.
    """
    if min(len(a), len(b)) < 2 or not (a.sum() + b.sum()).isfinite():  # LAPACK would abort
        return math.nan
    A = a.double().T.cov()
    B = b.double().T.cov()
    root = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()
    means = (a - b).double().mean(0).square().sum()
    return (means + A.trace() + B.trace() - 2 * root).item()


def squared_mmd(a, b, sigma: float = 10.0) -> float:
    """Squared maximum mean discrepancy of features (n, P), scaled to length sqrt(P).

    Gaussian kernel; without its diagonal, so unbiased.
    """
    a, b = (F.normalize(x.double(), dim=1) * x.shape[1] ** 0.5 for x in (a, b))

    def kernel_sum(x, y):
        return (-(torch.cdist(x, y) ** 2) / (2 * sigma**2)).exp().sum()

    n, m = len(a), len(b)
    within_a = (kernel_sum(a, a) - n) / (n * (n - 1))
    within_b = (kernel_sum(b, b) - m) / (m * (m - 1))
    return (within_a + within_b - 2 * kernel_sum(a, b) / (n * m)).item()


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
    columns = [column for column in COLUMNS if column in common]
    widths = [max(len(column), 6) + 2 for column in columns]
    lines = [" " * 8 + "".join(map(str.rjust, columns, widths))]
    for name, row in results.items():
        cells = [f"{row[column]:.3f}" for column in columns]
        lines.append(f"{TITLES.get(name, name):8}" + "".join(map(str.rjust, cells, widths)))
    return "\n".join(lines)


def split_rows(columns: list, count: int) -> list[list]:
    """Columns of images, or of marks -> rows: the next `count` of each column."""
    rows = []
    for start in range(0, len(columns[-1]), count):
        rows.append([column[start : start + count] for column in columns])
    return rows


def compare(checkpoints: list, names: list[str], path, seed: int = 0, prompts=()) -> None:
    """A picture of what checkpoints generate from the same prompts and noise.

    A prompt a row, a checkpoint a column; more than four checkpoints: the other way round.
    """
    if checkpoints[0].config["dataset"] != "shapes":
        return compare_reconstructions(checkpoints, names, path, seed)
    is_wide = len(checkpoints) > 4
    categories = ["color", "attribute", "position", "counting", "dense"]
    for category in [] if prompts else categories[: 3 if is_wide else 5]:
        prompts = [*prompts, *make_prompts(category, 1 if is_wide else 2, seed + 7)]
    repeated = [prompt for prompt in prompts for _ in range(4)]
    generated = [generate_and_check(loaded, repeated, seed) for loaded in checkpoints]
    rows = split_rows([images for images, _ in generated], 4)
    marks = split_rows([correct for _, correct in generated], 4)
    captions = prompts, [TITLES.get(name, name) for name in names]
    if is_wide:
        rows = list(map(list, zip(*rows, strict=True)))
        marks = list(zip(*marks, strict=True))
        captions = captions[::-1]
    note = f"Tick: exactly what the prompt asks for. Seed {seed}: the same noise for all."
    image_grid(rows, *captions, 2, note, correct=marks).save(path)


def compare_reconstructions(checkpoints: list, names: list[str], path, seed: int = 0) -> None:
    """The paper's figure 5: images, and what checkpoints generate from their visual words alone.

    Four scenes of each kind, or 16 held-out photographs.
    """
    first = checkpoints[0]
    is_shapes = first.config["dataset"] == "shapes"
    note = f"Generated from visual words alone. Seed {seed}: the same noise for all."
    if is_shapes:
        note += " Tick: all objects, colors and places are kept."
        rng = random.Random(f"reconstructions {seed}")
        scenes = [shapes.random_scene(rng, False, kind) for kind in KINDS for _ in range(4)]
        images = draw_scenes(scenes, make_atlas(first))
        captions = list(KINDS.values())
    else:
        batch = held_out_photographs(first, 16)
        images = batch["image"]
        texts = [first.vocabulary.decode(ids) for ids in batch["caption"].tolist()]
        pairs = ["; ".join(texts[i : i + 2]) for i in range(0, len(texts), 2)]
        captions = [f"class, not shown to the model: {pair}" for pair in pairs]
    columns, marks = [images], [[]]
    for loaded in checkpoints:
        noise = torch.Generator().manual_seed(seed)
        columns.append(reconstruct(loaded.model, loaded.encoder, images, generator=noise).cpu())
        if is_shapes:
            atlas = make_atlas(loaded)
            kept = read_cells(columns[-1], atlas) == read_cells(images, atlas)
            marks.append(kept.all(1).tolist())
    count = 4 if is_shapes else 2
    titles = ["input", *(TITLES.get(name, name) for name in names)]
    rows = split_rows(columns, count)
    image_grid(rows, captions, titles, 2, note, correct=split_rows(marks, count)).save(path)


# ---------------------------------------------------------------- the command line
def main(argv=None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="one or more checkpoints of train.py")
    add("--n", type=int, default=96, help="cases of each category (96)")
    add("--seed", type=int, default=0, help="of prompts, scenes and noise (0)")
    add("--json", help="where to write the results")
    add("--data_dir", default="", help="where the photographs are, if moved since training")
    add("--device", default=device, help=f"({device})")
    args = parser.parse_args(argv)
    try:
        if args.n < 1:
            raise ValueError(f"--n is {args.n}, it must be at least 1")
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
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
