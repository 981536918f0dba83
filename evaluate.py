"""Scoring."""
import random
import torch
from einops import rearrange

from data import *

ERROR_LIMIT = 0.02


def read_grids(images, atlas):
    """Images (B, 3, H, W) -> cells (B, 9): analysis by synthesis; -1 where no content of a cell is near."""
    cells = rearrange(images, "b k (r h) (c w) -> b (r c) (k h w)", r=GRID, c=GRID)
    known = atlas.flatten(2)                                                     # (2, 49, P)
    P = known.shape[-1]
    error = torch.cdist(cells.flatten(0, 1)[None], known) ** 2 / P               # (2, B * 9, 49)
    best, which = error.min(-1)
    best, which = (rearrange(x, "g (b n) -> g b n", n=GRID * GRID) for x in (best, which))
    paper = best.sum(-1).argmin(0)                                               # (B,)
    pick = lambda x: x[paper, torch.arange(len(images))]
    return torch.where(pick(best) < ERROR_LIMIT, pick(which), -1)


def prompts(category, n, seed=0):
    rng = random.Random(f"prompts {category} {seed}")
    out = []
    usual = [(s, USUAL_COLOR[s]) for s in range(6)]
    for _ in range(n):
        kind = {"single": "single", "counting": "group", "color": "single", "dense": "several"}.get(category, "pair")
        while True:
            s = random_scene(rng, biased=False, kind=kind)
            if category not in ("color", "attribute") or all(USUAL_COLOR[t.shape] != t.color for t in s.things):
                break
        out.append(describe(s, rng, *{"color": (1, 0, 0), "attribute": (1, 0, 0), "position": (0, 1, 0), "dense": (1, 1, 0)}.get(category, (0, 0, 0))))
    return out

CATS = ["single", "two", "counting", "color", "position", "attribute", "dense"]

@torch.no_grad()
def score(model, vocab, atlas, n=120, seed=0, cats=CATS):
    from sample import sample_image
    out = {}
    model.eval()
    for c in cats:
        ps = prompts(c, n, seed)
        ids = torch.tensor([vocab.encode(p, model.cfg.text_len, strict=True) for p in ps])
        im = sample_image(model, model.text_prefix(ids), generator=torch.Generator().manual_seed(seed))
        grids = read_grids(im, atlas).tolist()
        out[c] = sum(holds(parse(p), g) for p, g in zip(ps, grids)) / n
    out["overall"] = sum(out[c] for c in CATS[:6]) / 6
    return out

@torch.no_grad()
def understanding(model, encoder, vocab, n=512):
    from sample import sample_words
    b = Shapes("test").__getitems__([(0, i) for i in range(n)])
    vw = model.visual_words(encoder(b["image"]).patch_tokens)
    ids = sample_words(model, model.visual_prefix(vw)).tolist()
    ok = {}
    ds = Shapes("test")
    texts = []
    for i in range(n):
        t = vocab.decode(ids[i]); c = parse(t); texts.append(t)
        ok.setdefault(ds.scene(i).kind, []).append(bool(c and is_full(c) and holds(c, b["grid"][i].tolist())))
    return {k: sum(v) / len(v) for k, v in ok.items()} | {"all": sum(map(sum, ok.values())) / n}, vw, texts, b
