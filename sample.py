"""Text to image, image to image, image to text: everything that a trained checkpoint can do.

    python sample.py --ckpt out/reca.pt --prompt "a yellow star left of a red circle" --n 16 --out grid.png
    python sample.py --ckpt out/reca.pt --reconstruct a.png b.png      # what the model sees of an image, drawn again
    python sample.py --ckpt out/reca.pt --edit a.png --prompt "and a red circle"
    python sample.py --ckpt out/reca.pt --caption a.png b.png

Every sampler reads the prefix once and reuses its keys and values in all steps, with and without the condition
(classifier-free guidance, arXiv 2207.12598). Noise is drawn on the CPU: a seed means the same picture on every device.
# B batch, T prefix length, K visual words, N image positions, G of them drawn at a time, V words, C codes, P pixels of a patch
"""
import argparse
import math
import os
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import BOS, EOS, PAD, Vocabulary, image_grid, read_images
from encoder import ViT, ViTConfig, load_encoder
from model import ModelConfig, UnifiedModel, unpatchify
from recon_loss import interpolate, null_prefix, recon_prefix, see

FORMAT = 1          # of a checkpoint, see load_checkpoint
MAX_BATCH = 128     # images drawn at a time
TIME_POWER = 1.5    # t_i = (i / steps)^1.5: more steps near the noise, where layout and color are decided
CHOICE_NOISE = 4.5  # mask: how much chance there is in which codes are kept first, arXiv 2202.04200's code
HEAD_STEPS = 25     # mar: steps of the head for each group of patches

@dataclass(frozen=True)
class Sampling:
    """How to draw; a paradigm reads what it needs."""
    cfg_scale: float = 2.5    # guidance; 1 is none
    steps: int = 25           # passes through the transformer (flow, mask, mar); ar takes one a code
    renew: float = 0.0        # flow, mar: share of the noise drawn anew at each step; 0 is Euler's, 1 forgets the noise of before
    temperature: float = 1.0  # of the codes (ar, mask: 0 is greedy) or of the noise (flow, mar)

# --------------------------------------------- One sampler for each paradigm: prefixes (B, T, D) -> images (B, 3, H, W)

def sample_flow(model, prefix, how, generator):
    """flow: from noise (t = 0) to image (t = 1), all patches together."""
    look = read_guided(model, prefix, how)
    predict = lambda x_t, t: guided(how, look, x_t, t.expand(len(x_t)))
    shape = len(prefix), model.cfg.image_len, 3 * model.cfg.patch_size ** 2
    return unpatchify(denoise(predict, shape, model, how, how.steps, generator), model.cfg.patch_size)

def sample_ar(model, prefix, how, generator):
    """ar: code by code, in reading order."""
    look = read_guided(model, prefix, how)
    codes = [torch.full((len(prefix), 1), model.cfg.codes, device=prefix.device)]  # [MASK]: an image begins
    for _ in range(model.cfg.image_len):
        codes.append(draw(guided(how, look, codes[-1]), how.temperature, generator))  # (B, 1)
    return model.tokenizer.decode(torch.cat(codes[1:], 1))

def sample_mask(model, prefix, how, generator):
    """mask: all codes at once, keep those most sure of, and again (MaskGIT, arXiv 2202.04200, section 3.2). How sure: the log-probability
    of the code drawn, plus noise that fades out, without which the drawings vary too little."""
    look, N, mask = read_guided(model, prefix, how), model.cfg.image_len, model.cfg.codes
    codes = torch.full((len(prefix), N), mask, device=prefix.device)
    for k, left in enumerate(masked_left(N, how.steps), start=1):
        logits = guided(how, look, codes)                                        # (B, N, C)
        drawn = draw(logits, how.temperature, generator)                         # (B, N)
        sure = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        sure = sure + how.temperature * CHOICE_NOISE * (1 - k / how.steps) * gumbel(sure, generator)
        order = sure.masked_fill(codes != mask, math.inf).argsort(1)             # what is decided comes last
        codes = torch.where(codes == mask, drawn, codes).scatter(1, order[:, :left], mask)
    return model.tokenizer.decode(codes)

def sample_mar(model, prefix, how, generator):
    """mar: patches in a random order, a group at a time, each patch drawn by the flow MLP (arXiv 2406.11838, section 3.4)."""
    look, B, N, P = read_guided(model, prefix, how), len(prefix), model.cfg.image_len, 3 * model.cfg.patch_size ** 2
    copies = 1 if how.cfg_scale == 1 else 2                                      # of the states: with the condition, and without
    order = torch.rand(B, N, generator=generator).argsort(1).to(prefix.device)   # each row a permutation: every position once
    x, masked, done = prefix.new_zeros(B, N, P), torch.ones(B, N, dtype=torch.bool, device=prefix.device), 0
    for left in masked_left(N, how.steps):
        group = order[:, done: N - left, None]                                   # (B, G, 1)
        h = look(x.repeat(copies, 1, 1), masked.repeat(copies, 1)).take_along_dim(group.repeat(copies, 1, 1), 1)  # (2 B, G, D)
        predict = lambda x_t, t: guided(how, partial(model.image.flow_mlp, h=h), x_t, t.expand(x_t.shape[:2]))
        drawn = denoise(predict, (B, group.shape[1], P), model, how, HEAD_STEPS, generator)
        x, masked, done = x.scatter(1, group.expand_as(drawn), drawn), masked.scatter(1, group[..., 0], False), N - left
    return unpatchify(x, model.cfg.patch_size)

IMAGE_SAMPLER = {  # what each paradigm draws with, and how unless told otherwise
    "flow": (sample_flow, Sampling(cfg_scale=2.0, steps=50, renew=1.0)),
    "ar": (sample_ar, Sampling(cfg_scale=1.5, temperature=0.5)),
    "mask": (sample_mask, Sampling(cfg_scale=2.0, steps=18, temperature=0.7)),
    "mar": (sample_mar, Sampling(cfg_scale=2.5, steps=9)),
}

def denoise(predict, shape, model, how, steps, generator):
    """Noise -> patches (B, N, P) in so many steps, t_i = (i / steps)^TIME_POWER; predict(x_t, t) is the clean image that the model sees.

    Euler's step keeps the noise that x_t holds: x_t + (s - t) velocity = s x_pred + (1 - s) noise. `how.renew` mixes fresh noise in, by variance
    (DDIM's eta, arXiv 2010.02502, eq. 16): an early mistake, such as one object too many, can then be unmade.
    """
    fresh = lambda: torch.randn(shape, generator=generator).to(model.device) * model.cfg.noise_scale * how.temperature
    times = (torch.arange(steps + 1, device=model.device) / steps) ** TIME_POWER
    x_t = fresh()
    for t, t_next in zip(times[:-1], times[1:]):
        x_pred = predict(x_t, t)
        noise = (x_t - t * x_pred) / (1 - t)
        if how.renew:
            noise = (1 - how.renew ** 2) ** 0.5 * noise + how.renew * fresh()
        x_t = interpolate(x_pred, noise, t_next)
    return x_t

def masked_left(N, steps):
    """How many of N positions are still masked after each pass: N cos(pi k / 2 K); each pass decides one or more, the last all."""
    left, k = N, 0
    while left:
        k += 1
        left = max(0, min(left - 1, int(N * math.cos(math.pi / 2 * k / steps))))
        yield left

def gumbel(like, generator):
    """Noise whose largest entry, added to log-probabilities, is a draw from them; of the shape of `like`."""
    return -torch.empty(like.shape).exponential_(generator=generator).log().to(like)

def draw(logits, temperature, generator):
    """One id from softmax(logits / temperature), by the Gumbel-max trick; 0 is greedy. (..., C) -> (...)."""
    return (logits + temperature * gumbel(logits, generator) if temperature else logits).argmax(-1)

def read_guided(model, prefix, how):
    """Reads the prefixes (B, T, D) once, for guidance with as many empty conditions behind them: predict_image without a prefix, and with a progress bar."""
    if how.cfg_scale != 1:
        prefix = torch.cat([prefix, null_prefix(model).expand_as(prefix)])       # (2 B, T, D)
    cache = model.read_prefix(prefix, room=model.cfg.image_len)
    bar = tqdm(total=model.cfg.image_len if model.image.causal else how.steps, desc="drawing", delay=2, leave=False, disable=None)

    def look(*inputs):
        bar.update()
        return model.predict_image_cached(cache, *inputs)
    return look

def guided(how, look, *inputs):
    """uncond + s * (cond - uncond), arXiv 2207.12598: look of inputs (B, ...) with the condition and without -> (B, ...)."""
    if how.cfg_scale == 1:
        return look(*inputs)
    cond, uncond = look(*(torch.cat([x, x]) for x in inputs)).chunk(2)
    return uncond + how.cfg_scale * (cond - uncond)

# -------------------------------------------------------- What a checkpoint can do; **options are those of sample_image

@torch.no_grad()
def sample_image(model, prefix, generator=None, **options):
    """Prefixes (B, T, D) -> images (B, 3, H, W) in [0, 1], at most MAX_BATCH at a time. options: fields of Sampling, None for the default;
    ValueError for what they cannot be."""
    sampler, how = IMAGE_SAMPLER[model.cfg.paradigm]
    how = replace(how, renew=min(how.renew, model.cfg.renew))
    how = replace(how, **{name: value for name, value in options.items() if value is not None})
    if not (how.steps >= 1 and 0 <= how.renew <= 1 and how.cfg_scale >= 0 and how.temperature >= 0):
        raise ValueError(f"{how}: at least 1 step, renew in [0, 1], cfg_scale and temperature at least 0")
    return torch.cat([sampler(model, chunk, how, generator) for chunk in prefix.split(MAX_BATCH)])

@torch.no_grad()
def sample_words(model, prefix):
    """The likeliest words after a prefix: (B, T, D) -> ids (B, up to T - 1), each row worth reading up to its <eos>."""
    cache = model.read_prefix(prefix[:, :-1], room=model.cfg.text_len)           # its last word is what the first pass reads
    x, ids = prefix[:, -1:], prefix.new_empty(len(prefix), 0, dtype=torch.long)
    while ids.shape[1] < model.cfg.text_len - 1 and not ids.eq(EOS).any(1).all():
        new = model.text_logits_cached(cache, x).argmax(-1)                      # (B, 1)
        x, ids = model.wte(new), torch.cat([ids, new], 1)
    return ids

@torch.no_grad()
def see_words(model, encoder, images):
    """Images (B, 3, H, W) in [0, 1] -> visual words (B, K, V)."""
    return torch.cat([see(model, encoder, chunk.to(model.device)) for chunk in images.split(MAX_BATCH)])

def text_to_image(model, vocabulary, prompts, **options):
    """One image for each prompt: (B, 3, H, W). Raises ValueError for an unknown word or a prompt that is too long."""
    ids = torch.tensor([vocabulary.encode(prompt, model.cfg.text_len, strict=True) for prompt in prompts], device=model.device)
    return sample_image(model, model.text_prefix(ids), **options)

def reconstruct(model, encoder, images, **options):
    """The images drawn again from their visual words alone (or what `ModelConfig.condition` puts there): (B, 3, H, W) -> (B, 3, H, W)."""
    with torch.no_grad():
        prefix = torch.cat([recon_prefix(model, encoder, chunk.to(model.device)) for chunk in images.split(MAX_BATCH)])
    return sample_image(model, prefix, **options)

def edit(model, encoder, vocabulary, images, instructions, think=True, **options):
    """The images, changed as the instructions say; no edited image was trained on. See `edit_words` for the prefix.

    think: first say in words what the edited image shows, then draw that (as BAGEL thinks first, arXiv 2505.14683); else draw at once.
    """
    prefix = model.visual_prefix(edit_words(see_words(model, encoder, images), vocabulary, instructions))
    if think:
        ids = F.pad(sample_words(model, prefix), (1, 0), value=BOS)
        ids = ids.masked_fill((ids == EOS).cumsum(1) > (ids == EOS), PAD)        # what follows the first <eos> was not worth reading
        prefix = model.text_prefix(F.pad(ids, (0, model.cfg.text_len - ids.shape[1]), value=PAD))
    return sample_image(model, prefix, **options)

def caption(model, encoder, vocabulary, images):
    """What the model says of the images (B, 3, H, W): a list of sentences."""
    prefix = model.visual_prefix(see_words(model, encoder, images))
    return [vocabulary.decode(ids.tolist()) for chunk in prefix.split(MAX_BATCH) for ids in sample_words(model, chunk)]

def edit_words(words, vocabulary, instructions):
    """Visual words (B, K, V) go on with the instruction where they end, at their own <eos>: `w_1 .. w_i instruction <eos> <pad>`. If it is
    too long for the rest of the K places, it takes the last ones it needs; ValueError if it is too long for all."""
    words, K = words.clone(), words.shape[1]
    for row, instruction in zip(words, instructions, strict=True):
        ids = [i for i in vocabulary.encode(instruction, K + 1, strict=True) if i not in (BOS, PAD)]
        start = min([*row.argmax(-1).tolist(), EOS].index(EOS), K - len(ids))
        row[start:] = F.one_hot(torch.tensor((ids + [PAD] * K)[: K - start]), row.shape[-1]).to(row)
    return words

def readable(words, vocabulary, sure=0.9):
    """One image's visual words (K, V) as a line, up to <eos>: `a yellow star <eos>`; a word less than 90% sure with its percentage."""
    chances, ids = (x.tolist() for x in words.max(-1))
    line = [vocabulary.words[i] + ("" if p >= sure else f"({p:.0%})") for p, i in zip(chances, ids)]
    return " ".join(line[: [*ids, EOS].index(EOS) + 1])

# ---------------------------------------------------------------------------------------------------------- Checkpoints

def read_checkpoint(path) -> dict:
    """The dictionary that train.py saved (Run.checkpoint): plain types and tensors, so that no code is run when it is read. ValueError in one sentence."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}; train one with `python train.py`")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        raise ValueError(f"the checkpoint {path} is damaged or not one of train.py's ({(str(error).splitlines() or ['empty'])[0]:.90})") from None
    found = saved.get("format") if isinstance(saved, dict) else None
    if found != FORMAT:
        raise ValueError(f"the checkpoint {path} has format {found}, this code reads format {FORMAT}: train it again")
    return saved

def load_checkpoint(path, device="cpu"):
    """What a checkpoint holds: model, encoder, vocabulary, config, stage, step. Both modules in eval mode and frozen, the averaged weights
    where the file has them. Raises ValueError in one sentence."""
    saved = read_checkpoint(path)
    try:
        model = UnifiedModel(ModelConfig(**saved["model_config"]))
        model.load_state_dict(saved["model"] if saved["ema"] is None else saved["ema"])
        name, config, state = (saved["encoder"][key] for key in ("name", "config", "state"))
        encoder = ViT(ViTConfig(**config)) if config else load_encoder(name)
        if state:
            encoder.load_state_dict(state)
        for module in (model, encoder):
            module.to(device).eval().requires_grad_(False)
        return SimpleNamespace(model=model, encoder=encoder, vocabulary=Vocabulary(saved["vocabulary"]), **{k: saved[k] for k in ("config", "stage", "step")})
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"the checkpoint {path} does not fit this code ({' '.join(str(error).split()):.120}): train it again") from None

# ---------------------------------------------------------------------------------------------------- The command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (python sample.py --help lists the options)")

def parse_args(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    parser.add_argument("--prompt", help="what to draw, or the instruction of --edit")
    for name, text in {"reconstruct": "to see and draw again", "edit": "to change as --prompt says", "caption": "to describe"}.items():
        parser.add_argument(f"--{name}", nargs="+", metavar="IMG", help=f"images {text}")
    parser.add_argument("--n", type=int, default=4, help="images for the prompt, or for each image (4)")
    for f in fields(Sampling):
        parser.add_argument(f"--{f.name}", type=f.type, help="see class Sampling; by default the paradigm's own")
    parser.add_argument("--out", default="grid.png", help="where the picture goes")
    parser.add_argument("--seed", type=int, default=0)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    args = parser.parse_args(argv)
    if bool(args.reconstruct) + bool(args.caption) + bool(args.prompt) != 1 or args.edit and not args.prompt:
        parser.error("give one of --prompt TEXT, --reconstruct IMG, --caption IMG, or --edit IMG with --prompt TEXT")
    if args.n < 1:
        parser.error(f"--n is {args.n}, it must be at least 1")
    if not os.access(os.path.dirname(args.out) or ".", os.W_OK) or not args.out.lower().endswith((".png", ".jpg", ".webp")):
        parser.error(f"--out {args.out} cannot be written: it must be a .png, .jpg or .webp in a folder that exists and is yours")
    return args

def run(args):
    """What the command line asks for: prints captions, or draws and saves. Raises ValueError or OSError in one sentence."""
    loaded = load_checkpoint(args.ckpt, args.device)
    model, encoder, vocabulary = loaded.model, loaded.encoder, loaded.vocabulary
    options = {f.name: getattr(args, f.name) for f in fields(Sampling)} | {"generator": torch.Generator().manual_seed(args.seed)}
    paths = args.reconstruct or args.caption or args.edit
    if not paths:
        drawn = text_to_image(model, vocabulary, [args.prompt] * args.n, **options)
        grid = image_grid(drawn.split(8), [args.prompt])
    else:
        images = read_images(paths, model.cfg.image_size)
        seen, many = [readable(words, vocabulary) for words in see_words(model, encoder, images)], images.repeat_interleave(args.n, 0)
        if args.caption:
            for path, words, sentence in zip(paths, seen, caption(model, encoder, vocabulary, images)):
                print(f"{path}: {sentence}\n    visual words: {words}")
            return
        drawn = edit(model, encoder, vocabulary, many, [args.prompt] * len(many), **options) if args.edit else reconstruct(model, encoder, many, **options)
        grid = image_grid([[a[None], b] for a, b in zip(images, drawn.split(args.n))], seen, ["image", args.prompt or "from its visual words"])
    grid.save(args.out)
    print(f"{len(drawn)} images in {args.out}")

def main(argv=None):
    try:
        run(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None

if __name__ == "__main__":
    main()
