"""Train the unified model, then post-train it with Reconstruction Alignment (RecA, arXiv 2509.07295).

    python train.py                                     # the embedded shapes: base | SFT | RecA in minutes on a laptop
    python train.py --smoke                             # the whole path in about a minute, to see that it runs
    python train.py --dataset imagenet --data_dir DIR --encoder clip-b16
    python train.py --stage reca --init_from out/pretrain.pt --reca_steps 200 --out_dir out_short

Stages, in the order of `--stage all`; every one of them is the same loop with other loss terms (see recon_loss.py):

    encoder   the understanding encoder, from scratch; public weights need no training, and skip it
    pretrain  words -> image on sparse captions, and words -> words           all but the connector
    align     image -> visual words, that the frozen transformer can read     the connector alone
    sft       the control: sparse captions of RecA's images, the same steps   all but the connector
    reca      the same images with no caption: their visual words instead     all but the connector

`sft` and `reca` both start from the aligned base. The report at the end scores all three on the same prompts and noise.
"""
import argparse
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import evaluate
from data import BOS, batches, make_dataset
from encoder import ViT, load_encoder, scratch_config
from model import CaptionTower, ModelConfig, UnifiedModel
from recon_loss import total_loss
from sample import load_checkpoint, read_checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass, and the command line made from it


def option(default, help: str, choices=None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    dataset: str = option("shapes", "what to train on", ["shapes", "imagenet", "cifar10", "folder"])
    data_dir: str = option("", "folder of the images; imagenet: with train/ and val/")
    stage: str = option("all", "one stage, or all of them", ["all", "encoder", "pretrain", "align", "sft", "reca"])
    paradigm: str = option("flow", "how images are generated", ["flow", "ar", "mask", "mar"])
    encoder: str = option("scratch", "understanding encoder: scratch, a public name (clip-b16, ...), or a path")
    captions: str = option("sparse", "captions that the sft stage trains on", ["sparse", "dense"])
    out_dir: str = option("out", "where checkpoints, logs, tables and pictures go")
    init_from: str = option("", "checkpoint of an earlier stage to start from")
    resume: bool = option(False, "go on with the run in --out_dir")
    seed: int = option(0, "of weights, data order and noise")
    smoke: bool = option(False, "the whole path with very few steps")

    image_size: int = option(48, "pixels of a side")
    patch_size: int = option(16, "pixels of a patch's side")
    width: int = option(128, "of the transformer")
    depth: int = option(6, "blocks of the transformer")
    heads: int = option(4, "attention heads")
    text_len: int = option(18, "<bos> and this many words less one; also the number of visual words")

    batch_size: int = option(16, "images a step")
    draws: int = option(4, "how often each image of a step is noised or masked: draws share their prefix")
    side_batch: int = option(8, "images a step of each further term: t2t, i2t, replay")
    encoder_steps: int = option(1000, "steps of the encoder stage")
    pretrain_steps: int = option(2400, "steps of the pretrain stage")
    align_steps: int = option(600, "steps of the align stage")
    reca_steps: int = option(700, "steps of the reca stage, and of sft")
    encoder_lr: float = option(2e-3, "peak learning rate of the encoder stage")
    pretrain_lr: float = option(1.5e-3, "peak learning rate of the pretrain stage")
    align_lr: float = option(1e-3, "peak learning rate of the align stage")
    reca_lr: float = option(6e-4, "peak learning rate of the reca stage, and of sft")
    warmup: int = option(100, "steps of linear warm-up")
    decay: float = option(0.3, "share of a stage in which the learning rate falls linearly to zero")
    weight_decay: float = option(0.0, "decoupled weight decay")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    ema: float = option(0.0, "decay of the average of weights that samples; 0: sample the raw weights")

    t2t: float = option(0.3, "weight of words -> words in pretrain, sft and reca")
    i2t: float = option(0.25, "weight of image -> words in sft and reca; the paper keeps it where weights are shared")
    replay: float = option(0.25, "weight of the pre-training pairs in sft and reca; the paper's is 0")
    words: float = option(1.0, "weight in align of saying the canonical description, one visual word a word")
    entropy: float = option(0.0, "final weight of the visual words' entropy in align: makes them words, not mixtures")
    train_connector: bool = option(False, "let the connector learn in reca, as OpenUni's does")

    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", "of autocast; auto: bfloat16 on a GPU that has it, else float16 there, float32 on a CPU", ["auto", "float32", "bfloat16", "float16"])
    compile: str = option("auto", "torch.compile of the core step; auto: on a GPU (no gain was measured on CPUs)", ["auto", "on", "off"])
    workers: int = option(-1, "loader processes; -1: none for shapes, else one a core")
    save_every: int = option(500, "steps between checkpoints")
    log_every: int = option(50, "steps between log lines")
    eval_n: int = option(240, "prompts of each category in the report")


PRESETS = {
    "imagenet": dict(image_size=64, patch_size=8, width=384, depth=8, heads=6, text_len=33, encoder="clip-b16", eval_n=1000),
}
PRESETS["folder"] = PRESETS["cifar10"] = PRESETS["imagenet"]
SMOKE = dict(encoder_steps=60, pretrain_steps=100, align_steps=40, reca_steps=40, warmup=10, eval_n=24, log_every=10)


class Parser(argparse.ArgumentParser):
    """Argparse that answers a wrong option with the nearest right one."""

    def error(self, message):
        options = [o for a in self._actions for o in a.option_strings]
        near = [difflib.get_close_matches(w.split("=")[0], options, 1) for w in message.split() if w.startswith("--")]
        hint = f"; did you mean {near[0][0]}?" if near and near[0] and "unrecognized" in message else ""
        fail(f"{message}{hint} (python {Path(self.prog).name} --help lists the options)")


def fail(message: str):
    """A user's mistake: one sentence, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_config(argv) -> Config:
    """Command line over the data set's preset over the defaults."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(Config):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"{f.metadata['help']} (default: {f.default})", **kind)
    given = vars(parser.parse_args(argv))
    preset = PRESETS.get(given.get("dataset", "shapes"), {}) | (SMOKE if given.get("smoke") else {})
    return Config(**(preset | given))


def check(cfg: Config) -> None:
    """What can be known to be wrong before any work starts."""
    for name in ("image_size", "patch_size", "width", "depth", "heads", "text_len", "batch_size", "side_batch", "log_every", "save_every", "eval_n"):
        if getattr(cfg, name) < 1:
            fail(f"--{name} is {getattr(cfg, name)}, it must be at least 1")
    for name in ("encoder_steps", "pretrain_steps", "align_steps", "reca_steps"):
        if getattr(cfg, name) < 0:
            fail(f"--{name} is {getattr(cfg, name)}, it must not be negative")
    for name in ("encoder_lr", "pretrain_lr", "align_lr", "reca_lr", "grad_clip"):
        if not 0 < getattr(cfg, name) < float("inf"):
            fail(f"--{name} is {getattr(cfg, name)}, it must be a positive number")
    for name in ("decay", "ema"):
        if not 0 <= getattr(cfg, name) < 1:
            fail(f"--{name} is {getattr(cfg, name)}, it must be in [0, 1)")
    if cfg.image_size % cfg.patch_size:
        fail(f"--image_size {cfg.image_size} is not a multiple of --patch_size {cfg.patch_size}")
    if cfg.width % cfg.heads:
        fail(f"--width {cfg.width} is not a multiple of --heads {cfg.heads}")
    if cfg.dataset in ("imagenet", "folder") and not cfg.data_dir:
        fail(f"--dataset {cfg.dataset} needs --data_dir, the folder of its images")
    if cfg.dataset != "shapes" and cfg.encoder == "scratch":
        fail(f"--dataset {cfg.dataset} needs public weights (--encoder clip-b16, or a path): the scratch encoder learns from the shapes' exact captions")
    if cfg.dataset == "shapes" and cfg.image_size % 3:
        fail(f"--image_size {cfg.image_size} is not a multiple of 3: a scene of shapes is a grid of 3 x 3 cells")
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        fail(f"--device {cfg.device}: this machine has no CUDA device that torch can use")
    try:
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out_dir {cfg.out_dir} cannot be made: {error.strerror}")


# ----------------------------------------------------------------------------------------------------------------------
# One device-and-dtype policy


@dataclass
class Policy:
    """Where the work is done and in which precision; parameters and optimizer stay in float32."""
    device: torch.device
    dtype: torch.dtype
    compile: bool

    @classmethod
    def choose(cls, cfg: Config) -> "Policy":
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)
        cuda = device.type == "cuda"
        auto = (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if cuda else torch.float32
        torch.set_float32_matmul_precision("high" if cuda else "medium")  # TF32; on a CPU: oneDNN, 1.8 to 2.2 times MKL's speed on an AMD EPYC
        return cls(device, auto if cfg.dtype == "auto" else getattr(torch, cfg.dtype), cuda if cfg.compile == "auto" else cfg.compile == "on")

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Stages: which images, which losses, which parameters

# The batches of a step, by role: the split that they come from, and the option that holds their size.
BATCHES = {
    "encoder": {"main": ("pretrain", "batch_size"), "understand": ("understand", "batch_size")},
    "pretrain": {"main": ("pretrain", "batch_size"), "understand": ("understand", "side_batch")},
    "align": {"understand": ("understand", "batch_size")},
    "sft": {"main": ("reca", "batch_size"), "understand": ("understand", "side_batch"), "replay": ("pretrain", "side_batch")},
}
BATCHES["reca"] = BATCHES["sft"]

# What learns, by the parts of `part_of`; the rest is frozen.
STAGES = ["encoder", "pretrain", "align", "sft", "reca"]
TRAINS = {"encoder": {"encoder", "tower", "connector", "tokenizer"}, "pretrain": {"transformer"}, "align": {"connector"}, "sft": {"transformer"}, "reca": {"transformer"}}


def part_of(name: str) -> str:
    """The part that a parameter of the run belongs to: encoder, tower, tokenizer, connector or transformer."""
    top, _, rest = name.partition(".")
    return top if top != "model" else rest.split(".")[0] if rest.startswith(("tokenizer.", "connector.")) else "transformer"


def weights_of(stage: str, cfg: Config) -> dict[str, float]:
    """Loss terms of a stage and their weights. RecA and its control differ in the first term alone."""
    if stage == "encoder":
        scratch = float(cfg.encoder == "scratch")
        return {"caption": scratch, "contrast": 0.25 * scratch, "words": scratch, "tokenizer": float(cfg.paradigm in ("ar", "mask"))}
    if stage == "align":
        return {"i2t": 1.0, "words": cfg.words, "entropy": cfg.entropy}
    first = "recon" if stage == "reca" else "t2i"
    if stage == "pretrain":
        return {first: 1.0, "t2t": cfg.t2t}
    return {first: 1.0, "i2t": cfg.i2t, "t2t": cfg.t2t, "replay": cfg.replay}


# ----------------------------------------------------------------------------------------------------------------------
# The run: what it holds, saves and loads


class Run:
    """The encoder, its throw-away text tower, and the model; and what a checkpoint of them holds."""

    def __init__(self, cfg: Config, policy: Policy):
        self.cfg, self.policy, self.out = cfg, policy, Path(cfg.out_dir)
        torch.manual_seed(cfg.seed)
        self.vocabulary = self.dataset("pretrain").vocabulary
        encoder = ViT(scratch_config(cfg.image_size, cfg.patch_size)) if cfg.encoder == "scratch" else load_encoder(cfg.encoder)
        width = encoder.cfg.width
        model = UnifiedModel(ModelConfig(
            paradigm=cfg.paradigm, vocab_size=len(self.vocabulary), text_len=cfg.text_len, image_size=cfg.image_size, patch_size=cfg.patch_size,
            width=cfg.width, depth=cfg.depth, heads=cfg.heads, encoder_width=width, draws=cfg.draws, noise_scale=cfg.patch_size / 8))
        tower = CaptionTower(len(self.vocabulary), cfg.text_len, 128, width)
        self.parts = nn.ModuleDict({"encoder": encoder, "tower": tower, "model": model}).to(policy.device)
        self.encoder, self.tower, self.model = encoder, tower, model
        self.seconds: dict[str, float] = {}  # by stage
        self.workers = cfg.workers if cfg.workers >= 0 else 0 if cfg.dataset == "shapes" else os.cpu_count()

    def dataset(self, split: str):
        cfg = self.cfg
        return make_dataset(cfg.dataset, split, cfg.data_dir, cfg.image_size, cfg.seed, text_len=cfg.text_len, vocabulary=getattr(self, "vocabulary", None))

    def parameters_of(self, stage: str) -> dict[str, nn.Parameter]:
        """Freezes all but what the stage trains, and returns that by name."""
        learns = TRAINS[stage] | ({"connector"} if stage == "reca" and self.cfg.train_connector else set())
        learns -= {"encoder", "tower", "connector"} if stage == "encoder" and self.cfg.encoder != "scratch" else set()
        chosen = {name: p.requires_grad_(part_of(name) in learns) for name, p in self.parts.named_parameters()}
        return {name: p for name, p in chosen.items() if p.requires_grad}

    def checkpoint(self, stage: str, step: int) -> dict:
        """What sample.py, evaluate.py and a later stage need; see sample.load_checkpoint."""
        scratch = self.cfg.encoder == "scratch"
        return {"format": 1, "stage": stage, "step": step, "model_config": asdict(self.model.cfg), "model": self.model.state_dict(), "ema": None,
                "vocabulary": self.vocabulary.words, "config": asdict(self.cfg),
                "encoder": {"name": self.cfg.encoder, "config": asdict(self.encoder.cfg) if scratch else None, "state": self.encoder.state_dict() if scratch else None}}

    def load(self, path) -> None:
        """Takes over the weights of a checkpoint of the same sizes and words; anything else is a user's mistake."""
        saved = read_checkpoint(path)
        mine, theirs = asdict(self.model.cfg), saved["model_config"]
        differ = [f"{k} is {theirs.get(k)} there and {mine[k]} here" for k in mine if theirs.get(k) != mine[k]]
        if saved["vocabulary"] != self.vocabulary.words:
            differ.append("it was trained on other words")
        if saved["encoder"]["name"] != self.cfg.encoder:
            differ.append(f"encoder is {saved['encoder']['name']} there and {self.cfg.encoder} here")
        if differ:
            fail(f"the checkpoint {path} is of another configuration: {'; '.join(differ)}")
        self.model.load_state_dict(saved["model"])
        if saved["encoder"]["state"] is not None:
            self.encoder.load_state_dict(saved["encoder"]["state"])

    def save_state(self, stage: str, step: int, optimizers=(), scaler=None) -> None:
        """`last.pt`: all that --resume needs; the one before it stays as `last_but_one.pt` in case this one gets damaged."""
        cuda = torch.cuda.get_rng_state_all() if self.policy.device.type == "cuda" else []
        state = self.checkpoint(stage, step) | {
            "parts": self.parts.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict() if scaler else {},
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda}, "seconds": self.seconds}
        if (self.out / "last.pt").exists():
            os.replace(self.out / "last.pt", self.out / "last_but_one.pt")
        save(state, self.out / "last.pt")

    def log(self, stage: str, step: int, steps: int, losses: dict, lr: float, grad_norm: float, rate: float) -> None:
        """One aligned line for people, one line of log.jsonl for programs; a loss that is no number ends the run."""
        terms = " ".join(f"{term} {value:.4f}" for term, value in losses.items())
        memory = f" | {torch.cuda.max_memory_allocated() / 2**30:.1f} GB" if self.policy.device.type == "cuda" else ""
        tqdm.write(f"{stage:8} {step:{len(str(steps))}}/{steps} | {terms} | lr {lr:.1e} | gnorm {grad_norm:.2f} | {rate:.0f} img/s{memory}")
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **losses, "lr": lr, "grad_norm": grad_norm, "images_per_second": rate}) + "\n")
        if not all(math.isfinite(value) for value in losses.values()):
            fail(f"the loss of stage {stage} is not a number at step {step} ({terms}); the last good checkpoint is in {self.out}: "
                 f"go on from it with --resume and half the learning rate (--{'reca' if stage == 'sft' else stage}_lr)")


def save(state: dict, path: Path) -> None:
    """Atomic: a reader finds the old file or the new one, whole, whatever happens in between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        fail(f"{path} could not be written ({error}); what was saved before is whole: free some space, and go on with --resume")


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def make_optimizers(chosen: dict[str, nn.Parameter], cfg: Config) -> list[torch.optim.Optimizer]:
    """Muon (torch.optim, arXiv 2502.16982) for the matrices of the blocks, AdamW for embeddings, heads, norms and the rest."""
    matrices = [p for name, p in chosen.items() if p.ndim == 2 and "blocks." in name]
    rest = [p for name, p in chosen.items() if not (p.ndim == 2 and "blocks." in name)]
    made = [torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)]
    if matrices:
        made.append(torch.optim.Muon(matrices, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return made


def learning_rate(step: int, steps: int, peak: float, cfg: Config) -> float:
    """Linear warm-up, constant, linear decay over the last `cfg.decay` of the steps."""
    down = (steps - step) / max(cfg.decay * steps, 1)
    return peak * min((step + 1) / max(cfg.warmup, 1), 1.0, down)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def restore(saved: dict, optimizers: list, scaler) -> int:
    """Puts back all that decides the rest of a stage, to the bit; returns the step to go on with."""
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    scaler.load_state_dict(saved["scaler"])
    torch.set_rng_state(saved["rng"]["cpu"])
    if saved["rng"]["cuda"]:
        torch.cuda.set_rng_state_all(saved["rng"]["cuda"])
    return saved["step"]


class Interrupt:
    """SIGINT and SIGTERM ask for a stop after the step in progress; a second one stops at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked:
            raise SystemExit(128 + number)
        self.asked = True


def train_stage(run: Run, stage: str, interrupt: Interrupt, saved: dict | None = None) -> int:
    """Trains one stage, from `saved` (a state of the same stage, see Run.save_state) if given; returns its steps."""
    cfg, policy = run.cfg, run.policy
    name = "reca" if stage == "sft" else stage  # the control shares RecA's steps, rate, images, order and noise
    steps, peak = getattr(cfg, f"{name}_steps"), getattr(cfg, f"{name}_lr")
    weights = {term: w for term, w in weights_of(stage, cfg).items() if w > 0}
    chosen = run.parameters_of(stage)
    if not chosen or not weights or not steps:
        return 0
    optimizers, scaler, start = make_optimizers(chosen, cfg), policy.scaler(), 0
    seed = cfg.seed * 1000 + STAGES.index(name) * 10
    torch.manual_seed(seed)
    if saved:
        start = restore(saved, optimizers, scaler)
    streams = {role: batches(run.dataset(split), getattr(cfg, size), seed + i, start, run.workers)
               for i, (role, (split, size)) in enumerate(BATCHES[stage].items())}
    step_loss = torch.compile(total_loss) if policy.compile else total_loss
    how = dict(tower=run.tower, captions="full" if stage == "sft" and cfg.captions == "dense" else "caption",
               train_connector=stage == "reca" and cfg.train_connector)
    run.parts.train()
    sums, clock = {}, time.time()
    for step in tqdm(range(start, steps), desc=stage, initial=start, total=steps, leave=False, disable=None):
        batch = {role: to_device(next(stream), policy.device) for role, stream in streams.items()}
        progress = torch.tensor(step / steps, device=policy.device)
        with policy.autocast():
            loss, parts = step_loss(run.model, run.encoder, batch, weights, progress, **how)
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(chosen.values(), cfg.grad_clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, cfg)
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        for term, value in parts.items():
            sums[term] = sums.get(term, 0) + value
        done, passed = step + 1, (step - start) % cfg.log_every + 1
        if done % cfg.log_every == 0 or done == steps:
            run.log(stage, done, steps, {term: s.item() / passed for term, s in sums.items()}, group["lr"], grad_norm.item(), passed * cfg.batch_size / (time.time() - clock))
            sums, clock = {}, time.time()
        if done < steps and (done % cfg.save_every == 0 or interrupt.asked):
            run.save_state(stage, done, optimizers, scaler)
        if interrupt.asked:
            print(f"\nstopped in {stage} after step {done}; go on with: --resume --out_dir {run.out}")
            raise SystemExit(130)
    run.parts.eval()
    return steps


# ----------------------------------------------------------------------------------------------------------------------
# From the command line to the report


def find_state(out: Path) -> dict:
    """The newest good state of a run."""
    for name in ("last.pt", "last_but_one.pt"):
        try:
            return torch.load(out / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # a damaged file can raise nearly anything; the one before it is the answer
            print(f"{out / name} is damaged ({type(error).__name__}), looking for the one before it")
    fail(f"--resume: there is no good state in {out}; start the run anew, without --resume")


def report(run: Run, names: list[str]) -> None:
    """Scores the checkpoints on the same prompts, images and noise: a table, results.json and compare.png."""
    cfg, results, checkpoints = run.cfg, {}, [load_checkpoint(run.out / f"{name}.pt", run.policy.device) for name in names]
    photos = None if cfg.dataset == "shapes" else run.dataset("test")
    for name, loaded in zip(names, checkpoints):
        scores = evaluate.photographs(loaded, photos, cfg.eval_n, cfg.seed) if photos else evaluate.evaluate(loaded, cfg.eval_n, cfg.seed)
        results[name] = scores | {"steps": loaded.step, "seconds": run.seconds, "device": device_name(run.policy.device), "seed": cfg.seed, "settings": asdict(cfg)}
    (run.out / "results.json").write_text(json.dumps(results, indent=1))
    print(evaluate.table(results))
    if photos:
        evaluate.compare_photographs(checkpoints, names, photos, run.out / "compare.png", cfg.seed)
    else:
        evaluate.compare(checkpoints, names, run.out / "compare.png", cfg.seed)
    print(f"{run.out}/results.json, {run.out}/compare.png and {run.out}/log.jsonl are written; training took {sum(run.seconds.values()) / 60:.1f} minutes")


def main(argv=None) -> None:
    cfg = parse_config(argv)
    check(cfg)
    try:
        train(cfg)
    except ValueError as error:
        fail(str(error))


def train(cfg: Config) -> None:
    saved = find_state(Path(cfg.out_dir)) if cfg.resume else None
    if saved:  # a resumed run is the same run: only where it looks for its files may differ
        cfg = Config(**(saved["config"] | {"resume": True, "out_dir": cfg.out_dir, "data_dir": cfg.data_dir or saved["config"]["data_dir"]}))
    policy, interrupt = Policy.choose(cfg), Interrupt()
    run = Run(cfg, policy)
    stages = STAGES if cfg.stage == "all" else [cfg.stage]
    if saved:
        run.parts.load_state_dict(saved["parts"])
        run.seconds = saved["seconds"]
        stages = stages[stages.index(saved["stage"]):]
    elif cfg.init_from:
        run.load(cfg.init_from)
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{cfg.dataset}, {cfg.paradigm}: {parameters:.2f} M parameters, encoder {cfg.encoder}, on {device_name(policy.device)} in {policy.dtype}"
          f"{', compiled' if policy.compile else ''}, {run.workers} loader processes")
    for stage in stages:
        middle = saved if saved and saved["stage"] == stage and saved["step"] else None
        if not middle:
            if stage in ("sft", "reca") and cfg.stage == "all":
                run.load(run.out / "pretrain.pt")  # both start from the aligned base
            run.save_state(stage, 0)
        began = time.time()
        steps = train_stage(run, stage, interrupt, middle)
        run.seconds[stage] = run.seconds.get(stage, 0) + time.time() - began
        save(run.checkpoint(stage, steps), run.out / f"{'pretrain' if stage == 'align' else stage}.pt")
    scored = {"all": ["pretrain", "sft", "reca"], "encoder": [], "align": ["pretrain"]}.get(cfg.stage, [cfg.stage])
    if scored:
        report(run, scored)


if __name__ == "__main__":
    main()
