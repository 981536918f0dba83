"""Train the unified model, then post-train it with Reconstruction Alignment (RecA, arXiv 2509.07295).

    python train.py                                     # the embedded shapes: base | SFT | RecA in minutes on a laptop
    python train.py --smoke                             # the whole path in about a minute, to see that it runs
    python train.py --dataset imagenet --data_dir DIR --encoder clip-b16
    python train.py --stage reca --init_from out/pretrain.pt --reca_steps 200 --out_dir out_short
    python train.py --resume                            # go on where the run in out/ was stopped, to the bit
    torchrun --nproc_per_node 4 train.py ...            # the same batch over four processes, the same losses; --shard: FSDP
    python train.py --bench                             # how fast is the RecA step here?

Stages, in the order of `--stage all`; every one of them is the same loop with other loss terms (see recon_loss.py):

    encoder   the understanding encoder, from scratch; public weights need no training, and skip it
    pretrain  words -> image on sparse captions, and words -> words           all but the connector
    align     image -> visual words, that the frozen transformer can read     the connector alone
    sft       the control: sparse captions of RecA's images, the same steps   all but the connector
    reca      the same images with no caption: their visual words instead     all but the connector

`sft` and `reca` both start from the aligned base. The report at the end scores all three on the same prompts and noise.
"""
import argparse
import difflib
import fcntl
import json
import math
import os
import resource
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import evaluate
import recon_loss
from data import EOS, SPECIALS, TEXT_LEN, Vocabulary, batches, cache_features, encoder_identity, make_dataset
from encoder import ViT, ViTConfig, load_encoder, scratch_config
from model import IMAGES, Block, LayerNorm, Linear, ModelConfig, UnifiedModel, causal_mask
from recon_loss import total_loss
from sample import load_checkpoint, read_checkpoint

# ------------------------------------------------------ Configuration: one dataclass, and the command line made from it

def option(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})

@dataclass
class Config:
    dataset: str = option("shapes", "what to train on", ["shapes", "imagenet", "cifar10", "folder"])
    data_dir: str = option("", "folder of the images; imagenet: with train/ and val/")
    stage: str = option("all", "one stage, or all of them", ["all", "encoder", "pretrain", "align", "sft", "reca"])
    paradigm: str = option("flow", "how images are generated", list(IMAGES))
    encoder: str = option("scratch", "understanding encoder: scratch, a public name (clip-b16, ...), or a path; random: scratch left untrained, a control")
    encoder_size: int = option(0, "pixels of a side at which the encoder sees the images; 0: as they are")
    captions: str = option("sparse", "captions that the sft stage trains on; own: the visual words, as the model's own caption", ["sparse", "dense", "own"])
    condition: str = option("words", "what RecA's prefix holds; features, pixels: controls in which the image can be copied", ["words", "features", "pixels"])
    visual_words: int = option(0, "how many visual words are kept, the rest are <pad>; 0: all")
    sharpness: float = option(1.0, "what the logits of visual words are multiplied by: 0, all words alike; 10, nearly one word each")
    reverse_words: bool = option(False, "visual words in reverse: each is still a word, together they are no sentence")
    templates: int = option(0, "how many pairs of words one is drawn from, to stand last in RecA's prefix, as the paper's templates do; 0: none")
    images: int = option(0, "how many images of their split sft and reca see; 0: all")
    drop: float = option(0.1, "share of conditions dropped in training, for guidance")
    trains: str = option("all", "what of the transformer sft and reca train", ["all", "attention"])
    out_dir: str = option("out", "where checkpoints, logs, tables and pictures go")
    init_from: str = option("", "checkpoint of an earlier stage to start from")
    resume: bool = option(False, "go on with the run in --out_dir, with its settings")
    seed: int = option(0, "of weights, data order and noise")
    smoke: bool = option(False, "the whole path with very few steps")
    bench: bool = option(False, "only measure the RecA step here: eager and compiled, float32 and bfloat16")

    image_size: int = option(48, "pixels of a side")
    patch_size: int = option(16, "pixels of a patch's side")
    noise_scale: float = option(2.0, "flow, mar: standard deviation of the noise, where images are in [-1, 1]")
    width: int = option(128, "of the transformer")
    depth: int = option(6, "blocks of the transformer")
    heads: int = option(4, "attention heads")
    text_len: int = option(18, "<bos> and this many words less one; also the number of visual words")

    batch_size: int = option(32, "images a step")
    draws: int = option(2, "how often each image of a step is noised or masked: draws share their prefix")
    understand_batch: int = option(32, "images a step of the understanding side: stages encoder and align")
    side_batch: int = option(8, "images a step of each language term: t2t, i2t")
    replay_batch: int = option(16, "pre-training pairs a step that sft and reca replay")
    encoder_steps: int = option(700, "steps of the encoder stage")
    pretrain_steps: int = option(2800, "steps of the pretrain stage")
    align_steps: int = option(250, "steps of the align stage")
    reca_steps: int = option(1000, "steps of the reca stage, and of sft")
    encoder_lr: float = option(2e-3, "peak learning rate of the encoder stage")
    pretrain_lr: float = option(3e-3, "peak learning rate of the pretrain stage")
    align_lr: float = option(1e-3, "peak learning rate of the align stage")
    reca_lr: float = option(2e-3, "peak learning rate of the reca stage, and of sft")
    warmup: int = option(100, "steps of linear warm-up")
    decay: float = option(0.3, "share of a stage in which the learning rate falls linearly to zero")
    weight_decay: float = option(0.0, "decoupled weight decay")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.0, "decay of the average of weights that samples; 0: sample the raw weights")

    t2t: float = option(0.1, "weight of words -> words in pretrain, sft and reca")
    i2t: float = option(0.1, "weight of image -> words in sft and reca; the paper keeps it where weights are shared")
    replay: float = option(1.0, "weight of the pre-training pairs in sft and reca; the paper's is 0")
    words: float = option(1.0, "weight in align of saying the canonical description, one visual word a word; of photographs the caption, and the other visual words are free")
    train_connector: bool = option(False, "let the connector learn in reca, as OpenUni's does")

    device: str = option("auto", "auto: a GPU where there is one; CUDA_VISIBLE_DEVICES chooses among several", ["auto", "cpu", "cuda"])
    dtype: str = option("auto", "of autocast; auto: bfloat16 on a GPU that has it, else float16 there, float32 on a CPU", ["auto", "float32", "bfloat16", "float16"])
    compile: str = option("auto", "torch.compile of the core step; auto: on a GPU (no gain was measured on CPUs)", ["auto", "on", "off"])
    accumulate: int = option(1, "parts of a step's batch that are computed one after the other, to save memory")
    checkpoint_activations: bool = option(False, "compute the blocks' activations again in the backward pass, to save memory")
    shard: bool = option(False, "under torchrun, one stage at a time: each process holds a share of the weights (FSDP2)")
    workers: int = option(-1, "loader processes; -1: none for shapes, else one a core")
    cache_dir: str = option("", "where the index of an image folder is kept, and cached features; default: ~/.cache/reca")
    cache_features: bool = option(False, "compute what the encoder sees of each image once, and keep it on disk: for stages of several epochs; images are not flipped")
    save_every: int = option(500, "steps between states to resume from")
    keep: int = option(2, "newest states to keep")
    log_every: int = option(50, "steps between log lines")
    eval_n: int = option(64, "prompts of each category in the report")

# noise_scale: with less noise layout and color of a photograph can be seen at nearly all times that training draws, and captions are not listened to.
PHOTOS = dict(image_size=64, patch_size=8, noise_scale=3.0, width=384, depth=12, heads=6, text_len=33, encoder="clip-b16", pretrain_lr=1e-3, reca_lr=2e-4, eval_n=1000)
LARGE = PHOTOS | dict(patch_size=16, width=768, heads=12)  # photographs from 128 px on: JiT-B's sizes, arXiv 2511.13720
SMOKE = dict(encoder_steps=60, pretrain_steps=100, align_steps=40, reca_steps=40, warmup=10, eval_n=24, log_every=10)

# What --resume may change; all else is the run's own.
CHANGEABLE = {"resume", "out_dir", "data_dir", "cache_dir", "device", "dtype", "compile", "accumulate", "checkpoint_activations", "shard", "workers", "save_every", "keep",
              "log_every", "eval_n", "grad_clip", *(f"{s}_{x}" for s in ("encoder", "pretrain", "align", "reca") for x in ("lr", "steps"))}

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))  # of this process; torchrun sets them
WORLD, LOCAL_WORLD = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # how many there are; of them on this machine

def say(message: str) -> None:
    if RANK == 0:
        tqdm.write(message)

def fail(message: str):
    """A user's mistake: one sentence, exit code 2."""
    print(f"error: {message}" if RANK == 0 else f"error in process {RANK}: {message}", file=sys.stderr)
    raise SystemExit(2)

class Parser(argparse.ArgumentParser):
    """Argparse that answers a wrong option with the nearest right one."""

    def error(self, message):
        options = [o for a in self._actions for o in a.option_strings]
        near = [difflib.get_close_matches(w.split("=")[0], options, 1) for w in message.split() if w.startswith("--")]
        hint = f"; did you mean {near[0][0]}?" if near and near[0] and "unrecognized" in message else ""
        fail(f"{message}{hint} (python {Path(self.prog).name} --help lists the options)")

def parse_config(argv) -> tuple[Config, dict]:
    """Command line over the data set's preset over the defaults; and what the command line gives."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {f.default})", **kind)
    given = vars(parser.parse_args(argv))
    preset = {} if given.get("dataset", "shapes") == "shapes" else LARGE if given.get("image_size", 0) >= 128 else PHOTOS
    return Config(**(preset | (SMOKE if given.get("smoke") else {}) | given)), given

def check(cfg: Config) -> None:
    """What can be known to be wrong before any work starts; what is wrong with images and weights, data.py and encoder.py say."""
    def each(names: str, right, what: str):
        for name in names.split():
            if not right(getattr(cfg, name)):
                fail(f"--{name} is {getattr(cfg, name)}, it must be {what}")

    each("image_size patch_size width depth heads batch_size draws understand_batch side_batch replay_batch accumulate keep log_every save_every eval_n", lambda n: n >= 1, "at least 1")
    each("encoder_steps pretrain_steps align_steps reca_steps warmup encoder_size images visual_words", lambda n: n >= 0, "at least 0")
    each("encoder_lr pretrain_lr align_lr reca_lr grad_clip noise_scale", lambda x: 0 < x < math.inf, "a positive number")
    each("t2t i2t replay words weight_decay sharpness", lambda x: 0 <= x < math.inf, "a number, at least 0")
    each("decay", lambda x: 0 <= x <= 1, "in [0, 1]")
    each("ema drop", lambda x: 0 <= x < 1, "in [0, 1)")
    each("templates", lambda n: 0 <= n <= (4 if cfg.dataset == "shapes" else 0), "in 0 to 4, for shapes, and 0 for photographs")
    each("workers", lambda n: n >= -1, "-1 or more")
    each("seed", lambda n: 0 <= n < 2 ** 32, "at least 0 and below 2^32")
    each("batch_size understand_batch side_batch replay_batch", lambda n: n % (WORLD * cfg.accumulate) == 0, f"a multiple of {WORLD} processes x --accumulate {cfg.accumulate}")
    each("image_size", lambda n: n % cfg.patch_size == 0, f"a multiple of --patch_size {cfg.patch_size}")
    each("width", lambda n: n % cfg.heads == 0, f"a multiple of --heads {cfg.heads}")
    if IMAGES[cfg.paradigm].holds_codes:
        each("image_size", lambda n: n % ModelConfig.code_stride == 0, f"a multiple of {ModelConfig.code_stride}: --paradigm {cfg.paradigm} has a code for so many pixels")
    if cfg.dataset == "shapes":
        each("image_size", lambda n: n % 3 == 0, "a multiple of 3: a scene of shapes is a grid of 3 x 3 cells")
        each("text_len", lambda n: n == TEXT_LEN, f"{TEXT_LEN}: its longest caption")
    else:
        each("encoder", lambda name: name not in ("scratch", "random"), "public weights (clip-b16, or a path): scratch learns from the shapes' exact captions, random is its control on the shapes")
        each("text_len", lambda n: n >= 3, "at least 3")
    each("condition", lambda x: x == "words" or cfg.stage == "reca", "words: only --stage reca can have another")
    each("visual_words", lambda n: n < cfg.text_len, f"at most {cfg.text_len - 1}, the words of a prefix")
    if cfg.stage in NEEDS and not (cfg.init_from or cfg.resume) and (cfg.stage != "pretrain" or IMAGES[cfg.paradigm].holds_codes):
        fail(f"--stage {cfg.stage} starts from an earlier stage: give --init_from, a checkpoint of stage {NEEDS[cfg.stage]}")
    if cfg.shard and (WORLD == 1 or cfg.stage in ("all", "encoder")):
        fail("--shard needs several processes (torchrun --nproc_per_node N train.py ...) and one stage at a time (--stage pretrain, align, sft or reca)")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no CUDA device on this machine")
    try:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out_dir {cfg.out_dir} cannot be made: {error.strerror}")

# ------------------------------------------------------------------------------------------ One device-and-dtype policy

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
              "V100": 125e12, "T4": 65e12}  # dense, 16 bits, by the makers' data sheets

class Policy:
    """Where the work is done and in which precision; parameters and optimizer stay in float32."""

    def __init__(self, cfg: Config):
        cuda = cfg.device == "cuda" or cfg.device == "auto" and torch.cuda.is_available()
        self.device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if WORLD > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        recon_loss.RANK, recon_loss.WORLD = RANK, WORLD
        torch.set_float32_matmul_precision("high" if cuda else "medium")  # TF32; on a CPU: oneDNN in place of MKL, which where there is
        torch.backends.cuda.enable_flash_sdp(cuda)                        # AMX rounds factors to bfloat16; and attention by plain products: faster
        auto = "float32" if not cuda else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        self.dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
        self.compile = (cuda if cfg.compile == "auto" else cfg.compile == "on") and can_compile(self.device)
        self.device_name = torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        self.peak_flops = next((peak for name, peak in PEAK_FLOPS.items() if name in self.device_name), None)  # in 16 bits; None: not known

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def now(self) -> float:
        """The time, once a GPU has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.time()

    def gigabytes(self) -> float:
        """The most memory that was in use: of the GPU, or of this process since it began."""
        return (torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30

def can_compile(device: torch.device) -> bool:
    """A trial on two numbers: without a C++ compiler, or Triton on a GPU, training goes on without torch.compile."""
    try:
        torch.compile(lambda x: (x + 1).cos())(torch.ones(2, device=device))
        return True
    except Exception as error:  # the backend raises nearly anything; uncompiled, all is right but slower
        say(f"torch.compile does not work here ({first_line(error)}): on without it")
        return False

def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:90]

def over_ranks(x: torch.Tensor, how=dist.ReduceOp.SUM) -> torch.Tensor:
    if WORLD > 1:
        dist.all_reduce(x, how)
    return x

# ----------------------------------------------------------------- Stages: which images, which losses, which parameters

STAGES = ["encoder", "pretrain", "align", "sft", "reca"]
NEEDS = {"pretrain": "encoder", "align": "pretrain", "sft": "align", "reca": "align"}  # by itself a stage starts from a checkpoint of this one, or of a later one

# The batches of a step, by role: the split that they come from, and the option that holds their size.
BATCHES = {
    "encoder": {"main": ("understand", "batch_size"), "understand": ("understand", "understand_batch")},  # main: the tokenizer's; it has to know all colors
    "pretrain": {"main": ("pretrain", "batch_size"), "understand": ("understand", "side_batch")},
    "align": {"understand": ("understand", "understand_batch")},
    "sft": {"main": ("reca", "batch_size"), "understand": ("understand", "side_batch"), "replay": ("pretrain", "replay_batch")},
}
BATCHES["reca"] = BATCHES["sft"]

def weights_of(stage: str, cfg: Config) -> dict[str, float]:
    """Loss terms of a stage and their weights. RecA and its control differ in the first term alone."""
    scratch, codes = float(cfg.encoder == "scratch"), float(IMAGES[cfg.paradigm].holds_codes)
    language = {"i2t": cfg.i2t, "t2t": cfg.t2t, "replay": cfg.replay}
    return {
        "encoder": {"caption": scratch, "contrast": 0.25 * scratch, "words": scratch, "t2t": 1.0, "tokenizer": codes},
        "pretrain": {"t2i": 1.0, "t2t": cfg.t2t},
        "align": {"i2t": 1.0, "words": cfg.words},
        "sft": {"t2i": 1.0} | language,
        "reca": {"recon": 1.0} | language,
    }[stage]

def learns(stage: str, name: str, cfg: Config) -> bool:
    """Whether a stage trains the parameter of that name; the rest is frozen."""
    part = next((part for part in ("encoder.", "tower.", "model.connector.", "model.tokenizer.") if name.startswith(part)), "transformer")
    if stage == "encoder":  # all, but for public weights: these are frozen for good
        return cfg.encoder == "scratch" or part in ("model.tokenizer.", "transformer")
    if cfg.trains == "attention" and stage in ("sft", "reca") and part == "transformer":
        return ".attn." in name
    return part == ("model.connector." if stage == "align" else "transformer") or part == "model.connector." and stage == "reca" and cfg.train_connector

class CaptionTower(nn.Module):
    """The throw-away text side that trains an understanding encoder from scratch, as CoCa does (arXiv 2205.01917; SigLIP 2 too).

    Causal blocks read the caption alone: their state at <eos> is the text embedding, to be contrasted with the image's. Further causal blocks attend to
    the patch tokens and write the caption: that makes an encoder say which object has which color; contrast leaves a bag of words (arXiv 2210.01936).
    """

    def __init__(self, vocab_size: int, text_len: int, width: int, encoder_width: int, uni: int = 1, multi: int = 2, heads: int = 4):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, width)
        self.text_pos = nn.Parameter(torch.empty(text_len, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(uni)] + [Block(width, heads, encoder_width) for _ in range(multi)])
        self.uni = uni
        self.norm_text, self.norm = LayerNorm(width), LayerNorm(width)
        self.text_proj, self.lm_head = Linear(width, encoder_width), Linear(width, vocab_size)
        self.log_scale, self.bias = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        for p in self.parameters():
            nn.init.ones_(p) if p.ndim == 1 else nn.init.normal_(p, std=0.02)
        nn.init.normal_(self.wte.weight), nn.init.normal_(self.text_pos, std=0.3)
        nn.init.constant_(self.log_scale, math.log(10)), nn.init.constant_(self.bias, -10)  # arXiv 2303.15343, section 3.2

    def forward(self, ids, patch_tokens):
        """Captions (B, T), patch tokens (B, tokens, D_enc) -> text embedding (B, D_enc), next-word logits (B, T, V)."""
        x = self.wte(ids) + self.text_pos[: ids.shape[1]]
        mask = causal_mask(ids.shape[1], ids.device)
        for block in self.blocks[: self.uni]:
            x = block(x, mask=mask)
        end = (ids == EOS).int().argmax(1)
        text = self.text_proj(self.norm_text(x[torch.arange(len(x), device=x.device), end]))
        for block in self.blocks[self.uni:]:
            x = block(x, mask=mask, context=patch_tokens)
        return text, self.lm_head(self.norm(x))

# ------------------------------------------------------------------------------ The run: what it holds, saves and loads

class Run:
    """The encoder, its throw-away text tower, and the model; and what a checkpoint of them holds."""

    def __init__(self, cfg: Config, policy: Policy, vocabulary=None, encoder=None):
        self.cfg, self.policy, self.out = cfg, policy, Path(cfg.out_dir)
        torch.manual_seed(cfg.seed)  # on every rank the same: they start with the same weights, and draw the same noise
        self.vocabulary = vocabulary
        self.vocabulary = vocabulary or self.dataset("pretrain").vocabulary
        self.public = cfg.encoder not in ("scratch", "random")  # the encoder's weights are frozen, and where they came from: never saved
        self.encoder = encoder or (load_encoder(cfg.encoder) if self.public else ViT(scratch_config(cfg.image_size, cfg.patch_size)))
        options = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig) if hasattr(cfg, f.name)}  # image_size, width, paradigm, ...
        self.model = UnifiedModel(ModelConfig(**options, vocab_size=len(self.vocabulary), encoder_width=self.encoder.cfg.width, renew=float(cfg.dataset == "shapes")))
        recon_loss.DROP, recon_loss.TEMPLATES = cfg.drop, cfg.templates
        tower = CaptionTower(len(self.vocabulary), cfg.text_len, 128, self.encoder.cfg.width)
        self.parts = nn.ModuleDict({"encoder": self.encoder, "tower": tower, "model": self.model}).to(policy.device)
        with torch.no_grad():  # images of a size that this encoder cannot read are a mistake to be told now, not when align begins
            tokens = self.encoder(self.model.for_encoder(torch.zeros(1, 3, cfg.image_size, cfg.image_size, device=policy.device))).patch_tokens.shape[1]
        tokens = {"words": 0, "features": tokens, "pixels": (cfg.image_size // cfg.patch_size) ** 2}[cfg.condition]
        if tokens >= cfg.text_len:
            fail(f"--condition {cfg.condition} is {tokens} tokens, and the prefix has room for {cfg.text_len - 1}: choose larger patches")
        if cfg.checkpoint_activations:
            for block in self.model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        self.average: dict[str, torch.Tensor] = {}  # of what learns in the model, in a stage with --ema
        self.seconds: dict[str, float] = {}         # by stage
        self.workers = cfg.workers if cfg.workers >= 0 else 0 if cfg.dataset == "shapes" else os.cpu_count()

    def dataset(self, split: str):
        cfg = self.cfg
        return make_dataset(cfg.dataset, split, cfg.data_dir, cfg.image_size, cfg.seed, self.vocabulary, cfg.text_len, cache_dir=cfg.cache_dir)

    def cached(self, split: str):
        """The same with the features of the frozen encoder. The processes of one machine share the work."""
        def encode(images):
            with torch.no_grad(), self.policy.autocast():
                return self.encoder(self.model.for_encoder(images.to(self.policy.device))).patch_tokens

        identity = encoder_identity(self.encoder, self.cfg.encoder_size, self.policy.dtype)
        return cache_features(self.dataset(split), encode, identity, self.cfg.cache_dir, self.workers, LOCAL_RANK, LOCAL_WORLD)

    def parameters_of(self, stage: str) -> dict[str, nn.Parameter]:
        """Freezes all but what the stage trains, and returns that by name."""
        chosen = {name: p.requires_grad_(learns(stage, name, self.cfg)) for name, p in self.parts.named_parameters()}
        return {name: p for name, p in chosen.items() if p.requires_grad}

    def checkpoint(self, stage: str, step: int) -> dict:
        """What sample.py, evaluate.py and a later stage need; see sample.load_checkpoint. Under --shard all ranks have to call this."""
        model = whole(self.model.state_dict())
        return {"format": 1, "stage": stage, "step": step, "model_config": asdict(self.model.cfg), "model": model,
                "ema": model | whole(self.average) if self.average else None, "vocabulary": self.vocabulary.words, "config": asdict(self.cfg),
                "encoder": {"name": self.cfg.encoder, "config": None if self.public else asdict(self.encoder.cfg), "state": None if self.public else whole(self.encoder.state_dict())}}

    def load(self, path, stage: str) -> None:
        """Takes over the weights of a checkpoint of the same sizes and words, to begin `stage`; anything else is a user's mistake."""
        saved = read_checkpoint(path)
        try:
            may = {"draws", "visual_words", "sharpness", "reverse_words", "renew"} | ({"condition"} if saved["model_config"].get("condition", "words") == "words" else set())
            theirs, mine = saved["model_config"] | {"encoder": saved["encoder"]["name"]}, asdict(self.model.cfg) | {"encoder": self.cfg.encoder}
            differ = [f"{k} is {theirs.get(k)} there and {mine[k]} here" for k in mine if theirs.get(k) != mine[k] and k not in may]
            if differ or saved["vocabulary"] != self.vocabulary.words:
                fail(f"the checkpoint {path} is of another configuration: {'; '.join(differ) or 'it was trained on other words'}")
            if stage in NEEDS and STAGES.index(saved["stage"]) < STAGES.index(NEEDS[stage]):
                fail(f"the checkpoint {path} is of stage {saved['stage']}, and --stage {stage} starts from {NEEDS[stage]}: train that stage first")
            raw = {name: value for name, value in self.model.state_dict().items() if name.startswith("raw_")}  # of --condition: reca starts it anew
            self.model.load_state_dict(raw | (saved["ema"] or saved["model"]))
            if saved["encoder"]["state"] is not None:
                self.encoder.load_state_dict(saved["encoder"]["state"])
        except (KeyError, TypeError, RuntimeError) as error:
            fail(f"the checkpoint {path} does not fit this code ({' '.join(str(error).split()):.120}): train it again")

    def save_state(self, stage: str, step: int, optimizers, scaler, history: list) -> None:
        """All that --resume needs to go on to the bit. (Python's and NumPy's generators are not used; a batch depends on seed and step alone.)"""
        parts = {name: x for name, x in self.parts.state_dict().items() if not (self.public and name.startswith("encoder."))}
        state = self.checkpoint(stage, step) | {
            "parts": whole(parts), "average": whole(self.average), "optimizers": [whole(o.state_dict()) for o in optimizers],
            "scaler": scaler.state_dict(), "rng": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if self.policy.device.type == "cuda" else None},
            "history": history, "seconds": self.seconds}
        save(state, self.out / f"state-{STAGES.index(stage)}-{stage}-{step:07}.pt")
        for old in find_states(self.out)[self.cfg.keep:] if RANK == 0 else ():
            old.unlink()

    def restore(self, saved: dict, optimizers, scaler) -> list[torch.Tensor]:
        """Puts back what save_state saved beside the weights; returns the history since the last log line."""
        for name, value in saved["average"].items():
            self.average[name].copy_(like(value, self.average[name]))
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                for k, v in state["state"].get(i, {}).items():
                    state["state"][i][k] = like(v, p) if v.shape == p.shape else v
            optimizer.load_state_dict(state)
        if saved["scaler"]:  # else this run was not in float16
            scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"]["cpu"])
        if saved["rng"]["cuda"] is not None and self.policy.device.type == "cuda":
            torch.cuda.set_rng_state(saved["rng"]["cuda"])
        return saved["history"]

    def log(self, stage: str, step: int, steps: int, means: dict, lr: float, rate: float, flops: float, tokens: int) -> None:
        """One aligned line for people, one line of log.jsonl for programs. rate: steps a second; flops, tokens: of this process in a step."""
        if RANK:
            return
        images, tokens, memory = rate * self.cfg.batch_size, rate * tokens * WORLD, self.policy.gigabytes()
        mfu = rate * flops / self.policy.peak_flops if self.policy.peak_flops else None
        terms = " ".join(f"{term} {value:.4f}" for term, value in means.items() if term != "grad_norm")
        say(f"{stage:8} {step:{len(str(steps))}}/{steps} | {terms} | lr {lr:.1e} | gnorm {means['grad_norm']:.2f} | "
            f"{images:.0f} img/s {tokens / 1000:.1f}k tok/s{f' MFU {mfu:.1%}' if mfu else ''} | {memory:.1f} GB")
        entry = {"stage": stage, "step": step, **means, "lr": lr, "images_per_second": images, "tokens_per_second": tokens, "mfu": mfu, "gigabytes": memory}
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def require_finite(self, stage: str, first: int, terms: list[str], history: list[list[float]]) -> None:
        """Before anything is logged or saved: a step whose loss is no number ends the run, and the states before it stay."""
        for step, values in enumerate(history, first):
            wrong = [f"{term} is {value}" for term, value in zip(terms, values) if not math.isfinite(value)]
            if wrong and not (self.policy.dtype == torch.float16 and wrong[0].startswith("grad_norm")):  # there the scaler skips the step
                states, rate = find_states(self.out), f"{'reca' if stage == 'sft' else stage}_lr"
                fail(f"{', '.join(wrong)} at step {step} of stage {stage}; the last good state is {states[0] if states else 'the start'}: "
                     f"go on from it with --resume --out_dir {self.out} --{rate} {getattr(self.cfg, rate) / 2:g}")

def whole(state):
    """Tensors that are sharded over the processes, put together again."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state)

def like(value, other):
    """A whole tensor, sharded over the processes as `other` is."""
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements) if isinstance(other, DTensor) else value

def save(state: dict, path: Path) -> None:
    """By the first rank alone, the others wait for it. Atomic: a reader finds the old file or the new one, whole, whatever happens in between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if RANK == 0:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"{path} could not be written ({first_line(error.__context__ or error)}); what was saved before is whole: free some space, and go on with --resume")
    if WORLD > 1:
        dist.barrier()

def find_states(out: Path) -> list[Path]:
    """The states of a run, the newest first: their names are in the order of stages and steps."""
    return sorted(out.glob("state-*.pt"), reverse=True)

def read_state(out: Path) -> dict | None:
    """The newest good state of a run; None if it was stopped before the first."""
    for path in find_states(out):
        try:
            with zipfile.ZipFile(path) as file:
                if broken := file.testzip():  # torch.load does not look at the checksums
                    raise ValueError(f"checksum of {broken}")
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise nearly anything; the one before it is the answer
            say(f"{path} is damaged ({type(error).__name__}), taking the one before it")

# ------------------------------------------------------------------------------------------------------------- The loop

def make_optimizers(chosen: dict[str, nn.Parameter], cfg: Config) -> list[torch.optim.Optimizer]:
    """Muon (torch.optim, arXiv 2502.16982) for the matrices of the blocks and of the tokenizer, AdamW for embeddings, heads, norms and the rest."""
    matrices = {name: p for name, p in chosen.items() if p.ndim == 2 and ("blocks." in name or "tokenizer." in name)}
    rest = [p for name, p in chosen.items() if name not in matrices]
    adamw = [torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)] if rest else []
    return adamw + ([torch.optim.Muon(matrices.values(), weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")] if matrices else [])

def set_lr(optimizers: list, lr: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr

def learning_rate(step: int, steps: int, peak: float, cfg: Config) -> float:
    """Linear warm-up, constant, linear decay over the last `cfg.decay` of the steps."""
    down = (steps - step) / max(cfg.decay * steps, 1)
    return peak * min((step + 1) / max(cfg.warmup, 1), 1.0, down)

class Core(nn.Module):
    """The core step, from images to losses, as a module: this is what torch.compile, DDP and FSDP take hold of."""

    def __init__(self, run: Run, stage: str, weights: dict[str, float]):
        super().__init__()
        self.parts, self.weights = run.parts, weights
        self.how = dict(captions={"sparse": "caption", "dense": "full", "own": "own"}[run.cfg.captions if stage == "sft" else "sparse"],
                        train_connector=stage == "reca" and run.cfg.train_connector)

    def forward(self, batch):
        return total_loss(self.parts["model"], self.parts["encoder"], batch, self.weights, tower=self.parts["tower"], **self.how)

def cost(core: Core, batch: dict, policy: Policy, cfg: Config) -> tuple[int, int]:
    """FLOPs (a multiply-add is 2) and transformer tokens of a step, forward and backward: counted in one without an update."""
    tokens = []
    hook = core.parts["model"].blocks[0].register_forward_hook(lambda block, args, out: tokens.append(out.shape[0] * out.shape[1]))
    with FlopCounterMode(display=False) as counter, policy.autocast():
        core(part_of_batch(batch, 0, cfg.accumulate))[0].backward()
    hook.remove()
    core.zero_grad()
    return counter.get_total_flops() * cfg.accumulate, sum(tokens) * cfg.accumulate

def prepare(core: Core, policy: Policy, shard: bool) -> nn.Module:
    """torch's own engines around the core step. Static shapes: one graph a stage."""
    if shard:
        for block in core.parts["model"].blocks:
            fully_shard(block)
            if policy.compile:
                block.compile(dynamic=False)
        return fully_shard(core, ignored_params={p for part in ("encoder", "tower") for p in core.parts[part].parameters()})  # frozen, and no part of what grows
    if policy.compile:
        core.compile(dynamic=False)
    return nn.parallel.DistributedDataParallel(core, static_graph=True) if WORLD > 1 else core

def update(core, batch: dict, optimizers: list, scaler, policy: Policy, cfg: Config) -> dict[str, torch.Tensor]:
    """One optimizer step. Returns the terms of the loss, and the norm of the gradient."""
    sums = {}
    for i in range(cfg.accumulate):
        with policy.autocast():
            loss, parts = core(part_of_batch(batch, i, cfg.accumulate))
        scaler.scale(loss / cfg.accumulate).backward()
        for term, value in parts.items():
            sums[term] = sums.get(term, 0) + value.detach().float() / cfg.accumulate
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    learning = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    grad_norm = whole(nn.utils.clip_grad_norm_(learning, cfg.grad_clip))
    for optimizer in optimizers:
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    return sums | {"grad_norm": grad_norm}

def part_of_batch(batch: dict, i: int, n: int) -> dict:
    return {role: {k: v.chunk(n)[i] for k, v in part.items()} for role, part in batch.items()}

def next_batch(streams: dict, device) -> dict:
    return {role: {k: v.to(device, non_blocking=True) for k, v in next(stream).items()} for role, stream in streams.items()}

class Interrupt:
    """SIGINT and SIGTERM in a stage ask for a stop after the step in progress; elsewhere they stop at once, as a second one does, but under torchrun, which sends two."""
    asked, training = 0, False

    def __call__(self, number, frame):
        if not self.training or self.asked and WORLD == 1:
            raise SystemExit(128 + number)
        self.asked = number

def train_stage(run: Run, stage: str, interrupt: Interrupt, saved: dict | None = None) -> None:
    """Trains one stage, from `saved` (a state of the same stage, see Run.save_state) if given, and saves its checkpoint."""
    cfg, policy = run.cfg, run.policy
    name = "reca" if stage == "sft" else stage  # the control shares RecA's steps, rate, images, order and noise
    steps, peak = getattr(cfg, f"{name}_steps"), getattr(cfg, f"{name}_lr")
    weights = {term: w for term, w in weights_of(stage, cfg).items() if w > 0}
    if not run.parameters_of(stage) or not weights:
        return  # public weights, no tokenizer: nothing to train
    seed, start = cfg.seed * 1000 + STAGES.index(name) * 10, saved["step"] if saved else 0
    seen = ("main", "understand") if cfg.cache_features and stage in ("align", "sft", "reca") else ()  # in sft: to see the very same images
    datasets = {role: run.cached(split) if role in seen else run.dataset(split) for role, (split, _) in BATCHES[stage].items()}
    streams = {role: batches(datasets[role], getattr(cfg, size), seed + i, start, run.workers, str(run.out / "bad_images.txt"), RANK, WORLD,
                             cfg.images if split == "reca" else 0) for i, (role, (split, size)) in enumerate(BATCHES[stage].items())}
    core, batch = Core(run, stage, weights), next_batch(streams, policy.device)
    run.parts.train()
    flops, tokens = cost(core, batch, policy, cfg)
    core = prepare(core, policy, cfg.shard)
    chosen = run.parameters_of(stage)  # under --shard other tensors than before
    optimizers, scaler = make_optimizers(chosen, cfg), policy.scaler()
    averaged = {name.removeprefix("model."): p for name, p in chosen.items() if name.startswith("model.") and cfg.ema}
    run.average = {name: p.detach().clone() for name, p in averaged.items()}
    torch.manual_seed(seed)
    history = run.restore(saved, optimizers, scaler) if saved else []  # of the steps since the last log line: terms of the loss, norm of the gradient

    clock, clocked, before = time.time(), start, run.seconds.get(stage, 0) - time.time()
    interrupt.training = True
    for step in tqdm(range(start, steps), desc=stage, initial=start, total=steps, leave=False, disable=RANK > 0 or None):
        set_lr(optimizers, lr := learning_rate(step, steps, peak, cfg))
        parts = update(core, batch, optimizers, scaler, policy, cfg)
        batch = next_batch(streams, policy.device)  # while a GPU still computes
        history.append(torch.stack(list(parts.values())))
        for name, p in averaged.items():
            run.average[name].lerp_(p.detach(), 1 - min(cfg.ema, (1 + step) / (10 + step)))  # short at first
        done, stop = step + 1, int(over_ranks(torch.tensor(interrupt.asked), dist.ReduceOp.MAX))  # all ranks stop after the same step
        log, keep = done % cfg.log_every == 0 or done == steps, done % cfg.save_every == 0 or done == steps or stop
        if log or keep:  # the only places where the GPU is waited for
            history = list((over_ranks(torch.stack([line.to(policy.device) for line in history])) / WORLD).cpu())
            run.require_finite(stage, done - len(history) + 1, list(parts), [line.tolist() for line in history])
        if log:
            means = dict(zip(parts, torch.stack(history).mean(0).tolist()))
            run.log(stage, done, steps, means, lr, (done - clocked) / (time.time() - clock), flops, tokens)
            history, clock, clocked = [], time.time(), done
        if keep:
            run.seconds[stage] = before + time.time()
            run.save_state(stage, done, optimizers, scaler, history)
        if stop:
            say(f"stopped in {stage} after step {done}; go on with: --resume --out_dir {run.out}")
            raise SystemExit(128 + stop)
    interrupt.training = False
    run.parts.eval()
    save(run.checkpoint(stage, steps), run.out / f"{'pretrain' if stage == 'align' else stage}.pt")
    for name, p in averaged.items():  # what samples is what the next stage starts from
        p.data.copy_(run.average[name])
    run.average = {}

# ---------------------------------------------------------------------------------- From the command line to the report

def claim(out: Path):
    """One run a folder: `run.json`, locked until this process ends, however it ends. Returns the open file and what it says of the run before."""
    file = open(out / "run.json", "a+")
    try:
        if RANK == 0:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        return file, json.load(file)
    except OSError:
        fail(f"another run is at work in {out}: wait for it, or give another --out_dir")
    except ValueError:
        return file, {}  # new, or stopped while it was written

def note(file, cfg: Config, finished: bool) -> None:
    if RANK == 0:
        file.truncate(0)
        file.write(json.dumps({"finished": finished, "config": asdict(cfg)}))
        file.flush()

def trim_log(path: Path, stages: list[str], step: int) -> None:
    """Takes out what a run is about to write: lines of `stages`, in the first of them those after `step`; and half a line."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    kept = [line for line in lines if line["stage"] not in stages or line["stage"] == stages[0] and line["step"] <= step]
    path.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(path.with_suffix(".tmp"), path)

def resumed(cfg: Config, given: dict, theirs: dict | None) -> Config:
    """The settings of the run that is resumed: its own, but for what --resume may change."""
    if not theirs:
        fail(f"--resume: there is nothing of a run in {cfg.out_dir}; leave --resume out to start one")
    for name in given.keys() - CHANGEABLE:
        if given[name] != theirs.get(name, given[name]):
            fail(f"--{name} {given[name]}: the run in {cfg.out_dir} has {theirs[name]}, and --resume goes on with that; leave it out, or start anew with --init_from")
    try:
        return Config(**(theirs | {name: value for name, value in given.items() if name in CHANGEABLE} | {"out_dir": cfg.out_dir, "resume": True}))
    except TypeError as error:
        fail(f"the run in {cfg.out_dir} is of another version of this code ({error}): start a new one, with --init_from")

def report(run: Run, names: list[str]) -> None:
    """Scores the checkpoints on the same prompts, images and noise: a table, results.json and compare.png."""
    cfg, results, checkpoints = run.cfg, {}, [load_checkpoint(run.out / f"{name}.pt", run.policy.device) for name in names]
    for name, loaded in zip(names, checkpoints):
        loaded.config |= {"data_dir": cfg.data_dir, "cache_dir": cfg.cache_dir}  # --resume may have changed where they are since it was saved
        results[name] = evaluate.evaluate(loaded, cfg.eval_n, cfg.seed)
        results[name] |= {"steps": loaded.step, "seconds": run.seconds, "device": run.policy.device_name, "seed": cfg.seed, "settings": asdict(cfg)}
    (run.out / "results.json").write_text(json.dumps(results, indent=1))
    print(evaluate.table(results))
    evaluate.compare(checkpoints, names, run.out / "compare.png", cfg.seed)
    print(f"{run.out}/results.json, {run.out}/compare.png and {run.out}/log.jsonl are written; training took {sum(run.seconds.values()) / 60:.1f} minutes")

def bench(cfg: Config, steps: int = 20) -> None:
    """Speed of RecA's core step on random images and words: eager and, but for --compile off, compiled, in both precisions. JSON on stdout and in OUT/bench.json."""
    rows, known = [], {}
    if cfg.dataset != "shapes":  # no weights are needed: an encoder of CLIP-B/16's sizes, a vocabulary of ImageNet's
        known = dict(vocabulary=Vocabulary(SPECIALS + [str(i) for i in range(2000)]), encoder=ViT(ViTConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_width=3072)))
    for dtype, compiled in product(("float32", "bfloat16"), (False,) if cfg.compile == "off" else (False, True)):
        policy = Policy(replace(cfg, dtype=dtype, compile="on" if compiled else "off"))
        if policy.compile != compiled:
            continue
        run = Run(cfg, policy, **known)
        core, optimizers, scaler = Core(run, "reca", {"recon": 1.0}), make_optimizers(run.parameters_of("reca"), cfg), policy.scaler()
        batch = {"main": {"image": torch.rand(cfg.batch_size, 3, cfg.image_size, cfg.image_size, device=policy.device)}}
        flops, tokens = cost(core, batch, policy, cfg)
        core = prepare(core, policy, False)
        set_lr(optimizers, 1e-4)
        for step in range(-5, steps):
            if step == 0:  # the steps before were to warm up
                began = policy.now()
                if policy.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            update(core, batch, optimizers, scaler, policy, cfg)
        rate, peak = steps / (policy.now() - began), policy.peak_flops
        rows.append({"dtype": dtype, "compiled": compiled, "steps_per_second": rate, "images_per_second": rate * cfg.batch_size,
                     "tokens_per_second": rate * tokens, "teraflops_per_second": rate * flops / 1e12, "mfu": rate * flops / peak if peak else None,
                     "gigabytes": policy.gigabytes()})
    text = json.dumps({"device": policy.device_name, "parameters": sum(p.numel() for p in run.model.parameters()), "image_size": cfg.image_size,
                       "batch_size": cfg.batch_size, "draws": cfg.draws, "paradigm": cfg.paradigm, "torch": torch.__version__, "rows": rows}, indent=1)
    (run.out / "bench.json").write_text(text)
    print(text)

def train(cfg: Config, given: dict) -> None:
    interrupt, out, saved = Interrupt(), Path(cfg.out_dir), None
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    if cfg.resume and not (out / "run.json").exists():
        fail(f"--resume: there is no run in {out}; leave --resume out to start one")
    file, before = claim(out)
    if cfg.resume:
        saved = read_state(out)
        cfg = resumed(cfg, given, (saved or before).get("config"))
        check(cfg)
    elif find_states(out) and not before.get("finished"):  # also where run.json was cut by a full disk
        fail(f"{out} holds a run that has not ended ({find_states(out)[0].name}): go on with it (--resume --out_dir {out}), give another --out_dir, or remove it")
    if not before:
        note(file, cfg, finished=False)  # at once: --resume finds it there, however soon this process is killed
    policy = Policy(cfg)
    run = Run(cfg, policy)
    stages = STAGES if cfg.stage == "all" else [cfg.stage]
    if saved:
        stages = stages[stages.index(saved["stage"]):]
        public = {name: x for name, x in run.parts.state_dict().items() if name.startswith("encoder.") and name not in saved["parts"]}
        run.parts.load_state_dict(public | saved["parts"])
        run.seconds = saved["seconds"]
    elif cfg.init_from:
        run.load(cfg.init_from, cfg.stage)
    if before and before["finished"] and not cfg.resume:
        say(f"{out} holds a finished run: what this one makes takes its place")
    if RANK == 0:
        for old in [*out.glob("*.pt.tmp"), *(() if cfg.resume else find_states(out))]:
            old.unlink()
        trim_log(out / "log.jsonl", stages, saved["step"] if saved else 0)
    note(file, cfg, finished=False)
    say(f"{cfg.dataset}, {cfg.paradigm}: {sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters, encoder {cfg.encoder}, on {WORLD} x "
        f"{policy.device_name} in {policy.dtype}{', compiled' if policy.compile else ''}, {run.workers} loader processes")
    for stage in stages:
        middle = saved if saved and saved["stage"] == stage else None
        if stage in ("sft", "reca") and cfg.stage == "all" and not middle:
            run.load(out / "pretrain.pt", stage)  # both start from the aligned base
        train_stage(run, stage, interrupt, middle)
    scored = {"all": ["pretrain", "sft", "reca"], "encoder": [], "align": ["pretrain"]}.get(cfg.stage, [cfg.stage])
    if RANK == 0 and scored:
        report(run, scored)
    note(file, cfg, finished=True)
    if WORLD > 1:
        dist.destroy_process_group()

def main(argv=None) -> None:
    cfg, given = parse_config(argv)
    try:
        if not cfg.resume:
            check(cfg)
        bench(cfg) if cfg.bench else train(cfg, given)
    except ValueError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error}; what was saved before is whole: go on with --resume")
    except (torch.OutOfMemoryError, MemoryError) as error:
        fail(f"out of memory ({first_line(error)}): go on with --resume --accumulate {2 * cfg.accumulate}, or with --checkpoint_activations")

if __name__ == "__main__":
    main()
