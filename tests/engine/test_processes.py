"""Several processes (torchrun): what they share, and what each draws by itself."""

import shutil
from unittest.mock import patch

import pytest
import torch
from torch.distributed import HashStore

import engine
from engine import find_states
from train_helpers import assert_same, log_lines, run, torchrun, weights

PRETRAIN = ["--stage", "pretrain", "--log_every", 1, "--warmup", 100, "--save_every", 4]
TEN = [*PRETRAIN, "--pretrain_steps", 10, "--ema", 0.9]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Ten steps of pretrain in two processes."""
    out = tmp_path_factory.mktemp("processes") / "two"
    torchrun(out, *TEN)
    return out


def test_all_processes_end_with_the_same_weights(two):
    first, second = (torch.load(two / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(first, second)


def test_each_process_draws_its_own_noise(two):
    first, second = torch.load(find_states(two)[0], weights_only=True)["rng"]["cpu"]
    assert not torch.equal(first, second)


QUIET = ["--stage", "encoder", "--log_every", 1, "--warmup", 100, "--encoder_steps", 20]
QUIET += ["--paradigm", "ar", "--batch_size", 16]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Twenty steps without noise in one process."""
    out = tmp_path_factory.mktemp("processes") / "one"
    torchrun(out, *QUIET, processes=1, quiet=True)
    return out


@pytest.mark.parametrize("parts", [1, 2])
def test_losses_without_noise_are_those_of_one_process(parts, one, tmp_path):
    """Captions have unequal lengths, and each counts alike.

    One thread on both sides, and no products in bfloat16: sums in another order round otherwise.
    """
    torchrun(tmp_path / "two", *QUIET, "--grad_accum_steps", parts, quiet=True)
    for a, b in zip(log_lines(one), log_lines(tmp_path / "two"), strict=True):
        for name in ("t2t", "caption", "words", "tokenizer", "grad_norm"):
            # later, a rounding may turn a code of the tokenizer into the next one
            limit = 1e-5 if a["step"] <= 5 else 1e-3
            assert a[name] == pytest.approx(b[name], rel=limit), (name, a, b)
    assert a["step"] == 20


def test_two_processes_resume_bit_exactly(two, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(two, out)
    find_states(out)[0].unlink()  # of step 10: on from step 8
    (out / "pretrain.pt").unlink()
    torchrun(out, *TEN, "--resume")
    assert log_lines(out) == log_lines(two)
    assert_same(weights(out / "pretrain.pt"), weights(two / "pretrain.pt"))


def test_one_process_goes_on_with_a_state_of_two(two, tmp_path):
    """With other noise from there on."""
    shutil.copytree(two, tmp_path / "out")
    find_states(tmp_path / "out")[0].unlink()
    run(tmp_path / "out", *TEN, "--resume")
    lines = log_lines(tmp_path / "out")
    assert lines[:8] == log_lines(two)[:8]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[8:] != log_lines(two)[8:]


# ---------------------------------------------------------------- what is sent


@pytest.fixture
def alone_in_a_group(monkeypatch):
    """A process group of one process that takes itself for one of two."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(engine, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda tensors, x: None)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parts", [1, 4])
def test_gradients_are_reduced_once_a_step(parts, alone_in_a_group, tmp_path, monkeypatch):
    real = engine.wrap_model
    reduced = []

    def wrap_and_count(*args):
        module = real(*args)
        module.register_comm_hook(None, count)
        return module

    def count(_, bucket):
        reduced.append(bucket.is_last())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    monkeypatch.setattr(engine, "wrap_model", wrap_and_count)
    steps = ["--pretrain_steps", 3, "--grad_accum_steps", parts, "--batch_size", 16]
    with patch.object(engine.TrainState, "save"):
        run(tmp_path, *PRETRAIN, *steps)
    assert sum(reduced) == 3


def test_processes_ask_for_a_signal_every_few_steps(monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "WORLD_SIZE", 2)
    monkeypatch.setattr(engine, "all_reduce", lambda x, op: asked.append(op) or x)
    interrupt = engine.Interrupt()
    interrupt.asked = 15
    stops = [step for step in range(1, 41) if interrupt.agreed(step)]
    assert stops == [10, 20, 30, 40]
    assert len(asked) == 4
