"""What only a GPU can show: `python -m pytest tests/cuda`, about ten minutes.

The speed of three presets goes to bench.json, beside train.py.
"""

import json
import subprocess
import sys

import pytest
import torch

from engine import find_states
from train_helpers import (
    ROOT,
    assert_same,
    hooked,
    interrupted,
    log_lines,
    run,
    torchrun,
    weights,
)

DEVICE = "cuda"
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
PRETRAIN = ["--stage", "pretrain", "--device", DEVICE]
EAGER = [*PRETRAIN, "--compile", "off"]


@pytest.fixture
def deterministic(monkeypatch):
    """Sums in the same order each time, also in the backward pass of attention."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def train(out, *options):
    """The command line, in a process of its own."""
    command = [sys.executable, ROOT / "train.py", "--device", DEVICE, "--out_dir", out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_smoke_run_ends_with_its_report(tmp_path):
    train(tmp_path, "--smoke")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"pretrain", "sft", "reca"}
    assert (tmp_path / "compare.png").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_are_close_to_float32(dtype, tmp_path):
    run(tmp_path / "a", *EAGER, "--dtype", "float32")
    run(tmp_path / "b", *EAGER, "--dtype", dtype)
    for a, b in zip(log_lines(tmp_path / "a"), log_lines(tmp_path / "b"), strict=True):
        assert abs(a["t2i"] - b["t2i"]) < 0.02
        assert abs(a["t2t"] - b["t2t"]) < 0.02
    assert all(value.isfinite().all() for value in weights(tmp_path / "b/pretrain.pt").values())


def test_the_compiled_step_computes_what_the_eager_one_does(tmp_path):
    """The first step: a compiled one draws other noise. The text loss has none."""
    options = [*PRETRAIN, "--pretrain_steps", 3, "--log_every", 1, "--dtype", "float32"]
    for compile in ("off", "on"):
        run(tmp_path / compile, *options, "--compile", compile)
    eager, compiled = log_lines(tmp_path / "off"), log_lines(tmp_path / "on")
    assert abs(eager[0]["t2t"] - compiled[0]["t2t"]) < 1e-3
    assert abs(eager[-1]["t2t"] - compiled[-1]["t2t"]) < 0.02


def test_a_stopped_run_resumes_bit_exactly(deterministic, tmp_path):
    run(tmp_path / "whole", *EAGER)
    interrupted(tmp_path / "cut", 8, *EAGER)
    assert DEVICE in torch.load(find_states(tmp_path / "cut")[0], weights_only=True)["rng"]
    run(tmp_path / "cut", "--resume")
    assert log_lines(tmp_path / "whole") == log_lines(tmp_path / "cut")
    assert_same(weights(tmp_path / "whole/pretrain.pt"), weights(tmp_path / "cut/pretrain.pt"))


@pytest.mark.parametrize("paradigm", ["flow", "ar", "mask", "mar"])
def test_no_step_waits_for_the_gpu(paradigm, tmp_path):
    """In each stage, from its third step to its last but one: there it logs and saves."""

    def watch(module, step):
        torch.cuda.set_sync_debug_mode("error" if 3 <= step < 10 else "default")

    options = ["--device", DEVICE, "--compile", "off", "--dtype", "bfloat16", "--ema", 0.9]
    options += ["--paradigm", paradigm, "--log_every", 100, "--save_every", 100]
    options += [f"--{stage}_steps=10" for stage in ("encoder", "pretrain", "align", "reca")]
    try:
        run(tmp_path, *options, loss_class=hooked(watch))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(GPUS < 2, reason="there are no two GPUs")
def test_all_gpus_end_with_the_same_weights(tmp_path):
    options = [*PRETRAIN, "--batch_size", 8 * GPUS, "--grad_accum_steps", 2]
    torchrun(tmp_path, *options, processes=GPUS)
    first = torch.load(tmp_path / "rank0.pt", map_location="cpu")
    for rank in range(1, GPUS):
        assert_same(first, torch.load(tmp_path / f"rank{rank}.pt", map_location="cpu"))


PRESETS = {
    "shapes": [],
    "64 px": ["--dataset", "imagenet"],
    "256 px": ["--dataset", "imagenet", "--image_size", 256],
}


@pytest.mark.parametrize("name", PRESETS)
def test_bench(name, tmp_path):
    train(tmp_path, "--bench", *PRESETS[name])
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [row["dtype"] for row in result["rows"]] == 2 * ["float32"] + 2 * ["bfloat16"]
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    path = ROOT / "bench.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: result}, indent=1))
