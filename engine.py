"""What train.py runs on: device and precision, processes, optimizers, and the files of a run.

Nothing of RecA is here: losses are in recon_loss.py, stages and the training loop in train.py.
Under torchrun the processes train together with DDP; each draws its own noise, so a run resumes
bit-exactly with as many processes as before.
"""

import ctypes
import json
import os
import re
import sys
import zipfile
from contextlib import suppress
from copy import copy
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import config
from captioner import TextDecoder
from cli import LOCAL_RANK, LOCAL_WORLD_SIZE, RANK, WORLD_SIZE, exit_with_error, print0
from data import open_splits
from encoder import ViT, encoder_hash, scratch_config
from feature_cache import cache_features, encoder_fingerprint
from model import ModelConfig, UnifiedModel, resize_for_encoder
from muon import Muon
from pretrained import load_encoder
from sample import FORMAT, read_checkpoint

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on the folder of a run, no memory of a CPU in the log
    fcntl = resource = None

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
KEEP_STATES = 2  # how many of the newest states stay on disk
POLL_EVERY = 10  # steps after which several processes ask each other for a signal
RNG_MODULES = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}
# Dense FLOP/s in 16 bits, from the makers' data sheets
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H200 NVL": 835e12, "H100": 989e12}
PEAK_FLOPS |= {"H100 NVL": 835e12, "H100 PCIE": 756e12, "A100": 312e12, "A100 PCIE": 312e12}
PEAK_FLOPS |= {"L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
PEAK_FLOPS |= {"V100": 125e12, "V100 PCIE": 112e12, "T4": 65e12}


# ---------------------------------------------------------------- device and processes
class DeviceConfig:
    """Where the work is done and in which precision; weights and optimizers stay in float32.

    auto is CUDA, compiled, in bfloat16 or (V100, T4: no bfloat16) float16; else the CPU, or Apple's
    mps for one process, both in float32 and not compiled.
    """

    def __init__(self, cfg):
        has_mps = torch.mps.is_available() and WORLD_SIZE == 1
        best = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
        kind = best if cfg.device == "auto" else cfg.device
        is_cuda = kind == "cuda"
        self.device = torch.device(kind, LOCAL_RANK) if is_cuda else torch.device(kind)
        self.device_name = f"{kind.upper()}, {torch.get_num_threads()} threads"
        dtype = "float32"
        if is_cuda:
            torch.cuda.set_device(self.device)
            self.device_name = torch.cuda.get_device_name(self.device)
            has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if has_bfloat16 else "float16"
        self.dtype = getattr(torch, dtype if cfg.dtype == "auto" else cfg.dtype)
        if WORLD_SIZE > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
        # "high" is TF32; "medium" on a CPU is oneDNN, which with AMX rounds factors to bfloat16
        torch.set_float32_matmul_precision("high" if is_cuda else "medium")
        # on a CPU, attention as plain matrix products is faster
        torch.backends.cuda.enable_flash_sdp(is_cuda)
        if kind == "cpu":
            keep_freed_memory()
        is_wanted = cfg.compile == "on" or (cfg.compile == "auto" and is_cuda)
        self.compile = is_wanted and can_compile(self.device)
        # the rest of the name must fit as a whole: an H100 NVL is no H100
        card = re.sub(r"NVIDIA|TESLA|GEFORCE|SXM\d?|HBM\w+|\d+GB|-", " ", self.device_name.upper())
        self.peak_flops = PEAK_FLOPS.get(" ".join(card.split()))

    def move(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor on the device; bytes are pixels, and become floats in [0, 1] there."""
        x = x.to(self.device, non_blocking=True)
        return x / 255 if x.dtype == torch.uint8 else x

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def peak_gigabytes(self) -> float:
        """The most memory in use so far, of the GPU (mps: in use now) or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory() / 2**30
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
        return used / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, else KiB


def keep_freed_memory() -> None:
    """Linux: what is freed stays with this process, and a step asks the kernel for no pages."""
    with suppress(OSError, AttributeError, TypeError):  # another C library, or another system
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # large tensors have no mappings of their own ..
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # .. and the end of the heap is not given back


def can_compile(device: torch.device) -> bool:
    """Tries torch.compile on two numbers: it needs a C++ compiler, or Triton on a GPU."""
    try:
        torch.compile(lambda x: (x + 1).cos())(torch.ones(2, device=device))
        return True
    except Exception as error:  # the backend raises nearly anything
        print0(f"torch.compile does not work here ({first_line(error)}): on without it")
        return False


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:90]


def all_reduce(x: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(x, op)
    return x


def wrap_model(loss_module: nn.Module, cfg, device_config: DeviceConfig) -> nn.Module:
    """Activation checkpoints, torch.compile (static shapes: one graph a stage), and DDP."""
    if cfg.checkpoint_activations:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        for block in loss_module.parts["model"].blocks:
            block.forward = partial(checkpoint, block.forward, **options)
    if device_config.compile:
        loss_module.compile(dynamic=False)
    if WORLD_SIZE == 1:
        return loss_module
    # not all weights have a gradient in each stage; a static graph does not go with no_sync
    is_static = cfg.grad_accum_steps == 1
    options = {"static_graph": is_static, "find_unused_parameters": not is_static}
    options |= {"gradient_as_bucket_view": True, "forward_sync_buffers": False}
    device_ids = [LOCAL_RANK] if device_config.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(loss_module, device_ids, **options)


def make_optimizers(named_parameters) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982) for the matrices of blocks and tokenizer, AdamW for the rest."""
    matrices, rest = [], []
    for name, p in named_parameters:
        is_matrix = p.ndim == 2 and ("blocks." in name or "tokenizer." in name)
        if p.requires_grad:
            (matrices if is_matrix else rest).append(p)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return [adamw, Muon(matrices)]


def count_workers(cfg, streams: int = 1) -> int:
    """Loader processes of each stream of batches: the cores of this process, shared out."""
    if cfg.workers >= 0 or cfg.dataset == "shapes":
        return max(cfg.workers, 0)
    has_mask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_mask else os.cpu_count()
    return max(1, cores // (LOCAL_WORLD_SIZE * streams))


def micro_batch(batch: dict, i: int, n: int) -> dict:
    """Part i of n of each tensor (B, ...) of a batch: (B / n, ...)."""
    return tree_map(lambda x: x.chunk(n)[i], batch)


def count_flops(loss_module, batch: dict, device_config: DeviceConfig) -> tuple[int, int]:
    """FLOPs (a multiply-add is 2) and transformer tokens of a step, counted on a few images.

    The loss and its gradient count, optimizers and recomputed activations do not. Attention counts
    as if it had no mask.
    """
    n = min(len(part["image"]) for part in batch.values())  # the smallest batch has one image left
    blocks = loss_module.parts["model"].blocks
    for block in blocks:
        vars(block).pop("forward", None)  # without the activation checkpoints of `wrap_model`
    tokens = []
    hook = blocks[0].register_forward_pre_hook(
        lambda _, args: tokens.append(args[0].shape[:2].numel())
    )
    with FlopCounterMode(display=False) as counter, device_config.autocast():
        loss, _ = loss_module(micro_batch(batch, 0, n))
        loss.backward()
    hook.remove()
    loss_module.zero_grad()
    if device_config.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return n * counter.get_total_flops(), n * sum(tokens)


class Interrupt:
    """SIGINT and SIGTERM stop training after the step; a second one, or outside of it, at once."""

    asked = 0
    training = False

    def __call__(self, number, frame):
        if not self.training or (self.asked and WORLD_SIZE == 1):  # torchrun sends each twice
            raise SystemExit(128 + number)
        self.asked = number

    def agreed(self, step: int) -> int:
        """The signal that any process has got, else 0: all stop after the same step."""
        is_poll = WORLD_SIZE == 1 or step % POLL_EVERY == 0
        return int(all_reduce(torch.tensor(self.asked), dist.ReduceOp.MAX)) if is_poll else 0


# ---------------------------------------------------------------- the state of a run
class TrainState:
    """Encoder, its throw-away text decoder and model, and how they are saved and loaded."""

    def __init__(self, cfg, device_config, model_class=UnifiedModel, vocabulary=None, encoder=None):
        self.cfg = cfg
        self.device_config = device_config
        self.out = Path(cfg.out_dir)
        self.average: dict[str, torch.Tensor] = {}  # EMA of what is trained in the model
        self.seconds: dict[str, float] = {}  # by stage

        # all processes start from the same weights
        torch.manual_seed(cfg.seed)
        self.splits = {}
        if vocabulary is None:
            # all splits now: what is wrong with one is an error before the first step
            options = (cfg.image_size, cfg.seed, None, cfg.text_len)
            options = (*options, cfg.cache_dir, cfg.caption_column)
            self.splits = open_splits(cfg.dataset, cfg.data_dir, *options)
            vocabulary = self.splits["pretrain"].vocabulary
        self.vocabulary = vocabulary
        self.is_public = cfg.encoder not in ("scratch", "random")  # frozen, never saved
        if encoder is None and self.is_public:
            encoder = load_encoder(cfg.encoder)
        self.encoder = encoder or ViT(scratch_config(cfg.image_size, cfg.patch_size))
        self.encoder_hash = encoder_hash(self.encoder) if self.is_public else cfg.encoder
        width, words = self.encoder.cfg.width, len(self.vocabulary)
        sizes = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig) if hasattr(cfg, f.name)}
        eta = float(cfg.dataset == "shapes")  # flat shapes: resample the noise
        sizes |= {"vocab_size": words, "encoder_width": width, "eta": eta}
        self.model = model_class(ModelConfig(**sizes))
        text_decoder = TextDecoder(words, cfg.text_len, 128, width)
        parts = {"encoder": self.encoder, "text_decoder": text_decoder, "model": self.model}
        self.parts = nn.ModuleDict(parts).to(device_config.device)
        # an image size that the encoder cannot read is an error now, not when align begins
        self.encode(torch.zeros(1, 3, cfg.image_size, cfg.image_size))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> patch tokens of the encoder (B, tokens, D_enc)."""
        images = resize_for_encoder(self.device_config.move(images), self.cfg.encoder_size)
        with self.device_config.autocast():
            return self.encoder(images).patch_tokens

    def dataset(self, split: str, cached: bool = False):
        """A split; cached: with the encoder's features, which a machine's processes share."""
        cfg, dataset = self.cfg, copy(self.splits[split])
        if not cached:
            return dataset
        fingerprint = encoder_fingerprint(self.encoder, cfg.encoder_size, self.device_config.dtype)
        options = (cfg.cache_dir, count_workers(cfg), LOCAL_RANK, LOCAL_WORLD_SIZE)
        return cache_features(dataset, self.encode, fingerprint, *options)

    def checkpoint(self, stage: str, step: int) -> dict:
        """What sample.py, evaluate.py and a later stage read."""
        model = self.model.state_dict()
        encoder = {"name": self.cfg.encoder, "config": None, "state": None}
        encoder["hash"] = self.encoder_hash
        if not self.is_public:
            encoder |= {"config": asdict(self.encoder.cfg), "state": self.encoder.state_dict()}
        saved = {"format": FORMAT, "stage": stage, "step": step, "config": asdict(self.cfg)}
        saved |= {"model_class": type(self.model).__name__, "model_config": asdict(self.model.cfg)}
        saved |= {"model": model, "ema": model | self.average if self.average else None}
        return saved | {"encoder": encoder, "vocabulary": self.vocabulary.words}

    def load_checkpoint(self, path, starts_from: str = "") -> None:
        """Starts from the weights of a checkpoint of stage `starts_from`, or of a later one."""
        saved = read_checkpoint(path)
        try:
            theirs, ours = saved["model_config"], asdict(self.model.cfg)
            differ = []
            for name in ours.keys() - {"repeats_per_image", "eta"}:
                if theirs.get(name) != ours[name]:
                    differ.append(f"{name} is {theirs.get(name)} there and {ours[name]} here")
            if saved["encoder"]["hash"] != self.encoder_hash:
                name = saved["encoder"]["name"]
                differ.append(f"its encoder {name} and {self.cfg.encoder} here are not the same")
            if saved["vocabulary"] != self.vocabulary.words:
                differ.append("it was trained on other words")
            if differ:
                text = "; ".join(sorted(differ))
                exit_with_error(f"the checkpoint {path} is of another configuration: {text}")
            order = ["", *config.STAGE_NAMES]
            if order.index(saved["stage"]) < order.index(starts_from):
                text = f"--stage {self.cfg.stage} starts from {starts_from}: train that stage first"
                exit_with_error(f"the checkpoint {path} is of stage {saved['stage']}, and {text}")
            weights = saved["ema"] or saved["model"]
            if saved["model_class"] != type(self.model).__name__:
                weights = self.model.state_dict() | weights  # what a subclass adds starts anew
            self.model.load_state_dict(weights)
            if saved["encoder"]["state"]:
                self.encoder.load_state_dict(saved["encoder"]["state"])
        except (KeyError, TypeError, RuntimeError) as error:
            text = " ".join(str(error).split())[:120]
            exit_with_error(f"the checkpoint {path} does not fit this code ({text}): train again")

    def save_state(self, stage: str, step: int, optimizers, scaler, history: list) -> None:
        """All that --resume needs to go on bit-exactly; a batch depends on seed and step alone."""
        parts = self.parts.state_dict()
        if self.is_public:
            parts = {name: x for name, x in parts.items() if not name.startswith("encoder.")}
        state = self.checkpoint(stage, step) | {"parts": parts, "average": self.average}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        state |= {"scaler": scaler.state_dict(), "history": history, "seconds": self.seconds}
        state["rng"] = {}
        for kind in dict.fromkeys(["cpu", self.device_config.device.type]):
            noise = RNG_MODULES[kind].get_rng_state()
            state["rng"][kind] = [noise.clone() for _ in range(WORLD_SIZE)]  # of each process
            if WORLD_SIZE > 1:
                dist.all_gather(state["rng"][kind], noise)
        self.save(state, f"state-{config.STAGE_NAMES.index(stage)}-{stage}-{step:07}.pt")
        if RANK == 0:
            for old in find_states(self.out)[KEEP_STATES:]:
                old.unlink()

    def restore(self, saved: dict, optimizers, scaler) -> list[torch.Tensor]:
        """All but the weights of a state. Returns the values of the steps since the last log."""
        for name, value in saved["average"].items():
            self.average[name].copy_(value)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if saved["scaler"]:  # empty unless the run was in float16
            scaler.load_state_dict(saved["scaler"])
        for kind, noise in saved["rng"].items():
            # a process that the state knows nothing of keeps the generator that its stage seeded
            if kind in ("cpu", self.device_config.device.type) and len(noise) > RANK:
                RNG_MODULES[kind].set_rng_state(noise[RANK])
        return saved["history"]

    def save(self, saved: dict, name: str) -> None:
        """Saves in the first process, the others wait. Atomic: the old file or the new one."""
        path, temporary = self.out / name, self.out / f"{name}.tmp"
        try:
            if RANK == 0:
                with open(temporary, "wb") as file:
                    torch.save(saved, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            text = f"{path} could not be written ({first_line(error.__context__ or error)})"
            exit_with_error(f"{text}: free some space, and go on from the last state with --resume")
        all_reduce(torch.zeros(1))

    def log(self, stage, step, steps, means: dict, lr, rate, flops, tokens) -> None:
        """A line on the screen and in log.jsonl. rate: steps a second; flops, tokens: of a step."""
        peak = self.device_config.peak_flops
        mfu = rate * flops / peak if peak else None
        images, tokens = rate * self.cfg.batch_size, rate * tokens * WORLD_SIZE
        entry = {"stage": stage, "step": step, **means, "lr": lr, "images_per_second": images}
        entry |= {"tokens_per_second": tokens, "teraflops_per_second": rate * flops / 1e12}
        entry |= {"mfu": mfu, "gigabytes": self.device_config.peak_gigabytes()}
        terms = " ".join(f"{term} {x:.4f}" for term, x in means.items() if term != "grad_norm")
        line = f"{stage:8} {step:{len(str(steps))}}/{steps} | {terms} | lr {lr:.1e}"
        line += f" | gnorm {means['grad_norm']:.2f} | {images:.0f} img/s {tokens / 1000:.1f}k tok/s"
        line += f" MFU {mfu:.1%}" if mfu else ""
        print0(f"{line} | {entry['gigabytes']:.1f} GB")
        self.log_entry = entry
        if RANK == 0:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def reduce_history(self, stage: str, step: int, names: list[str], history: list) -> list:
        """The values of the steps up to `step`, averaged over the processes, on the CPU.

        A non-finite one ends the run, but not a gradient in float16, whose step is skipped.
        """
        rows = torch.stack([row.to(self.device_config.device) for row in history])
        rows = (all_reduce(rows) / WORLD_SIZE).cpu()  # (steps, names)
        is_float16 = self.device_config.dtype == torch.float16
        checked = rows[:, :-1] if is_float16 else rows  # the last is grad_norm
        for i, j in (~checked.isfinite()).nonzero().tolist():
            text = f"{names[j]} is {rows[i, j]} at step {step - len(rows) + 1 + i} of stage {stage}"
            state = [*find_states(self.out), "the start"][0]
            rate = "reca_lr" if stage == "sft" else f"{stage}_lr"
            command = f"--resume --out_dir {self.out} --{rate} {getattr(self.cfg, rate) / 2:g}"
            exit_with_error(f"{text}; the last good state is {state}: go on with {command}")
        return list(rows)


# ---------------------------------------------------------------- the files of a run
def find_states(out: Path) -> list[Path]:
    """The states of a run, the newest first: their names are in the order of stages and steps."""
    return sorted(out.glob("state-*.pt"), reverse=True)


def read_state(out: Path) -> dict | None:
    """The newest undamaged state of a run; None if there is none."""
    for path in find_states(out):
        # a damaged file can raise nearly anything; torch.load does not look at the checksums
        with suppress(Exception), zipfile.ZipFile(path) as file:
            if file.testzip() is None:
                return torch.load(path, map_location="cpu", weights_only=True)
        print0(f"{path} is damaged, taking the one before it")
    return None


def lock_run_dir(out: Path):
    """Locks OUT/run.json until this process ends. Returns the open file, and what it says."""
    file = open(out / "run.json", "a+")  # noqa: SIM115
    try:
        if RANK == 0 and fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.seek(0)
        return file, json.load(file)
    except OSError:
        exit_with_error(f"another run is at work in {out}: wait for it, or give another --out_dir")
    except ValueError:  # new, or stopped while it was written
        return file, {}


def write_run_json(file, cfg, finished: bool) -> None:
    if RANK == 0:
        file.truncate(0)
        file.write(json.dumps({"finished": finished, "config": asdict(cfg)}))
        file.flush()


def clean_run_dir(out: Path, stages: list[str], saved: dict | None) -> None:
    """Removes what a run of `stages` writes again, from the state `saved` on."""
    for path in [*out.glob("*.pt.tmp"), *([] if saved else find_states(out))]:
        path.unlink()
    log, kept = out / "log.jsonl", []
    for line in log.read_text().splitlines() if log.exists() else []:
        if line.endswith("}"):  # else cut by a kill
            entry = json.loads(line)
            is_before = saved and entry["stage"] == stages[0] and entry["step"] <= saved["step"]
            if is_before or entry["stage"] not in stages:
                kept.append(line + "\n")
    log.with_suffix(".tmp").write_text("".join(kept))
    os.replace(log.with_suffix(".tmp"), log)
