"""The options of train.py: one dataclass, the command line made from it, and the checks of both."""

import os
import textwrap
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

import torch

from cli import WORLD_SIZE, Parser, exit_with_error
from data import DATASETS
from model import ModelConfig
from paradigms import PARADIGMS
from shapes import TEXT_LEN

STAGE_NAMES = ["encoder", "pretrain", "align", "sft", "reca"]  # in the order of --stage all
DEVICES = ["auto", "cpu", "cuda", "mps"]
DTYPES = ["auto", "float32", "bfloat16", "float16"]


def option(group: str, default, help: str, choices=None):
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass
class Config:
    dataset: str = option("data", "shapes", "what to train on", DATASETS)
    data_dir: str = option("data", "", "folder of the images; empty: this one, if it has train/")
    image_size: int = option("data", 48, "side of the images, in pixels")
    text_len: int = option("data", 18, "length of a caption in words, with <bos>")
    workers: int = option("data", -1, "loader processes; -1: none for shapes, else shared cores")
    caption_column: str = option("data", "", "column of captions; empty: text, caption, prompt ..")
    cache_dir: str = option("data", "", "folder of file lists and features; empty: ~/.cache/reca")
    cache_features: bool = option("data", False, "compute the encoder's features once; no flips")
    paradigm: str = option("model", "flow", "how images are generated", list(PARADIGMS))
    encoder: str = option("model", "scratch", "scratch, random (untrained), clip-b16, ..., a path")
    encoder_size: int = option("model", 0, "side of the encoder's input, in pixels; 0: image_size")
    patch_size: int = option("model", 16, "side of a patch, in pixels")
    width: int = option("model", 128, "width of the transformer")
    depth: int = option("model", 6, "blocks of the transformer")
    heads: int = option("model", 4, "attention heads")
    noise_scale: float = option("model", 2.0, "flow, mar: std of the noise; images: -1 to 1")
    stage: str = option("stages", "all", "one stage, or all of them", ["all", *STAGE_NAMES])
    init_from: str = option("stages", "", "checkpoint of an earlier stage to start from")
    resume: bool = option("stages", False, "go on with the run in --out_dir, with its settings")
    encoder_steps: int = option("stages", 700, "steps of the encoder stage")
    pretrain_steps: int = option("stages", 2800, "steps of the pretrain stage")
    align_steps: int = option("stages", 250, "steps of the align stage")
    reca_steps: int = option("stages", 1000, "steps of the reca stage, and of sft")
    batch_size: int = option("optimisation", 32, "images a step; other batches are shares of it")
    repeats_per_image: int = option("optimisation", 2, "noises or masks of an image in a step")
    grad_accum_steps: int = option("optimisation", 1, "micro-batches of a step, to save memory")
    encoder_lr: float = option("optimisation", 2e-3, "peak learning rate of the encoder stage")
    pretrain_lr: float = option("optimisation", 3e-3, "peak learning rate of the pretrain stage")
    align_lr: float = option("optimisation", 1e-3, "peak learning rate of the align stage")
    reca_lr: float = option("optimisation", 2e-3, "peak learning rate of reca, and of sft")
    warmup: int = option("optimisation", 100, "steps of linear warm-up")
    ema: float = option("optimisation", 0.0, "decay of the weights' moving average; 0: none")
    i2t: float = option("loss", 0.1, "weight of image -> caption in sft and reca")
    replay: float = option("loss", 1.0, "weight of pretrain's pairs in sft, reca; paper: 0")
    device: str = option("device", "auto", "auto: a GPU if there is one", DEVICES)
    dtype: str = option("device", "auto", "of autocast; auto: 16 bits with cuda, else 32", DTYPES)
    compile: str = option("device", "auto", "torch.compile; auto: with cuda", ["auto", "on", "off"])
    checkpoint_activations: bool = option("device", False, "recompute activations; saves memory")
    out_dir: str = option("run", "out", "folder of checkpoints, logs, tables and pictures")
    seed: int = option("run", 0, "of weights, data order and noise")
    smoke: bool = option("run", False, "the whole path with very few steps")
    bench: bool = option("run", False, "only measure the speed of the RecA step")
    save_every: int = option("run", 500, "steps between states to resume from")
    log_every: int = option("run", 50, "steps between log lines")
    eval_n: int = option("run", 64, "prompts of each category in the report")

    def __post_init__(self):
        """Makes data_dir absolute: a checkpoint keeps it, and is used from other folders."""
        if self.dataset != "shapes" and (self.data_dir or os.path.isdir("train")):
            self.data_dir = os.path.abspath(os.path.expanduser(self.data_dir))


# noise_scale: with less, nearly every t shows a photograph's layout, and captions are ignored.
PHOTOS = dict(image_size=64, patch_size=8, noise_scale=3.0, width=384, depth=12, heads=6)
PHOTOS |= dict(text_len=33, encoder="clip-b16", pretrain_lr=1e-3, reca_lr=2e-4, eval_n=1000)
LARGE = dict(patch_size=16, width=768, heads=12)  # JiT-B's sizes, arXiv 2511.13720
SMOKE = dict(encoder_steps=60, pretrain_steps=100, align_steps=40, reca_steps=40)
SMOKE |= dict(warmup=10, eval_n=24, log_every=10)
PRESETS = {"--dataset imagenet, cifar10 or folder": PHOTOS}
PRESETS |= {"these with --image_size 128 or more, also": LARGE, "--smoke": SMOKE}

STEPS = ["encoder_steps", "pretrain_steps", "align_steps", "reca_steps"]
RATES = ["encoder_lr", "pretrain_lr", "align_lr", "reca_lr"]
# What --resume may change; all else is the run's own. The encoder: another path to its weights.
RESUME_OVERRIDES = {*STEPS, *RATES, "resume", "out_dir", "data_dir", "cache_dir", "workers"}
RESUME_OVERRIDES |= {"device", "dtype", "compile", "checkpoint_activations"}
RESUME_OVERRIDES |= {"encoder", "grad_accum_steps", "save_every", "log_every", "eval_n"}


def parse_config(argv, description: str = "") -> tuple[Config, dict]:
    """The settings of a command line, and the options it gives: they win over presets."""
    epilog = "presets (an option that is given wins over them):"
    for name, preset in PRESETS.items():
        changes = " ".join(f"--{key} {value}" for key, value in preset.items())
        epilog += "\n" + textwrap.fill(f"  {name}: {changes}", 96, subsequent_indent="    ")
    texts = {"usage": "%(prog)s [options]", "description": description, "epilog": epilog}
    parser = Parser(**texts)
    group = cache(parser.add_argument_group)  # makes each once
    for f in fields(Config):
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": BooleanOptionalAction}
        text = f"{f.metadata['help']} (default: {f.default!r})"
        group(f.metadata["group"]).add_argument(f"--{f.name}", default=SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    preset = {}
    if given.get("dataset", "shapes") != "shapes":
        preset = PHOTOS | (LARGE if given.get("image_size", 0) >= 128 else {})
    preset |= SMOKE if given.get("smoke") else {}
    return Config(**(preset | given)), given


def resume_config(cfg: Config, given: dict, saved: dict) -> Config:
    """The settings of the run that is resumed, but for the RESUME_OVERRIDES that are given."""
    run = f"the run in {cfg.out_dir}"
    settings = saved.get("config", {})
    for name, value in given.items():
        if name not in RESUME_OVERRIDES and value != settings.get(name, value):
            text = f"{run} has {settings[name]}, and --resume goes on with that"
            exit_with_error(f"--{name} {value}: {text}; leave it out, or start a new run")
    if settings.keys() != asdict(cfg).keys():
        exit_with_error(f"{run} is of another version of this code: start a new one")
    return Config(**(settings | given | {"out_dir": cfg.out_dir, "resume": True}))


def validate(cfg: Config) -> None:
    """Ends with a sentence for what can be known to be wrong before any file is read."""

    def require(holds: bool, name: str, what: str) -> None:
        if not holds:
            exit_with_error(f"--{name} is {getattr(cfg, name)}, it must be {what}")

    counts = ["image_size", "patch_size", "width", "depth", "heads", "batch_size"]
    counts += ["repeats_per_image", "grad_accum_steps", "save_every", "log_every", "eval_n"]
    for name in counts:
        require(getattr(cfg, name) >= 1, name, "at least 1")
    for name in [*STEPS, "warmup", "encoder_size", "i2t", "replay"]:
        require(0 <= getattr(cfg, name) < torch.inf, name, "a number, at least 0")
    for name in [*RATES, "noise_scale"]:
        require(0 < getattr(cfg, name) < torch.inf, name, "a positive number")
    require(0 <= cfg.ema < 1, "ema", "in [0, 1)")
    require(cfg.workers >= -1, "workers", "-1 or more")
    require(0 <= cfg.seed < 2**32, "seed", "at least 0 and below 2^32")
    what = f"a multiple of --patch_size {cfg.patch_size}"
    require(cfg.image_size % cfg.patch_size == 0, "image_size", what)
    require(cfg.width % cfg.heads == 0, "width", f"a multiple of --heads {cfg.heads}")
    if PARADIGMS[cfg.paradigm].uses_tokenizer:
        what = f"a multiple of {ModelConfig.code_stride}, the side of a code of {cfg.paradigm}"
        require(cfg.image_size % ModelConfig.code_stride == 0, "image_size", what)
    if cfg.dataset == "shapes":
        require(cfg.image_size % 3 == 0, "image_size", "a multiple of 3: a scene has 3 x 3 cells")
        require(cfg.text_len == TEXT_LEN, "text_len", f"{TEXT_LEN}: its longest caption")
    else:
        what = "public weights (clip-b16, or a path): scratch and random are for the shapes"
        require(cfg.encoder not in ("scratch", "random"), "encoder", what)
        require(cfg.text_len >= 3, "text_len", "at least 3")
    if cfg.device in ("cuda", "mps") and not getattr(torch, cfg.device).is_available():
        exit_with_error(f"--device {cfg.device}: torch finds no {cfg.device.upper()} device here")
    if cfg.device == "mps" and WORLD_SIZE > 1:
        exit_with_error("--device mps is one GPU: several processes train with --device cpu")
    if cfg.cache_features and not hasattr(os, "pread"):
        exit_with_error("--cache_features needs os.pread, which Windows has not: leave it out")
    try:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        exit_with_error(f"--out_dir {cfg.out_dir} cannot be made: {error.strerror}")
