"""Text to image, image to image, image to text: everything that a trained checkpoint can do.

    python sample.py --ckpt out/reca.pt --prompt "a yellow star left of a red circle" --n 16
    python sample.py --ckpt out/reca.pt --reconstruct a.png b.png    # from their visual words
    python sample.py --ckpt out/reca.pt --edit a.png --prompt "and a red circle"
    python sample.py --ckpt out/reca.pt --caption a.png b.png

The samplers of images stand in paradigms.py, beside the losses that they belong to.

# B batch, T prefix length, K visual words, D width, V words
"""

import os
from dataclasses import fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from cli import Parser, user_errors
from encoder import ViT, ViTConfig, encoder_hash
from figures import image_grid
from images import read_images
from model import ModelConfig, UnifiedModel
from paradigms import ImageNoise, Sampling
from pretrained import load_encoder
from words import BOS, EOS, PAD, Vocabulary

FORMAT = 2  # of a checkpoint; raised whenever names of tensors or configuration change
MAX_BATCH = 128  # images sampled at a time


# ---------------------------------------------------------------- what a checkpoint can do
@torch.no_grad()
def sample_image(model, prefix, seeds=None, **options):
    """Prefixes (B, T, D) -> images (B, 3, H, W) in [0, 1], at most MAX_BATCH at a time.

    seeds: of the noise of each image, by default 0 to B - 1. options: fields of Sampling, None for
    the paradigm's default. Raises ValueError for a value that is out of range.
    """
    sampling = model.paradigm.default_sampling
    sampling = replace(sampling, eta=min(sampling.eta, model.cfg.eta))
    given = {name: value for name, value in options.items() if value is not None}
    sampling = replace(sampling, **given)
    in_range = sampling.steps >= 1 and 0 <= sampling.eta <= 1
    if not in_range or sampling.cfg_scale < 0 or sampling.temperature < 0:
        rule = "steps at least 1, eta in [0, 1], cfg_scale and temperature at least 0"
        raise ValueError(f"{sampling} is out of range: {rule}")
    seeds = range(len(prefix)) if seeds is None else seeds
    images = []
    for i in range(0, len(prefix), MAX_BATCH):
        noise = ImageNoise(seeds[i : i + MAX_BATCH], model.device)
        images.append(model.paradigm.sample(model, prefix[i : i + MAX_BATCH], sampling, noise))
    return torch.cat(images)


@torch.no_grad()
def sample_words(model, prefix):
    """The likeliest words after a prefix, greedily: (B, T, D) -> words <eos> <pad> (B, up to K)."""
    # the prefix's last word is what the first pass reads
    cache = model.prefill(prefix[:, :-1], max_new_tokens=model.cfg.text_len)
    x = prefix[:, -1:]
    ids = torch.empty(len(prefix), 0, dtype=torch.long, device=prefix.device)
    ended = torch.zeros(len(prefix), 1, dtype=torch.bool, device=prefix.device)
    while ids.shape[1] < model.cfg.text_len - 1 and not ended.all():
        new = model.decode_step(cache, x).argmax(-1).masked_fill(ended, PAD)  # (B, 1)
        ids = torch.cat([ids, new], 1)
        ended = ended | (new == EOS)
        x = model.wte(new)
    return ids


@torch.no_grad()
def encode_in_chunks(model, encoder, images):
    """Images (B, 3, H, W) in [0, 1] -> visual words (B, K, V), MAX_BATCH images at a time."""
    chunks = [chunk.to(model.device) for chunk in images.split(MAX_BATCH)]
    return torch.cat([model.encode_visual_words(encoder, chunk) for chunk in chunks])


def text_to_image(model, vocabulary, prompts, **options):
    """B prompts -> images (B, 3, H, W) in [0, 1]; raises ValueError as `Vocabulary.encode` does."""
    ids = [vocabulary.encode(prompt, model.cfg.text_len, strict=True) for prompt in prompts]
    prefix = model.text_prefix(torch.tensor(ids, device=model.device))
    return sample_image(model, prefix, **options)


@torch.no_grad()
def reconstruct(model, encoder, images, **options):
    """Images (B, 3, H, W) in [0, 1], generated again from RecA's prefix alone: (B, 3, H, W)."""
    chunks = [chunk.to(model.device) for chunk in images.split(MAX_BATCH)]
    prefix = torch.cat([model.recon_prefix(encoder, chunk) for chunk in chunks])
    return sample_image(model, prefix, **options)


def edit(model, encoder, vocabulary, images, instructions, think=True, **options):
    """Images (B, 3, H, W), changed as the instructions say; no edited image was trained on.

    think: first say in words what the edited image shows, then generate that (as BAGEL does, arXiv
    2505.14683); otherwise generate at once. Raises ValueError as `append_instruction` does.
    """
    words = encode_in_chunks(model, encoder, images)
    prefix = model.visual_prefix(append_instruction(words, vocabulary, instructions))
    if think:
        ids = F.pad(sample_words(model, prefix), (1, 0), value=BOS)
        ids = F.pad(ids, (0, model.cfg.text_len - ids.shape[1]), value=PAD)  # (B, T)
        prefix = model.text_prefix(ids)
    return sample_image(model, prefix, **options)


def caption_images(model, encoder, vocabulary, images):
    """What the model says of images (B, 3, H, W): a list of B sentences."""
    prefix = model.visual_prefix(encode_in_chunks(model, encoder, images))
    sentences = []
    for chunk in prefix.split(MAX_BATCH):
        sentences += [vocabulary.decode(ids) for ids in sample_words(model, chunk).tolist()]
    return sentences


def append_instruction(words, vocabulary, instructions):
    """Visual words (B, K, V), continued by an instruction at their <eos>: `w_1 .. w_i words <eos>`.

    An instruction that is too long for the rest takes the last places that it needs. Raises
    ValueError if it is too long for all K, or holds an unknown word.
    """
    words = words.clone()
    K, V = words.shape[1:]
    for row, instruction in zip(words, instructions, strict=True):
        ids = vocabulary.encode(instruction, K + 1, strict=True)[1:]  # words <eos> <pad> ...
        first_eos = [*row.argmax(-1).tolist(), EOS].index(EOS)
        start = min(first_eos, ids.count(PAD))
        row[start:] = F.one_hot(torch.tensor(ids[: K - start]), V).to(row)
    return words


def format_visual_words(words, vocabulary, threshold=0.9):
    """Visual words (K, V) up to <eos>, below the threshold with their probability: `star(64%)`."""
    probabilities, ids = words.max(-1)
    line = []
    for p, i in zip(probabilities.tolist(), ids.tolist(), strict=True):
        line.append(vocabulary.words[i] if p >= threshold else f"{vocabulary.words[i]}({p:.0%})")
        if i == EOS:
            break
    return " ".join(line)


# ---------------------------------------------------------------- checkpoints
def read_checkpoint(path) -> dict:
    """The dictionary that train.py saved: plain types and tensors, so that no code runs when read.

    Raises ValueError, one sentence, for a missing, damaged or older file.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint {path}; train one with `python train.py`")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        reason = (str(error).splitlines() or ["empty"])[0][:60]
        text = f"the checkpoint {path} is damaged or not of train.py ({reason})"
        raise ValueError(text) from None
    found = saved.get("format") if isinstance(saved, dict) else None
    if found != FORMAT:
        formats = f"has format {found}, this code reads format {FORMAT}"
        raise ValueError(f"the checkpoint {path} {formats}: train it again")
    return saved


class Checkpoint:
    """A trained model, frozen and in eval mode: with averaged weights where the file has them.

    Its understanding encoder is loaded when an image has to be seen first. Raises ValueError.
    """

    def __init__(self, path, device="cpu", model_class=UnifiedModel, encoder: str = ""):
        saved = read_checkpoint(path)
        self.path = path
        self.device = device
        try:
            if saved["model_class"] != model_class.__name__:
                classes = f"{saved['model_class']}, not a {model_class.__name__}"
                raise ValueError(f"{path} is a {classes}: experiments.py scores what it trained")
            self.model = model_class(ModelConfig(**saved["model_config"]))
            self.model.load_state_dict(saved["model"] if saved["ema"] is None else saved["ema"])
            self.vocabulary = Vocabulary(saved["vocabulary"])
            self.config, self.stage, self.step = (saved[k] for k in ("config", "stage", "step"))
            self.saved_encoder = saved["encoder"] | ({"name": encoder} if encoder else {})
        except (KeyError, TypeError, AssertionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path} does not fit this code ({reason}): train it again") from None
        self.model.to(device).eval().requires_grad_(False)

    @cached_property
    def encoder(self) -> ViT:
        """Its own weights if it was trained with the model, else the public ones, by their hash."""
        saved = self.saved_encoder
        if saved["state"] is None:
            encoder = load_encoder(saved["name"])
            if encoder_hash(encoder) != saved["hash"]:
                told = f"{saved['name']} is not the encoder that {self.path} was trained with"
                raise ValueError(f"{told}: give the right one with --encoder NAME_OR_PATH")
        else:
            encoder = ViT(ViTConfig(**saved["config"]))
            encoder.load_state_dict(saved["state"])
        return encoder.to(self.device).eval().requires_grad_(False)


# ---------------------------------------------------------------- the command line
def parse_args(argv):
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint of train.py")
    add("--prompt", help="what to generate, or the instruction of --edit")
    add("--reconstruct", nargs="+", metavar="IMG", help="images to generate again")
    add("--edit", nargs="+", metavar="IMG", help="images to change as --prompt says")
    add("--caption", nargs="+", metavar="IMG", help="images to describe")
    add("--n", type=int, default=4, help="images for the prompt, or for each image (4)")
    for field in fields(Sampling):
        add(f"--{field.name}", type=field.type, help="see class Sampling (the paradigm's default)")
    add("--out", default="grid.png", help="where the picture goes (grid.png)")
    add("--seed", type=int, default=0, help="of the first image's noise, the next has seed + 1 (0)")
    add("--encoder", default="", help="the public encoder, if it is elsewhere than in training")
    add("--device", choices=devices, default=devices[0], help=f"({devices[0]})")
    args = parser.parse_args(argv)

    modes = [args.reconstruct, args.caption, args.prompt]
    if sum(map(bool, modes)) != 1 or (args.edit and not args.prompt):
        modes = "--prompt TEXT, --reconstruct IMG, --caption IMG, or --edit IMG with --prompt TEXT"
        parser.error(f"give one of {modes}")
    if args.n < 1:
        parser.error(f"--n is {args.n}, it must be at least 1")
    is_picture = args.out.lower().endswith((".png", ".jpg", ".webp"))
    if not is_picture or not os.access(os.path.dirname(args.out) or ".", os.W_OK):
        rule = "it must be a .png, .jpg or .webp in a folder that exists and is yours"
        parser.error(f"--out {args.out} cannot be written: {rule}")
    return args


def run(args):
    """What the command line asks for: prints captions, or samples and saves a grid."""
    loaded = Checkpoint(args.ckpt, args.device, encoder=args.encoder)
    model, vocabulary = loaded.model, loaded.vocabulary
    options = {field.name: getattr(args, field.name) for field in fields(Sampling)}
    seeds = list(range(args.seed, args.seed + args.n))
    paths = args.reconstruct or args.caption or args.edit
    if paths:
        images = read_images(paths, model.cfg.image_size)
        visual_words = encode_in_chunks(model, loaded.encoder, images)
        lines = [format_visual_words(words, vocabulary) for words in visual_words]
        repeated = images.repeat_interleave(args.n, 0)
        seeds *= len(paths)

    if args.caption:
        sentences = caption_images(model, loaded.encoder, vocabulary, images)
        for path, line, sentence in zip(paths, lines, sentences, strict=True):
            print(f"{path}: {sentence}\n    visual words: {line}")
        return
    options["seeds"] = seeds
    if args.edit:
        instructions = [args.prompt] * len(repeated)
        sampled = edit(model, loaded.encoder, vocabulary, repeated, instructions, **options)
    elif args.reconstruct:
        sampled = reconstruct(model, loaded.encoder, repeated, **options)
    else:
        sampled = text_to_image(model, vocabulary, [args.prompt] * args.n, **options)

    if paths:
        rows = list(zip(images[:, None], sampled.split(args.n), strict=True))
        columns = ["image", args.prompt or "from its visual words"]
        grid = image_grid(rows, lines, columns)
    else:
        grid = image_grid(sampled.split(8), [args.prompt])
    grid.save(args.out)
    print(f"{len(sampled)} images in {args.out}: seeds {seeds[0]} to {seeds[-1]} in reading order")
    print("one of them alone: --n 1 --seed ITS_SEED")


def main(argv=None):
    with user_errors():
        run(parse_args(argv))


if __name__ == "__main__":
    main()
