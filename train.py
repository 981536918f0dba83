"""Train the unified model, then post-train it with Reconstruction Alignment (arXiv 2509.07295).

    python train.py                              # shapes: base | SFT | RecA in minutes on a laptop
    python train.py --smoke                      # the whole path in about a minute
    python train.py --dataset imagenet --data_dir DIR --encoder clip-b16
    python train.py --stage reca --init_from out/pretrain.pt --reca_steps 200 --out_dir out_short
    python train.py --resume                     # go on where the run in out/ stopped, bit-exact
    torchrun --nproc_per_node 4 train.py ...     # the batch over four processes (DDP)
    python train.py --bench                      # how fast is the RecA step here?

Stages, in the order of `--stage all`; each is the same loop with other losses (recon_loss.py):

    encoder   the understanding encoder, from scratch; and the tokenizer of ar and mask
    pretrain  caption -> image on sparse captions, caption -> another wording
    align     image -> visual words that the frozen transformer reads
    sft       the control: sparse captions of RecA's images, as many steps
    reca      the same images without captions: their visual words instead

`sft` and `reca` both start from the aligned base; the report scores all three on the same prompts
and noise. Options are in config.py; devices, processes and files in engine.py. For a model larger
than one GPU, wrap LossModule in torch's `fully_shard` (its tutorial of FSDP2) in place of DDP.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain, product, repeat
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

import config
import engine
import evaluate
import figures
from cli import RANK, WORLD_SIZE, exit_with_error, print0
from data import batches, summarize_splits
from encoder import ViT, ViTConfig
from engine import DeviceConfig, TrainState
from model import UnifiedModel
from paradigms import PARADIGMS
from recon_loss import total_loss
from sample import Checkpoint
from words import SPECIALS, Vocabulary

GRAD_CLIP = 1.0  # largest norm of the gradient
BENCH_STEPS = 20  # that --bench measures, after as many to warm up
DECAY_FRACTION = 0.3  # share of a stage in which the learning rate falls linearly to zero
CURVES = ["t2i", "recon", "replay", "i2t", "t2t", "words", "caption", "tokenizer"]  # a color each


# ---------------------------------------------------------------- the table of stages
@dataclass(frozen=True)
class Stage:
    """What a stage trains, with which losses, on which images."""

    name: str
    starts_from: str  # the stage whose checkpoint it needs
    trains: tuple[str, ...]  # parts, see `freeze_except`
    losses: dict[str, float | str]  # {term: weight}; a string is the option that holds the weight
    batches: dict[str, tuple[str, float]]  # {role: (split, share of batch_size)}
    options: str = ""  # of its steps and learning rate: X_steps, X_lr; "": its name
    file: str = ""  # its checkpoint, without .pt; "": its name
    cached: tuple[str, ...] = ()  # batches whose encoder features --cache_features keeps
    max_images: int = 0  # of the main batch's split; 0: all


LANGUAGE = {"i2t": "i2t", "t2t": 0.1, "replay": "replay"}
QUARTER = {"understand": ("understand", 1 / 4)}  # the losses of language see fewer images

STAGES = {
    "encoder": Stage(
        name="encoder",
        starts_from="",
        trains=("encoder", "text_decoder", "connector", "tokenizer", "transformer"),
        losses={"caption": 1.0, "contrast": 0.25, "words": 1.0, "t2t": 1.0, "tokenizer": 1.0},
        # main is the tokenizer's batch: it has to see all colors
        batches={"main": ("understand", 1), "understand": ("understand", 1)},
    ),
    "pretrain": Stage(
        name="pretrain",
        starts_from="encoder",
        trains=("transformer",),
        losses={"t2i": 1.0, "t2t": 0.1},
        batches={"main": ("pretrain", 1), **QUARTER},
    ),
    "align": Stage(
        name="align",
        starts_from="pretrain",
        trains=("connector",),
        losses={"i2t": 1.0, "words": 1.0},
        batches={"understand": ("understand", 1)},
        file="pretrain",
        cached=("understand",),
    ),
    "sft": Stage(
        name="sft",
        starts_from="align",
        trains=("transformer",),
        losses={"t2i": 1.0, **LANGUAGE},
        batches={"main": ("reca", 1), **QUARTER, "replay": ("pretrain", 1 / 2)},
        options="reca",
        cached=("main", "understand"),
    ),
}
# RecA and its control differ in the first loss alone
STAGES["reca"] = replace(STAGES["sft"], name="reca", losses={"recon": 1.0, **LANGUAGE})


def resolve(stage: Stage, cfg) -> Stage:
    """A row of the table for this run: weights as numbers, without parts that it does not have."""
    trains = stage.trains
    losses = {t: getattr(cfg, w) if isinstance(w, str) else w for t, w in stage.losses.items()}
    if not PARADIGMS[cfg.paradigm].uses_tokenizer:
        losses.pop("tokenizer", None)
    if "encoder" in trains and cfg.encoder != "scratch":
        # an encoder with public weights stays as it is, and so does a random one
        trains = ("tokenizer", "transformer")
        losses = {term: losses[term] for term in losses if term in ("t2t", "tokenizer")}
    names = {"options": stage.options or stage.name, "file": stage.file or stage.name}
    return replace(stage, trains=trains, losses={t: w for t, w in losses.items() if w > 0}, **names)


def freeze_except(parts: nn.ModuleDict, stage: Stage) -> None:
    """Freezes what a stage does not train. The transformer is all that is in no other part."""
    for name, p in parts.named_parameters():
        part = name.removeprefix("model.").split(".")[0]
        if part not in ("encoder", "text_decoder", "connector", "tokenizer"):
            part = "transformer"
        p.requires_grad_(part in stage.trains)


def choose_stages(cfg, stages: dict[str, Stage]) -> list[Stage]:
    """The stages that --stage asks for; ends with a sentence where they cannot be trained."""
    chosen = [resolve(stage, cfg) for stage in stages.values() if cfg.stage in ("all", stage.name)]
    needs = chosen[0].starts_from
    if needs == "encoder" and not PARADIGMS[cfg.paradigm].uses_tokenizer:
        needs = ""  # pretrain then reads nothing that the encoder stage trains
    if needs and not (cfg.init_from or cfg.resume):
        text = f"give --init_from, a checkpoint of stage {needs}"
        exit_with_error(f"--stage {cfg.stage} starts from an earlier stage: {text}")
    for share in {share for stage in chosen for _, share in stage.batches.values()}:
        if share * cfg.batch_size % (WORLD_SIZE * cfg.grad_accum_steps):
            parts = f"{WORLD_SIZE} processes x --grad_accum_steps {cfg.grad_accum_steps}"
            text = f"{share:g} of it is a batch, and must be a multiple of {parts}"
            exit_with_error(f"--batch_size is {cfg.batch_size}: {text}")
    return chosen


# ---------------------------------------------------------------- the loop
class LossModule(nn.Module):
    """From a batch to its loss and {term: value}: what torch.compile and DDP wrap."""

    def __init__(self, parts: nn.ModuleDict, stage: Stage):
        super().__init__()
        self.parts = parts
        self.stage = stage

    def forward(self, batch: dict):
        model, encoder = self.parts["model"], self.parts["encoder"]
        return total_loss(model, encoder, batch, self.stage.losses, self.parts["text_decoder"])


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, constant, linear decay over the last DECAY_FRACTION of the steps."""
    up = (step + 1) / max(warmup, 1)
    down = (steps - step) / max(DECAY_FRACTION * steps, 1)
    return peak * min(up, 1.0, down)


def make_loader(state: TrainState, stage: Stage, seed: int, start: int) -> Iterator[dict]:
    """The batches of a stage from step `start` on: {role: {key: tensor (B, ...)}}."""
    cfg = state.cfg
    streams = {}
    workers = engine.count_workers(cfg, len(stage.batches))
    for i, (role, (split, share)) in enumerate(stage.batches.items()):
        dataset = state.dataset(split, cached=cfg.cache_features and role in stage.cached)
        options = (start, workers, str(state.out / "bad_images.txt"), RANK, WORLD_SIZE)
        options = (*options, stage.max_images if role == "main" else 0)
        streams[role] = batches(dataset, int(share * cfg.batch_size), seed + i, *options)
    while True:
        batch = {role: next(stream) for role, stream in streams.items()}
        yield tree_map(state.device_config.move, batch)


def train_stage(state, stage: Stage, loss_class, interrupt, saved=None, loader=None) -> None:
    """Trains a stage and saves its checkpoint. `saved`: a state of this stage to go on from."""
    cfg, device_config = state.cfg, state.device_config
    steps, n = getattr(cfg, f"{stage.options}_steps"), cfg.grad_accum_steps
    peak_lr = getattr(cfg, f"{stage.options}_lr")
    start = saved["step"] if saved else 0
    # the control has RecA's seed: the same images, the same noise
    seed = 1000 * cfg.seed + 10 * config.STAGE_NAMES.index(stage.options)

    # what is trained, and on which batches
    freeze_except(state.parts, stage)
    state.parts.train()
    loss_module = loss_class(state.parts, stage)
    loader = loader or make_loader(state, stage, seed, start)
    first = next(loader)
    flops, tokens = engine.count_flops(loss_module, first, device_config)
    loader = chain([first], loader)
    loss_module = engine.wrap_model(loss_module, cfg, device_config)

    # optimizers, and averages of the trained parameters
    optimizers = engine.make_optimizers(state.parts.named_parameters())
    averaged = {k: p for k, p in state.model.named_parameters() if p.requires_grad and cfg.ema}
    state.average = {name: p.detach().clone() for name, p in averaged.items()}
    scaler = device_config.scaler()

    # the same weights in all processes, but each draws its own noise
    torch.manual_seed(seed + RANK)
    history = state.restore(saved, optimizers, scaler) if saved else []
    # after `restore`, which makes new groups
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    logged_step, logged_time = start, time.time()
    began = logged_time - state.seconds.get(stage.name, 0)

    interrupt.training = True
    bar = {"desc": stage.name, "initial": start, "total": steps, "disable": RANK > 0 or None}
    for step in tqdm(range(start, steps), leave=False, **bar):
        # set the learning rate
        lr = learning_rate(step, steps, peak_lr, cfg.warmup)
        for group in groups:
            group["lr"] = lr

        # get a batch: {"main": {"image": (B, 3, H, W), "caption": (B, T), ...}, ...}
        batch = next(loader)

        # forward under autocast, then backward; the gradients of micro-batches add up
        values = 0
        for i in range(n):
            # DDP averages over the processes after the last one
            loss_module.require_backward_grad_sync = i == n - 1
            with device_config.autocast():
                loss, terms = loss_module(engine.micro_batch(batch, i, n))
            scaler.scale(loss / n).backward()
            values = values + torch.stack([term.detach().float() for term in terms.values()]) / n

        # clip the gradient
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)

        # take the step; one that overflows in float16 is skipped, by all optimizers
        is_finite = not scaler.is_enabled() or grad_norm.isfinite()
        for optimizer in optimizers:
            if is_finite:
                scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()

        # average the weights (EMA), over the last few steps at first
        decay = min(cfg.ema, (1 + step) / (10 + step))
        for name, p in averaged.items():
            state.average[name].lerp_(p.detach(), 1 - decay)

        # log; a non-finite loss ends the run before it is saved
        done = step + 1
        history.append(torch.cat([values, grad_norm[None]]))
        stop = interrupt.agreed(done)
        is_log_step = done % cfg.log_every == 0 or done == steps
        is_save_step = done % cfg.save_every == 0 or done == steps or stop
        if is_log_step or is_save_step:  # the only places that wait for the GPU
            names = [*terms, "grad_norm"]
            history = state.reduce_history(stage.name, done, names, history)
        if is_log_step:
            means = dict(zip(names, torch.stack(history).mean(0).tolist(), strict=True))
            rate = (done - logged_step) / (time.time() - logged_time)
            state.log(stage.name, done, steps, means, lr, rate, flops, tokens)
            history, logged_step, logged_time = [], done, time.time()

        # save a state to resume from
        if is_save_step:
            state.seconds[stage.name] = time.time() - began
            state.save_state(stage.name, done, optimizers, scaler, history)
        if stop:
            command = f"--resume --out_dir {state.out}"
            print0(f"stopped in {stage.name} after step {done}; go on with: {command}")
            raise SystemExit(128 + stop)
    interrupt.training = False

    state.parts.eval()
    state.save(state.checkpoint(stage.name, steps), f"{stage.file}.pt")
    # the next stage starts from the averaged weights, which also sample
    for name, p in averaged.items():
        p.data.copy_(state.average[name])
    state.average = {}


def bench(cfg, model_class, loss_class, stages: dict[str, Stage]) -> None:
    """Speed of RecA's loss, in each precision, eager and compiled, without data: OUT/bench.json."""
    known = {}
    if cfg.dataset != "shapes":  # needs no files: CLIP-B/16's sizes without its weights, any words
        words = SPECIALS + [str(i) for i in range(2000)]
        known = {"encoder": ViT(ViTConfig()), "vocabulary": Vocabulary(words)}
    stage = replace(resolve(stages["reca"], cfg), losses={"recon": 1.0})
    images = torch.rand(cfg.batch_size, 3, cfg.image_size, cfg.image_size)
    out = Path(cfg.out_dir, "bench")
    out.mkdir(exist_ok=True)
    endless = {"reca_steps": 10**9, "save_every": 10**9, "log_every": BENCH_STEPS}
    rows = []
    for dtype, compile in product(["float32", "bfloat16"], ["off", "on"]):
        way = {"dtype": dtype, "compile": compile}
        device_config = DeviceConfig(replace(cfg, **way))
        if compile == "on" and (cfg.compile == "off" or not device_config.compile):
            continue
        way_cfg = replace(cfg, out_dir=str(out), **way, **endless)
        state = TrainState(way_cfg, device_config, model_class, **known)
        # half of the steps warm up; the loop ends with its batches, and nothing is saved
        loader = repeat({"main": {"image": device_config.move(images)}}, 2 * BENCH_STEPS)
        with suppress(StopIteration):
            train_stage(state, stage, loss_class, engine.Interrupt(), loader=loader)
        rate = state.log_entry["images_per_second"] / cfg.batch_size
        row = {"dtype": dtype, "compiled": compile == "on", "steps_per_second": rate}
        rows.append(row | state.log_entry)
    result = {"device": device_config.device_name, "torch": torch.__version__, "rows": rows}
    result |= {"parameters": sum(p.numel() for p in state.model.parameters())}
    if RANK == 0:
        evaluate.write_json(Path(cfg.out_dir, "bench.json"), result | {"settings": asdict(cfg)})


# ---------------------------------------------------------------- the command line
def report(state: TrainState, names: list[str], model_class) -> None:
    """Scores checkpoints on the same prompts, images and noise: a table, results.json, pictures."""
    cfg, out, device_config = state.cfg, state.out, state.device_config
    checkpoints, results = [], {}
    with device_config.autocast():
        for name in names:
            # images and encoder may have moved since it was saved
            encoder = cfg.encoder if state.is_public else ""
            loaded = Checkpoint(out / f"{name}.pt", device_config.device, model_class, encoder)
            loaded.config |= {"data_dir": cfg.data_dir, "cache_dir": cfg.cache_dir}
            checkpoints.append(loaded)
            results[name] = evaluate.evaluate(loaded, cfg.eval_n, cfg.seed)
            results[name] |= {"steps": loaded.step, "seconds": state.seconds, "seed": cfg.seed}
            results[name] |= {"device": device_config.device_name, "settings": asdict(cfg)}
        evaluate.compare(checkpoints, names, out / "compare.png", cfg.seed)
    evaluate.write_json(out / "results.json", results)
    print(evaluate.table(results))
    figures.curves(read_curves(out, cfg.log_every), out / "curves.svg", "Losses", "step", "loss")
    print(f"results.json, compare.png, curves.svg and log.jsonl are in {out}")
    print(f"training took {sum(state.seconds.values()) / 60:.1f} minutes")


def read_curves(out: Path, log_every: int) -> dict[str, list[tuple[int, float]]]:
    """The log as {loss term: [(step, value), ...]}, steps counted over all stages."""
    series = {term: [] for term in CURVES}
    for i, line in enumerate((out / "log.jsonl").read_text().splitlines(), 1):
        entry = json.loads(line)
        for term in series.keys() & entry.keys():
            series[term].append((i * log_every, entry[term]))
    return {term: points for term, points in series.items() if points}


def train(cfg, given: dict, model_class, loss_class, stages: dict[str, Stage]) -> None:
    """Trains the stages that cfg asks for, with --resume from the newest state, and reports."""
    interrupt = engine.Interrupt()
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    out, saved = Path(cfg.out_dir), None
    if cfg.resume and not (out / "run.json").exists():
        exit_with_error(f"--resume: there is no run in {out}; leave --resume out to start one")
    run_file, before = engine.lock_run_dir(out)
    if cfg.resume:
        saved = engine.read_state(out)
        cfg = config.resume_config(cfg, given, saved or before)
        config.validate(cfg)
    chosen = choose_stages(cfg, stages)
    scored = dict.fromkeys(stage.file for stage in chosen if stage.name != "encoder")
    states = engine.find_states(out)
    if states and not cfg.resume and not before.get("finished"):
        text = f"go on with it (--resume --out_dir {out}), or give another --out_dir"
        exit_with_error(f"{out} holds a run that has not ended ({states[0].name}): {text}")
    if not before:  # at once: --resume finds it, however soon this process is killed
        engine.write_run_json(run_file, cfg, finished=False)

    device_config = DeviceConfig(cfg)
    state = TrainState(cfg, device_config, model_class)
    if saved:
        if saved["encoder"]["hash"] != state.encoder_hash:
            text = f"it was trained with {saved['encoder']['name']}, whose weights are others"
            exit_with_error(f"--encoder {cfg.encoder}: {text}")
        state.parts.load_state_dict(state.parts.state_dict() | saved["parts"])
        state.seconds = saved["seconds"]
        while chosen[0].name != saved["stage"]:
            over = chosen.pop(0)
            if f"{over.options}_steps" in given:
                print0(f"--{over.options}_steps has no effect on stage {over.name}: it is over")
        option = f"{chosen[0].options}_steps"
        if getattr(cfg, option) < saved["step"]:
            text = f"stage {saved['stage']} has done {saved['step']} steps already"
            exit_with_error(f"--{option} {getattr(cfg, option)}: {text}")
    elif cfg.init_from:
        state.load_checkpoint(cfg.init_from, chosen[0].starts_from)
    if before.get("finished") and not cfg.resume:
        print0(f"{out} holds a finished run: this one takes its place")
    if RANK == 0:
        engine.clean_run_dir(out, [stage.name for stage in chosen], saved)
    engine.write_run_json(run_file, cfg, finished=False)
    size = sum(p.numel() for p in state.model.parameters()) / 1e6
    where = f"{WORLD_SIZE} x {device_config.device_name} in {device_config.dtype}"
    print0(f"{cfg.dataset}, {cfg.paradigm}: {size:.2f} M parameters, {cfg.encoder}, on {where}")

    if cfg.dataset != "shapes":
        print0("\n  ".join(summarize_splits(state.splits)))

    for stage in chosen:
        # sft and reca both start from the aligned base
        if stage.starts_from == "align" and cfg.stage == "all" and not saved:
            state.load_checkpoint(out / "pretrain.pt", "align")
        train_stage(state, stage, loss_class, interrupt, saved)
        saved = None  # it was of the first stage
    if RANK == 0 and scored:
        report(state, list(scored), model_class)
    engine.write_run_json(run_file, cfg, finished=True)
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()


def main(argv=None, model_class=UnifiedModel, loss_class=LossModule, stages=STAGES) -> None:
    """The command line. experiments.py gives other classes, or another table of stages."""
    cfg, given = config.parse_config(argv, __doc__)
    try:
        if not cfg.resume:
            config.validate(cfg)
        if cfg.bench:
            bench(cfg, model_class, loss_class, stages)
        else:
            train(cfg, given, model_class, loss_class, stages)
    except ValueError as error:
        exit_with_error(str(error))
    except OSError as error:
        exit_with_error(f"{error}; what was saved before is whole: go on with --resume")
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = f"out of memory ({engine.first_line(error)}): go on with --resume"
        options = f"--grad_accum_steps {2 * cfg.grad_accum_steps}"
        exit_with_error(f"{text} {options}, or with --checkpoint_activations")


if __name__ == "__main__":
    main()
