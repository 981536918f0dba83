"""Text to image, image to image, image to text: everything that a trained checkpoint can do.

    python sample.py --ckpt out/reca.pt --prompt "a yellow star left of a red circle" --n 16 --out grid.png
    python sample.py --ckpt out/reca.pt --reconstruct a.png b.png      # what the model sees of an image, drawn again
    python sample.py --ckpt out/reca.pt --edit a.png --prompt "a red circle"
    python sample.py --ckpt out/reca.pt --caption a.png b.png

Every sampler reads the prefix once and reuses its keys and values in all steps, with and without the condition
(classifier-free guidance, arXiv 2207.12598). Noise is drawn on the CPU: a seed means the same picture on every device.

# B batch, T prefix length, K visual words, N image positions, V words, P pixels of a patch
"""
import argparse
import math
import os
import pickle
import sys
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import functional as TF
from tqdm import tqdm

from data import BOS, EOS, PAD, Vocabulary
from encoder import ViT, ViTConfig, load_encoder
from model import ModelConfig, UnifiedModel, unpatchify
from recon_loss import interpolate, null_caption

FORMAT = 1          # of a checkpoint, see load_checkpoint
MAX_BATCH = 128     # images drawn at a time
CHOICE_NOISE = 4.5  # mask: of the confidence, arXiv 2202.04200
TIME_POWER = 1.5    # t_i = (i / steps)^1.5: more steps near the noise, where layout and color are decided
HEAD_STEPS = 25     # mar: Euler steps of the head for each group of patches


@dataclass(frozen=True)
class Sampling:
    """How to draw; a paradigm reads what it needs."""
    cfg_scale: float = 2.5    # guidance; 1 is none
    steps: int = 25           # passes through the transformer (flow, mask, mar); ar takes one a code
    renew: float = 0.0        # flow, mar: share of the noise drawn anew at each step; 0 is Euler's, 1 forgets the noise of before
    temperature: float = 1.0  # of the codes (ar, mask: 0 is greedy) or of the head's noise (mar)
    top_k: int = 0            # ar: only the k likeliest codes; 0 is all
    top_p: float = 1.0        # ar: only the likeliest codes that together have this chance

# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def sample_flow(model, prefix, how, generator):
    """flow: from noise (t = 0) to image (t = 1), all patches together. (B, T, D) -> (B, 3, H, W)."""
    cache = read_guided(model, prefix, how)
    x_t = normal((len(prefix), model.cfg.image_len, 3 * model.cfg.patch_size ** 2), generator).to(prefix) * model.cfg.noise_scale

    def predict(x_t, t):
        x_in = torch.cat([x_t, x_t]) if how.cfg_scale != 1 else x_t              # (2 B, N, P)
        return guide(model.predict_image_cached(cache, x_in, t.expand(len(x_in))), how)

    return unpatchify(denoise(predict, x_t, how, how.steps, generator, model.cfg.noise_scale), model.cfg.patch_size)


def sample_ar(model, prefix, how, generator):
    """ar: code by code, in reading order. (B, T, D) -> (B, 3, H, W)."""
    cache, codes = read_guided(model, prefix, how), []
    code = torch.full((len(prefix), 1), model.cfg.codes, device=prefix.device)   # [MASK]: an image begins
    for _ in range(model.cfg.image_len):
        logits = guide(model.predict_image_cached(cache, code.repeat(2, 1) if how.cfg_scale != 1 else code), how)
        code = draw(likeliest(logits, how.top_k, how.top_p), how.temperature, generator)  # (B, 1)
        codes.append(code)
    return model.tokenizer.decode(torch.cat(codes, 1))


def sample_mask(model, prefix, how, generator):
    """mask: all codes at once, keep the most confident, and again (MaskGIT, arXiv 2202.04200, section 3.2). -> (B, 3, H, W).

    After pass k of K a share cos(pi k / 2 K) is still masked. Confidence is the log-probability of the code drawn, plus Gumbel noise that
    fades out, without which the drawing is too careful to vary.
    """
    B, N, mask = len(prefix), model.cfg.image_len, model.cfg.codes
    cache = read_guided(model, prefix, how)
    codes = torch.full((B, N), mask, device=prefix.device)
    for k, left in enumerate(masked_left(N, how.steps)):
        logits = guide(model.predict_image_cached(cache, codes.repeat(2, 1) if how.cfg_scale != 1 else codes), how)
        drawn = draw(logits, how.temperature, generator)                         # (B, N)
        confidence = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        confidence = confidence + how.temperature * CHOICE_NOISE * (1 - (k + 1) / how.steps) * gumbel(confidence, generator)
        order = confidence.masked_fill(codes != mask, math.inf).argsort(1)       # the least confident first, what is decided last
        codes = torch.where(codes == mask, drawn, codes).scatter(1, order[:, :left], mask)
    return model.tokenizer.decode(codes)


def sample_mar(model, prefix, how, generator):
    """mar: patches in a random order, a group at a time, each drawn by the flow MLP (arXiv 2406.11838, section 3.4). -> (B, 3, H, W)."""
    B, N, P = len(prefix), model.cfg.image_len, 3 * model.cfg.patch_size ** 2
    cache = read_guided(model, prefix, how)
    order = torch.rand(B, N, generator=generator).argsort(1).to(prefix.device)   # (B, N), a permutation: each position is drawn once
    x, masked, done = prefix.new_zeros(B, N, P), torch.ones(B, N, dtype=torch.bool, device=prefix.device), 0
    for left in masked_left(N, how.steps):
        group = order[:, done: N - left]                                         # (B, G)
        h = model.predict_image_cached(cache, *(y.repeat(2, *[1] * (y.ndim - 1)) if how.cfg_scale != 1 else y for y in (x, masked)))
        h = h.gather(1, group.repeat(len(h) // B, 1)[..., None].expand(-1, -1, h.shape[-1]))  # (2 B, G, D)

        def predict(x_t, t):
            x_in = torch.cat([x_t, x_t]) if how.cfg_scale != 1 else x_t          # (2 B, G, P)
            return guide(model.image.flow_mlp(x_in, t.expand(x_in.shape[:2]), h), how)

        noise = normal((B, group.shape[1], P), generator).to(prefix) * model.cfg.noise_scale * how.temperature
        drawn = denoise(predict, noise, how, HEAD_STEPS, generator, model.cfg.noise_scale * how.temperature)
        x = x.scatter(1, group[..., None].expand(-1, -1, P), drawn)
        masked, done = masked.scatter(1, group, False), N - left
    return unpatchify(x, model.cfg.patch_size)


# What each paradigm draws with, and how unless told otherwise
IMAGE_SAMPLER = {
    "flow": (sample_flow, Sampling(cfg_scale=2.0, steps=50, renew=1.0)),
    "ar": (sample_ar, Sampling(cfg_scale=2.5)),
    "mask": (sample_mask, Sampling(cfg_scale=2.5, steps=12)),
    "mar": (sample_mar, Sampling(cfg_scale=2.5, steps=9)),
}


def denoise(predict, x_t, how, steps, generator, scale):
    """Noise x_t (B, N, P) -> image in `steps` steps; predict(x_t, t) is the clean image that the model sees.

    An Euler step keeps the noise that x_t holds: x_s = s x_pred + (1 - s) noise with noise = (x_t - t x_pred) / (1 - t), which equals
    x_t + (s - t) velocity. `how.renew` mixes fresh noise in, by variance (DDIM's eta, arXiv 2010.02502, eq. 16): an early mistake, such as one
    object too many, can then be unmade. Steps go by t_i = (i / steps)^TIME_POWER.
    """
    times = (torch.arange(steps + 1, device=x_t.device) / steps) ** TIME_POWER
    for t, t_next in zip(times[:-1], times[1:]):
        x_pred = predict(x_t, t)
        noise = (x_t - t * x_pred) / (1 - t)
        if how.renew:
            noise = (1 - how.renew ** 2) ** 0.5 * noise + how.renew * scale * normal(noise.shape, generator).to(noise)
        x_t = interpolate(x_pred, noise, t_next)
    return x_t


def masked_left(N, steps):
    """How many of N positions are still masked after each pass: N cos(pi k / 2 K), each pass deciding one or more, the last all."""
    left = N
    for k in range(1, steps + 1):
        left = min(left - 1, math.floor(N * math.cos(math.pi / 2 * k / steps))) if k < steps else 0
        yield max(left, 0)
        if left <= 0:
            return


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


def gumbel(like, generator):
    return -torch.empty(like.shape).exponential_(generator=generator).log().to(like)


def draw(logits, temperature, generator):
    """One id from softmax(logits / temperature), by the Gumbel-max trick: 0 is greedy. (..., C) -> (...)."""
    return (logits + temperature * gumbel(logits, generator)).argmax(-1)


def likeliest(logits, top_k, top_p):
    """Logits (..., C) with all but the top k, and all but the nucleus of chance top_p (arXiv 1904.09751), at -inf."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[..., -1:], -math.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        out = p.cumsum(-1) - p >= top_p                                          # the first is always in
        logits = logits.masked_fill(out.scatter(-1, order, out), -math.inf)
    return logits


def read_guided(model, prefix, how):
    """The cache of the prefixes (B, T, D), with guidance followed in the batch by as many empty conditions."""
    if how.cfg_scale != 1:
        null = model.text_prefix(null_caption(model.cfg, prefix.device))
        prefix = torch.cat([prefix, null.expand_as(prefix)])                     # (2 B, T, D)
    return model.read_prefix(prefix, room=model.cfg.image_len)


def guide(out, how):
    """uncond + s * (cond - uncond), arXiv 2207.12598: (2 B, ...) -> (B, ...); at s = 1 only the condition was run."""
    if how.cfg_scale == 1:
        return out
    cond, uncond = out.chunk(2)
    return uncond + how.cfg_scale * (cond - uncond)


@torch.no_grad()
def sample_image(model, prefix, generator=None, progress=False, **options):
    """Prefixes (B, T, D) -> images (B, 3, H, W) in [0, 1], at most MAX_BATCH at a time.

    options: fields of Sampling; what is left out or None is the paradigm's own.
    """
    sampler, how = IMAGE_SAMPLER[model.cfg.paradigm]
    how = replace(how, **{name: value for name, value in options.items() if value is not None})
    chunks = prefix.split(MAX_BATCH)
    return torch.cat([sampler(model, chunk, how, generator)
                      for chunk in tqdm(chunks, "drawing", disable=not progress or len(chunks) == 1, leave=False)])


@torch.no_grad()
def sample_words(model, prefix, temperature=0.0, generator=None):
    """Words after a prefix, greedy at temperature 0: (B, T, D) -> ids (B, up to T - 1), each row worth reading up to its <eos>."""
    cache = model.read_prefix(prefix[:, :-1], room=model.cfg.text_len)           # its last word is what the first pass reads
    x, ids = prefix[:, -1:], []
    for _ in range(model.cfg.text_len - 1):
        ids.append(draw(model.text_logits_cached(cache, x), temperature, generator))  # (B, 1)
        if torch.cat(ids, 1).eq(EOS).any(1).all():
            break
        x = model.wte(ids[-1])                                                   # (B, 1, D)
    return torch.cat(ids, 1)


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint can do


def text_to_image(model, vocabulary, prompts, generator=None, progress=False, **options):
    """One image for each prompt: (B, 3, H, W). Raises ValueError for an unknown word or a prompt that is too long."""
    ids = torch.tensor([vocabulary.encode(prompt, model.cfg.text_len, strict=True) for prompt in prompts])
    prefix = model.text_prefix(ids.to(model.device))
    return sample_image(model, prefix, generator, progress, **options)


@torch.no_grad()
def see_words(model, encoder, images):
    """Images (B, 3, H, W) in [0, 1] -> visual words (B, K, V)."""
    return torch.cat([model.visual_words(encoder(chunk.to(model.device)).patch_tokens) for chunk in images.split(MAX_BATCH)])


def reconstruct(model, encoder, images, generator=None, progress=False, **options):
    """The images drawn again from their visual words alone: (B, 3, H, W) -> (B, 3, H, W)."""
    prefix = model.visual_prefix(see_words(model, encoder, images))
    return sample_image(model, prefix, generator, progress, **options)


def caption(model, encoder, vocabulary, images):
    """What the model says of the images (B, 3, H, W): a list of sentences."""
    prefix = model.visual_prefix(see_words(model, encoder, images))
    return [vocabulary.decode(ids.tolist()) for chunk in prefix.split(MAX_BATCH) for ids in sample_words(model, chunk)]


def edit(model, encoder, vocabulary, images, instructions, generator=None, progress=False, **options):
    """The images, changed as the instructions say; never trained for. See `edit_words` for what stands in the prefix."""
    words = edit_words(see_words(model, encoder, images), vocabulary, instructions)
    return sample_image(model, model.visual_prefix(words), generator, progress, **options)


def edit_words(words, vocabulary, instructions):
    """Visual words (B, K, V) go on with the instruction where they end, at their own <eos>: `w_1 .. w_i instruction <eos> <pad>`.

    An instruction too long for the rest of the K places takes the last ones it needs. ValueError if it is too long for all.
    """
    words, K = words.clone(), words.shape[1]
    for row, instruction in zip(words, instructions, strict=True):
        ids = vocabulary.encode(instruction, K + 1, strict=True)
        ids = ids[1: ids.index(EOS) + 1] + [PAD] * K                             # without <bos>
        ends = (row.argmax(-1) == EOS).nonzero()
        start = min(int(ends[0]) if len(ends) else K, K - ids.index(EOS) - 1)
        row[start:] = torch.nn.functional.one_hot(torch.tensor(ids[: K - start]), row.shape[-1]).to(row)
    return words


def readable(words, vocabulary, sure=0.9):
    """One image's visual words (K, V) as a line: `a yellow star <eos>`; a word less than 90% sure with its percentage."""
    line = []
    for p, i in zip(*(x.tolist() for x in words.max(-1))):
        line.append(vocabulary.words[i] + ("" if p >= sure else f"({p:.0%})"))
        if i == EOS:
            break
    return " ".join(line)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Loaded:
    """A checkpoint, ready to sample: everything in eval mode and frozen."""
    model: UnifiedModel
    encoder: torch.nn.Module | None
    vocabulary: Vocabulary
    config: dict
    stage: str
    step: int


def read_checkpoint(path) -> dict:
    """The dictionary that train.py saved: plain types and tensors, so that no code is run when it is read. Raises ValueError in one sentence.

    format, stage, step, model_config, model, ema, vocabulary, encoder {name, config, state}, config.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}; train one with `python train.py`")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} is damaged or not one of train.py's ({(str(error).splitlines() or ['empty'])[0]:.90})") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        found = saved.get("format") if isinstance(saved, dict) else None
        raise ValueError(f"the checkpoint {path} has format {found}, this code reads format {FORMAT}: train it again")
    return saved


def load_checkpoint(path, device="cpu") -> Loaded:
    """A checkpoint, ready to sample: the averaged weights where the file has them. Raises ValueError in one sentence."""
    saved = read_checkpoint(path)
    try:
        model = UnifiedModel(ModelConfig(**saved["model_config"]))
        model.load_state_dict(saved["model"] if saved["ema"] is None else saved["ema"])
        encoder = None
        if saved["encoder"]["config"] is not None:
            encoder = ViT(ViTConfig(**saved["encoder"]["config"]))
            encoder.load_state_dict(saved["encoder"]["state"])
        elif saved["encoder"]["name"] != "scratch":
            encoder = load_encoder(saved["encoder"]["name"])
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"the checkpoint {path} does not fit this code ({' '.join(str(error).split()):.120}): train it again") from None
    for module in (model, encoder):
        if module is not None:
            module.to(device).eval().requires_grad_(False)
    return Loaded(model, encoder, Vocabulary(saved["vocabulary"]), saved["config"], saved["stage"], saved["step"])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def read_image(path, size) -> torch.Tensor:
    """A picture file -> (3, size, size) in [0, 1]: shorter side to `size`, then the middle. Raises ValueError."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from None
    return TF.to_tensor(TF.center_crop(TF.resize(image, size, antialias=True), size))


def image_grid(rows, row_captions=None, column_captions=None, scale=None):
    """Rows of images with their captions -> one PIL image, small images magnified without blur.

    rows             a list of rows; a row is a tensor (C, 3, H, W) in [0, 1], or a list of them: groups, set apart, such as
                     [base, sft, reca]
    row_captions     one line above each row (a prompt)
    column_captions  one title above each group, or above each column of rows that are tensors
    scale            whole magnification; by default images become about 96 pixels wide
    """
    rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in rows]
    if column_captions and len(rows[0]) == 1 and len(column_captions) > 1:
        rows = [list(row[0].split(1)) for row in rows]
    H, W = rows[0][0].shape[-2:]
    scale = scale or max(1, round(96 / W))
    h, w, gap, between, line = H * scale, W * scale, 4, 16, 22
    font = ImageFont.load_default(size=15)
    lefts, x = [], between                                                       # of the groups
    for column in range(max(map(len, rows))):
        lefts.append(x)
        x += max(len(row[column]) for row in rows if column < len(row)) * (w + gap) - gap + between
    top = between // 2 + (line if column_captions else 0)
    step = h + gap + (line if row_captions else 0)
    captions = [(c, between, top + i * step) for i, c in enumerate(row_captions or [])]
    captions += [(c, left, between // 2) for c, left in zip(column_captions or [], lefts)]
    right = max([x] + [int(left + font.getlength(c)) + between for c, left, _ in captions])
    canvas = Image.new("RGB", (right, top + len(rows) * step + between // 2), "white")
    draw = ImageDraw.Draw(canvas)
    for text, left, y in captions:
        draw.text((left, y), text, fill="black", font=font)
    for i, row in enumerate(rows):
        for group, left in zip(row, lefts):
            for j, image in enumerate(group):
                picture = TF.to_pil_image(image.detach().float().cpu().clamp(0, 1)).resize((w, h), Image.NEAREST)
                canvas.paste(picture, (left + j * (w + gap), top + i * step + (line if row_captions else 0)))
    return canvas


# ----------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    parser.add_argument("--prompt", help="what to draw, or how to change --edit's images")
    parser.add_argument("--reconstruct", nargs="+", metavar="IMG", help="images to see and draw again")
    parser.add_argument("--edit", nargs="+", metavar="IMG", help="images to change as --prompt says")
    parser.add_argument("--caption", nargs="+", metavar="IMG", help="images to describe")
    parser.add_argument("--n", type=int, default=16, help="images for the prompt, or for each image (default 16, or 4)")
    parser.add_argument("--out", default="grid.png", help="where the picture goes")
    parser.add_argument("--cfg_scale", type=float, default=CFG_SCALE, help="guidance; 1 is none")
    parser.add_argument("--steps", type=int, default=STEPS, help="sampling steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    raise SystemExit("sample.py's command line is being written")


if __name__ == "__main__":
    main()
