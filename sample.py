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
from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms import functional as TF
from tqdm import tqdm

from data import BOS, EOS, PAD, Vocabulary
from encoder import ViT, ViTConfig, load_encoder
from model import ModelConfig, UnifiedModel, unpatchify
from recon_loss import null_caption, velocity

FORMAT = 1          # of a checkpoint, see load_checkpoint
MAX_BATCH = 128     # images drawn at a time
STEPS = 25
CFG_SCALE = 2.5
TIME_POWER = 1.5    # t_i = (i / steps)^1.5: more steps near the noise, where layout and color are decided

# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def sample_flow(model, prefix, cfg_scale, steps, generator):
    """Euler steps along the predicted velocity from noise (t = 0) to image (t = 1). (B, T, D) -> (B, 3, H, W)."""
    cfg, guided = model.cfg, cfg_scale != 1
    cache = read_guided(model, prefix, guided)
    x_t = torch.randn(len(prefix), cfg.image_len, 3 * cfg.patch_size ** 2, generator=generator).to(prefix) * cfg.noise_scale
    times = (torch.arange(steps + 1, device=prefix.device) / steps) ** TIME_POWER
    for t, t_next in zip(times[:-1], times[1:]):
        x_in = torch.cat([x_t, x_t]) if guided else x_t                          # (B or 2 B, N, P)
        x_pred = guide(model.predict_image_cached(cache, x_in, t.expand(len(x_in))), cfg_scale)
        x_t = x_t + (t_next - t) * velocity(x_pred, x_t, t)                      # (B, N, P)
    return unpatchify(x_t, cfg.patch_size)


def read_guided(model, prefix, guided):
    """The cache of the prefixes, followed in the batch by that of the empty condition."""
    if guided:
        null = model.text_prefix(null_caption(model.cfg, prefix.device))
        prefix = torch.cat([prefix, null.expand_as(prefix)])                     # (2 B, T, D)
    return model.read_prefix(prefix)


def guide(out, cfg_scale):
    """uncond + s * (cond - uncond), arXiv 2207.12598: (2 B, ...) -> (B, ...); at s = 1 only the condition was run."""
    if cfg_scale == 1:
        return out
    cond, uncond = out.chunk(2)
    return uncond + cfg_scale * (cond - uncond)


@torch.no_grad()
def sample_image(model, prefix, cfg_scale=CFG_SCALE, steps=STEPS, generator=None, progress=False):
    """Prefixes (B, T, D) -> images (B, 3, H, W) in [0, 1], at most MAX_BATCH at a time."""
    chunks = prefix.split(MAX_BATCH)
    return torch.cat([sample_flow(model, chunk, cfg_scale, steps, generator)
                      for chunk in tqdm(chunks, "drawing", disable=not progress or len(chunks) == 1, leave=False)])


@torch.no_grad()
def sample_words(model, prefix):
    """Greedy words after a prefix: (B, T, D) -> ids (B, up to T - 1)."""
    ids = torch.zeros(len(prefix), 0, dtype=torch.long, device=prefix.device)
    for _ in range(model.cfg.text_len - 1):
        nxt = model.text_logits(prefix, ids)[:, -1].argmax(-1)
        ids = torch.cat([ids, nxt[:, None]], 1)
        if ((ids == EOS).any(1)).all():
            break
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint can do


def text_to_image(model, vocabulary, prompts, cfg_scale=CFG_SCALE, steps=STEPS, generator=None, progress=False):
    """One image for each prompt: (B, 3, H, W). Raises ValueError for an unknown word or a prompt that is too long."""
    ids = torch.tensor([vocabulary.encode(prompt, model.cfg.text_len, strict=True) for prompt in prompts])
    prefix = model.text_prefix(ids.to(model.device))
    return sample_image(model, prefix, cfg_scale, steps, generator, progress)


@torch.no_grad()
def see_words(model, encoder, images):
    """Images (B, 3, H, W) in [0, 1] -> visual words (B, K, V)."""
    return torch.cat([model.visual_words(encoder(chunk.to(model.device)).patch_tokens) for chunk in images.split(MAX_BATCH)])


def reconstruct(model, encoder, images, cfg_scale=CFG_SCALE, steps=STEPS, generator=None, progress=False):
    """The images drawn again from their visual words alone: (B, 3, H, W) -> (B, 3, H, W)."""
    prefix = model.visual_prefix(see_words(model, encoder, images))
    return sample_image(model, prefix, cfg_scale, steps, generator, progress)


def caption(model, encoder, vocabulary, images):
    """What the model says of the images (B, 3, H, W): a list of sentences."""
    prefix = model.visual_prefix(see_words(model, encoder, images))
    return [vocabulary.decode(ids.tolist()) for chunk in prefix.split(MAX_BATCH) for ids in sample_words(model, chunk)]


def edit(model, encoder, vocabulary, images, instructions, cfg_scale=CFG_SCALE, steps=STEPS, generator=None, progress=False):
    """The images, changed as the instructions say; never trained for. See `edit_words` for what stands in the prefix."""
    words = edit_words(see_words(model, encoder, images), vocabulary, instructions)
    return sample_image(model, model.visual_prefix(words), cfg_scale, steps, generator, progress)


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


def load_checkpoint(path, device="cpu") -> Loaded:
    """Reads what train.py saves; the averaged weights where the file has them. Raises ValueError in one sentence.

    The file is a dictionary of plain types and tensors (no code is run when it is read): format, stage, step, model_config, model, ema,
    vocabulary, encoder {name, config, state}, config.
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
