"""What the tests of the engine share: small runs of train.py, in this process or by torchrun.

`torchrun train_helpers.py OPTIONS` is train.py without its report; each process then writes its
weights to OUT/rankN.pt. With QUIET in the environment it trains the stage QUIET.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import train
from cli import RANK
from config import parse_config
from engine import DeviceConfig, TrainState

ROOT = Path(train.__file__).parent
ENCODERS = ROOT / "tests/fixtures/encoder"
SIZES = dict(width=16, depth=1, heads=2, image_size=24, patch_size=8, batch_size=8, warmup=2)
STEPS = dict(encoder_steps=6, pretrain_steps=14, align_steps=6, reca_steps=8)
OFTEN = dict(log_every=4, save_every=3, eval_n=2, device="cpu")
TINY = [f"--{name}={value}" for name, value in (SIZES | STEPS | OFTEN).items()]
ONE_STEP = [f"--{name}=1" for name in STEPS]


def run(out, *options, **hooks):
    """train.py in this process, without the scores at its end. hooks: as train.main has them."""
    try:
        with patch.object(train, "report"):
            train.main([*TINY, "--out_dir", str(out), *map(str, options)], **hooks)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def hooked(hook):
    """A LossModule that calls hook(module, step) before each forward pass; step 0 counts FLOPs."""
    calls = Counter()

    class Hooked(train.LossModule):
        def forward(self, batch):
            step = calls[self.stage.name]
            calls[self.stage.name] += 1
            hook(self, step)
            return super().forward(batch)

    return Hooked


def at_pretrain_step(step: int, action):
    """A LossModule that does something in one step of pretrain: action(module)."""

    def hook(module, now):
        if module.stage.name == "pretrain" and now == step:
            action(module)

    return hooked(hook)


def interrupted(out, step: int, *options):
    """A run that gets SIGTERM in a step of pretrain, and ends after it."""
    stopping = at_pretrain_step(step, lambda module: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run(out, "--encoder_steps", 0, *options, loss_class=stopping)
    except SystemExit as end:
        assert end.code == 128 + signal.SIGTERM
    else:
        raise AssertionError("the run was not stopped")
    return out


def make_state(out, *options) -> TrainState:
    cfg, _ = parse_config([*TINY, "--out_dir", str(out), *map(str, options)])
    return TrainState(cfg, DeviceConfig(cfg))


def weights(path) -> dict:
    """The weights of a checkpoint, and their averages as ema.NAME."""
    saved = torch.load(path, weights_only=True)
    averages = {f"ema.{name}": value for name, value in (saved["ema"] or {}).items()}
    return saved["model"] | averages


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def log_lines(out) -> list[dict]:
    """log.jsonl without what depends on the clock."""
    entries = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        for name in ("images_per_second", "tokens_per_second", "teraflops_per_second", "gigabytes"):
            del entry[name]
    return entries


# ---------------------------------------------------------------- several processes


class ExactProducts(train.LossModule):
    """Products of float32 factors: oneDNN chooses by the size of a batch what it rounds (AMX)."""

    def __init__(self, parts, stage):
        super().__init__(parts, stage)
        torch.set_float32_matmul_precision("highest")


# a stage of the losses without noise, on captions of unequal lengths
QUIET = replace(
    train.STAGES["encoder"],
    losses={"t2t": 1.0, "caption": 1.0, "words": 1.0, "tokenizer": 1.0},
)
QUIET_HOOKS = {"loss_class": ExactProducts, "stages": {"encoder": QUIET}}


def torchrun(out, *options, processes=2, quiet=False):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", __file__, "--out_dir", out, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if quiet:
        environment["QUIET"] = "1"
    done = subprocess.run(map(str, command), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def kept_states(states: list):
    """Keeps the TrainStates that are made."""
    real = TrainState.__init__

    def init(self, *args, **options):
        real(self, *args, **options)
        states.append(self)

    with patch.object(TrainState, "__init__", init):
        yield


if __name__ == "__main__":
    states = []
    with kept_states(states):
        options = sys.argv[1:]
        out = Path(options[options.index("--out_dir") + 1])
        run(out, *options, **(QUIET_HOOKS if "QUIET" in os.environ else {}))
    torch.save(states[0].parts.state_dict(), out / f"rank{RANK}.pt")
